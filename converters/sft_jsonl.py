"""AudioQA manifest -> the JSONL that `swift sft` reads.

    python -m converters.sft_jsonl IN.jsonl OUT.jsonl --audio-root DIR [--mode grounded|interleaved|plain|MIX]

grounded: tags are text. interleaved: `<audio>` after each tag that the rollout would insert a clip for, and the crop as
`path#t=START,END` in `audios`. plain: no tags. Paths are absolute.

A mix, such as `--mode interleaved=50,grounded=30,plain=20`, draws each row's mode by its id: a model that was trained
on one mode alone has no answer in the others.

A row without `think` gets one from its `events`, unless `--no-from-events` is given. Where no row at all has `think`
or events, `--without-think` decides: refuse (an error), answers (rows that answer with an empty `think`), or skip (no
OUT is written, since RL needs no SFT).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from converters import conversion, shards
from converters.conversion import AudioFile, AudioRoot, Checked, Job, JsonLines, from_manifest
from converters.events_to_think import think_of_events
from echo_plugins.audio import format_fragment
from echo_plugins.audio_qa import AudioQA, Reason, RowError, read_rows, tags_of
from echo_plugins.relisten.prompt import AUDIO_TAG, MODES, Mode, user_message
from echo_plugins.relisten.segment import MAX_SEGMENTS, Segment, resolve

_WEIGHT = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")

HOW_TO_REASON = (
    "converters.synthesis makes reasoning: eaqa for labelled audio, cogito for questions about audio without labels"
)

app = conversion.new_command()


class WithoutThink(StrEnum):
    """What to do with a set in which no row has a chain of thought, nor events to build one from."""

    REFUSE = "refuse"
    ANSWERS = "answers"
    SKIP = "skip"


@app.command()
def main(
    source: conversion.ManifestArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="ms-swift JSONL, written whole or not at all.")],
    audio_root: conversion.AudioRootOption,
    mode: Annotated[
        str,
        typer.Option(
            metavar="MODE|MIX",
            help="What the chain of thought holds: interleaved (tags and sound), grounded (tags as text) or plain (no "
            "tags); or parts of each, interleaved=50,grounded=30,plain=20.",
        ),
    ] = "grounded",
    seed: Annotated[int, typer.Option(help="Of a mix: another seed gives the rows other modes.")] = 0,
    from_events: Annotated[
        bool, typer.Option("--from-events/--no-from-events", help="Build a missing 'think' from the row's 'events'.")
    ] = True,
    without_think: Annotated[
        WithoutThink,
        typer.Option(
            help="Where no row has 'think' or events: refuse ends with an error, answers writes rows that answer with "
            "an empty 'think' (mode plain), skip writes no OUT and removes an old one."
        ),
    ] = WithoutThink.REFUSE,
    model: conversion.ModelOption = None,
    rejected: conversion.RejectedOption = None,
    trust_durations: conversion.TrustOption = False,
    follow_links: conversion.LinksOption = False,
    shard_rows: shards.ShardRowsOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn an AudioQA manifest into SFT rows for ms-swift.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """

    mix = parse_mix(mode)
    found = Found.in_manifest(source, from_events)
    answers_only = False
    if found.rows and not found.with_think and not found.with_events:
        answers_only = _without_think(found, source, target, rejected, without_think)
    elif found.with_events:
        typer.echo(
            f"== {source}: {found.with_think} of {found.rows} rows have `think`; {found.with_events} more get it built "
            "from their `events` (--no-from-events leaves them out)",
            err=True,
        )
    window = conversion.window_of(model)
    audio = AudioRoot(audio_root, trust_durations, max_seconds=window, follow_links=follow_links)
    render = partial(_sft_line, mix=mix, seed=seed, from_events=from_events, answers_only=answers_only)
    job = Job(audio, from_manifest, render, JsonLines())
    settings = {"format": "sft_jsonl", "mode": mode, "seed": seed, "from_events": from_events}
    settings |= {"answers_only": answers_only} | audio.settings
    tally = shards.export(source, target, rejected, job, workers, shard_rows, settings)
    left_out = tally.rejected[Reason.NO_THINK]
    if left_out:
        typer.echo(
            f"== {left_out} rows have no `think` and are left out of SFT; RL can use them. {HOW_TO_REASON}", err=True
        )


