"""TSV or CSV, a row an event or a row a clip -> labelled audio or AudioQA, with a column map.

    python -m converters.importers.delimited IN.tsv OUT.jsonl --audio-root DIR --preset desed
    python -m converters.importers.delimited IN.csv OUT.jsonl --audio-root DIR --map audio=file \\
        --map event.label=class --map event.start=onset --map event.end=offset

With `event.label` mapped, the rows of one clip become one record; a clip with a bad row is left out, and both are
named. Otherwise a row is a clip. Empty cells count as not there.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import (
    AnswerOption,
    LabelMapOption,
    MapOption,
    Mapper,
    keys_of,
    load_preset,
    preset_option,
    read_label_map,
    record_of_clip,
    require_columns,
)
from echo_plugins.audio_qa import DAMAGE, FIELDS, Reason, RowError, damaged, opened

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
    quoted: Annotated[
        bool | None,
        typer.Option(
            "--quoted/--no-quoted",
            help="Quotes around a cell are the format's, not the text's.",
            show_default="the preset's; yes for commas, for tabs where all quotes are around cells",
        ),
    ] = None,
    answer: AnswerOption = None,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn a table of labels or captions into a manifest of labelled audio, or of AudioQA where it has questions.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    layout = load_preset(preset, "delimited").with_map(map_)
    layout = replace(layout, answer=answer) if answer else layout
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem, read_label_map(label_map))
    suffix = Path(source.name.removesuffix(".gz")).suffix
    delimiter = "\t" if delimiter == "\\t" else delimiter  # as one types it in a shell
    parted_by = delimiter or layout.reader.get("delimiter") or ("\t" if suffix == ".tsv" else ",")
    if len(parted_by) != 1:
        raise typer.BadParameter(f"{parted_by!r} is not one character", param_hint="--delimiter")
    quotes = layout.reader.get("quoted") if quoted is None else quoted
    if quotes is None:
        quotes = parted_by != "\t" or (not source.is_fifo() and quotes_cells(source, parted_by))
        if quotes and parted_by == "\t":
            typer.echo(f"== {source}: cells stand in quotes, which are taken off; --no-quoted keeps them", err=True)
    headers, columns = layout.reader.get("header_rows", 1), layout.reader.get("columns")
    gathered = "event.label" in layout.fields or layout.reader.get("gathered", False)

    table = partial(read_table, source, parted_by, quotes, headers, columns)
    wanted = {*keys_of(layout.fields.values()), *FIELDS}
    if map_ and not source.is_fifo():
        require_columns(map_, (names for _, names in table(lambda _: None, wanted, names_only=True)), str(source))

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        return mapper.clips(table(advance, wanted)) if gathered else table(advance, wanted)

    to_record = record_of_clip if gathered else mapper.record
    conversion.import_records(source, target, rejected, audio, to_record, workers, rows)
    if mapper.unmapped:
        shown = ", ".join(sorted(mapper.unmapped)[:3])
        all_of = len(mapper.unmapped) + len(mapper.mapped)
        found = f"{len(mapper.unmapped)} of {all_of} labels are not in {label_map} and stay as they are"
        typer.echo(f"== warning: {found}: {shown}", err=True)


def read_table(
    source: Path,
    delimiter: str,
    quoted: bool,
    header_rows: int,
    columns: list[str] | None,
    advance: Callable[[int], None],
    wanted: Collection[str] = (),
    names_only: bool = False,
) -> Iterator[Numbered]:
    """(line, {column: cell}) of every row. Several header rows are joined by dots; with `columns` there is none. Lines
    that begin with # stand before the header, or are it where they have a `wanted` column."""
    csv.field_size_limit(_MAX_CELL_CHARS)
    lines = _Lines(advance)
    parse = partial(
        csv.reader, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=quoted
    )
    try:
        with _text_of(source) as stream:
            lines.read(stream)
            reader = parse(lines, skipinitialspace=True)
            names = columns or _header(lines, reader, header_rows, wanted, str(source))
            if names_only:
                yield 0, dict.fromkeys(names, "")
                return
            commented = columns is not None  # comments may stand before the first row, as they do before a header
            while True:
                lines.taken.clear()
                number = lines.number + 1
                try:
                    cells = next(reader, None)
                except csv.Error as error:  # a quote that nothing closes takes the lines after it with it
                    words = [word.strip(' "') for word in lines.taken[0].rstrip().split(delimiter)]
                    lines.give_back()
                    yield number, RowError(Reason.NOT_A_TABLE, str(error), readings=_readings(names, words))
                    continue
                if cells is None:
                    return
                if commented and cells and cells[0].startswith("# "):
                    continue
                commented = False
                if not any(cell.strip() for cell in cells):
                    continue
                if wrong := [name for name, cell in zip(names, cells, strict=False) if _SURROGATE.search(cell)]:
                    detail = f"column {wrong[0]!r} is not UTF-8: save the table as UTF-8 (iconv -f CP1252 -t UTF-8)"
                    yield number, RowError(Reason.NOT_UTF8, detail, readings=_readings(names, cells))
                elif len(cells) > len(names):
                    detail = f"{len(cells)} cells under {len(names)} columns; is {delimiter!r} what parts them?"
                    yield number, RowError(Reason.WRONG_TYPE, detail, readings=_readings(names, cells))
                elif header_rows == 1 or any(cells[1:]):
                    # pandas names the index of a many-row header in a row of its own
                    yield number, {name: cell for name, cell in zip(names, cells, strict=False) if cell.strip()}
    except DAMAGE as error:
        yield lines.number + 1, damaged(source, error)


