"""RTTM (who speaks when) and CTM (which word when) -> labelled audio.

    python -m converters.importers.rttm IN.rttm OUT.jsonl --audio-root DIR [--map audio='{file}.flac']

One record a file that the lines name. A turn's label is its speaker, a word's the word; CTM words are `meta.transcript`
too. Where a file has several channels, each event names its `channel`, and the transcript has a line a channel. A file
with a bad line is left out, and both are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import MapOption, Mapper, Preset, record_of_clip, require_columns
from echo_plugins.audio_qa import DAMAGE, Reason, Record, RowError, damaged, opened


class Lines(StrEnum):
    """What the lines are."""

    RTTM = "rttm"
    CTM = "ctm"


_COLUMNS = {
    Lines.RTTM: ("type", "file", "channel", "start", "duration", "text", "subtype", "speaker", "confidence", "ahead"),
    Lines.CTM: ("file", "channel", "start", "duration", "word", "confidence"),
}
_FEWEST = {Lines.RTTM: 8, Lines.CTM: 5}
_FILE = {Lines.RTTM: 1, Lines.CTM: 0}  # the place of the file's name in a line
_LABEL = {Lines.RTTM: "speaker", Lines.CTM: "word"}
_NOT_GIVEN = "<NA>"

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, help="RTTM or CTM.")],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    lines: Annotated[Lines | None, typer.Option(help="What the lines are.", show_default="by the name of IN")] = None,
    map_: MapOption = [],  # noqa: B006  typer reads the default, nobody changes it
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn speaker turns (RTTM) or timed words (CTM) into a manifest of labelled audio.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    kind = lines or (Lines.CTM if source.suffix == ".ctm" else Lines.RTTM)
    event = {"label": _LABEL[kind], "start": "start", "duration": "duration", "kind": {"value": "speech"}}
    event |= {"channel": "channel"}
    fields: dict[str, Any] = {"id": "file", "audio": "{file}.wav", "meta.domain": {"value": "speech"}}
    fields |= {f"event.{name}": spec for name, spec in event.items()}
    layout = Preset(fields=fields).with_map(map_)
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem)
    require_columns(map_, [dict.fromkeys(_COLUMNS[kind])], str(source))
    taken = {name.removeprefix("meta.") for name in layout.fields if name.startswith("meta.")}

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        return mapper.clips(read_lines(source, kind, advance))

    def to_record(line: int, clip: object) -> Record:
        if isinstance(clip, dict):
            clip["meta"] = {name: value for name, value in clip["meta"].items() if name in taken}
            by_channel: dict[str, list[Any]] = {}
            for event in sorted(clip["events"], key=lambda event: event["start"]):
                by_channel.setdefault(event.get("channel", ""), []).append(event)
            if len(by_channel) == 1:
                for event in clip["events"]:
                    event.pop("channel", None)
            if kind is Lines.CTM:
                words = (" ".join(event["label"] for event in events) for _, events in sorted(by_channel.items()))
                clip["meta"].setdefault("transcript", "\n".join(words))
        return record_of_clip(line, clip)

    conversion.import_records(source, target, rejected, audio, to_record, workers, rows)


def read_lines(source: Path, kind: Lines, advance: Callable[[int], None]) -> Iterator[Numbered]:
    """(line, {column: word}) of every turn or word; comments and other types of RTTM line are passed over."""
    columns, place, number = _COLUMNS[kind], _FILE[kind], 0
    try:
        with opened(source) as stream:
            for number, raw in enumerate(stream, start=1):
                advance(len(raw))
                line = raw.decode("utf-8-sig", "surrogateescape")
                words = line.split()
                if not words or line.startswith(";;") or (kind is Lines.RTTM and words[0] != "SPEAKER"):
                    continue
                # With blanks in its name there are surplus words, and the name is one of these.
                names = (" ".join(words[place : place + size]) for size in range(1, len(words) - len(columns) + 2))
                readings = tuple({"file": name} for name in names) or (
                    {"file": words[place]} if len(words) > place else {},
                )
                if not line.isascii() and not _is_utf8(raw):
                    detail = "the line is not UTF-8: save the file as UTF-8 (iconv -f CP1252 -t UTF-8)"
                    yield number, RowError(Reason.NOT_UTF8, detail, readings=readings)
                elif not _FEWEST[kind] <= len(words) <= len(columns):
                    needed = f"{_FEWEST[kind]} to {len(columns)} are needed; is there a blank in a name?"
                    yield number, RowError(Reason.NOT_A_TABLE, f"{len(words)} words, {needed}", readings=readings)
                else:
                    pairs = zip(columns, words, strict=False)
                    yield number, {name: word for name, word in pairs if word != _NOT_GIVEN}
    except DAMAGE as error:
        yield number + 1, damaged(source, error)


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.rttm")