@dataclass(frozen=True)
class Found:
    """What the rows of a manifest have to reason with."""

    rows: int = 0
    with_think: int = 0
    with_events: int = 0  # no `think`, but events that one can be built from

    @classmethod
    def in_manifest(cls, source: Path, from_events: bool) -> Found:
        """Count without looking at the audio. A row without `think` counts only if it can be used. A pipe can be read
        only once, so nothing is found in it."""
        if not source.is_file():
            return cls()
        rows = with_think = with_events = 0
        for _, row in read_rows(source, lambda num_bytes: None):
            if isinstance(row, dict) and row.get("think") is not None:  # judged later: a look must be cheap
                rows, with_think = rows + 1, with_think + 1
                continue
            try:
                record = AudioQA.from_json(row)
            except RowError:
                continue
            rows += 1
            with_events += from_events and think_of_events(record) is not None
        return cls(rows, with_think, with_events)


def _without_think(found: Found, source: Path, target: Path, side: Path | None, choice: WithoutThink) -> bool:
    """Carry out `--without-think` and say so. True: write answers only. Otherwise raises typer.Exit."""
    none_has = f"none of the {found.rows} rows has `think`, which SFT needs"
    if choice is WithoutThink.REFUSE:
        typer.echo(
            f"error: {source}: {none_has}, or `events` to build it from. --without-think answers trains on the answers "
            f"alone; --without-think skip leaves SFT out, and RL starts from the base model; {HOW_TO_REASON}.",
            err=True,
        )
        raise typer.Exit(1)
    if choice is WithoutThink.ANSWERS:
        typer.echo(
            f"== {source}: {none_has}: all {found.rows} become rows of mode plain that answer with an empty <think>, "
            f"so the model learns to answer without reasoning. {HOW_TO_REASON}.",
            err=True,
        )
        return True
    shards.remove(source, target, side)
    typer.echo(
        f"== {source}: {none_has}: no SFT rows are written to {target}, and RL starts from the base model. "
        f"{HOW_TO_REASON}.",
        err=True,
    )
    raise typer.Exit(0)


def parse_mix(text: str) -> dict[Mode, float]:
    """`interleaved`, or `interleaved=50,plain=20`, to the share of each mode, 1 in all. Raises typer.BadParameter."""
    named = dict.fromkeys(MODES, 0.0)
    for word in [f"{text}=1"] if text in named else text.split(","):
        mode, _, weight = word.strip().partition("=")
        if mode not in named or named[mode] or not _WEIGHT.fullmatch(weight):
            modes = ", ".join(MODES)
            raise typer.BadParameter(
                f"{text!r} is neither a mode ({modes}) nor a mix (MODE=WEIGHT,...)", param_hint="--mode"
            )
        named[mode] = float(weight)
    total = sum(named.values())
    if not total:
        raise typer.BadParameter(f"{text!r} gives every mode the weight 0", param_hint="--mode")
    return {mode: weight / total for mode, weight in named.items() if weight}


def mode_of(row_id: str, parts: Mapping[Mode, float], seed: int) -> Mode:
    """The mode of one row of a mix. It hangs on its id and the seed alone, not on the rows around it."""
    draw = int.from_bytes(hashlib.blake2b(f"{seed}:{row_id}".encode(), digest_size=8).digest()) / 2**64
    reached = 0.0
    for mode, share in parts.items():
        reached += share
        if draw < reached:
            return mode
    return list(parts)[-1]  # the shares add up to a little under 1


def _sft_line(
    checked: Checked[AudioQA], index: int, mix: Mapping[Mode, float], seed: int, from_events: bool, answers_only: bool
) -> bytes:
    record = checked.record
    if answers_only:
        row = _row(checked, "plain", "", [])
    else:
        if record.think is None and from_events:
            think = think_of_events(record, checked.audio.duration_seconds)
            checked = replace(checked, record=replace(record, think=think))
        row = sft_row(checked, mode_of(record.id, mix, seed))
    return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)


