"""The importers as commands: field maps, the forms of an answer, and the official benchmark layouts."""

from __future__ import annotations

import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
from typer.testing import CliRunner, Result

from converters import hf_parquet
from converters.importers import benchmark, delimited, hf, jsonl, lhotse, rttm, textgrid
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


def convert(app: typer.Typer, root: Path, name: str, content: bytes | str, *words: str) -> tuple[Result, Any, Any]:
    """(result, records, rejected) of running `app` on a file with that name and content."""
    source, target = root.parent / name, root.parent / "out.jsonl"
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    target.unlink(missing_ok=True)
    result = CliRunner().invoke(app, [str(source), str(target), "--audio-root", str(root), *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result, read(target), read(target.with_name("out.jsonl.rejected.jsonl"))


def mapped(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--map", pair)]


LABELS = mapped("audio=file", "event.label=label", "event.start=onset", "event.end=offset")
HEADER = "file,label,onset,offset\n"


@pytest.mark.parametrize(
    ("header", "good", "bad"),
    [
        (HEADER, "sub/b.wav,dog,0.5,1", "sub/b.wav,bell, small,1,2"),
        ("label,onset,offset,file\n", "dog,0.5,1,sub/b.wav", "bell, small,1,2,sub/b.wav"),
        ("label,file,onset,offset\n", "dog,sub/b.wav,0.5,1", "bell, small,sub/b.wav,1,5,2"),
        (HEADER, "sub/b.wav,dog,0.5,1", "sub/b.wav,bell,x,2"),
        (HEADER, "sub/b.wav,dog,0.5,1", 'sub/b.wav,"bell,1,2'),
        (HEADER, "sub/b.wav,dog,0.5,1", "sub/b.wav,caf\udce9,1,2"),
    ],
)
def test_a_bad_label_row_takes_its_clip_with_it_wherever_it_fails(root: Path, header: str, good: str, bad: str) -> None:
    names = header.strip().split(",")
    other = ",".join({"file": "a.wav", "label": "rain", "onset": "0", "offset": "1"}[name] for name in names)
    table = f"{header}{other}\n{good}\n{bad}\n".encode("utf-8", "surrogateescape")
    result, records, rejected = convert(delimited.app, root, "in.csv", table, *LABELS)
    assert result.exit_code == 0, result.output
    assert [record["audio"] for record in records] == ["a.wav"]
    assert [entry["line"] for entry in rejected] == [4, 3]
    assert rejected[1]["reason"] == "incomplete_labels" and "line 4" in rejected[1]["detail"]


@pytest.mark.parametrize("bad", [",dog,1,2", "caf\udce9.wav,dog,1,2", 'a.wav,"dog,1,2\nsub/b.wav,bell",1,2'])
def test_a_label_row_that_names_no_clip_or_two_ends_the_import(root: Path, bad: str) -> None:
    table = f"{HEADER}a.wav,rain,0,1\n{bad}\n".encode("utf-8", "surrogateescape")
    result, records, _ = convert(delimited.app, root, "in.csv", table, *LABELS)
    assert result.exit_code == 1 and not records
    assert "line 3" in result.stderr and ("any clip may lack a label" in result.stderr or "a quote" in result.stderr)


def test_a_quote_that_nothing_closes_costs_its_own_line(root: Path) -> None:
    lines = [f"a.wav,caption {number}" for number in range(300)]
    lines[20] = 'a.wav,"torn'
    lines[200] = 'a.wav,"whole, with a ""comma"""'
    words = mapped("audio=file", "meta.caption=caption")
    result, records, rejected = convert(delimited.app, root, "in.csv", "\n".join(["file,caption", *lines]), *words)
    assert result.exit_code == 0 and len(records) == 299
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [(22, "not_a_table")]
    assert records[199]["meta"]["caption"] == 'whole, with a "comma"'


@pytest.mark.parametrize(
    ("table", "captions"),
    [
        ('file\tcaption\na.wav\t"say ""stop"""\na.wav\t"two\nlines"\n', ['say "stop"', "two\nlines"]),
        ('file\tcaption\na.wav\t"Stop," he said\na.wav\tsay "hi"\n', ['"Stop," he said', 'say "hi"']),
    ],
)
def test_quotes_around_all_cells_of_a_tsv_are_the_formats_and_others_the_texts(
    root: Path, table: str, captions: list[str]
) -> None:
    words = mapped("audio=file", "meta.caption=caption")
    result, records, _ = convert(delimited.app, root, "in.tsv", table, *words)
    assert [record["meta"]["caption"] for record in records] == captions
    assert ("--no-quoted" in result.stderr) == (captions[0] == 'say "stop"')


def test_the_segment_lists_of_audioset_are_read(root: Path) -> None:
    table = (
        "# Segments csv created Mon\n# num_ytids=2, num_segs=2\n# YTID, start_seconds, end_seconds, positive_labels\n"
    )
    table += 'a, 30.000, 40.000, "/m/09x0r,/m/05zppz"\nsub/b, 0.000, 10.000, "/m/04rlf"\n'
    words = mapped("audio={YTID}.wav", "meta.labels=positive_labels")
    _, records, rejected = convert(delimited.app, root, "in.csv", table, *words)
    assert [record["meta"]["labels"] for record in records] == ["/m/09x0r,/m/05zppz", "/m/04rlf"] and not rejected


def test_two_columns_of_a_name_that_is_wanted_are_refused(root: Path) -> None:
    table = "file,caption,caption,x,x\na.wav,one,two,3,4\n"
    result, _, _ = convert(delimited.app, root, "in.csv", table, *mapped("audio=file", "meta.caption=caption"))
    assert result.exit_code == 2 and "two columns 'caption'" in result.output
    result, records, _ = convert(delimited.app, root, "in.csv", table, *mapped("audio=file"))
    assert records[0]["meta"] == {"caption": "one", "caption 3": "two", "x": "3", "x 5": "4"}


def test_a_table_takes_the_form_of_its_answers(root: Path) -> None:
    table = "file,question,one,two,gold\na.wav,q?,a bell,a dog,1.0\na.wav,q?,a bell,a dog,0\n"
    words = [*mapped("audio=file", "choices=one,two", "answer=gold"), "--answer", "index0"]
    _, records, _ = convert(delimited.app, root, "in.csv", table, *words)
    assert [record["answer"] for record in records] == ["a dog", "a bell"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("index,mid,name\n0,/m/1,Dog\n", "3 columns"),
        (b"/m/1,caf\xe9\n", "UTF-8"),
        ("/m/1\n", "1 column"),
    ],
)
def test_a_label_map_that_is_none_is_refused_in_one_line(root: Path, content: bytes | str, told: str) -> None:
    labels = root.parent / "labels.csv"
    labels.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\na\t0\t1\t/m/1\n"
    words = ["--preset", "audioset-strong", "--label-map", str(labels)]
    result, _, _ = convert(delimited.app, root, "in.tsv", table, *words)
    assert result.exit_code == 2 and told in result.output


def test_labels_that_the_map_lacks_are_counted(root: Path) -> None:
    (root.parent / "labels.csv").write_text('/m/1,"Dog, bark"\n')
    table = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel\na\t0\t1\t/m/1\na\t0\t1\t/m/2\n"
    words = ["--preset", "audioset-strong", "--label-map", str(root.parent / "labels.csv")]
    result, records, _ = convert(delimited.app, root, "in.tsv", table, *words)
    assert {event["label"] for event in records[0]["events"]} == {"Dog, bark", "/m/2"}
    assert "1 of 2 labels are not in" in result.stderr and "/m/2" in result.stderr


def test_a_key_that_only_a_late_row_has_may_be_mapped_and_a_path_that_none_has_may_not(root: Path) -> None:
    rows = [{"audio": "a.wav", "qa": {"text": "x"}}] * 1_200 + [{"audio": "a.wav", "note": {"said": "late"}}]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    result, records, _ = convert(jsonl.app, root, "in.jsonl", content, *mapped("meta.caption=note.said"))
    assert result.exit_code == 0 and records[-1]["meta"]["caption"] == "late"
    result, _, _ = convert(jsonl.app, root, "in.jsonl", content, *mapped("meta.caption=note.sald"))
    assert result.exit_code == 2 and "note.sald" in result.output


@pytest.mark.parametrize(
    ("app", "name", "content"),
    [
        (rttm.app, "in.rttm", "SPEAKER a 1 0 1 <NA> <NA> s <NA> <NA>\n"),
        (rttm.app, "in.ctm", "a 1 0 1 yes\n"),
        (textgrid.app, "in.TextGrid", ""),
    ],
)
def test_the_columns_of_a_fixed_format_are_known(root: Path, app: typer.Typer, name: str, content: str) -> None:
    result, _, _ = convert(app, root, name, content, "--map", "audio={fiel}.wav")
    assert result.exit_code == 2 and "did you mean 'file'" in result.output


def test_channels_of_a_conversation_stay_apart_and_na_is_a_word(root: Path) -> None:
    content = "a A 0.1 0.2 hello\na B 0.2 0.2 who\na A 0.5 0.2 NA\na B 0.6 0.2 is\nsub/b 1 0 0.5 yes 0.9\n"
    _, (a, b), _ = convert(rttm.app, root, "in.ctm", content)
    assert a["meta"]["transcript"] == "hello NA\nwho is" and b["meta"]["transcript"] == "yes"
    assert [event["channel"] for event in a["events"]] == ["A", "B", "A", "B"]
    assert b["events"] == [{"label": "yes", "start": 0.0, "end": 0.5, "kind": "speech"}]


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("in.ctm", b"sub/b 1 0.1 0.2 caf\xe9\n", "not_utf8"),
        ("in.rttm", b"SPEAKER sub/b 1 0.1 0.2 <NA> <NA> caf\xe9 <NA> <NA>\n", "not_utf8"),
        ("in.rttm", b"SPEAKER sub/b 1 0.1 0.2 <NA>\n", "not_a_table"),
        ("in.rttm", b"SPEAKER sub/b 1 0.1 0.2 <NA> <NA> two words <NA> <NA>\n", "not_a_table"),
    ],
)
def test_a_bad_line_of_speech_is_refused_and_takes_its_recording_with_it(
    root: Path, name: str, bad: bytes, reason: str
) -> None:
    good = b"%s 1 0 1 yes\n" if name == "in.ctm" else b"SPEAKER %s 1 0 1 <NA> <NA> s <NA> <NA>\n"
    content = good % b"a" + bad + good % b"sub/b"
    _, records, rejected = convert(rttm.app, root, name, content)
    assert [record["audio"] for record in records] == ["a.wav"]
    assert [entry["reason"] for entry in rejected] == [reason, "incomplete_labels"]


