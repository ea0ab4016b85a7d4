"""Scores: the official rule against an independent implementation, honest denominators, intervals, official files."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from eval.predictions import write_whole
from eval.score import Graded, app, grade, load, tally, totals, wilson

WORDS = [
    *("a", "man", "woman", "the", "dog", "barks", "two", "2", "three", "left_right", "caf\u00e9", "don't"),
    *("sound-effect", "C#", "12:30", "Stra\u00dfe", "\u00c9t\u00e9"),
]


def is_word_character(character: str) -> bool:
    return character == "_" or character.isalnum()


def independent_official_rule(prediction: str, answer: str, choices: list[str]) -> bool:
    """The rule once more, from its description: characters and multisets, no regular expressions, no set algebra."""

    def words(text: str) -> list[str]:
        found, word = [], ""
        for character in text.lower() + " ":
            if is_word_character(character):
                word += character
            elif word:
                found.append(word)
                word = ""
        return found

    said, right = words(prediction), words(answer)
    if not said:
        return False
    for word in right:
        if word not in said:
            return False
    for choice in choices:
        other = words(choice)
        if sorted(set(other)) == sorted(set(right)):
            continue
        for word in other:
            if word not in right and word in said:
                return False
    return True


def random_text(chance: random.Random, most: int) -> str:
    glue = chance.choice([" ", " ", ", ", "-", "_", ". ", "\n", "'"])
    words = [chance.choice(WORDS) for _ in range(chance.randint(0, most))]
    return glue.join(chance.choice([word, word.upper(), word.title(), f"({word})"]) for word in words)


def random_vector(chance: random.Random) -> dict[str, Any]:
    choices = [random_text(chance, 4) for _ in range(chance.randint(2, 8))]
    if chance.random() < 0.2:
        choices[-1] = choices[0]
    answer = chance.choice(choices)
    prediction = chance.choice(
        [
            answer,
            f"The answer is {answer}.",
            f"{chance.choice('ABCD')}. {answer}",
            chance.choice(choices),
            f"{answer} {chance.choice(choices)}",
            random_text(chance, 6),
            "",
        ]
    )
    return {"id": "x", "choices": choices, "answer": answer, "answer_prediction": prediction}


def test_the_official_rule_agrees_with_an_independent_one_on_every_vector() -> None:
    chance = random.Random(20261121)
    verdicts = []
    for _ in range(8000):
        row = random_vector(chance)
        if not row["answer"]:
            continue
        expected = independent_official_rule(row["answer_prediction"].strip(), row["answer"], row["choices"])
        assert grade(row).official == expected, row
        verdicts.append(expected)
    assert len(verdicts) > 5000 and 0.2 < sum(verdicts) / len(verdicts) < 0.8  # both outcomes are tested


QUESTION = {"id": "q", "choices": ["a man", "a woman", "a child", "nobody"], "answer": "a woman"}


@pytest.mark.parametrize(
    ("prediction", "official", "strict"),
    [
        ("a woman", True, True),
        ("A woman.", True, True),
        ("(B) a woman", True, True),
        ("B", False, True),
        ("A. a woman", True, False),  # the letter of another choice
        ("The answer is a woman", True, False),
        ("a woman and a man", False, False),
        ("a man", False, False),
        ("", False, False),
    ],
)
def test_the_two_rules_differ_where_they_should(prediction: str, official: bool, strict: bool) -> None:
    graded = grade(QUESTION | {"answer_prediction": prediction})
    assert (graded.official, graded.strict, graded.answered) == (official, strict, bool(prediction))


@pytest.mark.parametrize(("prediction", "right"), [("Dog", True), ("A", True), ("C", True), ("B", False), ("D", False)])
def test_a_choice_that_is_listed_twice_is_one_choice(prediction: str, right: bool) -> None:
    row = {"id": "q", "choices": ["Dog", "Cat", "Dog", "Cow"], "answer": "Dog", "model_output": prediction}
    assert grade(row).strict is right


@pytest.mark.parametrize("row", [{}, {"answer_prediction": None}, {"model_output": "  "}])
def test_no_prediction_is_unanswered_and_wrong(row: dict[str, Any]) -> None:
    assert grade(QUESTION | row) == Graded("q", False, False, False)


def test_an_empty_choice_is_never_named() -> None:
    row = {"id": "q", "choices": ["yes", ""], "answer": "yes"}
    assert grade(row | {"answer_prediction": "yes"}).strict is True
    assert grade(row | {"answer_prediction": ""}).strict is False


def test_wilson_intervals_are_the_published_ones() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_intervals_hold_the_share_for_every_count() -> None:
    for total in range(1, 60):
        for right in range(total + 1):
            low, high = wilson(right, total)
            assert 0.0 <= low <= right / total <= high <= 1.0


def mmar_like(number: int, chance: random.Random) -> dict[str, Any]:
    choices = chance.sample(["rain", "wind", "a dog", "two cats", "thunder"], 4)
    return {
        "id": f"r{number}",
        "audio_path": f"./audio/r{number}.wav",
        "question": "What is it?",
        "choices": choices,
        "answer": chance.choice(choices),
        "modality": chance.choice(["sound", "speech", "music"]),
        "category": [f"layer {number % 2}"],
        "sub-category": f"sub {number % 5}",
    }


PREDICTORS: dict[str, tuple[Callable[[dict[str, Any], random.Random], str], float, float]] = {
    "gold": (lambda row, _: row["answer"], 1.0, 1.0),
    "constant": (lambda row, _: row["choices"][0], 0.2, 0.3),
    "random": (lambda row, chance: chance.choice(row["choices"]), 0.2, 0.3),
    "silent": (lambda row, _: "", 0.0, 0.0),
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_gold_constant_and_random_predictors_score_as_expected(name: str, tmp_path: Path) -> None:
    predict, low, high = PREDICTORS[name]
    chance = random.Random(1)
    rows = [mmar_like(number, chance) for number in range(1000)]
    file = write_rows(tmp_path / "p.jsonl", [row | {"answer_prediction": predict(row, chance)} for row in rows])
    predicted = load(file)
    summary = totals(predicted, [grade(row) for row in predicted.rows])
    for rule in ("official", "strict"):
        assert low <= summary[f"{rule}_accuracy"] <= high
    assert summary["total"] == 1000 and summary["unanswered"] == (1000 if name == "silent" else 0)
    assert sum(group["total"] for group in summary["by"]["modality"].values()) == 1000


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_breakdowns_add_up_and_the_macro_mean_weighs_groups_alike(tmp_path: Path) -> None:
    rows = [
        QUESTION
        | {"id": str(n), "modality": "sound" if n < 9 else "music", "answer_prediction": "a woman" if n < 9 else "x"}
        for n in range(10)
    ]
    predicted = load(write_rows(tmp_path / "p.jsonl", rows))
    summary = totals(predicted, [grade(row) for row in predicted.rows])
    assert summary["official_accuracy"] == 0.9
    assert summary["macro_accuracy"] == 0.5 and summary["macro_over"] == "modality"
    assert summary["by"]["modality"]["sound"]["official_accuracy"] == 1.0
    assert summary["by"]["modality"]["music"]["total"] == 1


def run_with_sidecar(folder: Path, rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> Path:
    """A predictions file as eval.infer leaves it, with the questions it came from."""
    from eval.benchmarks import load_questions

    questions = load_questions("mmar", write_rows(folder / "MMAR-meta.jsonl", rows))
    file = write_rows(folder / "out.jsonl", predicted)
    identity = {"benchmark": "mmar", "questions_sha256": questions.sha256}
    sidecar = {"identity": identity, "questions": str(questions.file), "num_rows": len(rows)}
    write_whole(folder / "out.run.json", json.dumps(sidecar))
    return file


def test_missing_rows_stay_in_the_denominator_of_every_group(tmp_path: Path) -> None:
    chance = random.Random(2)
    rows = [mmar_like(number, chance) for number in range(40)]
    answered = [row | {"answer_prediction": row["answer"]} for row in rows[:30]]
    predicted = load(run_with_sidecar(tmp_path, rows, answered))
    summary = totals(predicted, [grade(row) for row in predicted.rows])
    assert (summary["total"], summary["missing"], summary["unanswered"]) == (40, 10, 10)
    assert summary["official_accuracy"] == 0.75
    assert sum(group["total"] for group in summary["by"]["sub-category"].values()) == 40


def test_missing_rows_are_counted_even_when_the_questions_are_gone(tmp_path: Path) -> None:
    rows = [mmar_like(number, random.Random(3)) for number in range(10)]
    file = run_with_sidecar(tmp_path, rows, [row | {"answer_prediction": row["answer"]} for row in rows[:5]])
    (tmp_path / "MMAR-meta.jsonl").unlink()
    result = CliRunner().invoke(app, [str(file), "--json", str(tmp_path / "s.json")])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["total"], summary["missing"], summary["official_accuracy"]) == (10, 5, 0.5)
    assert "5 rows are missing" in result.stderr


def test_a_torn_last_line_and_error_rows_count_as_wrong(tmp_path: Path) -> None:
    rows = [mmar_like(number, random.Random(4)) for number in range(4)]
    predicted = [row | {"answer_prediction": row["answer"]} for row in rows[:2]]
    predicted.append(rows[2] | {"answer_prediction": "", "stop_reason": "error"})
    file = run_with_sidecar(tmp_path, rows, predicted)
    with file.open("a") as stream:
        stream.write(json.dumps(rows[3])[:20])
    loaded = load(file)
    summary = totals(loaded, [grade(row) for row in loaded.rows])
    assert (summary["total"], summary["missing"], summary["errors"], summary["official_accuracy"]) == (4, 1, 1, 0.5)


def test_withheld_answers_are_counted_and_not_scored(tmp_path: Path) -> None:
    rows = [{"id": str(n), "choices": ["a", "b"], "task": "sound", "model_output": "a" if n else ""} for n in range(3)]
    result = CliRunner().invoke(app, [str(write_rows(tmp_path / "p.jsonl", rows)), "--json", str(tmp_path / "s.json")])
    assert result.exit_code == 0 and "withheld" in result.output
    summary = json.loads((tmp_path / "s.json").read_text())
    assert summary["official_accuracy"] is None and summary["macro_accuracy"] is None
    assert (summary["total"], summary["unanswered"]) == (3, 1)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_the_official_file_has_every_row_and_every_key_the_official_scripts_read(tmp_path: Path, suffix: str) -> None:
    rows = [mmar_like(number, random.Random(5)) for number in range(6)]
    predicted = [row | {"answer_prediction": "rain", "model_response": "..."} for row in rows[:4]]
    file = run_with_sidecar(tmp_path, rows, predicted)
    target = tmp_path / f"official{suffix}"
    assert CliRunner().invoke(app, [str(file), "--official", str(target)]).exit_code == 0
    text = target.read_text()
    written = json.loads(text) if suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    for row, original in zip(written, rows, strict=True):
        assert original.items() <= row.items()
        assert row["answer_prediction"] == row["model_prediction"] == row["model_output"]
        assert row["thinking_prediction"] == ""
    assert [row["model_output"] for row in written] == ["rain"] * 4 + [""] * 2


def test_the_rows_file_has_each_verdict_once(tmp_path: Path) -> None:
    rows = [QUESTION | {"id": str(n), "answer_prediction": "B" if n else "a woman"} for n in range(2)]
    target = tmp_path / "rows.jsonl"
    CliRunner().invoke(app, [str(write_rows(tmp_path / "p.jsonl", rows)), "--rows", str(target)])
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"id": "0", "official": True, "strict": True, "answered": True},
        {"id": "1", "official": False, "strict": True, "answered": True},
    ]


def test_segments_are_summed_up(tmp_path: Path) -> None:
    heard = {"start": 0.0, "end": 1.0, "inserted": True}
    refused = {"start": 9.0, "end": 9.5, "inserted": False, "refusal": "past_end"}
    rows = [QUESTION | {"id": "0", "segments": [heard, refused]}, QUESTION | {"id": "1", "segments": []}]
    predicted = load(write_rows(tmp_path / "p.jsonl", rows))
    assert totals(predicted, [grade(row) for row in predicted.rows])["segments"] == {
        "named": 2,
        "inserted": 1,
        "refused": {"past_end": 1},
        "rows_with_clips": 1,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows in it"),
        ('{"id": 1}\n', "'choices' must be a list of texts"),
        ('{"id": 1, "choices": ["a"], "answer": "a", "answer_prediction": 3}\n', "must be text, not 3"),
        ('{"id": 1, "choices": []}\n{"id": 1, "choices": []}\n', "line 2: row 1 is there twice"),
        ('{"id": 1, "choices": []}\nnonsense\n', "line 2: not JSON"),
    ],
)
def test_rows_that_cannot_be_scored_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    result = CliRunner().invoke(app, [str(tmp_path / "p.jsonl")])
    assert result.exit_code == 1 and message in result.stderr
    assert CliRunner().invoke(app, [str(tmp_path / "none.jsonl")]).exit_code == 1


def test_fractions_and_intervals_of_a_tally_belong_together() -> None:
    group = tally([Graded(str(n), n < 30, n < 20, n < 35) for n in range(40)])
    assert group.official_interval and group.official_accuracy
    assert (group.official_accuracy, group.strict_accuracy, group.unanswered) == (0.75, 0.5, 5)
    assert group.official_interval[0] < 0.75 < group.official_interval[1]
    assert math.isclose(sum(group.strict_interval or (0, 0)), 1.0)  # symmetric at one half
