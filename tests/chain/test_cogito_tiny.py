"""recipes/cogito-tiny with its own defaults and small numbers: what the synthesis writes is trained on, and the answers
of that model are judged by rubrics, without a hand in between."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"DATA_CLIP_ROWS": "480", "DATA_BENCHMARK_ROWS": "12", "RL_HOLDOUT": "4"}
SMALL |= {"SFT_BATCH_SIZE": "4", "SFT_MICRO_BATCH": "4", "SFT_MAX_STEPS": "3", "SFT_SAVE_STEPS": "2"}
SMALL |= {"SFT_EVAL_STEPS": "2", "SFT_LOG_STEPS": "1", "EVAL_MAX_TOKENS": "48", "PREFLIGHT": "warn"}

pytestmark = pytest.mark.timeout(900)


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, **SMALL, "RUN_DIR": str(folder), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "recipes" / "cogito-tiny" / "run.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_from_labelled_clips_to_avg_rubrics_and_crs(tmp_path: Path) -> None:
    said = run(tmp_path)
    made = rows(tmp_path / "data/synthesis/run/sft.jsonl")
    trained = rows(tmp_path / "data" / "sft-rows.jsonl") + rows(tmp_path / "data" / "sft-val-rows.jsonl")
    assert len(trained) == len(made) > 4
    thoughts = {f"<think>{row['think']}</think><answer>{row['answer']}</answer>" for row in made}
    assert {row["messages"][-1]["content"] for row in trained} == thoughts
    log = rows(tmp_path / "sft" / "logging.jsonl")
    assert any(line.get("global_step/max_steps") == "3/3" for line in log)

    items = rows(tmp_path / "data/benchmarks/mmar/MMAR-meta.jsonl")
    folder = tmp_path / "eval" / "mmar" / "rubric"
    submitted = rows(folder / "plain.submission.jsonl")
    assert {row["id"] for row in submitted} == {row["id"] for row in items} and len(items) == 12
    assert len(json.loads((folder / "plain.json").read_text())) and (folder / "plain.judgements.jsonl").exists()
    assert "Avg" in said and "CRS" in said and (tmp_path / "report.html").exists()

    again = run(tmp_path)
    assert not [stage for stage in ("data", "sft", "infer") if f"{stage}: starts" in again]
