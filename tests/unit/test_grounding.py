"""Where a model listens, and whether that pays."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval import grounding
from eval.grounding import Listened, listened
from eval.stats import independent_difference

EVENTS = [{"label": "bell", "start": 0.0, "end": 1.0}, {"label": "dog", "start": 2.0, "end": 3.0}]
ROW = {"question": "Which sound comes second?", "choices": ["bell", "dog"], "answer": "dog", "events": EVENTS}


def clips(*spans: tuple[float, float], inserted: bool = True) -> list[dict[str, Any]]:
    return [{"start": start, "end": end, "inserted": inserted} for start, end in spans]


def heard(*spans: tuple[float, float], **row: Any) -> Listened:
    found = listened({**ROW, "segments": clips(*spans), **row}, True)
    assert found is not None
    return found


def test_the_answers_event_is_asked_about_before_the_questions() -> None:
    assert heard((2.0, 3.0)).hit and not heard((0.0, 1.0)).hit
    times = {"question": "How often is the bell heard?", "answer": "two"}
    assert heard((0.0, 1.0), **times).hit and not heard((2.0, 3.0), **times).hit
    assert listened({**ROW, "answer": "three", "question": "How many sounds are there?"}, True) is None
    assert listened({**ROW, "events": None}, True) is None


def test_what_a_row_heard_is_measured_in_seconds() -> None:
    row = heard((2.0, 2.5), (2.0, 2.5), (0.0, 1.0))
    assert row.best == 0.5 and not row.hit, "a hit is above 0.5"
    assert (row.recalled, row.clips, row.precise, row.covered) == ((1.0, 0.0, 0.0), 3, 0, 0.5)
    assert row.repeated == pytest.approx(0.25)
    refused = listened({**ROW, "segments": clips((2.0, 3.0), inserted=False)}, True)
    assert refused is not None and (refused.best, refused.clips, refused.repeated) == (0.0, 0, None)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    assert independent_difference((56, 70), (48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)  # his table II
    assert independent_difference((10, 10), (0, 20)) == pytest.approx((0.679, 1.0), abs=1e-3)


def predictions(folder: Path, hits_right: int, hits_wrong: int, misses_right: int, misses_wrong: int) -> Path:
    file, rows = folder / "interleaved.jsonl", []
    for span, said, number in (
        ((2.0, 3.0), "dog", hits_right),
        ((2.0, 3.0), "bell", hits_wrong),
        ((0.0, 1.0), "dog", misses_right),
        ((0.0, 1.0), "bell", misses_wrong),
    ):
        rows += [{**ROW, "segments": clips(span), "answer_prediction": said} for _ in range(number)]
    file.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    return file


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ((20, 0, 8, 72), "Listening pays: right in 100% with a hit and in 10% without.*gain up to 72 points"),
        ((5, 15, 20, 60), "Listening does not pay yet: right in 25% with a hit and in 25% without"),
        ((95, 0, 0, 5), "95% of the rows hear the right place"),
        ((0, 0, 5, 5), "No row hears the right place"),
    ],
)
def test_one_sentence_says_whether_rl_can_gain_by_listening_elsewhere(
    tmp_path: Path, counts: tuple[int, int, int, int], sentence: str
) -> None:
    file = predictions(tmp_path, *counts)
    done = CliRunner().invoke(grounding.app, [str(file), "--json", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    assert re.search(sentence, " ".join(done.output.split()))
    (numbers,) = json.loads((tmp_path / "out.json").read_text()).values()
    assert numbers["all"]["rows"] == sum(counts) and numbers["all"]["hits"] == (counts[0] + counts[1]) / sum(counts)


def test_rows_without_events_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"id": "1", "choices": ["a", "b"], "answer": "a", "answer_prediction": "a"}) + "\n")
    done = CliRunner().invoke(grounding.app, [str(file)])
    assert done.exit_code == 1 and "no row has `events`" in done.output
