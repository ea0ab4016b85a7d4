"""recipes/echo-7b with its defaults, killed in each stage and given the same command again.

The frameworks are played: what would train for hours on eight GPUs writes the checkpoints that it would leave, and
kills the run half-way. Everything of ours is real: the recipe, the manifests, the converters, the stages' scripts.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "sft", "rl", "merge", "infer")

# Stands where Python and `swift` are. KILL names the stage in which the whole run is killed, as by the machine.
PLAYED = r"""
import json, os, pathlib, signal, sys, time

words = sys.argv[1:]

def kill_the_run(stage):
    if os.environ.get("KILL") == stage:
        os.killpg(0, signal.SIGKILL)

def note(text):
    with open(os.environ["PLAYED_LOG"], "a") as log:
        log.write(text + "\n")

def option(name):
    return words[words.index(name) + 1] if name in words else None

def override(name):
    (value,) = [word.partition("=")[2].strip("'") for word in words if word.startswith(name + "=")]
    return value

if words[0] == "sft":
    output = pathlib.Path(option("--output_dir"))
    resumed = option("--resume_from_checkpoint")
    first = int(resumed.rpartition("-")[2]) if resumed else 0
    assert not resumed or pathlib.Path(resumed, "optimizer.pt").exists()
    note(f"sft from {first}")
    for step in (2, 4):
        if step <= first:
            continue
        folder = output / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(pathlib.Path(option("--model"), "config.json").read_text())
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "optimizer.pt").write_bytes(b"moments")
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "max_steps": 4}))
        if step == 2:
            kill_the_run("sft")
elif "verl.trainer.main_ppo" in words:
    output = pathlib.Path(override("trainer.default_local_dir"))
    tracker = output / "latest_checkpointed_iteration.txt"
    first = int(tracker.read_text()) if tracker.exists() else 0
    assert pathlib.Path(override("actor_rollout_ref.model.path"), "config.json").exists()
    start = pathlib.Path(override("actor_rollout_ref.model.path")).name
    note(f"rl from {first}" + ("" if start == "last" else " of the base model"))
    for step in (1, 2):
        if step <= first:
            continue
        (output / f"global_step_{step}").mkdir(parents=True)
        tracker.write_text(str(step))
        if step == 1:
            kill_the_run("rl")
elif "echo_plugins.for_verl.merge" in words:
    note("merge")
    kill_the_run("merge")
    output = pathlib.Path(option("--output"))
    output.mkdir()
    (output / "config.json").write_text("{}")
elif "eval.infer" in words:
    file = pathlib.Path(option("--output"))
    file.parent.mkdir(parents=True, exist_ok=True)
    there = file.read_text().count("\n") if file.exists() else 0
    note(f"infer {file.parent.name}/{file.stem} from {there}")
    for row in range(there, 4):
        with file.open("a") as rows:
            rows.write(json.dumps({"id": row}) + "\n")
        if file.stem == "grounded" and row == 1:
            kill_the_run("infer")
elif "eval.score" not in words:
    if "converters.rl_parquet" in words and any(word.endswith("val.parquet") for word in words):
        kill_the_run("data")
    os.execv(sys.executable, [sys.executable, *words])
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, dict[str, str]]:
    """What a user of the recipe has (a model, EAQA's two manifests and their audio), and the environment."""
    folder = tmp_path_factory.mktemp("echo-7b")
    data = folder / "data"
    (data / "audio").mkdir(parents=True)
    for index in range(400):
        soundfile.write(data / "audio" / f"{index}.flac", 0.1 * np.sin(np.arange(16_000) * (index + 1)), 8_000)
    row = {"question": "What is heard?", "choices": ["a bell", "a dog"], "answer": "a bell"}
    think = {"think": "In <seg>0.50, 1.50</seg> something rings."}
    for name, extra, number in (("sft", think, 64), ("rl", {}, 400)):
        rows = [{"id": f"{name}-{index}", "audio": f"audio/{index}.flac", **row, **extra} for index in range(number)]
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("mmar", "mmau-mini"):
        (folder / "benchmarks" / name).mkdir(parents=True)
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "played.py").write_text(PLAYED)
    for name in ("python", "swift"):
        (binaries / name).write_text(f'#!/bin/sh\nexec {sys.executable} {binaries}/played.py "$@"\n')
        (binaries / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SFT_", "RL_", "EVAL_"))}
    return folder, {
        **clean,
        "PYTHON": str(binaries / "python"),
        "PLAYED_LOG": str(folder / "log"),
        "BASE_MODEL": str(tiny_model),
        "AUDIO_ROOT": str(data),
        "SFT_AUDIO_QA": str(data / "sft.jsonl"),
        "RL_AUDIO_QA": str(data / "rl.jsonl"),
        "BENCHMARK_ROOT": str(folder / "benchmarks"),
        "PREFLIGHT": "warn",  # this machine has no eight GPUs
        "RUN_DIR": str(folder / "run"),
    }


def run(environment: dict[str, str], *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "recipes" / "echo-7b" / "run.sh"), *words],
        capture_output=True,
        text=True,
        env={**environment, **settings},
        check=False,
        start_new_session=True,
        timeout=300,
    )


def played(folder: Path) -> list[str]:
    return (folder / "log").read_text().split("\n")[:-1]


