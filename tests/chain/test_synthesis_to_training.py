"""From labelled audio to trained weights: EAQA makes rows of the soundscapes, the exporters take them, and each stage
trains one step on them. The models that write and judge are played by rules; all else is what a user runs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import synthesis_run
import torch
from misbehaving_server import misbehaving_server
from rule_models import RuleModels
from safetensors.torch import load_file

from echo_plugins.rewards import load_preset
from echo_plugins.rewards.explain import recorded

ROOT = Path(__file__).resolve().parents[2]
NUM_CLIPS = 52  # all that the soundscapes have
QUESTIONS, GROUP = 4, 2
TRAINED = {"thinker.model", "thinker.lm_head"}

# What differs between the rollouts of a model that has learned one step: without it no group has an advantage.
MY_TERM = """
def digits(record) -> float:
    return sum(map(str.isdigit, record.text)) / max(1, len(record.text))
"""
MY_PRESET = "terms: {format: 0.5, accuracy: 0.5, segment: 0.5, consistency: 1.0, mine.py:digits: 1.0}\n"

SFT = {"DEVICE": "cpu", "SFT_DTYPE": "float32", "SFT_RECOMPUTE": "false", "SFT_MAX_STEPS": "1", "SFT_BATCH_SIZE": "8"}
SFT |= {"SFT_MICRO_BATCH": "4", "SFT_LR": "1e-3", "SFT_WARMUP_RATIO": "0", "SFT_LOG_STEPS": "1"}
RL = {"DEVICE": "cpu", "RL_WORKERS": "1", "RL_STEPS": "1", "RL_BATCH_SIZE": str(QUESTIONS), "RL_TEST_FREQ": "-1"}
RL |= {
    "RL_MINI_BATCH": str(QUESTIONS),
    "RL_GROUP": str(GROUP),
    "RL_MAX_PROMPT": "512",
    "RL_MAX_RESPONSE": "64",
    "RL_LR": "1e-4",
}

pytestmark = pytest.mark.timeout(1200)


@dataclass(frozen=True)
class Chain:
    """`made`: AudioQA rows by file, as EAQA left them. `folder` has sft.jsonl, rl.parquet, sft/ and rl/."""

    made: dict[str, list[dict[str, Any]]]
    base: Path
    folder: Path


def stage(script: str, settings: dict[str, str]) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "RAY_"))}
    environment = {**inherited, "PYTHON": sys.executable, **settings}
    command = ["bash", str(ROOT / "script" / script)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of `after` whose weights were others before."""
    return {".".join(name.split(".")[:2]) for name in after if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def chain(soundscapes: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("from-labels")
    synthesis_run.clips_of(soundscapes, folder / "clips.jsonl", NUM_CLIPS)
    with misbehaving_server(RuleModels()) as server:
        done = synthesis_run.run("eaqa", synthesis_run.write_config(folder, "eaqa", server.url, soundscapes))
    assert done.returncode == 0, done.stderr
    run = folder / "run"
    sft_rows, rl_rows = folder / "sft.jsonl", folder / "rl.parquet"
    for words in (
        ("converters.sft_jsonl", run / "sft.jsonl", sft_rows, "--mode", "interleaved"),
        ("converters.rl_parquet", run / "rl.jsonl", rl_rows),
    ):
        exported = synthesis_run.module(*map(str, words), "--audio-root", str(soundscapes))
        assert exported.returncode == 0, exported.stderr
    places = {"MODEL": str(tiny_model), "TRAIN_FILE": str(sft_rows), "OUTPUT_DIR": str(folder / "sft")}
    stage("stage1_ground_reason.sh", SFT | places)
    (folder / "mine.py").write_text(MY_TERM)
    (folder / "mine.yaml").write_text(MY_PRESET)
    places = {"MODEL": str(folder / "sft" / "last"), "TRAIN_FILE": str(rl_rows), "VAL_FILE": str(rl_rows)}
    places |= {"OUTPUT_DIR": str(folder / "rl"), "REWARD_PRESET": str(folder / "mine.yaml")}
    stage("stage2_multiturn_rl.sh", RL | places)
    return Chain(synthesis_run.written(run), tiny_model, folder)


def test_one_step_of_sft_on_eaqas_rows_moves_the_text_model(chain: Chain) -> None:
    log = [json.loads(line) for line in (chain.folder / "sft" / "logging.jsonl").open()]
    (step,) = (line for line in log if "loss" in line)
    assert len(synthesis_run.rows(chain.folder / "sft" / "rows.jsonl")) == len(chain.made["sft"])
    assert step["global_step/max_steps"] == "1/1" and 0 < float(step["loss"]) < math.inf
    before, after = (load_file(model / "model.safetensors") for model in (chain.base, chain.folder / "sft" / "last"))
    assert moved(before, after) == TRAINED


def test_one_step_of_rl_from_that_model_rolls_out_eaqas_questions_and_rewards_them(chain: Chain) -> None:
    questions = {row["id"]: row for row in chain.made["rl"]}
    rollouts = synthesis_run.rows(chain.folder / "rl" / "trajectories" / "1.jsonl")
    asked = [row["id"] for row in rollouts]
    assert len(asked) == QUESTIONS * GROUP and len(set(asked)) == QUESTIONS
    preset = load_preset(chain.folder / "mine.yaml")
    for row in rollouts:
        source = questions[row["id"]]
        assert (row["question"], row["choices"]) == (source["question"], source["choices"])
        assert row["ground_truth"] == source["answer"] and Path(row["audio"]).name == Path(source["audio"]).name
        assert row["error"] is None and row["sampled_tokens"] > 0
        assert row["score"] == pytest.approx(preset.score(recorded(row).record).score, abs=1e-6)
    assert any(row["score"] > 0 for row in rollouts)


def test_that_step_moves_the_text_model_by_what_was_rewarded(chain: Chain) -> None:
    (metrics,) = (line["data"] for line in synthesis_run.rows(chain.folder / "rl" / "metrics.jsonl"))
    assert 0 < metrics["actor/grad_norm"] < math.inf
    assert (chain.folder / "rl" / "latest_checkpointed_iteration.txt").read_text() == "1"
    saved = chain.folder / "rl" / "global_step_1" / "actor" / "model_world_size_1_rank_0.pt"
    after = {name: value.to_local() for name, value in torch.load(saved, weights_only=False).items()}
    assert moved(load_file(chain.folder / "sft" / "last" / "model.safetensors"), after) == TRAINED
