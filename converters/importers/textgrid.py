"""Praat TextGrids -> labelled audio, a record a file.

    python -m converters.importers.textgrid FOLDER OUT.jsonl --audio-root DIR [--tier words] [--map audio='{file}.flac']

The audio is the file of the same name under the audio root. The intervals of the tiers become events, each with its
tier's name as `tier`; empty ones are silence and left out, and so are point tiers, which have no length. Of two tiers
of one name the second is NAME_2; `--tier NAME` takes both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from praatio import textgrid
from praatio.utilities.constants import Interval
from praatio.utilities.errors import DuplicateTierName, PraatioException

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import MapOption, Mapper, Preset, require_columns
from echo_plugins.audio_qa import Reason, RowError

_NUMBERED = re.compile(r"_[0-9]+\Z")

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[Path, typer.Argument(metavar="IN", exists=True, help="A TextGrid, or a folder of them.")],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    tier: Annotated[list[str], typer.Option(help="Take this tier; may be given again.", show_default="all")] = [],  # noqa: B006
    map_: MapOption = [],  # noqa: B006  typer reads the default, nobody changes it
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn Praat TextGrids into a manifest of labelled audio. The line of a rejected row is the number of its file.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    layout = Preset(fields={"id": "file", "audio": "{file}.wav"}).with_map(map_)
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    require_columns(map_, [{"file": "", "events": []}], str(source))
    found = source.rglob("*") if source.is_dir() else [source]
    files = sorted(file for file in found if file == source or file.suffix.lower() == ".textgrid")

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        for number, file in enumerate(files, start=1):
            yield number, read_textgrid(file, file.relative_to(source if source.is_dir() else file.parent), tier)

    conversion.import_records(source, target, rejected, audio, Mapper(layout, audio, source.stem).record, workers, rows)


def _open(file: Path, of_one_name: Literal["error", "rename"]) -> textgrid.Textgrid:
    return textgrid.openTextgrid(
        str(file), includeEmptyIntervals=False, reportingMode="error", duplicateNamesMode=of_one_name
    )


def read_textgrid(file: Path, name: Path, tiers: list[str]) -> dict[str, object] | RowError:
    """The intervals of one file as events, or what is wrong with it."""
    numbered = False
    try:
        try:
            grid = _open(file, "error")
        except DuplicateTierName:
            grid, numbered = _open(file, "rename"), True
    except UnicodeError as error:
        return RowError(Reason.NOT_UTF8, f"{name}: neither UTF-8 nor UTF-16 ({error}): iconv -f CP1252 -t UTF-8")
    # The others are for files that end early, or hold 1.2.3, or a key that is not there.
    except (PraatioException, LookupError, ValueError, TypeError, AttributeError, OSError) as error:
        return RowError(Reason.NOT_A_TEXTGRID, f"{name}: {error}")
    if numbered:
        tiers = [other for other in grid.tierNames if other in tiers or _NUMBERED.sub("", other) in tiers] or tiers
    if missing := [tier for tier in tiers if tier not in grid.tierNames]:
        return RowError(Reason.MISSING_FIELD, f"{name} has no tier {missing}, only {list(grid.tierNames)}")
    events = [
        {"label": entry.label.strip(), "start": entry.start, "end": entry.end, "tier": tier.name}
        for tier in grid.tiers
        if not tiers or tier.name in tiers
        for entry in tier.entries
        if isinstance(entry, Interval) and entry.label.strip()
    ]
    return {"file": name.with_suffix("").as_posix(), "events": events}


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.textgrid")