def test_the_same_command_goes_on_whichever_stage_was_killed(given: tuple[Path, dict[str, str]]) -> None:
    folder, environment = given
    for stage in STAGES:
        killed = run(environment, *STAGES, KILL=stage)
        assert killed.returncode == -9, killed.stderr[-3000:]
    finished = run(environment, *STAGES)
    assert finished.returncode == 0, finished.stderr[-3000:]
    modes = ("interleaved", "grounded", "plain")
    assert played(folder) == [
        *("sft from 0", "sft from 2", "rl from 0", "rl from 1", "merge", "merge"),
        *("infer mmar/interleaved from 0", "infer mmar/grounded from 0"),
        *(f"infer mmar/{mode} from {rows}" for mode, rows in zip(modes, (4, 2, 0), strict=True)),
        *(f"infer mmau-mini/{mode} from 0" for mode in modes),
    ]
    manifests = {name: json.loads((folder / "run" / "manifests" / f"{name}.json").read_text()) for name in STAGES}
    assert {name: manifest["starts"] for name, manifest in manifests.items()} == dict.fromkeys(STAGES, 2)
    assert all(manifest["finished"] for manifest in manifests.values())
    assert not list((folder / "run").glob("*.old-*"))
    assert not (folder / "run" / "sft" / "last" / "optimizer.pt").exists(), "112 GB that no later stage needs"


def test_a_finished_run_is_finished_however_it_is_asked_to_run(given: tuple[Path, dict[str, str]]) -> None:
    folder, environment = given
    before = played(folder)
    other = {"RL_GPU_MEMORY": "0.5", "RL_OFFLOAD": "True", "RL_TOKENS_PER_GPU": "4096", "RL_TP": "2", "NUM_GPUS": "4"}
    other |= {"RL_SAVE_FREQ": "10", "RL_TIMEOUT": "60", "SFT_DEEPSPEED": "", "SFT_SAVE_STEPS": "9", "TRACKERS": ""}
    again = run(environment, *STAGES, **other)
    assert again.returncode == 0 and again.stderr.count("skipped") == len(STAGES)
    (folder / "run").rename(folder / "remounted")
    again = run(environment, *STAGES, RUN_DIR=str(folder / "remounted"))
    assert again.returncode == 0 and again.stderr.count("skipped") == len(STAGES), again.stderr
    (folder / "remounted").rename(folder / "run")
    assert played(folder) == before


def test_another_learning_rate_asks_first(given: tuple[Path, dict[str, str]]) -> None:
    folder, environment = given
    before = played(folder)
    asked = run(environment, "rl", RL_LR="2e-6")
    assert asked.returncode == 2 and "RL_LR was 1e-6, is 2e-6" in asked.stderr
    assert "CONTINUE=1" in asked.stderr and "FORCE=1" in asked.stderr
    assert played(folder) == before and not list((folder / "run").glob("*.old-*"))


@pytest.mark.parametrize(
    ("stage", "setting", "cure"),
    [("sft", "SFT_LR", "SFT_EPOCHS, SFT_MAX_STEPS"), ("rl", "RL_LR", "RL_STEPS, RL_EPOCHS")],
)
def test_continue_with_no_step_left_says_so_and_changes_nothing(
    given: tuple[Path, dict[str, str]], stage: str, setting: str, cure: str
) -> None:
    folder, environment = given
    manifest = folder / "run" / "manifests" / f"{stage}.json"
    before = manifest.read_text()
    refused = run(environment, stage, **{setting: "2e-6"}, CONTINUE="1")
    assert refused.returncode == 2
    assert "no step is left" in refused.stderr and cure in refused.stderr
    assert manifest.read_text() == before
    assert run(environment, *STAGES).stderr.count("skipped") == len(STAGES)


def test_a_stage_begun_anew_keeps_the_earlier_one_and_those_after_it_ask(given: tuple[Path, dict[str, str]]) -> None:
    folder, environment = given
    copy = folder / "copy"
    shutil.copytree(folder / "run", copy, symlinks=True)
    environment = environment | {"RUN_DIR": str(copy), "RL_LR": "2e-6"}
    killed = run(environment, "rl", FORCE="1", KILL="rl")
    assert killed.returncode == -9
    done = run(environment, "rl", FORCE="1")
    assert done.returncode == 0, done.stderr
    assert played(folder)[-2:] == ["rl from 0", "rl from 1"]
    assert sorted(path.name for path in copy.glob("*.old-*")) == ["rl.old-1"]
    asked = run(environment, "merge")
    assert asked.returncode == 2 and "the output of stage rl has changed" in asked.stderr
    assert run(environment, "merge", CONTINUE="1").returncode == 0


@pytest.mark.parametrize(
    ("kind", "extra", "stages"),
    [
        ("no reasoning", {}, ["rl from 0 of the base model"]),
        ("events", {"events": [{"label": "a bell", "start": 0.5, "end": 1.5}]}, ["sft from 0", "rl from 0"]),
        ("reasoning", {"think": "In <seg>0.50, 1.50</seg> something rings."}, ["sft from 0", "rl from 0"]),
    ],
)
def test_ones_own_rows_run_whole(
    given: tuple[Path, dict[str, str]], kind: str, extra: dict[str, object], stages: list[str]
) -> None:
    folder, environment = given
    rows = [json.loads(line) | extra for line in (folder / "data" / "rl.jsonl").open()]
    mine = folder / f"{kind}.jsonl"
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {name: value for name, value in environment.items() if not name.endswith("AUDIO_QA")}
    own |= {"AUDIO_QA": str(mine), "BENCHMARKS": "", "RUN_DIR": str(folder / f"run {kind}")}
    before = len(played(folder))
    done = run(own, *STAGES)
    assert done.returncode == 0, done.stderr[-3000:]
    modes = [f"infer test/{mode} from 0" for mode in ("interleaved", "grounded", "plain")]
    assert played(folder)[before:] == [*stages, "merge", *modes]
    assert ("RL starts from" in done.stderr) == (kind == "no reasoning")
    assert run(own, *STAGES).stderr.count("skipped") == (4 if kind == "no reasoning" else 5)
