"""Benchmarks are read as published, with their oddities; what cannot be used says where and why."""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet
from typer.testing import CliRunner

from eval import score
from eval.benchmarks import (
    AUDIO_QA,
    BENCHMARKS,
    NO_LABEL,
    BenchmarkError,
    Item,
    app,
    audio_problem,
    benchmark_name,
    breakdowns_of,
    definition_of,
    guess_breakdowns,
    labels,
    load_benchmark,
    load_questions,
)
from eval.predictions import PredictionsError, json_line

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
    (item,) = questions
    assert (item.id, item.audios, item.answer) == ("a_00-01-32", ("./audio/a_00-01-32.wav",), "a woman")
    assert item.choices == ("a man", "a woman", "", "nobody")
    assert item.row == MMAR_ROW
    assert breakdowns_of("mmar", [item.row]) == ("modality", "category", "sub-category")
    assert questions.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_mmau_is_read_with_a_duplicate_choice_and_a_category_that_is_a_list(tmp_path: Path) -> None:
    write(tmp_path / "mmau-test-mini.json", json.dumps([MMAU_ROW], indent=2))
    (item,) = load_benchmark("mmau-mini", tmp_path)
    assert item.choices == ("Dog", "Cat", "Dog", "Cow")
    assert labels(item.row, "category") == ["Reasoning"]


@pytest.mark.parametrize("answer", [{}, {"answer": None}, {"answer": ""}])
def test_a_withheld_answer_is_none(tmp_path: Path, answer: dict[str, Any]) -> None:
    row = {key: value for key, value in MMAU_ROW.items() if key != "answer"} | answer
    write(tmp_path / "mmau-test.json", json.dumps([row]))
    (item,) = load_benchmark("mmau", tmp_path)
    assert item.answer is None


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
    assert breakdowns_of(questions.name, [item.row for item in questions]) == ("kind",)
    assert [item.id for item in questions][3] == "3"
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
        ("[{]", "row 1: not JSON"),
        (json.dumps([MMAR_ROW])[:-1] + " {}]", "after row 1: neither ',' nor the end of the list"),
        (json.dumps([MMAR_ROW])[:-1], "after row 1: neither ',' nor the end of the list"),
        (json.dumps([MMAR_ROW, 3]), "line 2: not a JSON object but int"),
        (jsonl(MMAR_ROW | {"choices": []}), "0 choices; there may be 1 to 26"),
        (jsonl(MMAR_ROW | {"choices": [str(n) for n in range(27)]}), "27 choices; there may be 1 to 26"),
        ("\n\n", "no rows in it"),
        (jsonl(MMAR_ROW | {"choices": "a b"}), r"line 1: 'choices' is 'a b', which is no list"),
        (jsonl(MMAR_ROW | {"choices": ["a", 2]}), "every choice must be text"),
        (jsonl(MMAR_ROW | {"answer": 2}), "'answer' must be the text of a choice, not 2"),
        (jsonl({key: value for key, value in MMAR_ROW.items() if key != "audio_path"}), "the audio is None"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path / "MMAR-meta.jsonl", content)
    with pytest.raises(BenchmarkError, match=message):
        load_benchmark("mmar", tmp_path)


def test_a_missing_file_says_where_the_benchmark_is_got_from(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"MMAR-meta\.jsonl: no such file.*github\.com/ddlBoJack/MMAR"):
        load_benchmark("mmar", tmp_path)
    with pytest.raises(BenchmarkError, match="no benchmark 'nope'; there are mmar, mmau-mini, mmau"):
        load_benchmark("nope", tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchmarkError, match="not UTF-8"):
        load_questions(AUDIO_QA, tmp_path / "m.jsonl")


def test_mmsu_rows_get_choices_and_answer_from_their_letters(tmp_path: Path) -> None:
    row = {
        "id": "count_1",
        "audio_path": "/somewhere/else/count_1.wav",
        "question": "How many words?",
        **{"choice_a": 3, "choice_b": 4, "choice_c": "five", "choice_d": None, "answer_gt": 4},
        "category": "Perception",
    }
    write(tmp_path / "question" / "mmsu.jsonl", jsonl(row))
    (item,) = load_benchmark("mmsu", tmp_path)
    assert item == Item(
        "count_1",
        ("audio/count_1.wav",),
        "How many words?",
        ("3", "4", "five"),
        "4",
        row | {"choices": ["3", "4", "five"], "answer": "4"},
    )


