"""Every importer on spoilt copies of a sample file: bytes dropped, changed and put in, lines and cells moved.

Never a traceback, and every row that is there is written or refused. ECHO_FUZZ_SEEDS tries more copies.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from converters.importers import delimited, hf, jsonl, lhotse, rttm, textgrid
from converters.importers.delimited import read_table
from echo_plugins.audio_qa import RowError

SEEDS = range(int(os.environ.get("ECHO_FUZZ_SEEDS", "25")))
NAMES = ("a", "b", "c")


def lines(content: bytes) -> int:
    return sum(1 for line in re.split(rb"\r\n|\r|\n", content) if line.strip(b" \t,\x0b\x0c"))


def rows(content: bytes) -> int:
    return sum(1 for line in content.split(b"\n") if line.strip())


def jsonl_of(values: list[Any]) -> bytes:
    return b"".join(orjson.dumps(value) + b"\n" for value in values)


def parquet(stream: bool) -> bytes:
    sound, out = io.BytesIO(), io.BytesIO()
    soundfile.write(sound, np.zeros(16_000), 16_000, format="FLAC")
    values = [{"id": name, "audio": {"bytes": sound.getvalue(), "path": f"{name}.flac"}, "n": 1} for name in NAMES]
    table = pa.Table.from_pylist(values)
    if stream:
        with pa.ipc.new_stream(out, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, out)
    return out.getvalue()


QA = [
    {"id": name, "audio": f"{name}.wav", "question": "q?", "choices": ["a dog", "a cat"], "answer": "a cat"}
    | {"think": "At <seg>0.50, 1.50</seg>.", "events": [{"label": "cat", "start": 0.5, "end": 1.5}], "duration": 2.0}
    for name in NAMES
]
CUTS = [
    {"id": name, "start": 0, "duration": 2.0, "supervisions": [{"start": 0.1, "duration": 1, "text": "yes"}]}
    | {"recording": {"id": name, "duration": 2.0, "sources": [{"type": "file", "source": f"{name}.wav"}]}}
    for name in NAMES
]
JAMS = {"annotations": [{"namespace": "x", "data": [{"time": 0, "duration": 1, "value": {"label": "v"}}]}]}
GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2
tiers? <exists>
size = 1
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 2
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 2
            text = "hello"
"""
LABELS = [
    word
    for pair in ("audio=file", "event.label=label", "event.start=onset", "event.end=offset")
    for word in ("--map", pair)
]


@dataclass(frozen=True)
class Sample:
    """A good file of an importer, and how many rows a spoilt copy has, where that can be counted."""

    app: typer.Typer
    name: str
    content: bytes
    words: tuple[str, ...] = ()
    rows_there: Callable[[bytes], int | None] = lambda content: None


TABLE = "file,label,onset,offset\n" + "".join(f"{name}.wav,dog,{at},1.5\n" for name in NAMES for at in (0, 0.5))
CAPTIONS = 'file\tcaption\na.wav\t"say ""stop"""\nb.wav\t"two\nlines"\nc.wav\tplain\n'
TURNS = "".join(f"SPEAKER {name} 1 {at} 0.5 <NA> <NA> s{at} <NA> <NA>\n" for name in NAMES for at in (0, 1))
WORDS = "".join(f"{name} {channel} 0.5 0.25 yes 0.9\n" for name in NAMES for channel in "AB")
CAPTION = ("--map", "audio=file", "--map", "meta.captions=caption")

