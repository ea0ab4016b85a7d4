"""Benchmarks are read as published, with their oddities; what cannot be used says where and why."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from eval.benchmarks import (
    AUDIO_QA,
    BENCHMARKS,
    NO_LABEL,
    BenchmarkError,
    guess_breakdowns,
    labels,
    load_benchmark,
    load_questions,
)

MMAR_ROW = {
    "id": "a_00-01-32",
    "audio_path": "./audio/a_00-01-32.wav",
    "question": "Who speaks?",
    "choices": ["a man", "a woman", "", "nobody"],
    "answer": "a woman",
    "modality": "mix-sound-speech",
    "category": "Semantic Layer",
    "sub-category": "Speaker Analysis",
    "language": None,
    "rubric": [],
}
MMAU_ROW = {
    "id": "3fe6",
    "audio_id": "./test-mini-audios/3fe6.wav",
    "question": "What is heard?",
    "choices": ["Dog", "Cat", "Dog", "Cow"],
    "answer": "Dog",
    "task": "sound",
    "category": ["Reasoning"],
    "sub-category": "Acoustic Source Inference",
    "difficulty": "hard",
}


def write(file: Path, content: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content, encoding="utf-8")
    return file


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_mmar_is_read_from_its_official_layout(tmp_path: Path) -> None:
    content = jsonl(MMAR_ROW).rstrip("\n")  # the published file has no newline at its end
    write(tmp_path / "MMAR-meta.jsonl", content)
    questions = load_benchmark("mmar", tmp_path)
    (item,) = questions.items
    assert (item.id, item.audio, item.answer) == ("a_00-01-32", "./audio/a_00-01-32.wav", "a woman")
    assert item.choices == ("a man", "a woman", "", "nobody")
    assert item.row == MMAR_ROW
    assert questions.breakdowns == ("modality", "category", "sub-category")
    assert questions.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_mmau_is_read_with_a_duplicate_choice_and_a_category_that_is_a_list(tmp_path: Path) -> None:
    write(tmp_path / "mmau-test-mini.json", json.dumps([MMAU_ROW], indent=2))
    (item,) = load_benchmark("mmau-mini", tmp_path).items
    assert item.choices == ("Dog", "Cat", "Dog", "Cow")
    assert labels(item.row, "category") == ["Reasoning"]


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}])
def test_a_withheld_answer_is_none(tmp_path: Path, answer: dict[str, Any]) -> None:
    row = {key: value for key, value in MMAU_ROW.items() if key != "answer"} | answer
    write(tmp_path / "mmau-test.json", json.dumps([row]))
    assert load_benchmark("mmau", tmp_path).items[0].answer is None


def test_a_known_revision_is_named_and_another_is_not(tmp_path: Path) -> None:
    file = write(tmp_path / "MMAR-meta.jsonl", jsonl(MMAR_ROW))
    assert load_benchmark("mmar", tmp_path).revision is None
    assert all(len(sha256) == 64 for benchmark in BENCHMARKS.values() for sha256 in benchmark.revisions)
    assert load_questions(AUDIO_QA, write(file.with_name("a.jsonl"), jsonl(AUDIO_QA_ROW))).revision is None


AUDIO_QA_ROW = {"id": 7, "audio": "x.wav", "question": "?", "choices": ["a", "b"], "answer": "a", "meta": {"kind": "k"}}


def test_a_manifest_is_a_benchmark_broken_down_by_the_labels_in_its_meta(tmp_path: Path) -> None:
    rows = [
        AUDIO_QA_ROW
        | {
            "id": number,
            "meta": {"kind": "count" if number % 2 else "order", "note": f"row {number}", "length": number / 7},
        }
        for number in range(100)
    ]
    questions = load_questions(AUDIO_QA, write(tmp_path / "m.jsonl", jsonl(*rows)))
    assert questions.breakdowns == ("kind",)
    assert questions.items[3].id == "3"
    assert labels(rows[3], "kind") == ["count"]


def test_labels_are_named_once_and_their_absence_is_a_label_of_its_own() -> None:
    assert labels({"category": ["x", "y", "x"]}, "category") == ["x", "y"]
    assert labels({"category": []}, "category") == labels({}, "category") == labels({"category": None}, "category")
    assert labels({}, "category") == [NO_LABEL]


def test_official_fields_are_found_in_rows_without_a_known_benchmark() -> None:
    assert guess_breakdowns([MMAU_ROW]) == ("category", "sub-category", "task", "difficulty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (jsonl(MMAR_ROW, MMAR_ROW), r"line 2: the id 'a_00-01-32' was there before"),
        (jsonl(MMAR_ROW) + '{"id": ', r"line 2: not JSON"),
        (jsonl(MMAR_ROW) + "[1]\n", r"line 2: not a JSON object but list"),
        ("[{]", "not a JSON list"),
        ("\n\n", "no rows in it"),
        (jsonl(MMAR_ROW | {"choices": "a b"}), r"line 1: 'choices' is 'a b', which is no list"),
        (jsonl(MMAR_ROW | {"choices": ["a", 2]}), "every choice must be text"),
        (jsonl(MMAR_ROW | {"answer": 2}), "'answer' must be the text of a choice, not 2"),
        (jsonl({key: value for key, value in MMAR_ROW.items() if key != "audio_path"}), "'audio_path' is None"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "MMAR-meta.jsonl", content)
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark("mmar", tmp_path)


def test_a_missing_file_says_where_the_benchmark_is_got_from(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"MMAR-meta\.jsonl: no such file.*github\.com/ddlBoJack/MMAR"):
        load_benchmark("mmar", tmp_path)
    with pytest.raises(BenchmarkError, match="no benchmark 'nope': mmar, mmau-mini, mmau"):
        load_benchmark("nope", tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchmarkError, match="not UTF-8"):
        load_questions(AUDIO_QA, tmp_path / "m.jsonl")
