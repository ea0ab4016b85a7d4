"""`AUDIO_QA=my.jsonl AUDIO_ROOT=dir bash recipes/NAME/run.sh` on sets that no recipe made: questions alone, questions
with labelled events, questions with reasoning.

Questions alone go through the whole of recipes/tiny-cpu: they need the most from it. The other two differ from the
recipe's own rows only until SFT has taken them, so they stop there. recipes/echo-7b needs GPUs, so it runs its data
stage on each.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from safetensors.torch import load_file

from echo_plugins.relisten.segment import Segment, find_tags
from echo_plugins.relisten.transcript import parse

ROOT = Path(__file__).resolve().parents[2]
ROWS, RECORDINGS, HELD = 24, 12, 4
CLIP_SECONDS = 2.0
TONES = {"hum": 150.0, "whistle": 1500.0}

SMALL = {"QUICK": "1", "EVAL_HOLDOUT": str(HELD), "SFT_MAX_STEPS": "2", "SFT_BATCH_SIZE": "4", "SFT_MICRO_BATCH": "4"}
SMALL |= {
    "RL_STEPS": "1",
    "RL_GROUP": "2",
    "RL_MAX_RESPONSE": "48",
    "RL_WORKERS": "1",
    "EVAL_BEFORE_RL": "0",
    "EVAL_MODES": "interleaved",
    "EVAL_MAX_TOKENS": "48",
}
SMALL |= {"PREFLIGHT": "warn"}

pytestmark = pytest.mark.timeout(900)


def row(number: int) -> dict[str, Any]:
    """A question in real prose, each with other words, about a hum and then a whistle."""
    prose = re.findall(r"[A-Za-z]+", (ROOT / "LICENSE").read_text())
    words = " ".join(prose[60 * number : 60 * number + 40])
    question = f"Somebody reads aloud: {words}. Meanwhile, which of the two is heard first?"
    choices = ["the whistle", "the hum", "neither of the two"]
    return {"id": f"own-{number}", "audio": f"clip {number % RECORDINGS}.wav", "question": question, "choices": choices}


EVENTS = [{"label": "whistle", "start": 1.2, "end": 1.8}, {"label": "hum", "start": 0.2, "end": 0.8}]
KINDS: dict[str, dict[str, Any]] = {
    "questions": {"answer": "the hum"},
    "events": {"answer": "the hum", "events": EVENTS},
    "reasoning": {
        "answer": "the hum",
        "think": "In <seg>0.20, 0.80</seg>, something hums; the whistle follows in <seg>1.20, 1.80</seg>.",
    },
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """questions.jsonl, events.jsonl, reasoning.jsonl and their audio/."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "audio").mkdir()
    time = np.arange(int(22_050 * CLIP_SECONDS)) / 22_050
    for number in range(RECORDINGS):
        sound = np.zeros_like(time)
        for event in EVENTS:
            inside = (event["start"] <= time) & (time < event["end"])
            sound += 0.4 * inside * np.sin(2 * np.pi * (TONES[event["label"]] + 10 * number) * time)
        soundfile.write(folder / "audio" / f"clip {number}.wav", sound, 22_050)
    for kind, more in KINDS.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row(n) | more) + "\n" for n in range(ROWS)))
    return folder