def test_air_bench_rows_are_found_in_the_folder_of_their_task(tmp_path: Path) -> None:
    row = {
        "path": "a.wav",
        "question": "Who speaks?",
        **{"choice_a": "a man", "choice_b": "a woman", "answer_gt": "a woman", "uniq_id": 7},
    }
    rows = [row | {"task_name": task, "dataset_name": "x"} for task in ("Audio_Grounding", "Sound_AQA")]
    write(tmp_path / "Foundation_meta.json", json.dumps(rows))
    items = list(load_benchmark("air-bench-foundation", tmp_path))
    assert [item.audios for item in items] == [("Audio_Grounding_x/a.flac",), ("Sound_AQA_x/a.wav",)]
    assert [item.id for item in items] == ["Audio_Grounding/x/7", "Sound_AQA/x/7"]
    assert items[0].choices == ("a man", "a woman") and items[0].answer == items[0].row["answer"] == "a woman"


def test_mmau_pro_rows_may_have_several_clips_and_no_choices(tmp_path: Path) -> None:
    closed = {"id": "1", "audio_path": ["data/a.wav", "data/b.wav"], "question": "?", "choices": ["x", "y"]}
    rows = [
        closed | {"answer": "x", "category": "sound", "perceptual_skills": ["p", "q"]},
        {"id": "2", "audio_path": ["data/a.wav"], "question": "?", "choices": None, "answer": None, "category": "open"},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    first, second = load_benchmark("mmau-pro", tmp_path)
    assert first.audios == ("data/a.wav", "data/b.wav") and labels(first.row, "perceptual_skills") == ["p", "q"]
    assert second.choices == () and second.answer is None and second.row["choices"] == []
    (tmp_path / "test.parquet").write_bytes(b"no such thing")
    with pytest.raises(BenchmarkError, match="not Parquet"):
        load_benchmark("mmau-pro", tmp_path)


def run_check(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *words], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_check_says_what_is_missing_and_where_it_is_got_from(tmp_path: Path) -> None:
    status, said = run_check("mmar", "--benchmark-root", str(tmp_path))
    assert status == 1 and "no such file" in said and "github.com/ddlBoJack/MMAR" in said

    rows = [
        MMAR_ROW,
        MMAR_ROW | {"id": "b", "audio_path": "./audio/b.wav", "choices": ["x", "x", "y", "z"], "answer": "w"},
    ]
    write(tmp_path / "MMAR-meta.jsonl", jsonl(*rows))
    (tmp_path / "audio").mkdir()
    soundfile.write(tmp_path / "audio" / "b.wav", np.zeros(1600), 16_000)
    status, said = run_check("mmar", "--benchmark-root", str(tmp_path))
    assert status == 1
    for words in (
        "2, where 1000 are published",
        "unpinned; known here: February 2026, with rubrics (1c9a343e7beb)",
        "1 rows have theirs, 1 lack it",
        "a_00-01-32: './audio/a_00-01-32.wav': no such file",
        "1 rows with an empty choice",
        "1 rows that list a choice twice",
        "1 rows whose answer is none of the choices: always wrong",
        "huggingface.co/datasets/BoJack/MMAR",
    ):
        assert words in said, said
    assert run_check("nope", "--benchmark-root", str(tmp_path))[0] == 2


def test_check_is_content_when_all_is_there(tmp_path: Path) -> None:
    row = {"id": "1", "path": "a.wav", "task_name": "T", "dataset_name": "d", "uniq_id": 1, "question": "?"}
    write(tmp_path / "Foundation_meta.json", json.dumps([row | {"choice_a": "x", "choice_b": "y", "answer_gt": "x"}]))
    (tmp_path / "T_d").mkdir()
    soundfile.write(tmp_path / "T_d" / "a.wav", np.zeros(1600), 16_000)
    status, said = run_check("air-bench-foundation", "--benchmark-root", str(tmp_path))
    assert status == 0 and "1 rows have theirs, 0 lack it" in said and "get it" not in said


OWN = """
rows: [later.jsonl, questions.json]
id: key.number
audio: "clips/{file}.wav"
question: prompt
choices: [o1, o2, o3, o4]
answer: gold
answer_is: letter
breakdowns: [key.kind]
num_rows: 2
"""
OWN_ROWS = [
    {
        "key": {"number": 7, "kind": "bird"},
        "file": "a",
        "prompt": "Which?",
        "gold": "B",
        "answer": "seven",
        "split": "x",
    }
    | {"o1": "owl", "o2": "cuckoo", "o3": 3, "o4": None},
    {"key": {"number": 8, "kind": "car"}, "file": "b", "prompt": "Who?", "gold": "(a)", "o1": "he", "o2": "she"},
]


def own(folder: Path, definition: str = OWN, rows: Any = OWN_ROWS) -> Path:
    write(folder / "mine.yaml", definition)
    write(folder / "root" / "questions.json", json.dumps(rows))
    (folder / "root" / "clips").mkdir(exist_ok=True)
    for row in rows:
        soundfile.write(folder / "root" / "clips" / f"{row['file']}.wav", np.zeros(1600), 16_000)
    return folder / "mine.yaml"


def test_a_benchmark_of_ones_own_is_a_yaml_file_and_is_checked_as_the_others_are(tmp_path: Path) -> None:
    file = own(tmp_path)
    first, second = load_benchmark(str(file), tmp_path / "root")
    assert (first.id, first.audios, first.question) == ("7", ("clips/a.wav",), "Which?")
    assert first.choices == ("owl", "cuckoo", "3") and first.answer == "cuckoo" and second.answer == "he"
    assert first.row["answer"] == "cuckoo" and first.row["as_published"] == {"answer": "seven"}
    status, said = run_check(str(file), "--benchmark-root", str(tmp_path / "root"))
    assert status == 0 and "2 rows have theirs, 0 lack it" in said
    (tmp_path / "root" / "clips" / "b.wav").unlink()
    status, said = run_check(str(file), "--benchmark-root", str(tmp_path / "root"))
    assert status == 1 and "1 lack it" in said and "8: 'clips/b.wav'" in said


def test_a_benchmark_of_ones_own_is_scored_without_its_yaml_file(tmp_path: Path) -> None:
    file = own(tmp_path)
    questions = load_benchmark(name := benchmark_name(str(file)), tmp_path / "root")
    rows = [{**item.row, "answer_prediction": "cuckoo"} for item in questions][:1]
    write(tmp_path / "p.jsonl", jsonl(*rows))
    identity = {"benchmark": name, "questions_sha256": questions.sha256}
    sidecar = {"identity": identity, "questions": str(questions.file), "num_rows": 2, **definition_of(name)}
    write(tmp_path / "p.run.json", json.dumps(sidecar))
    file.unlink()
    del BENCHMARKS[name]
    summary = score.totals(predicted := score.load(tmp_path / "p.jsonl"), score.grade_all(predicted))
    assert (summary["total"], summary["missing"], summary["strict_accuracy"]) == (2, 1, 0.5)
    assert {label: group["strict_accuracy"] for label, group in summary["by"]["key.kind"].items()} == {
        "bird": 1.0,
        "car": 0.0,
    }


@pytest.mark.parametrize(
    ("choices", "answer_is", "gold", "answer"),
    [
        ({"B": "dog", "A": "bell", "D": "rain"}, "letter", "D", "rain"),
        ({"B": "dog", "A": "bell"}, "text", "dog", "dog"),
        (["x", "y"], "index0", 1, "y"),
        (["x", "y"], "index1", "1", "x"),
        (["x", "y"], "index1", 0, "no choice 0"),
        (["x", "y"], "letter", "E", "no choice E"),
        (["x", "y"], "letter", None, None),
        ([3, 4.5], "text", 4.5, "4.5"),
    ],
)
def test_answers_of_ones_own_benchmark_are_found_by_text_letter_or_place(
    tmp_path: Path, choices: Any, answer_is: str, gold: Any, answer: str | None
) -> None:
    definition = f"rows: questions.json\naudio: f\nquestion: q\nchoices: c\nanswer: g\nanswer_is: {answer_is}\n"
    row = {"id": 1, "f": "clips/a.wav", "file": "a", "q": "?", "c": choices, "g": gold}
    (item,) = load_benchmark(str(own(tmp_path, definition, [row])), tmp_path / "root")
    assert item.answer == answer


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("question: prompt", "", "the key 'question' is missing"),
        ("question: prompt", "qestion: prompt", "no key 'qestion': is 'question' meant?"),
        ("answer_is: letter", "answer_is: number", "'answer_is' is one of text, letter"),
        ("num_rows: 2", "rule: nv_embed", "'rule' is one of string_match, letter, first_letter"),
        ("num_rows: 2", "num_rows: two", "'num_rows' cannot be 'two'"),
        ("num_rows: 2", "num_rows: [", "cannot be read"),
        ("question: prompt", "question: 3", "'question' cannot be 3"),
    ],
)
def test_a_definition_that_is_not_right_says_why(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = own(tmp_path, OWN.replace(old, new))
    with pytest.raises(BenchmarkError, match=re.escape(message)):
        load_benchmark(str(file), tmp_path / "root")
    assert run_check(str(file), "--benchmark-root", str(tmp_path / "root"))[0] == 2


def test_a_letter_where_a_set_has_texts_is_the_choice_that_it_names(tmp_path: Path) -> None:
    row = {"id": "1", "audio_path": "a.wav", "question": "?", "choice_a": "Dog", "choice_b": "Cat", "answer_gt": "B"}
    texts = row | {"id": "2", "choice_a": "B", "choice_b": "A", "answer_gt": "B"}
    write(tmp_path / "mmsu.jsonl", jsonl(row, texts))
    assert [item.answer for item in load_benchmark("mmsu", tmp_path)] == ["Cat", "B"]


def test_the_id_that_is_asked_is_the_one_that_is_resumed_and_scored(tmp_path: Path) -> None:
    """AIR-Bench counts `uniq_id` from 1 in each task: a column `id` of the same would be there twice."""
    row = {"id": "1", "uniq_id": 1, "dataset_name": "d", "path": "a.wav", "question": "?", "choice_a": "x"}
    rows = [row | {"task_name": task, "answer_gt": "x"} for task in ("s", "t")]
    write(tmp_path / "Foundation_meta.json", json.dumps(rows))
    items = list(load_benchmark("air-bench-foundation", tmp_path))
    assert [item.row["id"] for item in items] == [item.id for item in items] == ["s/d/1", "t/d/1"]
    assert items[0].row["as_published"] == {"id": "1"}


def test_a_row_that_nests_too_deep_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", "[" * 100_000 + "\n")
    write(tmp_path / "m.json", '[{"id": ' + "[" * 100_000)
    for name in ("m.jsonl", "m.json"):
        with pytest.raises(BenchmarkError, match=r"m\.json.* 1: not JSON"):
            load_questions(AUDIO_QA, tmp_path / name)


def test_every_benchmark_is_listed_with_its_source() -> None:
    said = CliRunner().invoke(app, ["list"]).output
    assert all(benchmark.name in said and benchmark.get_it in said for benchmark in BENCHMARKS.values())


def damaged(content: bytes, chance: random.Random) -> bytes:
    """`content` with bytes dropped, doubled, changed, or text that JSON takes and others do not."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        place, length = chance.randrange(len(content)), chance.choice([1, 1, 3, 40])
        put = chance.choice(
            [
                b"",
                bytes([chance.randrange(256)]),
                content[place : place + 2 * length],
                b"null",
                b"\\ud800",
                b"[",
                b"\n",
                b"1e999",
            ]
        )
        content = content[:place] + put + content[place + length :]
    return content


LETTERED = {"id": "1", "audio_path": "a.wav", "question": "?", "choice_a": "Dog", "choice_b": "Cat", "answer_gt": "Dog"}
SAMPLES = {
    "mmar": ("MMAR-meta.jsonl", jsonl(*(MMAR_ROW | {"id": str(n)} for n in range(4)))),
    "mmau-mini": ("mmau-test-mini.json", json.dumps([MMAU_ROW | {"id": str(n)} for n in range(4)])),
    "mmau-pro": ("mmau-pro.jsonl", jsonl(*({"id": str(n), "audio_path": ["a"], "question": "?"} for n in range(4)))),
    "mmsu": ("mmsu.jsonl", jsonl(*(LETTERED | {"id": str(n)} for n in range(4)))),
    "air-bench-foundation": (
        "Foundation_meta.json",
        json.dumps(
            [LETTERED | {"uniq_id": n, "task_name": "t", "dataset_name": "d", "path": "a.wav"} for n in range(4)]
        ),
    ),
    "own": ("questions.json", json.dumps(OWN_ROWS)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_file_is_read_or_refused_by_row_and_scored_or_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path / "own.yaml", OWN)
    file, content = SAMPLES[name]
    benchmark = benchmark_name(str(tmp_path / "own.yaml")) if name == "own" else name
    chance = random.Random(20261127)
    outcomes: Counter[str] = Counter()
    for _ in range(300):
        (tmp_path / file).write_bytes(damaged(content.encode(), chance))
        try:
            questions = load_benchmark(benchmark, tmp_path)
            items = list(questions)
        except BenchmarkError as error:
            outcomes["refused"] += 1
            assert str(tmp_path / file) in str(error)
            continue
        outcomes["read"] += 1
        for item in items:
            audio_problem(item, tmp_path)
        predictions = [{**item.row, "answer_prediction": "Dog"} for item in items]
        write(tmp_path / "p.jsonl", "".join(map(json_line, predictions)))
        assert len(score.grade_all(score.load(tmp_path / "p.jsonl"))) == len(items) == questions.num_rows
        (tmp_path / "p.jsonl").write_bytes(damaged((tmp_path / "p.jsonl").read_bytes(), chance))
        try:
            score.totals(predicted := score.load(tmp_path / "p.jsonl"), score.grade_all(predicted))
        except PredictionsError as error:
            assert str(tmp_path / "p.jsonl") in str(error)
    assert outcomes["read"] > 5 and outcomes["refused"] > 20, outcomes