def sft_row(checked: Checked[AudioQA], mode: Mode) -> dict[str, Any]:
    """One ms-swift row. Raises RowError for a row without a chain of thought."""
    record, audio = checked.record, checked.audio
    if record.think is None:
        raise RowError(Reason.NO_THINK, "SFT needs 'think'; rows without one are for RL (converters.rl_parquet)")
    think, fragments = record.think, []
    if mode == "interleaved":
        think, fragments = interleave(think, audio)
    elif mode == "plain":
        think = without_tags(think)
        if not think:
            raise RowError(Reason.EMPTY_TEXT, "nothing is left of 'think' without its tags")
    return _row(checked, mode, think, fragments)


def _row(checked: Checked[AudioQA], mode: Mode, think: str, fragments: list[str]) -> dict[str, Any]:
    record = checked.record
    response = f"<think>{think}</think><answer>{record.answer}</answer>"
    messages = [user_message(record.question, record.choices, mode), {"role": "assistant", "content": response}]
    return {"messages": messages, "audios": [checked.audio.path, *fragments]}


def interleave(think: str, audio: AudioFile, max_segments: int = MAX_SEGMENTS) -> tuple[str, list[str]]:
    """`think` with an audio placeholder after each tag that resolves, up to `max_segments`, and the crops in order."""
    parts: list[str] = []
    fragments: list[str] = []
    kept = 0
    for tag in tags_of(think):
        parts.append(think[kept : tag.end])
        kept = tag.end
        segment = resolve(tag.meaning, audio.duration_seconds) if isinstance(tag.meaning, Segment) else tag.meaning
        if isinstance(segment, Segment) and len(fragments) < max_segments:
            parts.append(AUDIO_TAG)
            fragments.append(format_fragment(audio.path, segment.start_seconds, segment.end_seconds))
    return "".join([*parts, think[kept:]]), fragments


# What only leads up to a tag and hangs in the air without it: "Between TAG and TAG, ...", "in the segment TAG".
_LEAD = re.compile(
    r"(?:\b(?:in|at|from|during|between|within|over|around|near|by|for|of|on|to|until|through|throughout|with|and|see)"
    r"[ \t]{1,4}(?:(?:the|this|that)[ \t]{1,4})?"
    r"(?:(?:segment|interval|span|part|section|window|range|clip)s?[ \t]{1,4})?)?\Z",
    re.IGNORECASE,
)
_LEAD_CHARS = 48  # more than _LEAD can match, so that a long text is not searched
_BETWEEN_TAGS = re.compile(r"[ \t]*(?:,|and|or|to|,[ \t]*and)?[ \t]*")
_STARTS = ".!?:;\n"
_CLOSING = ",.;:!?)]"


def without_tags(think: str) -> str:
    """`think` without its tags, and without the preposition or bracket that only led up to one, so that it still reads.

    >>> without_tags("In <seg>1, 2</seg>, a dog barks; then at <seg>3, 4</seg> a door shuts (<seg>4, 5</seg>).")
    'A dog barks; then a door shuts.'
    """
    tags = tags_of(think)
    bounds = [0, *(bound for tag in tags for bound in (tag.start, tag.end)), len(think)]
    pieces = [think[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True)]
    out = [pieces[0]]
    for index, piece in enumerate(pieces[1:], start=1):
        if index < len(tags) and _BETWEEN_TAGS.fullmatch(piece):
            continue  # "TAG and TAG" goes as one
        before = out.pop()
        lead = _LEAD.search(before[-_LEAD_CHARS:])
        before = before[: len(before) - len(lead[0] if lead else "")].rstrip(" \t")
        while not before and out:
            before = out.pop().rstrip(" \t")
        after = piece.lstrip(" \t")
        if before.endswith(("(", "[")) and after.startswith((")", "]")):
            before, after = before[:-1].rstrip(" \t"), after[1:].lstrip(" \t")
        if not before or before[-1] in _STARTS:
            after = after.lstrip(",:; \t")
            after = after if before.endswith(";") else after[:1].upper() + after[1:]
        elif before.endswith(",") and (not after or after[0] in _CLOSING):
            before = before[:-1]
        glue = " " if before and before[-1] not in "\n([" and after and after[0] not in _CLOSING + "\n" else ""
        out += [before + glue, after]
    return "".join(out).strip()


if __name__ == "__main__":
    app(prog_name="python -m converters.sft_jsonl")