SAMPLES = {
    "jsonl": Sample(jsonl.app, "in.jsonl", jsonl_of(QA), rows_there=rows),
    "json": Sample(jsonl.app, "in.json", json.dumps(QA, indent=1).encode()),
    "jsonl.gz": Sample(jsonl.app, "in.jsonl.gz", gzip.compress(jsonl_of(QA), mtime=0)),
    "utf-16": Sample(jsonl.app, "in.jsonl", jsonl_of(QA).decode().encode("utf-16")),
    "nemo": Sample(
        jsonl.app,
        "in.json",
        jsonl_of([{"audio_filepath": f"{name}.wav", "duration": 2.0, "offset": 0, "text": "x"} for name in NAMES]),
        ("--preset", "nemo"),
        rows,
    ),
    "jams": Sample(jsonl.app, "a.jams", json.dumps(JAMS).encode(), ("--preset", "jams"), lambda content: 1),
    "labels": Sample(delimited.app, "in.csv", TABLE.encode(), tuple(LABELS), lambda content: lines(content) - 1),
    "quoted": Sample(delimited.app, "in.tsv", CAPTIONS.encode(), CAPTION),
    "rttm": Sample(rttm.app, "in.rttm", TURNS.encode()),
    "ctm": Sample(rttm.app, "in.ctm", WORDS.encode(), rows_there=rows),
    "textgrid": Sample(textgrid.app, "a.TextGrid", GRID.encode(), rows_there=lambda content: 1),
    "lhotse": Sample(lhotse.app, "cuts.jsonl", jsonl_of(CUTS), rows_there=rows),
    "parquet": Sample(hf.app, "in.parquet", parquet(stream=False)),
    "arrow": Sample(hf.app, "in.arrow", parquet(stream=True)),
}


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to three things wrong."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        end = min(len(content), place + draw.choice((1, 1, 2, 5, 40)))
        kind = draw.randrange(6)
        if kind == 0:
            content = content[:place] + content[end:]
        elif kind == 1:
            content = content[:place] + draw.randbytes(end - place) + content[end:]
        elif kind == 2:
            content = content[:place] + draw.choice(TROUBLE) + content[place:]
        elif kind == 3:
            content = content[:place]
        else:
            mark = draw.choice((b"\n", b"\n", b",", b"\t", b" ", b'"'))
            pieces = content.split(mark)
            one, other = draw.randrange(len(pieces)), draw.randrange(len(pieces))
            pieces[one], pieces[other] = pieces[other], pieces[one]
            content = mark.join(pieces)
    return content


TROUBLE = (
    b'"',
    b",",
    b"\t",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"NaN",
    b"1e999",
    b"-",
    b"null",
    b"{",
    b"[",
    b"# ",
)


def of(path: Path) -> list[Any]:
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


@pytest.mark.parametrize("name", SAMPLES)
def test_a_spoilt_file_gives_no_traceback_and_every_row_is_written_or_refused(tmp_path: Path, name: str) -> None:
    sample, root = SAMPLES[name], tmp_path / "audio"
    root.mkdir()
    for stem in NAMES:
        soundfile.write(root / f"{stem}.wav", np.zeros(32_000), 16_000)
    source, target = tmp_path / sample.name, tmp_path / "out.jsonl"
    for seed in (None, *SEEDS):
        content = sample.content if seed is None else spoilt(sample.content, random.Random(f"{name} {seed}"))
        source.write_bytes(content)
        target.unlink(missing_ok=True)
        words = [str(source), str(target), "--audio-root", str(root), *sample.words]
        result = CliRunner().invoke(sample.app, words)
        where = f"{name}, seed {seed}: {content[:2_000]!r}\n{result.output}"
        assert result.exception is None or isinstance(result.exception, SystemExit), where
        said = re.search(r"([0-9]+) rows read, ([0-9]+) written to .*, ([0-9]+) rejected", result.stderr)
        if said is None:
            assert result.exit_code in (1, 2) and "rror" in result.output and not target.exists(), where
            continue
        records, rejected = of(target), of(target.with_name("out.jsonl.rejected.jsonl"))
        assert [int(number) for number in said.groups()] == [len(records) + len(rejected), len(records), len(rejected)]
        assert result.exit_code == (1 if not records or "error: " in result.stderr else 0), where
        there = sample.rows_there(content)
        if there is not None and "not read" not in result.stderr:
            told = re.search(r"([0-9]+) rows, gathered", result.stderr)  # of a table whose rows are events
            assert (int(told[1]) if told else len(records) + len(rejected)) == there, where
        assert seed is not None or (result.exit_code == 0 and not rejected), where


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\x00"), max_size=6)


@given(st.lists(st.tuples(CELLS, CELLS, CELLS), max_size=5), st.sampled_from(",;\t"))
def test_a_table_reads_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, cells: list[tuple[str, ...]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("table") / "in.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("one", "two", "three"), *cells])
    found = [row for _, row in read_table(path, delimiter, True, 1, None, lambda num_bytes: None)]
    assert not any(isinstance(row, RowError) for row in found)
    written = [{k: v for k, v in zip(("one", "two", "three"), row, strict=True) if v.strip()} for row in cells]
    assert found == [row for row in written if row]