def run(recipe: str, own: Path, kind: str, run_dir: Path, *stages: str, **settings: str) -> str:
    """Run the recipe on a set, and return all that it prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "RAY_"))}
    places = {"AUDIO_QA": str(own / f"{kind}.jsonl"), "AUDIO_ROOT": str(own / "audio"), "RUN_DIR": str(run_dir)}
    environment = {**inherited, **SMALL, **settings, **places, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "recipes" / recipe / "run.sh"), *stages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-6000:]
    return printed


def sft_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "data" / "sft-rows.jsonl").open()]


def responses(run_dir: Path) -> list[str]:
    return [sft_row["messages"][-1]["content"] for sft_row in sft_rows(run_dir)]


def assert_trained(run_dir: Path) -> None:
    log = [json.loads(line) for line in (run_dir / "sft" / "logging.jsonl").open()]
    assert any(line.get("global_step/max_steps") == "2/2" for line in log)
    assert (run_dir / "sft" / "last" / "model.safetensors").exists()
    assert not (run_dir / "sft" / "overlong.jsonl").read_text()


def test_questions_alone_run_from_end_to_end(own: Path, tmp_path: Path) -> None:
    printed = run("tiny-cpu", own, "questions", tmp_path)
    assert f"none of the {ROWS - HELD} rows has `think`" in printed and "converters.synthesis" in printed
    assert set(responses(tmp_path)) == {"<think></think><answer>the hum</answer>"}
    assert all(parse(text).well_formed for text in responses(tmp_path))
    assert_trained(tmp_path)
    assert (tmp_path / "rl" / "latest_checkpointed_iteration.txt").read_text() == "1"
    held = {json.loads(line)["id"] for line in (tmp_path / "data" / "test.jsonl").open()}
    (predictions,) = (tmp_path / "eval").glob("*/interleaved.jsonl")
    assert {json.loads(line)["id"] for line in predictions.open()} == held and len(held) == HELD
    summary = json.loads((tmp_path / "summary.json").read_text())
    (sft,) = [stage for stage in summary["stages"] if stage["stage"] == "sft"]
    assert sft["what"].startswith("2 steps, loss ")


def test_events_become_reasoning_that_sft_takes(own: Path, tmp_path: Path) -> None:
    printed = run("tiny-cpu", own, "events", tmp_path, "data", "sft", SFT_MODE="interleaved")
    assert f"{ROWS - HELD} more get it built from their `events`" in printed
    for sft_row, response in zip(sft_rows(tmp_path), responses(tmp_path), strict=True):
        tags = [tag.meaning for tag in find_tags(response)]
        assert tags == [Segment(0.2, 0.8), Segment(1.2, 1.8)] and len(sft_row["audios"]) == 3
        assert parse(response).well_formed
    assert_trained(tmp_path)


def test_reasoning_is_trained_on_as_it_is(own: Path, tmp_path: Path) -> None:
    run("tiny-cpu", own, "reasoning", tmp_path, "data", "sft", SFT_MODE="grounded")
    think = KINDS["reasoning"]["think"]
    assert set(responses(tmp_path)) == {f"<think>{think}</think><answer>the hum</answer>"}
    assert_trained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_echo_7b_takes_each_kind(own: Path, tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """Without reasoning there is no SFT, and RL starts from the base model."""
    settings = {"BASE_MODEL": str(tiny_model), "BENCHMARKS": "", "RL_HOLDOUT": "4"}
    stages = ("data", "sft") if kind == "questions" else ("data",)
    printed = run("echo-7b", own, kind, tmp_path, *stages, **settings)
    assert pq.read_table(tmp_path / "data" / "rl.parquet").num_rows > 0
    if kind == "questions":
        assert "no SFT rows are written" in printed and "RL starts from" in printed
        assert not (tmp_path / "data" / "sft-rows.jsonl").exists() and not (tmp_path / "sft").exists()
    else:
        assert all(len(find_tags(response)) == 2 for response in responses(tmp_path))


def test_cogito_30b_lora_trains_an_adapter_of_qwen3_omni_and_scores_it(
    own: Path, tiny_qwen3: Path, tmp_path: Path
) -> None:
    """No RL: the merged model of stage 1 is what is asked."""
    settings = {
        "BASE_MODEL": str(tiny_qwen3),
        "BENCHMARKS": "",
        "RL_HOLDOUT": "4",
        "RL_STEPS": "0",
        "EVAL_MODES": "plain",
    }
    settings |= {"DEVICE": "cpu", "SFT_DTYPE": "float32", "SFT_DEEPSPEED": "", "EVAL_TP": "1"}
    printed = run("cogito-30b-lora", own, "reasoning", tmp_path, **settings)
    assert printed.count("left out, RL_STEPS=0") == 2 and not (tmp_path / "rl").exists()
    assert not any(find_tags(response) for response in responses(tmp_path)), "plain rows name no segments"
    assert_trained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_qwen3, tmp_path / "sft" / "last"))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert before.keys() == after.keys() and any("thinker.model.layers.0.self_attn" in name for name in changed)
    rows = [json.loads(line) for line in (tmp_path / "eval" / "test" / "plain.jsonl").open()]
    assert len(rows) == HELD and not any("error" in row for row in rows)
    assert json.loads((tmp_path / "eval" / "test" / "plain.json").read_text())["total"] == HELD
    assert "thinking_prediction" in rows[0] and "answer_prediction" in rows[0]
