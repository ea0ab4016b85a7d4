"""Set rows of an AudioQA manifest aside for evaluation, so that no recording lies on both sides.

    python -m converters.holdout IN.jsonl --rows N [--most-share 0.25] --held HELD.jsonl --rest REST.jsonl

A recording is what `meta.recording` names, otherwise the audio file. Which ones are held depends on their names alone:
the same manifest is always divided in the same way, and a recording that is added later moves few of the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import orjson
import typer

from converters import conversion
from converters.atomic import StagedFile
from converters.conversion import refuse_same_file
from echo_plugins.audio_qa import RowError, read_raw

app = conversion.new_command()


@app.command()
def main(
    source: conversion.ManifestArgument,
    rows: Annotated[int, typer.Option(min=1, help="Hold whole recordings until they have this many rows.")],
    held: Annotated[Path, typer.Option(dir_okay=False, help="Written whole or not at all.")],
    rest: Annotated[Path, typer.Option(dir_okay=False, help="Written whole or not at all.")],
    most_share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of a small manifest hold no more than this share of the rows.")
    ] = 1.0,
) -> None:
    """Set rows of an AudioQA manifest aside for evaluation, so that no recording lies on both sides."""
    refuse_same_file(source, held, rest)
    counts = Counter(recording_of_line(line) for line in _lines(source))
    named = counts.total() - counts[None]  # the others are no rows, and stay for the exporters to refuse
    chosen = held_recordings(counts, wanted_rows(rows, named, most_share))
    if len(chosen) == len(counts.keys() - {None}):
        typer.echo(
            f"error: {source}: holding {rows} of its {named} rows would leave none, since a recording "
            f"({len(counts.keys() - {None})} in all) is held whole. Choose fewer --rows (a recipe's EVAL_HOLDOUT or "
            "RL_HOLDOUT).",
            err=True,
        )
        raise typer.Exit(1)
    with StagedFile(held) as held_file, StagedFile(rest) as rest_file:
        with held_file.path.open("wb") as held_out, rest_file.path.open("wb") as rest_out:
            for line in _lines(source):
                (held_out if recording_of_line(line) in chosen else rest_out).write(line + b"\n")
        held_file.commit()
        rest_file.commit()
    num_held = sum(counts[audio] for audio in chosen)
    typer.echo(
        f"== {source}: {counts.total()} rows of {len(counts)} recordings: {num_held} rows of {len(chosen)} recordings "
        f"are held out in {held}, {counts.total() - num_held} rows are left in {rest}"
    )


def _lines(source: Path) -> Iterator[bytes]:
    """The rows, a line each; exit status 1 where the file cannot be read to its end."""
    for number, raw in read_raw(source, lambda num_bytes: None):
        if isinstance(raw, RowError):
            typer.echo(f"error: {source}: line {number}: {raw.detail}", err=True)
            raise typer.Exit(1)
        if isinstance(raw, str) or b"\n" in raw.rstrip():  # an element of a list, or an object over many lines
            try:
                raw = orjson.dumps(orjson.loads(raw))
            except orjson.JSONDecodeError as error:
                typer.echo(f"error: {source}: line {number}: {error}", err=True)
                raise typer.Exit(1) from error
        yield raw.rstrip(b"\r\n")


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


def wanted_rows(rows: int, total: int, most_share: float) -> int:
    """`rows`, or where that is more than `most_share` of `total` rows, that share of them; 1 at least."""
    return max(1, min(rows, int(most_share * total)))


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
