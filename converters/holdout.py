"""Set rows of an AudioQA manifest aside for evaluation, so that no recording lies on both sides.

    python -m converters.holdout IN.jsonl --rows N --held HELD.jsonl --rest REST.jsonl

Which recordings are held depends on the names of the audio files alone: the same manifest is always divided in the same
way, and a recording that is added later moves few of the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Annotated

import orjson
import typer

from converters import conversion
from converters.atomic import StagedFile

app = conversion.new_command()


@app.command()
def main(
    source: conversion.ManifestArgument,
    rows: Annotated[int, typer.Option(min=1, help="Hold whole recordings until they have this many rows.")],
    held: Annotated[Path, typer.Option(dir_okay=False, help="Written whole or not at all.")],
    rest: Annotated[Path, typer.Option(dir_okay=False, help="Written whole or not at all.")],
) -> None:
    """Set rows of an AudioQA manifest aside for evaluation, so that no recording lies on both sides."""
    counts = Counter(audio_of(line) for line in source.open("rb"))
    chosen = held_recordings(counts, rows)
    if len(chosen) == len(counts):
        typer.echo(f"{source}: holding {rows} rows would leave none; it has {len(counts)} recordings", err=True)
        raise typer.Exit(1)
    with StagedFile(held) as held_file, StagedFile(rest) as rest_file:
        with held_file.path.open("wb") as held_out, rest_file.path.open("wb") as rest_out:
            for line in source.open("rb"):
                (held_out if audio_of(line) in chosen else rest_out).write(line.rstrip(b"\n") + b"\n")
        held_file.commit()
        rest_file.commit()
    num_held = sum(counts[audio] for audio in chosen)
    typer.echo(f"{held}: {num_held} rows of {len(chosen)} recordings; {rest}: {counts.total() - num_held} rows")


def audio_of(line: bytes) -> str | None:
    """The row's audio path; None for a line that is no such row, which the exporters report and reject."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return str(row["audio"]) if isinstance(row, dict) and "audio" in row else None


def held_recordings(counts: Counter[str | None], num_rows: int) -> set[str | None]:
    """The recordings with the smallest hashes, until they have `num_rows` rows between them."""
    chosen: set[str | None] = set()
    total = 0
    for audio in sorted(filter(None, counts), key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= num_rows:
            break
        chosen.add(audio)
        total += counts[audio]
    return chosen


if __name__ == "__main__":
    app(prog_name="python -m converters.holdout")
