"""The closing table: what it says of SFT."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("summary", ROOT / "script" / "summary.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["summary"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / "logging.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_all_steps_count_not_only_those_whose_loss_was_logged(summary: ModuleType, tmp_path: Path) -> None:
    """Nine steps with SFT_LOG_STEPS=10, as ms-swift 4.6.0 logs them."""
    lines = [
        {"loss": 7.07, "epoch": 0.11, "global_step/max_steps": "1/9"},
        {"train_runtime": 6.0, "train_loss": 5.1, "epoch": 1.0, "global_step/max_steps": "9/9"},
        {"last_model_checkpoint": "sft/checkpoint-9", "global_step": 9, "log_history": []},
    ]
    assert summary.sft_log(log(tmp_path, lines)) == "9 steps, loss 7.07 at step 1"


def test_loss_goes_from_the_first_logged_step_to_the_last(summary: ModuleType, tmp_path: Path) -> None:
    lines = [{"loss": loss, "global_step/max_steps": f"{step}/25"} for step, loss in ((1, 7.0), (10, 5.0), (20, 2.5))]
    lines.append({"train_loss": 4.0, "global_step/max_steps": "25/25"})
    assert summary.sft_log(log(tmp_path, lines)) == "25 steps, loss 7.00 -> 2.50"


def test_a_stage_that_has_logged_nothing_says_nothing(summary: ModuleType, tmp_path: Path) -> None:
    assert summary.sft_log(tmp_path) == ""
