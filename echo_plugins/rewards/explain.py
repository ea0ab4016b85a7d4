"""What a reward preset makes of recorded outputs, term by term, before a GPU is used.

    python -m echo_plugins.rewards.explain runs/x/rl/trajectories/*.jsonl --preset paper --preset my.yaml
    python -m echo_plugins.rewards.explain runs/x/eval/test/interleaved.jsonl --preset quota-2 --json rows.jsonl
    python -m echo_plugins.rewards.explain --preset my.yaml

It reads the trajectory log of RL and the predictions of eval.infer. Without a file it checks the presets.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..relisten.segment import Refusal, Segment
from ..relisten.trajectory import Attempt, StopReason
from .compose import EXAMPLE, Preset, PresetError, Scored, load_preset, preset_names
from .terms import Event, Record

MAX_SHOWN_CHARS = 40  # of an id or an answer in a table

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RowError(ValueError):
    """A line that is no recorded output; the message says where and why."""


@dataclass(frozen=True)
class Recorded:
    """A recorded output: whose question it answers, and the same id for all rollouts of one question in one step."""

    id: str
    group: tuple[Any, str]
    record: Record


@app.command()
def main(
    files: Annotated[
        list[Path] | None,
        typer.Argument(exists=True, dir_okay=False, metavar="[FILE.jsonl]...", show_default=False),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(preset_names())}, or a .yaml file. May be given several times. [default: paper]"
        ),
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, help="The N rows with the lowest scores, and the N with the highest.")
    ] = 5,
    json: Annotated[
        Path | None, typer.Option(metavar="ROWS.jsonl", dir_okay=False, help="Every row's terms, as JSON lines.")
    ] = None,
) -> None:
    """Show what reward presets make of recorded outputs, term by term.

    FILE.jsonl is a trajectory log of RL (rl/trajectories/STEP.jsonl, rl/validation/STEP.jsonl) or the predictions of
    eval.infer. Without a file, the presets are checked and their terms listed. Exit status: 0 done, 1 a file cannot be
    used, 2 wrong usage, such as a preset that is not right.
    """
    try:
        presets = {name: load_preset(name) for name in preset or ["paper"]}
    except PresetError as error:
        raise typer.BadParameter(str(error), param_hint="--preset") from error
    if not files:
        for name, each in presets.items():
            _console.print(contents(name, each))
        return
    try:
        rows, left_out = read(files)
    except (RowError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    for reason, places in left_out.items():
        _errors.print(f"{len(places)} rows are left out: {reason}. The first: {places[0]}", markup=False)
    if not rows:
        _errors.print("error: there is no row to score")
        raise typer.Exit(1)
    scores = {
        name: [each.score(row.record) for row in track(rows, name, console=_errors)] for name, each in presets.items()
    }
    for name, scored in scores.items():
        _console.print(summary(name, scored))
        _console.print(spread(rows, scored))
        if show:
            _console.print(extremes(name, rows, scored, show))
        for line in complaints(name, scored):
            _console.print(line, style="red", markup=False)
    if json:
        with json.open("wb") as out:
            for row, *one_each in zip(rows, *scores.values(), strict=True):
                out.write(orjson.dumps(row_of(row, dict(zip(scores, one_each, strict=True)))) + b"\n")


def read(files: Iterable[Path]) -> tuple[list[Recorded], dict[str, list[str]]]:
    """The recorded outputs, and where those are that are left out, by the reason. Raises RowError."""
    rows: list[Recorded] = []
    left_out: dict[str, list[str]] = defaultdict(list)
    for file in files:
        for number, row in _lines(file):
            where = f"{file}, line {number}"
            if not row.get("ground_truth", row.get("answer")):
                left_out["they have no right answer, as where a benchmark withholds them"].append(where)
                continue
            try:
                rows.append(recorded(row))
            except (KeyError, TypeError) as error:
                raise RowError(f"{where}: no trajectory and no prediction ({error!r})") from error
            except ValueError as error:
                left_out["they cannot be scored"].append(f"{where}: {error}")
    return rows, left_out


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise RowError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise RowError(f"{file}, line {number}: not an object")
            yield number, row


def recorded(row: Mapping[str, Any]) -> Recorded:
    """A line of the trajectory log, or of the predictions of eval.infer.

    Raises KeyError and TypeError for anything else, ValueError for a ground truth that is not one of the choices.
    """
    is_log = "text" in row
    text = row["text"] if is_log else row["model_response"]
    if not isinstance(text, str):
        raise TypeError(f"the output is {text!r}")
    logprobs = row.get("answer_logprobs")
    if logprobs is None and row.get("answer_logprob") is not None:
        logprobs = [row["answer_logprob"]]  # what an older log has: their sum
    events = row.get("events")
    record = Record(
        text=text,
        ground_truth=row["ground_truth"] if is_log else row["answer"],
        choices=tuple(row.get("choices") or ()),
        duration_seconds=row.get("duration") or 0.0,
        attempts=tuple(_attempt(segment) for segment in row["segments"]),
        stop_reason=StopReason(row["stop_reason"]),
        answer_logprobs=logprobs,
        question=row.get("question") or "",
        events=None if events is None else tuple(Event(e["start"], e["end"], e["label"]) for e in events),
    )
    return Recorded(str(row["id"]), (row.get("step"), str(row["id"])), record)


def _attempt(segment: Mapping[str, Any]) -> Attempt:
    refusal = segment.get("refusal")
    resolved = None if refusal else Segment(segment["start"], segment["end"])
    return Attempt(
        segment.get("text") or "",
        resolved,
        Refusal(refusal) if refusal else None,
        straddled=bool(segment.get("straddled")),
        inserted=bool(segment["inserted"]),
    )


def contents(name: str, preset: Preset) -> Table:
    """The terms of a preset, and what each gives for a right answer that listened once."""
    table = Table("term", "weight", "parameters", "what it pays for", "example", title=name, title_justify="left")
    scored = preset.score(EXAMPLE)
    for weighted in preset.terms:
        parameters = ", ".join(f"{key}={value}" for key, value in weighted.parameters.items())
        says = " ".join((inspect.getdoc(weighted.function.func) or "").partition("\n\n")[0].split())
        problem = (scored.errors | scored.missing).get(weighted.name)
        value = f"{scored.components[weighted.name]:.3f}" if problem is None else f"[red]{_short(problem)}"
        table.add_row(weighted.name, f"{weighted.weight:g}", parameters, says, value)
    return table


def spread(rows: Sequence[Recorded], scored: Sequence[Scored]) -> str:
    """How many rows, and in how many groups scores differ: where all rollouts score the same, GRPO learns nothing."""
    groups: dict[tuple[Any, str], list[float]] = defaultdict(list)
    for row, one in zip(rows, scored, strict=True):
        groups[row.group].append(one.score)
    several = [scores for scores in groups.values() if len(scores) > 1]
    if not several:
        return f"{len(rows)} rows"
    differing = sum(any(not math.isclose(a, b) for a, b in pairwise(scores)) for scores in several)
    return f"{len(rows)} rows; scores differ in {differing} of {len(several)} groups of rollouts of one question"


def summary(name: str, scored: Sequence[Scored]) -> Table:
    """Each weighted term over the file."""
    table = Table("term", title=name, title_justify="left")
    for column in ("mean", "lowest", "highest", "not 0"):
        table.add_column(column, justify="right")
    columns = {term: [one.components[term] for one in scored] for term in scored[0].components}
    for term, values in {**columns, "score": [one.score for one in scored]}.items():
        share = sum(value != 0 for value in values) / len(values)
        cells = [f"{number:.3f}" for number in (math.fsum(values) / len(values), min(values), max(values))]
        if all(term in one.errors | one.missing for one in scored):
            cells = ["-"] * len(cells)
        table.add_row(term, *cells, f"{share:.0%}", style="bold" if term == "score" else None)
    return table


def extremes(name: str, rows: Sequence[Recorded], scored: Sequence[Scored], number: int) -> Table:
    """The terms of the rows with the lowest scores and of those with the highest."""
    order = sorted(range(len(rows)), key=lambda index: scored[index].score)
    parts = [order] if len(order) <= 2 * number else [order[:number], order[-number:]]
    title = f"{name}: the lowest scores, and the highest"
    table = Table("row", "answered", "right answer", "clips", title=title, title_justify="left")
    for term in [*scored[0].components, "score"]:
        table.add_column(term, justify="right")
    for part in parts:
        for index in part:
            record, one = rows[index].record, scored[index]
            problems = one.errors | one.missing
            cells = ["-" if term in problems else f"{value:.3f}" for term, value in one.components.items()]
            said = "failed" if record.failed else record.transcript.answer
            shown = [_short(text) for text in (rows[index].id, said or "no one answer", record.ground_truth)]
            table.add_row(*shown, f"{len(record.heard)}", *cells, f"{one.score:.3f}")
        table.add_section()
    return table


def _short(text: str) -> str:
    return (text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "...").replace("[", "\\[")


def complaints(name: str, scored: Sequence[Scored]) -> Iterator[str]:
    """Which terms had no value in how many rows, and why."""
    for term in scored[0].components:
        for verb, found in (
            ("lacks something", [one.missing[term] for one in scored if term in one.missing]),
            ("raised or gave no number", [one.errors[term] for one in scored if term in one.errors]),
        ):
            if found:
                yield f"{name}: {term} {verb} in {len(found)} of {len(scored)} rows and is 0 there: {found[0]}"


def row_of(row: Recorded, scores: Mapping[str, Scored]) -> dict[str, Any]:
    """A line of --json."""
    record = row.record
    return {
        "id": row.id,
        "step": row.group[0],
        "correct": not record.failed and record.correct,
        "clips": len(record.heard),
        "presets": {
            name: {"score": one.score, "terms": one.components, "problems": one.errors | one.missing}
            for name, one in scores.items()
        },
    }


if __name__ == "__main__":
    app(prog_name="python -m echo_plugins.rewards.explain")