def test_a_recording_with_a_blank_in_its_name_is_told_so(root: Path) -> None:
    content = "SPEAKER my a 1 0 1 <NA> <NA> s <NA> <NA>\nSPEAKER a 1 .50 +0.5 <NA> <NA> s <NA> <NA>\n"
    _, records, (rejected,) = convert(rttm.app, root, "in.rttm", content)
    assert records[0]["events"][0]["start"] == 0.5 and "11 words" in rejected["detail"]


GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
2
<exists>
2
"IntervalTier"
"speaker"
0
2
1
0
1
"ja"
"IntervalTier"
"speaker"
0
2
1
1
2
"nej"
"""


def test_two_tiers_of_one_name_are_numbered_and_taken_together(root: Path) -> None:
    for words in ([], ["--tier", "speaker"]):
        _, (record,), _ = convert(textgrid.app, root, "a.TEXTGRID", GRID, *words)
        assert [(event["label"], event["tier"]) for event in record["events"]] == [
            ("ja", "speaker"),
            ("nej", "speaker_2"),
        ]
    _, records, (rejected,) = convert(textgrid.app, root, "a.TEXTGRID", GRID, "--tier", "words")
    assert not records and "no tier ['words']" in rejected["detail"]


def test_file_names_that_are_no_utf_8_are_refused_and_the_others_taken(root: Path) -> None:
    folder = root.parent / "grids"
    folder.mkdir()
    for name in (b"a.TEXTGRID", b"caf\xe9.TextGrid"):
        (folder / os.fsdecode(name)).write_text(GRID)
    target = root.parent / "out.jsonl"
    result = CliRunner().invoke(textgrid.app, [str(folder), str(target), "--audio-root", str(root)])
    assert result.exit_code == 0, result.output
    (rejected,) = read(target.with_name("out.jsonl.rejected.jsonl"))
    assert rejected["reason"] == "not_utf8" and "rename" in rejected["detail"]
    assert [record["audio"] for record in read(target)] == ["a.wav"]


@pytest.mark.parametrize("transform", ["Speed", "Volume", "Reverberate"])
def test_a_cut_that_lhotse_would_change_is_no_whole_recording(root: Path, transform: str) -> None:
    recording = {"id": "r", "sources": [{"type": "file", "source": "a.wav"}], "duration": 2.0}
    cut = {"id": "c", "start": 0, "duration": 2.0, "recording": recording | {"transforms": [{"name": transform}]}}
    _, records, (rejected,) = convert(lhotse.app, root, "cuts.jsonl", json.dumps(cut))
    assert not records and rejected["reason"] == "not_a_whole_recording" and transform in rejected["detail"]


@pytest.mark.parametrize("app", [jsonl.app, lhotse.app], ids=["jsonl", "lhotse"])
def test_a_damaged_gzip_keeps_the_rows_before_it_and_fails(root: Path, app: typer.Typer) -> None:
    recording = {"id": "r", "sources": [{"type": "file", "source": "a.wav"}], "duration": 2.0}
    cut = {"start": 0, "duration": 2.0, "recording": recording} if app is lhotse.app else {"audio": "a.wav"}
    content = "".join(json.dumps(cut | {"id": f"c{number}"}) + "\n" for number in range(50)).encode()
    result, records, rejected = convert(app, root, "in.jsonl.gz", gzip.compress(content) + b"garbage")
    assert result.exit_code == 1 and "in.jsonl.gz" in result.stderr and "not read" in result.stderr
    assert len(records) == 50 and [entry["line"] for entry in rejected] == [51]


def test_a_cut_list_and_a_byte_that_is_no_utf_8_in_one(root: Path) -> None:
    rows = [PLAIN | {"id": str(number)} for number in range(10)]
    content = json.dumps(rows, indent=0).encode()
    result, records, _ = convert(jsonl.app, root, "in.json", content[: len(content) // 2])
    assert result.exit_code == 1 and len(records) == 5 and "5 good rows" in result.stderr
    result, records, (rejected,) = convert(jsonl.app, root, "in.json", content.replace(b"q?", b"\xe9", 1))
    assert result.exit_code == 0 and len(records) == 9 and rejected["reason"] == "not_utf8"


def test_an_object_around_the_rows_on_one_line_is_named(root: Path) -> None:
    result, _, (rejected,) = convert(jsonl.app, root, "in.json", json.dumps({"version": 1, "data": [PLAIN, PLAIN]}))
    assert result.exit_code == 1 and "'data', 'version'" in rejected["detail"] and '.["data"]' in rejected["detail"]


def test_both_lines_of_an_id_that_is_there_twice_are_named(root: Path) -> None:
    content = "".join(json.dumps(PLAIN | {"id": row_id}) + "\n" for row_id in ("1", "2", "3", "2"))
    _, _, (rejected,) = convert(jsonl.app, root, "in.jsonl", content)
    assert rejected["line"] == 4 and "line 2" in rejected["detail"]


def test_embedded_audio_of_two_files_of_one_name_stays_apart(root: Path) -> None:
    records = []
    for split, level in (("train", 0.1), ("test", 0.2)):
        sound = io.BytesIO()
        soundfile.write(sound, np.full(16_000, level), 16_000, format="WAV")
        source, target = root.parent / split / "0000.parquet", root.parent / split / "out.jsonl"
        source.parent.mkdir()
        pq.write_table(pa.Table.from_pylist([{"audio": {"bytes": sound.getvalue(), "path": None}}] * 2), source)
        assert CliRunner().invoke(hf.app, [str(source), str(target), "--audio-root", str(root)]).exit_code == 0
        records.append(read(target))
        assert (root / records[-1][0]["audio"]).read_bytes() == sound.getvalue()
    (train, same), (test, _) = records
    assert train["audio"] == same["audio"] != test["audio"] and train["audio"].endswith(".wav")


def test_a_parquet_row_that_python_cannot_hold_is_refused_and_a_broken_file_named(root: Path) -> None:
    source, target = root.parent / "in.parquet", root.parent / "out.jsonl"
    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xe9"))
    pq.write_table(pa.table({"audio": ["a.wav", "a.wav"], "caption": text}), source)
    result = CliRunner().invoke(hf.app, [str(source), str(target), "--audio-root", str(root)])
    assert result.exit_code == 0, result.output
    assert [entry["reason"] for entry in read(target.with_name("out.jsonl.rejected.jsonl"))] == ["not_utf8"]
    source.write_bytes(source.read_bytes()[:-9])
    result = CliRunner().invoke(hf.app, [str(source), str(target), "--audio-root", str(root)])
    assert result.exit_code == 1 and "in.parquet" in result.output


@pytest.mark.parametrize("words", [(), ("--embed-audio",)])
def test_a_hugging_face_file_of_ours_comes_back_as_it_was(root: Path, words: tuple[str, ...]) -> None:
    row = PLAIN | {"think": "so", "events": [{"label": "cat", "start": 0.5, "end": 1.0}], "duration": 2.0}
    row |= {"meta": {"recording": "r", "captions": ["a cat"]}}
    manifest, parquet, target = root.parent / "in.jsonl", root.parent / "in.parquet", root.parent / "out.jsonl"
    manifest.write_bytes(orjson.dumps(row))
    for app, source, out, more in ((hf_parquet.app, manifest, parquet, words), (hf.app, parquet, target, ())):
        result = CliRunner().invoke(app, [str(source), str(out), "--audio-root", str(root), *more])
        assert result.exit_code == 0, result.output
    (record,) = read(target)
    assert record | {"audio": "a.wav"} == row


def test_a_damaged_arrow_file_does_not_end_the_process(root: Path) -> None:
    source, target = root.parent / "in.arrow", root.parent / "out.jsonl"
    table = pa.table({"audio": ["a.wav"] * 3, "caption": ["one", "two", "three"]})
    with pa.OSFile(str(source), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    whole = source.read_bytes()
    offsets = np.array([0, 3, 6, 11], np.int32).tobytes()  # of the captions
    assert whole.count(offsets) == 1
    source.write_bytes(whole.replace(offsets, np.array([0, 3, 1 << 30, 11], np.int32).tobytes()))
    result = CliRunner().invoke(hf.app, [str(source), str(target), "--audio-root", str(root)])
    assert result.exit_code == 0 and [record["meta"]["caption"] for record in read(target)] == ["one"]
    assert len(read(target.with_name("out.jsonl.rejected.jsonl"))) == 2