def quotes_cells(source: Path, delimiter: str) -> bool:
    """Whether quotes are a spreadsheet's, around whole cells, and not the text's own."""
    quote = re.compile(rf'(?:^|{re.escape(delimiter)})"')
    found = False

    def looked_at(stream: Iterable[str]) -> Iterator[str]:
        nonlocal found
        for line in stream:
            found = found or bool(quote.search(line))
            yield line

    try:
        with _text_of(source) as stream:
            widths = {len(cells) for cells in csv.reader(looked_at(stream), delimiter=delimiter, strict=True) if cells}
    except (*DAMAGE, csv.Error):
        return False
    return found and len(widths) == 1


@contextmanager
def _text_of(source: Path) -> Iterator[io.TextIOWrapper]:
    # A byte that is no UTF-8 costs its own row: it is kept as a surrogate, which no text has.
    with opened(source) as stream:
        yield io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


class _Lines:
    """The lines of a text, for csv.reader: those of a row that cannot be parsed can be read again."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._stream: Iterator[str] = iter(())
        self._again: deque[str] = deque()
        self.number = 0
        self.taken: list[str] = []

    def read(self, stream: Iterator[str]) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if self._again:
            line = self._again.popleft()
        else:
            line = next(self._stream)
            self._advance(len(line))
        self.number += 1
        self.taken.append(line)
        return line

    def give_back(self, kept: int = 1) -> None:
        """All lines since `taken` was cleared but the first."""
        self.number -= len(self.taken) - kept
        self._again.extendleft(reversed(self.taken[kept:]))


def _readings(names: Sequence[str], cells: Sequence[str]) -> tuple[dict[str, str], ...]:
    """The row with each run of surplus cells taken out: one of them has its clip."""
    return tuple(dict(zip(names, cells[shift:], strict=False)) for shift in range(max(0, len(cells) - len(names)) + 1))


def _header(
    lines: _Lines, reader: Iterator[list[str]], header_rows: int, wanted: Collection[str], source: str
) -> list[str]:
    """The columns' names; the first is `index` where pandas left it empty. Raises typer.BadParameter (status 2)."""
    rows: list[list[str]] = []
    while len(rows) < header_rows:
        try:
            cells = [cell.strip() for cell in next(reader, [])]
        except csv.Error as error:
            raise typer.BadParameter(f"{source}: its header cannot be read: {error}", param_hint="IN") from error
        if not rows and cells and cells[0].startswith("#") and cells[0] not in wanted:
            cells[0] = cells[0].lstrip("# ")
            if not set(wanted).intersection(cells):
                continue
        rows.append(cells)
    names = [".".join(part for part in parts if part) for parts in zip(*rows, strict=False)]
    names = [name or ("index" if not place else f"column {place + 1}") for place, name in enumerate(names)]
    twice = sorted(name for name, number in Counter(names).items() if number > 1)
    if twice and set(twice).intersection(wanted):
        raise typer.BadParameter(f"{source} has two columns {twice[0]!r}: rename one", param_hint="IN")
    lines.taken.clear()
    return [name if name not in names[:place] else f"{name} {place + 1}" for place, name in enumerate(names)]


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.delimited")
