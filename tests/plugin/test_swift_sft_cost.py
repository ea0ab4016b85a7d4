"""tests/benchmark/sft_cost.py runs, and finds the same logits with and without padding. Times are not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmark" / "sft_cost.py"


def test_padding_to_the_window_costs_memory_and_changes_no_logits() -> None:
    command = [sys.executable, str(SCRIPT), "--family", "qwen2_5_omni", "--clips", "1", "--repeats", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    header, _, *lines = (line.strip("| ").split("|") for line in result.stdout.splitlines() if line.startswith("|"))
    columns = [name.strip() for name in header]
    stock, _, ratio = (dict(zip(columns, (cell.strip() for cell in line), strict=False)) for line in lines)
    assert stock["features, MB"] == "30.7", "two clips, each padded to 300 s"
    assert ratio["features, MB"] == "30.0x", "the longest sound has 10 s"
    assert ratio["logits differ by"] == "0"
