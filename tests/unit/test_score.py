"""Scores: the official rule against an independent implementation, honest denominators, intervals, official files."""

import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from typer.testing import CliRunner

from eval.predictions import write_whole
from eval.score import Graded, app, as_latex, chosen, grade, grade_all, load, official_file, tally, totals
from eval.stats import difference_interval, effective_size, mcnemar, mean_interval, pass_at_k, wilson

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


LETTER_RESPONSES = [
    "{l}",
    "{l}.",
    "({l}) {t}",
    "It is {l}.",
    "{l} {t}",
    "{t}",
    "the {l}",
    "{l}\n",
    "\n{l}",
    "None",
    "",
    "b",
    "Dog",
]


def independent_letter_rule(response: str, answer: str, choices: list[str], *, first: bool) -> bool:
    """MMSU's and AIR-Bench's rule once more: the letter is looked up in a table, and compared as text."""
    one_line = response.strip().replace("\n", "")
    if one_line in ("", "None"):
        return False
    candidates = [one_line[0]] if one_line[0] in ("A", "B", "C", "D") else list(one_line)[-2:-1]
    table = dict(zip("ABCD", choices, strict=False))
    right = [letter for letter, text in table.items() if text == answer]
    return candidates[:1] != [] and candidates[0] in (right[:1] if first else right)


@pytest.mark.parametrize("rule", ["letter", "first_letter"])
def test_the_letter_rules_agree_with_an_independent_one_on_every_vector(rule: Any) -> None:
    chance = random.Random(20261122)
    verdicts = []
    for _ in range(5000):
        choices = [chance.choice(["Dog", "Apple", "4", "Cat"]) + chance.choice(["", "s"]) for _ in range(4)]
        choices = choices[: chance.randint(2, 4)]
        answer, place = chance.choice(choices), chance.randrange(4)
        text = (choices * 2)[place]
        response = chance.choice(LETTER_RESPONSES).format(l="ABCD"[place], t=text)
        row = {"id": "x", "choices": choices, "answer": answer, "answer_prediction": response}
        named = chosen(row)
        given = response.strip() if named is None else "ABCD"[choices.index(named)]
        expected = independent_letter_rule(given, answer, choices, first=rule == "first_letter")
        assert grade(row, rule).official == expected, row
        verdicts.append(expected)
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8


def test_a_choice_that_begins_with_a_letter_is_not_read_as_that_letter() -> None:
    row = {"id": "x", "choices": ["Dog", "Cat", "Bird"], "answer": "Bird"}
    assert grade(row | {"answer_prediction": "Bird"}, "letter").official is True  # the script alone would read a B
    assert grade(row | {"answer_prediction": "Dog"}, "letter").official is False


