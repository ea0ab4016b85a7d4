"""The importers as commands: field maps, the forms of an answer, and the official benchmark layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import soundfile
import typer
from typer.testing import CliRunner, Result

from converters.importers import benchmark, delimited, jsonl
from echo_plugins.audio_qa import AudioQA


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "audio"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.wav", "sub/b.wav"):
        soundfile.write(folder / name, np.zeros(32_000), 16_000)
    return folder


def import_rows(app: typer.Typer, rows: Any, root: Path, *words: str) -> tuple[Result, list[Any], list[Any]]:
    """(result, records, rejected) of running `app` on rows written as a JSON list."""
    source, target = root.parent / "in.json", root.parent / "out.jsonl"
    source.write_text(json.dumps(rows, indent=1))
    result = CliRunner().invoke(app, [str(source), str(target), "--audio-root", str(root), *words])
    side = target.with_name("out.jsonl.rejected.jsonl")
    return result, read(target), read(side)


def read(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


PLAIN = {"id": "x", "audio": "a.wav", "question": "q?", "choices": ["a dog", "a cat"], "answer": "a cat"}


def test_audio_qa_itself_passes_through_with_its_duration(root: Path) -> None:
    result, records, rejected = import_rows(jsonl.app, [PLAIN | {"think": "so", "meta": {"k": 1}}], root)
    assert result.exit_code == 0, result.output
    assert records == [PLAIN | {"think": "so", "duration": 2.0, "meta": {"k": 1}}]
    assert rejected == []
    assert result.stderr.startswith("== ") and "1 rows read, 1 written" in result.stderr


def test_a_field_map_walks_into_objects_and_lists_and_the_rest_becomes_meta(root: Path) -> None:
    row = {
        "clip": {"files": [{"path": "./sub/b.wav"}]},
        "qa": {"text": "q?", "options": {"A": "a dog", "B": "a cat"}},
        "gold.key": "B",
        "year": 2026,
        "meta": {"source": "s"},
    }
    words = ("audio=clip.files.0.path", "question=qa.text", "choices=qa.options", "answer=gold.key")
    result, records, _ = import_rows(jsonl.app, [row], root, *(part for word in words for part in ("--map", word)))
    assert result.exit_code == 0, result.output
    (record,) = records
    assert record["id"] == "in-0000002"  # the file's name and the line
    assert (record["audio"], record["question"], record["answer"]) == ("sub/b.wav", "q?", "a cat")
    assert record["choices"] == ["a dog", "a cat"]
    assert record["meta"] == {"clip": row["clip"], "qa": row["qa"], "year": 2026, "source": "s"}
    assert AudioQA.from_json(record).to_json() == record


def test_several_keys_make_one_list_of_choices(root: Path) -> None:
    row = {"id": "x", "audio": "a.wav", "question": "q?", "a": "a dog", "b": "a cat", "c": None, "answer": "a cat"}
    result, records, _ = import_rows(jsonl.app, [row], root, "--map", "choices=a,b,c")
    assert result.exit_code == 0, result.output
    assert records[0]["choices"] == ["a dog", "a cat"]
    assert "meta" not in records[0]


def test_an_absolute_path_inside_the_root_becomes_relative(root: Path) -> None:
    rows = [PLAIN | {"audio": str(root / "sub" / "b.wav")}, PLAIN | {"id": "y", "audio": "/etc/hostname"}]
    _, records, rejected = import_rows(jsonl.app, rows, root)
    assert [record["audio"] for record in records] == ["sub/b.wav"]
    assert [(entry["id"], entry["reason"]) for entry in rejected] == [("y", "audio_outside_root")]


CHOICES = ["a dog", "a cat", "a bird"]


@pytest.mark.parametrize(
    ("form", "answer", "outcome"),
    [
        ("auto", "a cat", "a cat"),
        ("auto", " A cat. ", "a cat"),
        ("auto", "B", "a cat"),
        ("auto", "(b)", "a cat"),
        ("auto", "B. a cat", "a cat"),
        ("auto", "B. a dog", "answer_not_a_choice"),
        ("auto", "D", "answer_not_a_choice"),
        ("auto", 1, "ambiguous_answer"),
        ("auto", "1", "answer_not_a_choice"),
        ("auto", None, "missing_field"),
        ("auto", "", "empty_text"),
        ("auto", ["a cat"], "wrong_type"),
        ("text", "a cat", "a cat"),
        ("text", "B", "answer_not_a_choice"),
        ("text", 1, "answer_not_a_choice"),
        ("letter", "B", "a cat"),
        ("index0", 1, "a cat"),
        ("index0", "1", "a cat"),
        ("index0", 0, "a dog"),
        ("index0", 3, "answer_not_a_choice"),
        ("index0", -1, "answer_not_a_choice"),
        ("index0", "B", "wrong_type"),
        ("index0", True, "wrong_type"),
        ("index0", 1.0, "wrong_type"),
        ("index1", 1, "a dog"),
        ("index1", "3", "a bird"),
        ("index1", 0, "answer_not_a_choice"),
    ],
)
def test_every_form_of_answer_becomes_the_choices_text_or_is_refused(
    root: Path, form: str, answer: Any, outcome: str
) -> None:
    _, records, rejected = import_rows(
        jsonl.app, [PLAIN | {"choices": CHOICES, "answer": answer}], root, "--answer", form
    )
    assert [record["answer"] for record in records] + [entry["reason"] for entry in rejected] == [outcome]


@pytest.mark.parametrize(
    ("form", "outcome"), [("auto", "ambiguous_answer"), ("text", "A"), ("letter", "B"), ("index0", "B")]
)
def test_choices_that_are_letters_need_a_word_from_the_user(root: Path, form: str, outcome: str) -> None:
    row = PLAIN | {"choices": ["B", "A"], "answer": 0 if form == "index0" else "A"}
    _, records, rejected = import_rows(jsonl.app, [row], root, "--answer", form)
    assert [record["answer"] for record in records] + [entry["reason"] for entry in rejected] == [outcome]


def test_numbers_as_choices_become_texts(root: Path) -> None:
    _, records, _ = import_rows(jsonl.app, [PLAIN | {"choices": [1, 2.5, "3"], "answer": "2.5"}], root)
    assert records[0]["choices"] == ["1", "2.5", "3"]
    row = PLAIN | {"choices": [1, 2, 3], "answer": 2}
    _, records, _ = import_rows(jsonl.app, [row], root, "--answer", "text")
    assert records[0]["answer"] == "2"


@pytest.mark.parametrize("word", ["audio", "audio=", "=x", "sound=x", "meta=x"])
def test_a_map_that_means_nothing_is_wrong_usage(root: Path, word: str) -> None:
    result, _, _ = import_rows(jsonl.app, [PLAIN], root, "--map", word)
    assert result.exit_code == 2


def test_a_field_mapped_twice_is_wrong_usage(root: Path) -> None:
    result, _, _ = import_rows(jsonl.app, [PLAIN], root, "--map", "audio=a", "--map", "audio=b")
    assert result.exit_code == 2


MMAR = {
    "id": "BV1",
    "audio_path": "./sub/b.wav",
    "question": "q?",
    "choices": ["a dog", "a cat"],
    "answer": "a cat",
    "modality": "sound",
    "category": "Semantic Layer",
    "sub-category": "Counting",
    "language": "en",
    "thinking": "Because of the <seg> noise.",
    "cue": ["meow"],
    "rubric": [{"name": "n", "choices": [0, 1]}],
}
MMAU = {
    "id": "m-1",
    "audio_id": "./a.wav",
    "question": "q?",
    "choices": ["a dog", "a cat"],
    "answer": "a cat ",
    "task": "sound",
    "split": "test-mini",
    "category": ["Reasoning", "Perception"],
    "sub-category": "Temporal",
    "difficulty": "easy",
}


@pytest.mark.parametrize(("row", "audio", "key"), [(MMAR, "sub/b.wav", "audio_path"), (MMAU, "a.wav", "audio_id")])
@pytest.mark.parametrize("words", [(), "own"])
def test_benchmark_rows_keep_their_breakdown_keys(
    root: Path, row: dict[str, Any], audio: str, key: str, words: object
) -> None:
    named = ("--benchmark", "mmar" if row is MMAR else "mmau") if words == "own" else ()
    result, records, _ = import_rows(benchmark.app, [row], root, *named)
    assert result.exit_code == 0, result.output
    (record,) = records
    assert (record["id"], record["audio"], record["answer"]) == (row["id"], audio, "a cat")
    assert record["meta"] == {name: row[name] for name in row if name not in (key, *PLAIN)}
    assert "think" not in record


def test_benchmark_rows_that_cannot_be_used_are_named(root: Path) -> None:
    rows = [
        MMAR,
        MMAR | {"id": "empty", "choices": ["a cat", ""]},
        MMAU | {"id": "twice", "choices": ["a cat", "a cat"]},
        {key: value for key, value in (MMAU | {"id": "withheld"}).items() if key != "answer"},
        {"id": "other", "question": "q?"},
    ]
    result, records, rejected = import_rows(benchmark.app, rows, root)
    assert result.exit_code == 0
    assert len(records) == 1
    assert [(entry["id"], entry["reason"]) for entry in rejected] == [
        ("empty", "empty_text"),
        ("twice", "duplicate_choice"),
        ("withheld", "missing_field"),
        ("other", "missing_field"),
    ]


@pytest.mark.parametrize(
    ("choices", "answer", "right"),
    [
        ({"B": "a dog", "A": "a bell", "C": "rain"}, "A", "a bell"),
        ({"A": "a bell", "C": "rain", "D": "a dog"}, "C", "rain"),
        ({"b": "a dog", "a": "a bell"}, "(a)", "a bell"),
        ({"1": "a bell", "2": "a dog"}, "1", "a bell"),
        ({"A": "a bell", "C": "rain"}, "rain", "rain"),
    ],
)
def test_of_choices_with_keys_the_key_decides(root: Path, choices: dict[str, str], answer: str, right: str) -> None:
    result, records, _ = import_rows(jsonl.app, [PLAIN | {"choices": choices, "answer": answer}], root)
    assert result.exit_code == 0, result.output
    assert records[0]["answer"] == right and records[0]["choices"] == [choices[key] for key in sorted(choices)]


def test_a_letter_that_is_no_key_names_no_choice(root: Path) -> None:
    rows = [PLAIN | {"choices": {"A": "a bell", "C": "rain", "D": "a dog"}, "answer": "B"}]
    _, records, rejected = import_rows(jsonl.app, rows, root)
    assert not records and rejected[0]["reason"] == "answer_not_a_choice"


def test_an_empty_column_of_choices_moves_no_letter(root: Path) -> None:
    row = {"id": "x", "audio": "a.wav", "question": "q?", "a": "a bell", "b": "", "c": "rain", "d": "a dog"}
    result, records, _ = import_rows(jsonl.app, [row | {"answer": "C"}], root, "--map", "choices=a,b,c,d")
    assert result.exit_code == 0, result.output
    assert records[0]["answer"] == "rain" and records[0]["choices"] == ["a bell", "rain", "a dog"]


def test_a_mapped_key_that_no_row_has_is_named_with_the_nearest(root: Path) -> None:
    result, _, _ = import_rows(jsonl.app, [PLAIN], root, "--map", "question=questoin")
    assert result.exit_code == 2 and "questoin" in result.output and "question" in result.output


def test_a_byte_that_is_no_utf_8_costs_one_row_of_a_table(root: Path) -> None:
    table = root / "in.csv"
    lines = [f"a.wav,caption {number}".encode() for number in range(400)]
    lines[301] = "a.wav,caf\u00e9".encode("cp1252")
    table.write_bytes(b"\n".join([b"file,caption", *lines]) + b"\n")
    words = ["--map", "audio=file", "--map", "meta.caption=caption"]
    target = root / "out.jsonl"
    result = CliRunner().invoke(delimited.app, [str(table), str(target), "--audio-root", str(root), *words])
    assert result.exit_code == 0, result.output
    rejected = [orjson.loads(line) for line in target.with_name("out.jsonl.rejected.jsonl").open("rb")]
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [(303, "not_utf8")]
    assert sum(1 for _ in target.open("rb")) == 399


def test_a_table_in_utf_16_is_read(root: Path) -> None:
    table = root / "in.csv"
    table.write_text("file,caption\na.wav,caf\u00e9\n", encoding="utf-16")
    words = ["--map", "audio=file", "--map", "meta.caption=caption"]
    target = root / "out.jsonl"
    result = CliRunner().invoke(delimited.app, [str(table), str(target), "--audio-root", str(root), *words])
    assert result.exit_code == 0, result.output
    assert orjson.loads(target.read_bytes())["meta"]["caption"] == "caf\u00e9"
