"""RTTM (who speaks when) and CTM (which word when) -> labelled audio.

    python -m converters.importers.rttm IN.rttm OUT.jsonl --audio-root DIR [--map audio='{file}.flac']

One record a file that the lines name. A turn's label is its speaker, a word's the word; CTM words are `meta.transcript`
too. A file with a bad line is left out, and both are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from converters import conversion
from converters.conversion import AudioRoot, Numbered
from converters.importers.mapping import MapOption, Mapper, Preset, record_of_clip
from echo_plugins.audio_qa import Record


class Lines(StrEnum):
    """What the lines are."""

    RTTM = "rttm"
    CTM = "ctm"


_COLUMNS = {
    Lines.RTTM: ("type", "file", "channel", "start", "duration", "text", "subtype", "speaker", "confidence"),
    Lines.CTM: ("file", "channel", "start", "duration", "word", "confidence"),
}
_LABEL = {Lines.RTTM: "speaker", Lines.CTM: "word"}
_NOT_GIVEN = ("<NA>", "NA")

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
    fields: dict[str, Any] = {"id": "file", "audio": "{file}.wav", "meta.domain": {"value": "speech"}}
    fields |= {f"event.{name}": spec for name, spec in event.items()}
    layout = Preset(fields=fields).with_map(map_)
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem)

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        return mapper.clips(read_lines(source, kind, advance))

    def to_record(line: int, clip: object) -> Record:
        if isinstance(clip, dict):
            clip["meta"] = {"domain": "speech"}
            if kind is Lines.CTM:
                words = sorted(clip["events"], key=lambda event: event["start"])
                clip["meta"]["transcript"] = " ".join(event["label"] for event in words)
        return record_of_clip(line, clip)

    conversion.import_records(source, target, rejected, audio, to_record, workers, rows)


def read_lines(source: Path, kind: Lines, advance: Callable[[int], None]) -> Iterator[Numbered]:
    """(line, {column: word}) of every turn or word; comments and other types of RTTM line are passed over."""
    with source.open(encoding="utf-8-sig", errors="replace") as stream:
        for number, line in enumerate(stream, start=1):
            advance(len(line))
            words = line.split()
            if not words or line.startswith(";;") or (kind is Lines.RTTM and words[0] != "SPEAKER"):
                continue
            pairs = zip(_COLUMNS[kind], words, strict=False)
            yield number, {name: word for name, word in pairs if word not in _NOT_GIVEN}


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.rttm")