def test_an_official_rule_that_is_not_ours_is_not_made_up() -> None:
    row = {"id": "x", "choices": ["Dog", "Cat"], "answer": "Cat", "answer_prediction": "Cat"}
    assert grade(row, "nv_embed") == Graded("x", None, True, True)
    open_row = {"id": "y", "choices": [], "answer": "it rains", "answer_prediction": "it rains"}
    assert grade(open_row, "nv_embed") == Graded("y", None, None, True)
    group = tally([grade(row, "nv_embed"), grade(open_row, "nv_embed")])
    assert (group.total, group.scored, group.official_accuracy, group.strict_accuracy) == (2, 1, None, 1.0)


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
        "mean_seconds": 1.0,
        "median_seconds": 1.0,
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no rows in it"),
        ('{"id": 1}\n', "no row can be scored. The first, '1': 'choices' must be a list of texts, not None"),
        ('{"id": 1, "choices": []}\n{"id": 1, "choices": []}\n', "line 2: row 1 is there twice"),
        ('{"id": 1, "choices": []}\nnonsense\n', "line 2: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_file_that_cannot_be_scored_says_why(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    result = CliRunner().invoke(app, [str(tmp_path / "p.jsonl")])
    assert result.exit_code == 1 and message in result.stderr
    assert CliRunner().invoke(app, [str(tmp_path / "none.jsonl")]).exit_code == 1


def score(file: Path, *words: str) -> tuple[dict[str, Any], str]:
    """The totals of a file, and all that is printed."""
    totals_file = file.with_suffix(".totals")
    result = CliRunner().invoke(app, [str(file), "--json", str(totals_file), *words])
    assert result.exit_code == 0, result.output
    return json.loads(totals_file.read_text()), result.output


def test_rows_that_cannot_be_used_are_named_and_counted_and_the_rest_is_scored(tmp_path: Path) -> None:
    good = QUESTION | {"answer_prediction": "B"}
    rows = [
        good | {"id": "good"},
        good | {"id": "no choices", "choices": None},
        good | {"id": "odd choices", "choices": ["a", None]},
        good | {"id": "odd answer", "answer": 7},
        good | {"id": "odd prediction", "answer_prediction": ["B"]},
        good | {"id": "null prediction", "answer_prediction": None},
        good | {"id": "null answer", "answer": None},
        {key: value for key, value in good.items() if key != "id"},
        good | {"id": "last, without a newline"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    summary, printed = score(file, "--rows", str(tmp_path / "r.jsonl"))
    assert (summary["total"], summary["scored"], summary["unanswered"]) == (9, 5, 2), summary
    assert summary["strict_accuracy"] == 0.6, "an odd or a null prediction is a wrong one"
    assert summary["unusable"] == ["no choices", "odd choices", "odd answer", "odd prediction"]
    assert summary["no_key"] == ["null answer"]
    assert "row 'odd answer' cannot be used: 'answer' must be text, not 7" in printed
    assert "4 rows cannot be used: no choices, odd choices" in printed and "1 rows have no key here" in printed
    verdicts = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["id"] for row in verdicts][-2:] == ["line 8", "last, without a newline"]
    assert verdicts[1]["problem"].startswith("'choices' must be") and "problem" not in verdicts[0]


@pytest.mark.parametrize(
    ("row", "prediction", "official", "strict"),
    [
        ({"choices": [], "answer": "it rains"}, "I hear that it rains", True, None),
        ({"choices": [], "answer": "it rains"}, "snow", False, None),
        ({"choices": ["Dog", "Cat"], "answer": ""}, "bird", True, False),  # no word is missing, none is wrong
        ({"choices": ["Dog", "Cat"], "answer": ""}, "Cat", False, False),
        ({"choices": ["Dog", "Cat"], "answer": ""}, "", False, False),
        ({"choices": None, "answer": "Cat"}, "", False, None),  # the script never comes to the choices
        ({"choices": [None, "Cat"], "answer": "Cat"}, "?!", False, None),
        ({"choices": None, "answer": "Cat"}, "Cat", None, None),
        ({"choices": ["Dog", "Cat"], "answer": None}, "Cat", None, None),
    ],
)
def test_where_the_official_rule_has_a_verdict_so_have_we(
    row: dict[str, Any], prediction: str, official: bool | None, strict: bool | None
) -> None:
    graded = grade({"id": "x", "answer_prediction": prediction, **row})
    assert (graded.official, graded.strict) == (official, strict)
    if official is not None and isinstance(row["choices"], list) and None not in row["choices"]:
        assert independent_official_rule(prediction, row["answer"], row["choices"]) is official


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "Cat", "B", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["start", "end", "inserted", "x"]), inner)
    ),
    max_leaves=6,
)
KEYS = (
    *("id", "choices", "answer", "answer_prediction", "model_output", "segments", "stop_reason", "meta", "audio"),
    *("category", "modality", "url"),
)
ODD_ROWS = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON) | {"choices": st.just(["Dog", "Cat"]) | JSON})


@given(st.lists(ODD_ROWS, min_size=1, max_size=6))
def test_whatever_rows_a_file_has_each_is_counted_once_and_nothing_ends_the_rest(rows: list[dict[str, Any]]) -> None:
    fair = [QUESTION | {"id": "right", "answer_prediction": "B"}, QUESTION | {"id": "wrong", "answer_prediction": "A"}]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [fair[0], *rows, fair[1]]))
        ids = [str(row["id"]) for row in rows if row.get("id") is not None]
        if len(set(ids) | {"right", "wrong"}) < len(ids) + 2:
            with pytest.raises(ValueError, match="is there twice"):
                load(file)
            return
        graded = grade_all(predicted := load(file))
        assert graded[0].strict is True and graded[-1].strict is False and len(graded) == len(rows) + 2
        summary = totals(predicted, graded)
        assert summary["total"] == len(rows) + 2
        assert summary["scored"] + len({*summary["unusable"], *summary["no_key"]}) >= summary["total"]
        official_file(predicted, Path(folder) / "official.json")
        assert len(json.loads((Path(folder) / "official.json").read_text())) == len(rows) + 2


