"""JSONL or JSON rows of any shape -> AudioQA, with a field map.

    python -m converters.importers.jsonl IN OUT.jsonl --audio-root DIR \\
        --map audio=audio_path --map choices=multi_choice --map question=qa.text --answer index0

A field that is not mapped is read under its own name. Dots walk into objects and lists. Rows without an id get one from
the file's name and the line. Keys that no field took are kept under `meta`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from converters import conversion
from converters.audio_qa import FIELDS, AudioQA, Reason, RowError
from converters.conversion import AudioRoot
from echo_plugins.relisten.transcript import match_choice

_LETTER = re.compile(r"\(?[A-Za-z]\)?[.:]?")


class AnswerForm(StrEnum):
    """How the source says which choice is right."""

    AUTO = "auto"
    TEXT = "text"
    LETTER = "letter"
    INDEX0 = "index0"
    INDEX1 = "index1"


app = conversion.new_command()


@app.command()
def main(
    source: conversion.ImportedArgument,
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    map_: Annotated[
        list[str],
        typer.Option(
            "--map",
            metavar="FIELD=KEY",
            help=f"Where a field stands in the source; FIELD is one of {', '.join(FIELDS[:-1])}. "
            "Dots walk into objects (qa.text); several keys, choices=option_a,option_b, make one list.",
        ),
    ] = [],  # noqa: B006  typer reads the default, nobody changes it
    answer: Annotated[
        AnswerForm,
        typer.Option(help="How the answer is given; auto takes the choice's text or its letter, never a number."),
    ] = AnswerForm.AUTO,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn JSONL or JSON rows of any shape into an AudioQA manifest.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    fields = parse_map(map_)
    root = audio_root.resolve()

    def to_record(line: int, row: object) -> AudioQA:
        return record_of(row, fields, answer, root, default_id=f"{source.stem}-{line:07d}")

    conversion.import_records(source, target, rejected, AudioRoot(root), to_record, workers)


def parse_map(pairs: Sequence[str]) -> dict[str, str]:
    """FIELD=KEY words to {field: key}. Raises typer.BadParameter (exit status 2)."""
    fields: dict[str, str] = {}
    for pair in pairs:
        name, equals, key = pair.partition("=")
        if not equals or not key or name not in FIELDS[:-1]:
            raise typer.BadParameter(f"{pair!r} is not FIELD=KEY with FIELD one of {', '.join(FIELDS[:-1])}")
        if name in fields:
            raise typer.BadParameter(f"{name!r} is mapped twice")
        fields[name] = key
    return fields


def record_of(row: object, fields: Mapping[str, str], form: AnswerForm, root: Path, default_id: str) -> AudioQA:
    """One source row as AudioQA. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError(Reason.NOT_AN_OBJECT, f"a row is a JSON object, this is a {type(row).__name__}")
    keys = {name: fields.get(name, name) for name in FIELDS[:-1]}
    found = {name: _choices(row, key) if name == "choices" else _look_up(row, key) for name, key in keys.items()}
    taken = {part.strip() for key in keys.values() for part in (key, *key.split(","))}
    found["meta"] = {key: value for key, value in row.items() if key not in taken}
    if isinstance(row.get("meta"), dict):
        found["meta"] |= found["meta"].pop("meta", {})
    if found["id"] is None:
        found["id"] = default_id
    if isinstance(found["audio"], str):
        found["audio"] = relative_audio(found["audio"], root)
    if isinstance(found["choices"], list) and found["answer"] is not None:
        found["answer"] = answer_text(found["answer"], found["choices"], form)
    return AudioQA.from_json({name: value for name, value in found.items() if value is not None})


def relative_audio(path: str, root: Path) -> str:
    """`path` relative to the audio root where it is an absolute path inside it; otherwise tidied (`./a` is `a`)."""
    plain = Path(path)
    if plain.is_absolute() and plain.is_relative_to(root):
        plain = plain.relative_to(root)
    return plain.as_posix()


def answer_text(answer: Any, choices: Sequence[Any], form: AnswerForm) -> Any:
    """The text of the right choice; what names none is handed back for the record to refuse.

    Raises RowError when text and letter name different choices, and for a number without `--answer index0|index1`.
    """
    texts = [choice.strip() if isinstance(choice, str) else "" for choice in choices]
    said = answer.strip() if isinstance(answer, str) else answer
    if form in (AnswerForm.INDEX0, AnswerForm.INDEX1):
        digits = isinstance(said, str) and said.isascii() and said.isdigit()
        if not digits and (isinstance(said, bool) or not isinstance(said, int)):
            raise RowError(Reason.WRONG_TYPE, f"--answer {form} takes whole numbers, this is {said!r}"[:200])
        index = int(said) - (form is AnswerForm.INDEX1)
        if not 0 <= index < len(texts):
            raise RowError(Reason.ANSWER_NOT_A_CHOICE, f"there is no choice {said} ({form}) among {len(texts)}")
        return texts[index]
    if form is AnswerForm.TEXT and type(said) in (int, float):
        said = str(said)  # as the choices' numbers are
    if not isinstance(said, str):
        if isinstance(said, int):
            raise RowError(Reason.AMBIGUOUS_ANSWER, f"the answer is the number {said}: say --answer index0 or index1")
        return said
    readings: set[int] = set()
    if form is not AnswerForm.LETTER and said in texts:
        readings.add(texts.index(said))
    if form is not AnswerForm.TEXT:
        # Without the texts `match_choice` can only read a letter.
        named = match_choice(said, [""] * len(texts) if _LETTER.fullmatch(said) else texts)
        if named is not None:
            readings.add(named)
    if len(readings) > 1:
        raise RowError(Reason.AMBIGUOUS_ANSWER, f"{said!r} is a choice's text and another's letter: say --answer")
    return texts[readings.pop()] if readings else said


def _look_up(row: Any, key: str) -> Any:
    if isinstance(row, dict) and key in row:
        return row[key]  # a key that has dots in its name
    value = row
    for part in key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _choices(row: dict[str, Any], key: str) -> Any:
    """A list as it is, the values of {"A": .., "B": ..}, or one list from several keys; numbers as text."""
    if key in row or "," not in key:
        value = _look_up(row, key)
    else:
        value = [choice for choice in (_look_up(row, part.strip()) for part in key.split(",")) if choice is not None]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        value = [str(item) if type(item) in (int, float) else item for item in value]
    return value


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.jsonl")
