"""`python -m echo_plugins.rewards.explain` on both kinds of file that it reads, and on files that it cannot use."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from echo_plugins.relisten.segment import Segment
from echo_plugins.rewards.explain import app, recorded

SEGMENT = {"start": 1.0, "end": 2.0, "inserted": True}
REFUSED = {"start": 9.0, "end": 9.5, "inserted": False, "refusal": "past_end", "text": "<seg>9, 9.5</seg>"}
TEXT = "<think>At <seg>1.00, 2.00</seg> a bell.</think><answer>{}</answer>"


def logged(row_id: str, answer: str, **other: Any) -> dict[str, Any]:
    """A line of the trajectory log; the right answer is two."""
    return {
        "step": 3,
        "key": f"{row_id}_0_0",
        "id": row_id,
        "question": "How often is the bell heard?",
        "choices": ["one", "two"],
        "ground_truth": "two",
        "events": [{"label": "bell", "start": 1.0, "end": 3.0}],
        "text": TEXT.format(answer),
        "segments": [{**SEGMENT, "text": "<seg>1.00, 2.00</seg>", "refusal": None, "straddled": False}],
        "stop_reason": "answered",
        "answer_logprob": math.log(0.5),
        "answer_logprobs": [math.log(0.5)],
        "duration": 4.0,
        **other,
    }


def predicted(row_id: str, answer: str, **other: Any) -> dict[str, Any]:
    """A row of eval.infer."""
    return {
        "id": row_id,
        "choices": ["one", "two"],
        "answer": "two",
        "model_response": TEXT.format(answer),
        "segments": [SEGMENT, REFUSED],
        "stop_reason": "answered",
        **other,
    }


@pytest.fixture
def explain(tmp_path: Path) -> Any:
    """Run the command on rows; its options may name files in `tmp_path`."""

    def run(rows: list[Any], *options: str) -> Result:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return CliRunner().invoke(app, [str(file), *options], env={"COLUMNS": "200"})

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_shows_every_term_of_every_preset_on_a_trajectory_log(explain: Any, tmp_path: Path) -> None:
    out = tmp_path / "terms.jsonl"
    done = explain(
        [logged("a", "two"), logged("a", "one"), logged("b", "one", stop_reason="error")],
        *("--preset", "paper", "--preset", "confidence-linear", "--preset", "grounding", "--json", str(out)),
    )
    assert done.exit_code == 0, done.output
    right, wrong, failed = rows_of(out)
    assert right["presets"]["paper"]["terms"] == {"format": 0.5, "accuracy": 0.5, "segment": 0.5, "consistency": 0.0}
    assert right["presets"]["paper"]["score"] == 1.5 and (right["step"], right["correct"], right["clips"]) == (
        3,
        True,
        1,
    )
    assert wrong["presets"]["confidence-linear"]["terms"] == {"format": 0.5, "accuracy": pytest.approx(-0.25)}
    assert right["presets"]["grounding"]["terms"]["grounding"] == pytest.approx(0.25)
    assert {preset["score"] for preset in failed["presets"].values()} == {0.0} and not failed["correct"]
    assert "scores differ in 1 of 1 groups" in done.stdout and "failed" in done.stdout


def test_it_names_what_a_file_of_predictions_lacks(explain: Any) -> None:
    done = explain([predicted("a", "two"), predicted("b", "one")], "--preset", "quota-2", "--preset", "grounding")
    assert done.exit_code == 0
    assert (
        "quota-2: accuracy lacks something in 2 of 2 rows and is 0 there: there are no log-probabilities" in done.stdout
    )
    assert "grounding: grounding lacks something in 2 of 2 rows and is 0 there: the row has no events" in done.stdout


def test_a_users_term_is_tried_and_its_error_shown(explain: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def words(record): return len(record.text.split())\ndef broken(record): return record.colour\n"
    )
    (tmp_path / "mine.yaml").write_text("terms: {'mine.py:words': 2, 'mine.py:broken': 1}\n")
    out = tmp_path / "terms.jsonl"
    done = explain([logged("a", "two")], "--preset", str(tmp_path / "mine.yaml"), "--json", str(out))
    assert done.exit_code == 0
    assert "broken raised or gave no number in 1 of 1 rows and is 0 there: AttributeError" in done.stdout
    assert rows_of(out)[0]["presets"][str(tmp_path / "mine.yaml")]["terms"] == {"words": 10.0, "broken": 0.0}


def test_the_lowest_and_the_highest_rows_are_shown(explain: Any) -> None:
    rows = [logged(f"right-{n}", "two") for n in range(4)] + [logged(f"wrong-{n}", "one") for n in range(4)]
    done = explain(rows, "--show", "2")
    shown = [name for name in (f"{kind}-{n}" for kind in ("right", "wrong") for n in range(4)) if name in done.stdout]
    assert shown == ["right-2", "right-3", "wrong-0", "wrong-1"]
    assert "wrong-0" not in explain(rows, "--show", "0").stdout


def test_both_kinds_of_file_give_the_same_record() -> None:
    of_log, of_eval = recorded(logged("a", "two")).record, recorded(predicted("a", "two")).record
    assert of_log.heard == of_eval.heard == (Segment(1.0, 2.0),)
    assert of_eval.attempts[1].segment is None  # refused, though the row says where it pointed
    assert (of_log.text, of_log.correct, of_log.choices) == (of_eval.text, of_eval.correct, of_eval.choices)


def test_an_older_log_has_the_sum_of_the_log_probs(explain: Any, tmp_path: Path) -> None:
    row = logged("a", "two")
    del row["answer_logprobs"]
    assert recorded(row).record.answer_probability == pytest.approx(0.5)


def test_rows_without_a_right_answer_or_with_one_that_is_no_choice_are_left_out_and_counted(explain: Any) -> None:
    rows = [predicted("a", "two"), predicted("b", "two") | {"answer": None}, predicted("c", "two") | {"answer": "nine"}]
    done = explain(rows)
    assert done.exit_code == 0 and "1 rows\n" in done.stdout
    assert "1 rows are left out: they have no right answer" in done.stderr
    assert "'nine' is not one of the choices" in done.stderr and "line 3" in done.stderr


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        (["{"], r"line 1: not JSON"),
        (["[]"], r"line 1: not an object"),
        ([{"answer": "two", "id": "a"}], r"line 1: no trajectory and no prediction \(KeyError\('model_response'\)"),
        ([logged("a", "two", text=None)], r"line 1: no trajectory and no prediction \(TypeError"),
        ([], "there is no row to score"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_line(explain: Any, rows: list[Any], complaint: str) -> None:
    done = explain(rows)
    assert done.exit_code == 1
    assert re.search(complaint, done.stderr), done.stderr


def test_a_wrong_preset_is_wrong_usage(explain: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("terms: {acuracy: 1}\n")
    for preset in ("papers", str(tmp_path / "bad.yaml")):
        assert explain([logged("a", "two")], "--preset", preset).exit_code == 2


def test_without_a_file_the_presets_are_checked_and_listed() -> None:
    done = CliRunner().invoke(app, ["--preset", "quota-3"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "quota=3" in done.stdout and "1 for a right answer after at least" in done.stdout


def test_markup_in_an_output_is_shown_as_it_is(explain: Any) -> None:
    assert "[red]two" in explain([logged("a", "[red]two")]).stdout