def test_the_score_of_a_resumed_file_counts_all_that_was_ever_asked(tmp_path: Path) -> None:
    """What an older version's sidecar forgot, and what this one's says."""
    rows = [mmar_like(number, random.Random(9)) for number in range(100)]
    file = run_with_sidecar(tmp_path, rows, [row | {"answer_prediction": row["answer"]} for row in rows[:50]])
    sidecar = json.loads((tmp_path / "out.run.json").read_text())
    write_whole(tmp_path / "out.run.json", json.dumps(sidecar | {"ids": ["r1", "r2"], "num_rows": 2}))
    assert score(file)[0]["total"] == 50, "every row that is there was asked"
    write_whole(tmp_path / "out.run.json", json.dumps(sidecar | {"ids": ["r1", "r99"], "num_rows": 2}))
    summary, printed = score(file)
    assert (summary["total"], summary["missing"]) == (51, 1) and "51 of 100 rows of the benchmark were asked" in printed
    with file.open("a") as stream:
        stream.write(json.dumps(QUESTION) + "\n")
    result = CliRunner().invoke(app, [str(file)])
    assert result.exit_code == 1 and "1 rows are no rows of" in result.stderr and "'q'" in result.stderr


def test_a_run_is_scored_where_it_was_moved_to(tmp_path: Path) -> None:
    rows = [mmar_like(number, random.Random(3)) for number in range(10)]
    old, new = tmp_path / "old", tmp_path / "mnt" / "new"
    old.mkdir()
    file = run_with_sidecar(old, rows, [row | {"answer_prediction": row["answer"]} for row in rows[:5]])
    sidecar = json.loads((old / "out.run.json").read_text())
    write_whole(old / "out.run.json", json.dumps(sidecar | {"relative": {"questions": "MMAR-meta.jsonl"}}))
    new.parent.mkdir()
    old.rename(new)
    summary, _ = score(new / file.name)
    assert (summary["missing"], summary["macro_over"]) == (5, "modality") and summary["macro_accuracy"] is not None


def test_rows_of_unknown_labels_are_counted_in_the_table_and_spoil_no_mean(tmp_path: Path) -> None:
    rows = [mmar_like(number, random.Random(3)) for number in range(10)]
    file = run_with_sidecar(tmp_path, rows, [row | {"answer_prediction": row["answer"]} for row in rows[:5]])
    (tmp_path / "MMAR-meta.jsonl").unlink()
    summary, printed = score(file)
    assert sum(group["total"] for group in summary["by"]["modality"].values()) == 10
    assert summary["by"]["modality"]["(unknown)"] | {} == summary["by"]["category"]["(unknown)"]
    assert summary["by"]["modality"]["(unknown)"]["official_accuracy"] == 0.0
    assert summary["macro_accuracy"] is None and "mean over modality" not in printed


