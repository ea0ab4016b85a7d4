"""A finished stage is skipped, a stopped one goes on, a changed one asks. Nothing is renamed or begun anew unasked."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Stage = Callable[..., subprocess.CompletedProcess[str]]

# A recipe of two stages. `sft` appends a line to its output and is killed or refuses as it is told.
SCRIPT = """
set -euo pipefail
source script/common.sh
defaults all
train() {
  mkdir -p "$RUN_DIR/sft"
  [[ "${REFUSE:-0}" != 1 ]] || exit 2
  echo "$SFT_LR" >> "$RUN_DIR/sft/log"
  [[ "${KILL:-0}" != 1 ]] || kill -9 $$
}
merge() { mkdir -p "$RUN_DIR/merged"; cp "$RUN_DIR/sft/log" "$RUN_DIR/merged/log"; }
stage sft --output "$RUN_DIR/sft" --input "rows=$ROWS" --model "the base model=$BASE_MODEL" --place AUDIO_ROOT \
  --learned WORDS_TEXT -- train
stage merge --output "$RUN_DIR/merged" --after sft -- merge
"""


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "rows.jsonl").write_text("one")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        places = {
            "RUN_DIR": str(tmp_path / "run"),
            "ROWS": str(tmp_path / "rows.jsonl"),
            "BASE_MODEL": str(base),
            "AUDIO_ROOT": "/audio",
            "WORDS_TEXT": "",
            "SFT_LR": "1e-6",
            "PYTHON": sys.executable,
        }
        return subprocess.run(
            ["bash", "-c", SCRIPT],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **places, **environment},
            check=False,
        )

    return run


def log(tmp_path: Path, folder: str = "sft") -> list[str]:
    return (tmp_path / "run" / folder / "log").read_text().split()


def manifest(tmp_path: Path, name: str = "sft") -> dict:
    return json.loads((tmp_path / "run" / "manifests" / f"{name}.json").read_text())


def test_a_finished_stage_is_skipped(stage: Stage, tmp_path: Path) -> None:
    assert stage().returncode == 0
    again = stage()
    assert again.returncode == 0 and again.stderr.count("skipped") == 2
    assert log(tmp_path) == ["1e-6"]
    assert manifest(tmp_path)["finished"] and manifest(tmp_path)["learned"]["SFT_LR"] == "1e-6"
    assert manifest(tmp_path)["versions"]["python"]


def test_a_killed_stage_goes_on_in_its_output(stage: Stage, tmp_path: Path) -> None:
    assert stage(KILL="1").returncode == -9
    again = stage()
    assert again.returncode == 0 and "sft: was stopped half-way, goes on" in again.stderr
    assert log(tmp_path) == ["1e-6", "1e-6"] and manifest(tmp_path)["starts"] == 2


RUN_SETTINGS = {
    "SFT_DEEPSPEED": "zero3",
    "SFT_MICRO_BATCH": "4",
    "SFT_SAVE_STEPS": "7",
    "SFT_WORKERS": "3",
    "SFT_RECOMPUTE": "false",
    "NUM_GPUS": "2",
    "NUM_NODES": "2",
    "DEVICE": "cpu",
    "TRACKERS": "wandb",
}


@pytest.mark.parametrize("killed", ["0", "1"], ids=["finished", "killed"])
def test_how_a_stage_is_run_never_matters(stage: Stage, tmp_path: Path, killed: str) -> None:
    stage(KILL=killed)
    again = stage(**RUN_SETTINGS)
    assert again.returncode == 0, again.stderr
    assert log(tmp_path) == (["1e-6", "1e-6"] if killed == "1" else ["1e-6"])


@pytest.mark.parametrize("killed", ["0", "1"], ids=["finished", "killed"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"SFT_LR": "2e-6"}, "SFT_LR was 1e-6, is 2e-6"),
        ({"SEED": "7"}, "SEED was 42, is 7"),
        ({"SFT_CLIP": "silent"}, "SFT_CLIP was own, is silent"),
        ({"WORDS_TEXT": "--lr 1"}, "what follows -- was empty, is --lr 1"),
    ],
)
def test_a_change_of_what_is_learned_asks_and_touches_nothing(
    stage: Stage, tmp_path: Path, killed: str, change: dict[str, str], told: str
) -> None:
    stage(KILL=killed)
    before = manifest(tmp_path)
    asked = stage(**change)
    assert asked.returncode == 2
    assert told in asked.stderr and "CONTINUE=1" in asked.stderr and "FORCE=1" in asked.stderr
    assert asked.stderr.count("\n") == 3, "one line a changed setting"
    assert log(tmp_path) == ["1e-6"] and manifest(tmp_path) == before
    assert not (tmp_path / "run" / "sft.old-1").exists()
    assert stage().returncode == 0, "the first command still goes on"


def test_continue_goes_on_with_the_new_setting_and_the_stages_after_it_are_made_again(
    stage: Stage, tmp_path: Path
) -> None:
    stage()
    again = stage(SFT_LR="2e-6", CONTINUE="1")
    assert again.returncode == 0 and "SFT_LR was 1e-6, is 2e-6" in again.stderr
    assert log(tmp_path) == log(tmp_path, "merged") == ["1e-6", "2e-6"]
    assert log(tmp_path, "merged.old-1") == ["1e-6"]
    assert stage(SFT_LR="2e-6").stderr.count("skipped") == 2


def test_a_stage_that_refuses_to_continue_is_as_it_was(stage: Stage, tmp_path: Path) -> None:
    stage()
    before = manifest(tmp_path)
    refused = stage(SFT_LR="2e-6", CONTINUE="1", REFUSE="1")
    assert refused.returncode == 2
    assert manifest(tmp_path) == before
    assert stage().stderr.count("skipped") == 2


def test_force_begins_anew_beside_what_is_there(stage: Stage, tmp_path: Path) -> None:
    stage()
    assert stage(FORCE="1", SFT_LR="2e-6").returncode == 0
    assert log(tmp_path) == ["2e-6"] and log(tmp_path, "sft.old-1") == ["1e-6"]


def test_force_begins_anew_once_however_often_the_run_is_killed(stage: Stage, tmp_path: Path) -> None:
    """recipe.sh writes the list of stages; a stage strikes itself off when it begins anew."""
    stage()
    waiting = tmp_path / "run" / "manifests" / "force"
    waiting.write_text("sft merge\n")
    assert stage(FORCE="1", KILL="1").returncode == -9
    assert waiting.read_text() == "merge"
    assert stage(FORCE="1").returncode == 0
    assert log(tmp_path) == ["1e-6", "1e-6"] and not (tmp_path / "run" / "sft.old-2").exists()
    assert (tmp_path / "run" / "merged.old-1").exists()


def test_other_rows_ask_and_rows_that_moved_do_not(stage: Stage, tmp_path: Path) -> None:
    stage()
    moved = tmp_path / "elsewhere.jsonl"
    (tmp_path / "rows.jsonl").rename(moved)
    assert stage(ROWS=str(moved)).stderr.count("skipped") == 2
    moved.write_text("two")
    assert "rows has changed" in stage(ROWS=str(moved)).stderr


def test_a_run_that_moved_is_the_same_run(stage: Stage, tmp_path: Path) -> None:
    stage(KILL="1")
    (tmp_path / "run").rename(tmp_path / "mounted-elsewhere")
    again = stage(RUN_DIR=str(tmp_path / "mounted-elsewhere"))
    assert again.returncode == 0 and "goes on" in again.stderr
    (tmp_path / "mounted-elsewhere").rename(tmp_path / "run")
    assert stage().stderr.count("skipped") == 2


def test_a_model_is_the_same_after_another_download_and_without_optimizer_state(stage: Stage, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("optimizer.pt", "README.md"):
        (base / name).write_text("x")
    stage()
    (base / "optimizer.pt").unlink()
    shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    (tmp_path / "copy").rename(base)
    (base / ".cache").mkdir()
    (base / ".cache" / "download").write_text("2026")
    (base / "README.md").write_text("y")
    os.utime(base / "model.safetensors", (1, 1))
    assert stage().stderr.count("skipped") == 2
    (base / "config.json").write_text('{"hidden_size": 2}')
    assert "the base model has changed" in stage().stderr
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"other weights")
    assert "the base model has changed" in stage().stderr


def test_audio_that_moved_has_its_rows_written_again_and_changes_no_later_stage(stage: Stage, tmp_path: Path) -> None:
    stage()
    result = manifest(tmp_path)["result"]
    again = stage(AUDIO_ROOT="/other")
    assert "sft: makes what is missing" in again.stderr and "merge: finished before" in again.stderr
    assert log(tmp_path) == ["1e-6", "1e-6"] and manifest(tmp_path)["result"] == result


def test_an_output_that_was_removed_is_made_again(stage: Stage, tmp_path: Path) -> None:
    stage()
    shutil.rmtree(tmp_path / "run" / "sft")
    assert "sft: starts" in stage().stderr
    assert log(tmp_path) == ["1e-6"]


def test_a_missing_input_is_one_clear_line(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").unlink()
    failed = stage()
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "rows.jsonl does not exist" in failed.stderr


def test_a_stage_needs_the_one_before_it(stage: Stage, tmp_path: Path) -> None:
    stage()
    (tmp_path / "run" / "manifests" / "sft.json").unlink()
    (tmp_path / "rows.jsonl").unlink()
    script = SCRIPT.replace('stage sft --output "$RUN_DIR/sft" --input "rows=$ROWS"', ': "$RUN_DIR/sft" "rows=$ROWS"')
    places = {"RUN_DIR": str(tmp_path / "run"), "ROWS": "", "BASE_MODEL": "", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **places}, check=False
    )
    assert done.returncode == 1 and "stage sft has not finished; run it first" in done.stderr


def test_an_empty_value_counts(tmp_path: Path) -> None:
    script = 'source script/common.sh; defaults sft; echo "<$SFT_DEEPSPEED> <$SFT_LR>"'
    values = {**os.environ, "SFT_LR": "", "SFT_DEEPSPEED": ""}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=values, check=True)
    assert done.stdout == "<> <>\n"


def test_a_dry_run_prints_the_command_needs_no_input_and_leaves_nothing(tmp_path: Path) -> None:
    script = """
        set -euo pipefail
        source script/common.sh
        stage sft --output "$RUN_DIR/sft" --input "rows=$RUN_DIR/none.jsonl" -- run touch "$RUN_DIR/file"
    """
    values = {**os.environ, "RUN_DIR": str(tmp_path), "PYTHON": sys.executable, "DRY_RUN": "1"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=values, check=False)
    assert done.returncode == 0 and "# stage sft" in done.stdout and "touch" in done.stdout
    assert not any(tmp_path.iterdir())


def test_a_setting_that_came_later_had_its_defaults_effect_before() -> None:
    sys.path.insert(0, str(ROOT / "script"))
    import manifest as script

    begun = {"learned": {"SFT_LR": "1e-5"}, "inputs": {}}
    default = script.defaults()["SFT_LORA_TARGETS"]
    assert script.differences(begun, {"learned": {"SFT_LR": "1e-5", "SFT_LORA_TARGETS": default}, "inputs": {}}) == []
    other = {"learned": {"SFT_LR": "1e-5", "SFT_LORA_TARGETS": ".*q_proj"}, "inputs": {}}
    assert script.differences(begun, other) == [f"SFT_LORA_TARGETS was {default}, is .*q_proj"]
