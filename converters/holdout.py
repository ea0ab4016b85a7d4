"""Set rows of an AudioQA manifest aside for evaluation, so that no recording lies on both sides.

    python -m converters.holdout IN.jsonl --rows N --held HELD.jsonl --rest REST.jsonl

A recording is what `meta.recording` names, otherwise the audio file. Which ones are held depends on their names alone:
the same manifest is always divided in the same way, and a recording that is added later moves few of the others.
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
    counts = Counter(recording_of_line(line) for line in source.open("rb"))
    chosen = held_recordings(counts, rows)
    if len(chosen) == len(counts):
        typer.echo(
            f"error: {source}: holding {rows} of its {counts.total()} rows would leave none, since a recording "
            f"({len(counts)} in all) is held whole. Choose fewer --rows (a recipe's EVAL_HOLDOUT or RL_HOLDOUT).",
            err=True,
        )
        raise typer.Exit(1)
    with StagedFile(held) as held_file, StagedFile(rest) as rest_file:
        with held_file.path.open("wb") as held_out, rest_file.path.open("wb") as rest_out:
            for line in source.open("rb"):
                (held_out if recording_of_line(line) in chosen else rest_out).write(line.rstrip(b"\n") + b"\n")
        held_file.commit()
        rest_file.commit()
    num_held = sum(counts[audio] for audio in chosen)
    typer.echo(
        f"== {source}: {counts.total()} rows of {len(counts)} recordings: {num_held} rows of {len(chosen)} recordings "
        f"are held out in {held}, {counts.total() - num_held} rows are left in {rest}"
    )


def recording_of_line(line: bytes) -> str | None:
    """What `audio_qa.recording_of` says of the row; None for a line that is no such row, which the exporters reject."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(row, dict) or "audio" not in row:
        return None
    meta = row.get("meta")
    return str((meta.get("recording") if isinstance(meta, dict) else None) or row["audio"])


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