def test_intervals_are_wider_where_rows_share_a_recording(tmp_path: Path) -> None:
    rows = [
        QUESTION
        | {"id": str(n), "url": f"https://youtu.be/video{n // 5:06}?t={n}", "answer_prediction": "AB"[n // 5 % 2]}
        for n in range(100)
    ]
    summary, printed = score(write_rows(tmp_path / "p.jsonl", rows))
    low, high = summary["strict_interval"]
    assert (low, high) == pytest.approx(wilson(10, 20), abs=0.01), "twenty recordings, all of each right or wrong"
    assert "intervals are of 20 recordings" in printed


def test_fractions_and_intervals_of_a_tally_belong_together() -> None:
    group = tally([Graded(str(n), n < 30, n < 20, n < 35) for n in range(40)])
    assert group.official_interval and group.official_accuracy
    assert (group.official_accuracy, group.strict_accuracy, group.unanswered) == (0.75, 0.5, 5)
    assert group.official_interval[0] < 0.75 < group.official_interval[1]
    assert math.isclose(sum(group.strict_interval or (0, 0)), 1.0)  # symmetric at one half


def mmsu_run(folder: Path, answers: dict[str, str], **identity: Any) -> Path:
    from eval.benchmarks import load_questions

    rows = [
        {"id": row_id, "audio_path": f"{row_id}.wav", "question": "?", "category": kind, "answer_gt": "Cat"}
        | {"choice_a": "Dog", "choice_b": "Cat", "choice_c": "Bird"}
        for row_id, kind in (("1", "Perception"), ("2", "Perception"), ("3", "Reasoning"))
    ]
    questions = load_questions("mmsu", write_rows(folder / "mmsu.jsonl", rows))
    file = folder / "out.jsonl"
    write_rows(file, [item.row | {"answer_prediction": answers[item.id]} for item in questions if item.id in answers])
    about = {"benchmark": "mmsu", "questions_sha256": questions.sha256} | identity
    write_whole(
        folder / "out.run.json", json.dumps({"identity": about, "questions": str(questions.file), "num_rows": 3})
    )
    return file


def test_the_official_file_of_a_letter_benchmark_scores_as_we_say(tmp_path: Path) -> None:
    file = mmsu_run(tmp_path, {"1": "Cat", "2": "it is B."})
    official, scores = tmp_path / "official.jsonl", tmp_path / "scores.json"
    assert CliRunner().invoke(app, [str(file), "--official", str(official), "--json", str(scores)]).exit_code == 0
    written = [json.loads(line) for line in official.read_text().splitlines()]
    assert [row["response"] for row in written] == ["B", "it is B.", ""]
    assert [independent_letter_rule(row["response"], "Cat", row["choices"], first=False) for row in written] == [
        True,
        True,
        False,
    ]
    summary = json.loads(scores.read_text())
    assert (summary["rule"], summary["missing"], summary["revision"]) == ("letter", 1, None)
    assert summary["official_accuracy"] == pytest.approx(2 / 3) and summary["strict_accuracy"] == pytest.approx(1 / 3)


def test_shuffled_letters_are_not_given_to_an_official_script(tmp_path: Path) -> None:
    file = mmsu_run(tmp_path, {"1": "Cat"}, shuffle_choices=1)
    result = CliRunner().invoke(app, [str(file), "--official", str(tmp_path / "o.jsonl")])
    assert result.exit_code == 1 and "were shuffled" in result.stderr


def test_the_rows_that_were_asked_by_id_are_the_denominator(tmp_path: Path) -> None:
    file = mmsu_run(tmp_path, {"3": "Cat"})
    sidecar = json.loads((tmp_path / "out.run.json").read_text())
    write_whole(tmp_path / "out.run.json", json.dumps(sidecar | {"ids": ["1", "3"], "num_rows": 2}))
    predicted = load(file)
    assert [row["id"] for row in predicted.rows] == ["1", "3"] and predicted.missing == ["1"]


def test_an_official_file_can_be_parquet(tmp_path: Path) -> None:
    from pyarrow import parquet

    file = mmsu_run(tmp_path, {"1": "Cat"})
    assert CliRunner().invoke(app, [str(file), "--official", str(tmp_path / "o.parquet")]).exit_code == 0
    assert parquet.read_table(tmp_path / "o.parquet").column("model_output").to_pylist() == ["Cat", "", ""]


def test_accuracy_is_told_by_the_number_of_clips_heard(tmp_path: Path) -> None:
    heard = {"start": 0.0, "end": 1.0, "inserted": True}
    rows = [
        QUESTION | {"id": str(n), "segments": [heard] * (n % 3), "answer_prediction": "a woman" if n % 3 else ""}
        for n in range(9)
    ]
    predicted = load(write_rows(tmp_path / "p.jsonl", rows))
    by_clips = totals(predicted, grade_all(predicted))["by_clips"]
    assert [(number, group["total"], group["strict_accuracy"]) for number, group in by_clips.items()] == [
        ("0", 3, 0.0),
        ("1", 3, 1.0),
        ("2", 3, 1.0),
    ]


def test_tables_are_written_as_markdown_and_as_a_row_of_latex(tmp_path: Path) -> None:
    rows = [
        QUESTION | {"id": str(n), "modality": "mix_1 & 2" if n else "a|b", "answer_prediction": "B" if n < 3 else ""}
        for n in range(4)
    ]
    file = write_rows(tmp_path / "p_1.jsonl", rows)
    words = ["--markdown", str(tmp_path / "p.md"), "--latex", str(tmp_path / "p.tex"), "--name", "Echo 100%"]
    assert CliRunner().invoke(app, [str(file), *words]).exit_code == 0
    markdown = (tmp_path / "p.md").read_text()
    assert "| all | 4 | 1 | 0.0 ( 0.0- 49.0) | 75.0 (30.1- 95.4) |" in markdown and "a\\|b" in markdown
    header, row = (tmp_path / "p.tex").read_text().splitlines()
    assert header == r"% model & a|b & mix\_1 \& 2 & mean over modality & all (official, % of 4 rows)"
    assert row == r"Echo 100\% & 0.0 & 0.0 & 0.0 & 0.0 \\"
    summary = totals(predicted := load(file), grade_all(predicted)) | {"official_accuracy": None}
    assert as_latex(summary, "x").splitlines()[1] == r"x & 100.0 & 66.7 & 83.3 & 75.0 \\"


def test_mcnemars_test_is_the_exact_binomial_one() -> None:
    assert mcnemar([]) == mcnemar([0, 0]) == mcnemar([1] * 3 + [-1] * 3) == 1.0
    assert mcnemar([1] * 5) == mcnemar([-1] * 5) == 2 / 2**5
    assert mcnemar([1] * 8 + [-1] * 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert mcnemar([1] * 4200 + [-1] * 4000) == pytest.approx(0.0279, abs=2e-4)  # the normal one, continuity corrected
    assert mcnemar([1] * 9000 + [-1] * 1000) < 1e-300
    for first, second in ((3, 9), (0, 20), (55, 70)):
        assert mcnemar([1] * second + [-1] * first) == pytest.approx(binomtest(first, first + second).pvalue)


@given(st.lists(st.integers(-4, 4), max_size=9))
def test_recordings_are_flipped_together_in_every_way(differences: list[int]) -> None:
    far = abs(sum(differences))
    flips = list(itertools.product([1, -1], repeat=len(differences)))
    as_far = sum(abs(sum(sign * each for sign, each in zip(flip, differences, strict=True))) >= far for flip in flips)
    assert mcnemar(differences) == pytest.approx(as_far / len(flips))


def test_intervals_agree_with_the_formulas_where_there_are_some() -> None:
    low, high = difference_interval(40, 60, 1000)
    half = 1.96 * math.sqrt((0.1 - 0.02**2) / 1000)
    assert (low, high) == pytest.approx((0.02 - half, 0.02 + half), abs=2e-3)
    low, high = mean_interval([(0.5, wilson(50, 100)), (0.5, wilson(200, 400))])
    half = 1.96 * math.sqrt((0.25 / 100 + 0.25 / 400) / 4)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=4e-3)
    assert wilson(7, 40) == pytest.approx(tuple(binomtest(7, 40).proportion_ci(method="wilson")))


def test_intervals_have_a_width_at_the_ends() -> None:
    low, high = difference_interval(0, 0, 50)
    assert (low, high) == pytest.approx((-(z2 := 1.96**2) / (50 + z2), z2 / (50 + z2)), abs=1e-3)
    assert difference_interval(0, 50, 50)[0] < 0.9 and difference_interval(50, 0, 50)[1] > -0.9
    low, high = mean_interval([(1.0, wilson(10, 10))] * 3)
    assert high == 1.0 and wilson(30, 30)[0] - 0.06 < low < wilson(30, 30)[0]
    low, high = mean_interval([(1.0, wilson(3, 3)), (0.0, wilson(0, 4))])
    assert low < 0.35 and high > 0.65


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_an_interval_of_a_difference_holds_it_and_mirrors(only_first: int, only_second: int, others: int) -> None:
    total = only_first + only_second + others + 1
    low, high = difference_interval(only_first, only_second, total)
    assert -1 <= low < (only_second - only_first) / total < high <= 1 or low < high
    assert difference_interval(only_second, only_first, total) == pytest.approx((-high, -low), abs=1e-9)


@pytest.mark.parametrize(("share_of_second", "share_of_first"), [(0.05, 0.02), (0.0, 0.01), (0.2, 0.2)])
def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says(
    share_of_second: float, share_of_first: float
) -> None:
    draws = np.random.default_rng(0).multinomial(
        60, [share_of_first, share_of_second, 1 - share_of_first - share_of_second], 800
    )
    truth = share_of_second - share_of_first
    held = [low <= truth <= high for low, high in (difference_interval(b, c, 60) for b, c, _ in draws.tolist())]
    assert sum(held) / len(held) > 0.93


def test_rows_of_one_recording_are_worth_less_than_as_many_recordings() -> None:
    each = [f"r{n}" for n in range(12)]
    assert effective_size([1, 0] * 6, each) == 12
    assert effective_size([1] * 6 + [0] * 6, ["a"] * 6 + ["b"] * 6) == 1.0, "each says the same six times"
    assert effective_size([1, 0] * 6, ["a"] * 6 + ["b"] * 6) == 12, "never more than there are rows"
    assert effective_size([1] * 12, [name for name in "abc" for _ in range(4)]) == 3, "no estimate: each counts once"
    assert effective_size([], []) == 0 and effective_size([1, 0], ["a", "a"]) == 1
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(300):  # 40 recordings of five questions that are all right or all wrong together
        verdicts = np.repeat(chance.random(40) < 0.6, 5)
        names = [str(n) for n in np.repeat(np.arange(40), 5)]
        low, high = wilson(verdicts.sum(), 200, effective_size(verdicts.astype(float).tolist(), names))
        held += low <= 0.6 <= high
    assert held / 300 > 0.92


def test_pass_at_k_is_the_share_of_the_subsets_that_hold_a_right_answer() -> None:
    for runs in range(1, 7):
        for right in range(runs + 1):
            for k in range(1, runs + 1):
                subsets = list(itertools.combinations([True] * right + [False] * (runs - right), k))
                assert pass_at_k(right, runs, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@3 of 2 runs"):
        pass_at_k(1, 2, 3)
