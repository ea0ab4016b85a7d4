"""What eval.throughput makes of its measurements. That it measures, tests/plugin/test_throughput_arms.py shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.throughput import ARMS, Counts, Measurement, app, draw, summarise, table

SECONDS = {
    "serial": (20.0, 44.0, 30.0),
    "ours": (2.0, 4.0, 3.0),
    "clips first": (2.2, 4.4, 3.3),
    "limit": (1.0, 3.0, 2.4),
}
STEPS = {"serial": 480, "ours": 130, "clips first": 125, "limit": 120}


def measurements(batch: int = 64, segments: int = 2) -> list[Measurement]:
    return [
        Measurement(batch, segments, arm, repeat, SECONDS[arm][repeat], batch, 120 * batch, Counts(STEPS[arm]), 1.0)
        for repeat in (2, 0, 1)
        for arm in ARMS
    ]


def test_ratios_are_medians_of_what_ran_side_by_side() -> None:
    (row,) = summarise(measurements())
    # 44 / 4 and 20 / 2 and 30 / 3, not the medians 30 / 3 of the arms apart
    assert row["times_serial"] == pytest.approx(10.0)
    assert row["of_clips_first"] == pytest.approx(1.1)
    assert row["of_limit"] == pytest.approx(0.75)
    assert row["steps_of_limit"] == pytest.approx(130 / 120)
    assert row["arms"]["ours"]["seconds"] == 3.0
    assert (row["arms"]["ours"]["least_seconds"], row["arms"]["ours"]["most_seconds"]) == (2.0, 4.0)
    assert row["arms"]["ours"]["tokens_per_second"] == pytest.approx(120 * 64 / 3.0)


def test_the_table_and_the_picture_show_every_setting(tmp_path: Path) -> None:
    rows = summarise(measurements() + measurements(16, 2) + measurements(16, 0))
    assert table(rows).row_count == 3
    draw(rows, tmp_path / "throughput.png")
    assert Image.open(tmp_path / "throughput.png").width > 600


def test_a_list_that_is_none_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, ["--model", "x", "--batches", "1,many"])
    assert result.exit_code == 2
    assert "whole numbers" in result.output
