"""JSON or JSONL rows of any shape -> AudioQA or labelled audio, with a field map.

    python -m converters.importers.jsonl IN OUT.jsonl --audio-root DIR \\
        --map audio=audio_path --map choices=multi_choice --map question=qa.text --answer index0
    python -m converters.importers.jsonl IN OUT.jsonl --audio-root DIR --preset musicbench

IN is a file, or a folder of files that are a row each (JAMS). A field that is not mapped is read under its own name.
Dots walk into objects and lists. Rows without an id get one from the file's name and the line. Keys that no field took
are kept under `meta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import AnswerOption, MapOption, Mapper, load_preset, preset_option, require_columns
from echo_plugins.audio_qa import Reason, RowError, parse_row, read_raw, read_value

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[Path, typer.Argument(metavar="IN", exists=True, help="JSONL, JSON, or a folder of JSON files.")],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    preset: Annotated[str | None, preset_option("jsonl")] = None,
    map_: MapOption = [],  # noqa: B006  typer reads the default, nobody changes it
    answer: AnswerOption = None,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn JSON or JSONL rows of any shape into a manifest of AudioQA or labelled audio.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    layout = load_preset(preset, "jsonl").with_map(map_)
    layout = replace(layout, answer=answer) if answer else layout
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem)
    depth = layout.reader.get("depth", 0)

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        return _nested(source, depth) if depth else _files(source, advance)

    if not source.is_fifo():
        parsed = (parse_row(row) if isinstance(row, bytes | str) else row for _, row in rows(lambda _: None))
        require_columns(map_, parsed, str(source), mapper.item_fields)
    conversion.import_records(source, target, rejected, audio, mapper.record, workers, rows)


def _files(source: Path, advance: Callable[[int], None]) -> Iterator[Numbered]:
    if source.is_dir() or source.suffix == ".jams":
        files = sorted([*source.glob("*.json"), *source.glob("*.jams")]) if source.is_dir() else [source]
        for number, file in enumerate(files, start=1):
            row = read_value(file)
            yield number, row | {"file": file.stem} if isinstance(row, dict) else row
    else:
        yield from read_raw(source, advance)


def _nested(source: Path, depth: int) -> Iterator[Numbered]:
    """The objects `depth` levels down in one object of objects, numbered."""
    value = read_value(source)
    if isinstance(value, RowError):
        yield 1, value
        return
    rows: list[Any] = [value]
    for _ in range(depth):
        if not all(isinstance(row, dict) for row in rows):
            yield 1, RowError(Reason.NOT_AN_OBJECT, f"{source}: objects {depth} levels deep are needed")
            return
        rows = [inner for row in rows for inner in row.values()]
    yield from enumerate(rows, start=1)


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.jsonl")
