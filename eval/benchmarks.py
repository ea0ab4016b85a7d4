"""Benchmarks: where their rows, audio, choices and keys are. A user's AudioQA manifest is one of them, without code.

The official layouts are read as they are published, nothing is renamed or moved. Metadata is a JSON list or JSONL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUDIO_QA = "audio-qa"

# A meta field of a manifest with more labels than this is a name or a note, not something to break scores down by.
MAX_LABELS = 64
NO_LABEL = "(none)"


class BenchmarkError(ValueError):
    """The rows cannot be used; the message names the file, the row and the cure."""


@dataclass(frozen=True)
class Benchmark:
    """One published benchmark.

    `files`: names that its metadata has under the root, the first that exists is read. `breakdowns`: the fields that
    the official report breaks down by; the macro mean is over the first. `revisions`: sha256 of the metadata files
    that published numbers belong to, with their name.
    """

    name: str
    title: str
    files: tuple[str, ...]
    audio_key: str
    breakdowns: tuple[str, ...]
    num_rows: int
    get_it: str
    revisions: Mapping[str, str]


BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "mmar",
            "MMAR",
            ("MMAR-meta.jsonl", "MMAR-meta.json"),
            "audio_path",
            ("modality", "category", "sub-category"),
            1000,
            "MMAR-meta.jsonl from github.com/ddlBoJack/MMAR; audio/ from huggingface.co/datasets/BoJack/MMAR",
            {"1c9a343e7bebf1037482b935c54eacd43cc63df7b2c668724b5560caf1f84fad": "February 2026, with rubrics"},
        ),
        Benchmark(
            "mmau-mini",
            "MMAU test-mini",
            ("mmau-test-mini.json",),
            "audio_id",
            ("task", "difficulty", "category", "sub-category"),
            1000,
            "mmau-test-mini.json from github.com/Sakshi113/MMAU; test-mini-audios/ from "
            "huggingface.co/datasets/gamma-lab-umd/MMAU-test-mini",
            {"9f18fda99f8dbc2bc5ecd6323fb5063309f54969810b5c6f1caeb3b8d904cf1c": "v05.15.25"},
        ),
        Benchmark(
            "mmau",
            "MMAU test",
            ("mmau-test.json",),
            "audio_id",
            ("task", "difficulty", "category", "sub-category"),
            9000,
            "mmau-test.json from github.com/Sakshi113/MMAU; test-audios/ from "
            "huggingface.co/datasets/gamma-lab-umd/MMAU-test. Its answers are withheld: upload the --official file",
            {},
        ),
    )
}


@dataclass(frozen=True)
class Item:
    """One question. `audio` is relative to the audio root, `answer` None where withheld, `row` as published."""

    id: str
    audio: str
    question: str
    choices: tuple[str, ...]
    answer: str | None
    row: dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """The rows of a benchmark, and what identifies them: its name and the sha256 of the file they came from."""

    name: str
    file: Path
    sha256: str
    items: list[Item]
    breakdowns: tuple[str, ...]

    @property
    def revision(self) -> str | None:
        """The published revision that this file is, None when it is no known one."""
        benchmark = BENCHMARKS.get(self.name)
        return benchmark.revisions.get(self.sha256) if benchmark else None


def load_benchmark(name: str, root: str | Path) -> Questions:
    """The rows of a published benchmark under its root folder. Raises BenchmarkError."""
    if name not in BENCHMARKS:
        raise BenchmarkError(f"no benchmark {name!r}: {', '.join(BENCHMARKS)}, or a manifest with --audio-qa")
    benchmark = BENCHMARKS[name]
    files = [Path(root) / file for file in benchmark.files]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise BenchmarkError(f"{files[0]}: no such file. {benchmark.title} is {benchmark.get_it}")
    return load_questions(name, file)


def load_questions(name: str, file: str | Path) -> Questions:
    """The rows of one metadata file or manifest, by the keys of the benchmark `name` (AUDIO_QA for a manifest)."""
    file = Path(file)
    benchmark = BENCHMARKS.get(name)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{file}: {error.strerror}") from error
    items: list[Item] = []
    seen: set[str] = set()
    for where, row in _rows(content, file):
        item = _item(row, benchmark.audio_key if benchmark else "audio", where)
        if item.id in seen:
            raise BenchmarkError(f"{where}: the id {item.id!r} was there before; ids must be unique to resume by them")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise BenchmarkError(f"{file}: no rows in it")
    breakdowns = benchmark.breakdowns if benchmark else guess_breakdowns([item.row for item in items])
    return Questions(name, file, hashlib.sha256(content).hexdigest(), items, breakdowns)


def labels(row: Mapping[str, Any], field: str) -> list[str]:
    """The labels of a row under `field`, of the row itself or of its `meta`. A list counts under each of its labels."""
    meta = row.get("meta")
    value = row[field] if field in row else meta.get(field) if isinstance(meta, Mapping) else None
    values = value if isinstance(value, list) else [value]
    named = [str(value) for value in dict.fromkeys(values) if value not in (None, "")]
    return named or [NO_LABEL]


def guess_breakdowns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Fields to break down by where no benchmark says: the official ones that rows have, then every field of `meta`
    that holds between 2 and MAX_LABELS labels."""
    known = dict.fromkeys(field for benchmark in BENCHMARKS.values() for field in benchmark.breakdowns)
    found = [field for field in known if any(field in row for row in rows)]
    metas = [meta for row in rows if isinstance(meta := row.get("meta"), Mapping)]
    for field in dict.fromkeys(field for meta in metas for field in meta):
        if field in found or not all(_is_label(meta.get(field)) for meta in metas):
            continue
        if 2 <= len({label for row in rows for label in labels(row, field)} - {NO_LABEL}) <= MAX_LABELS:
            found.append(field)
    return tuple(found)


def _is_label(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(value is None or isinstance(value, (str, bool, int)) for value in values)


def _rows(content: bytes, file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where, row) of a JSON list or of JSONL."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{file}: not UTF-8 ({error})") from error
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), 1))
        except json.JSONDecodeError as error:
            raise BenchmarkError(f"{file}: not a JSON list ({error})") from error
        unit = "row"
    else:
        rows, unit = [], "line"
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise BenchmarkError(f"{file}, line {number}: not JSON ({error})") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise BenchmarkError(f"{file}, {unit} {number}: not a JSON object but {type(row).__name__}")
        yield f"{file}, {unit} {number}", row


def _item(row: dict[str, Any], audio_key: str, where: str) -> Item:
    for key, kind in (("id", (str, int)), (audio_key, str), ("question", str), ("choices", list)):
        if not isinstance(row.get(key), kind):
            raise BenchmarkError(f"{where}: {key!r} is {row.get(key)!r}, which is no {_name_of(kind)}")
    choices = row["choices"]
    if not all(isinstance(choice, str) for choice in choices):
        raise BenchmarkError(f"{where}: every choice must be text: {choices!r}")
    answer = row.get("answer")
    if not isinstance(answer, (str, type(None))):
        raise BenchmarkError(f"{where}: 'answer' must be the text of a choice, not {answer!r}")
    return Item(str(row["id"]), row[audio_key], row["question"], tuple(choices), answer or None, row)


def _name_of(kind: type | tuple[type, ...]) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join({str: "text", int: "number", list: "list"}[kind] for kind in kinds)
