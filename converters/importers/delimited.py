"""TSV or CSV, a row an event or a row a clip -> labelled audio or AudioQA, with a column map.

    python -m converters.importers.delimited IN.tsv OUT.jsonl --audio-root DIR --preset desed
    python -m converters.importers.delimited IN.csv OUT.jsonl --audio-root DIR --map audio=file \\
        --map event.label=class --map event.start=onset --map event.end=offset

With `event.label` mapped, the rows of one clip become one record; a clip with a bad row is left out, and both are
named. Otherwise a row is a clip. Empty cells count as not there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import (
    LabelMapOption,
    MapOption,
    Mapper,
    load_preset,
    preset_option,
    read_label_map,
    record_of_clip,
    require_columns,
)
from echo_plugins.audio_qa import Reason, RowError

_MAX_CELL_CHARS = 1 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, help="TSV or CSV with a header.")
    ],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    preset: Annotated[str | None, preset_option("delimited")] = None,
    map_: MapOption = [],  # noqa: B006  typer reads the default, nobody changes it
    label_map: LabelMapOption = None,
    delimiter: Annotated[
        str | None, typer.Option(help="One character.", show_default="the preset's; a tab for .tsv, else a comma")
    ] = None,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn a table of labels or captions into a manifest of labelled audio, or of AudioQA where it has questions.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    layout = load_preset(preset, "delimited").with_map(map_)
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem, read_label_map(label_map))
    parted_by = delimiter or layout.reader.get("delimiter") or ("\t" if source.suffix == ".tsv" else ",")
    quoted = layout.reader.get("quoted", parted_by != "\t")
    headers, columns = layout.reader.get("header_rows", 1), layout.reader.get("columns")
    gathered = "event.label" in layout.fields or layout.reader.get("gathered", False)

    first = next(read_table(source, parted_by, quoted, headers, columns, lambda _: None, names_only=True), (0, {}))[1]
    require_columns(map_, first if isinstance(first, dict) else (), str(source))

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        table = read_table(source, parted_by, quoted, headers, columns, advance)
        return mapper.clips(table) if gathered else table

    to_record = record_of_clip if gathered else mapper.record
    conversion.import_records(source, target, rejected, audio, to_record, workers, rows)


def read_table(
    source: Path,
    delimiter: str,
    quoted: bool,
    header_rows: int,
    columns: list[str] | None,
    advance: Callable[[int], None],
    names_only: bool = False,
) -> Iterator[Numbered]:
    """(line, {column: cell}) of every row. Several header rows are joined by dots; with `columns` there is none."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    with source.open("rb") as begin:
        encoding = "utf-16" if begin.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    # A byte that is no UTF-8 costs its own row: it is kept as a surrogate, which no text has.
    with source.open(encoding=encoding, errors="surrogateescape", newline="") as stream:
        reader = csv.reader(_counted(stream, advance), delimiter=delimiter, quoting=quoting)
        try:
            names = columns or _header(reader, header_rows)
            if names_only:
                yield 0, dict.fromkeys(names, "")
                return
            for cells in reader:
                if not cells:
                    continue
                if wrong := [name for name, cell in zip(names, cells, strict=False) if _SURROGATE.search(cell)]:
                    yield reader.line_num, RowError(Reason.NOT_A_TABLE, f"column {wrong[0]!r} is not UTF-8")
                elif len(cells) > len(names):
                    detail = f"{len(cells)} cells under {len(names)} columns; is {delimiter!r} what parts them?"
                    yield reader.line_num, RowError(Reason.WRONG_TYPE, detail)
                elif header_rows == 1 or any(
                    cells[1:]
                ):  # pandas names the index of a many-row header in a row of its own
                    yield (
                        reader.line_num,
                        {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()},
                    )
        except (csv.Error, UnicodeDecodeError) as error:
            yield reader.line_num + 1, RowError(Reason.NOT_A_TABLE, f"{error}; the rest of the table is not read")


def _header(reader: Iterator[list[str]], header_rows: int) -> list[str]:
    """The columns' names; the first is `index` where pandas left it empty."""
    rows = [next(reader, []) for _ in range(header_rows)]
    names = [".".join(part for part in parts if part) for parts in zip(*rows, strict=False)]
    return [name or ("index" if not place else f"column {place + 1}") for place, name in enumerate(names)]


def _counted(stream: Iterator[str], advance: Callable[[int], None]) -> Iterator[str]:
    for line in stream:
        advance(len(line))
        yield line


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.delimited")
