"""Where a model listens, and whether that pays: the clips of its predictions against the events of their rows.

    python -m eval.grounding OUT.jsonl [MORE.jsonl ...] [--by kind] [--json FILE]

For rows that have `events`. An event is asked about where the right answer mentions its label as whole words; where the
answer mentions none, those that the question mentions. Rows without such an event are left out, and counted.

A row is a *hit* where one of its clips meets an event asked about: intersection over union above 0.5. The table has the
share of hits; how often the answer is right with a hit and without (the gap says if it depends on what was heard);
the mean of the best intersection over union; recall (share of these events that some clip meets at 0.3, 0.5 and 0.7);
precision (share of clips that meet one); coverage (share of the events' seconds that were heard); and the share of
inserted seconds that were heard before.

RL can teach where to listen only where hits are few and being right depends on them. A sentence says so.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from echo_plugins.relisten.segment import HIT_IOU, Segment, iou, overlap_ratio, shared_seconds, union_seconds
from echo_plugins.rewards.terms import mentions

from .benchmarks import labels
from .predictions import PredictionsError, write_whole
from .score import grade_all, load
from .stats import Interval, independent_difference, wilson

RECALL_AT = (0.3, 0.5, 0.7)
ENOUGH_HITS = 0.9  # more cannot come from listening elsewhere

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Listened:
    """What one row heard of the events that it is asked about."""

    right: bool
    best: float  # the largest intersection over union of a clip with one of the events
    recalled: tuple[float, ...]  # share of the events at each of RECALL_AT
    clips: int
    precise: int  # clips that meet an event
    covered: float  # share of the events' seconds
    repeated: float | None  # share of inserted seconds that were heard before; None without a clip

    @property
    def hit(self) -> bool:
        return self.best > HIT_IOU


@dataclass(frozen=True)
class Grounding:
    """A group of rows. Shares are fractions, their intervals 95%."""

    rows: int
    hits: float
    hits_interval: Interval
    right: float
    right_with_hit: float | None
    right_without: float | None
    difference: Interval | None  # of the two
    mean_iou: float
    recall: dict[str, float]
    precision: float | None
    coverage: float
    repeated: float | None


def events_asked_about(row: Mapping[str, Any]) -> list[Segment]:
    """See the head of this file."""
    events = [event for event in row.get("events") or () if event.get("label")]
    for text in (str(row.get("answer") or ""), str(row.get("question") or "")):
        if found := [Segment(event["start"], event["end"]) for event in events if mentions(text, event["label"])]:
            return found
    return []


def listened(row: Mapping[str, Any], right: bool) -> Listened | None:
    """None where the row has no event that it is asked about."""
    events = events_asked_about(row)
    if not events:
        return None
    clips = [Segment(clip["start"], clip["end"]) for clip in row.get("segments") or () if clip.get("inserted")]
    met = [max((iou([clip], [event]) for clip in clips), default=0.0) for event in events]
    seconds = union_seconds(events)
    return Listened(
        right,
        max(met),
        tuple(sum(value > level for value in met) / len(met) for level in RECALL_AT),
        len(clips),
        sum(any(iou([clip], [event]) > HIT_IOU for event in events) for clip in clips),
        shared_seconds(clips, events) / seconds if seconds else 0.0,
        overlap_ratio(clips) if clips else None,
    )


def grounding(rows: Sequence[Listened]) -> Grounding:
    """Of one row or more."""

    def mean(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return statistics.fmean(known) if known else None

    with_hit, without = ([row.right for row in rows if row.hit is hit] for hit in (True, False))
    pairs = (sum(with_hit), len(with_hit)), (sum(without), len(without))
    clips = sum(row.clips for row in rows)
    return Grounding(
        rows=len(rows),
        hits=len(with_hit) / len(rows),
        hits_interval=wilson(len(with_hit), len(rows)),
        right=statistics.fmean(row.right for row in rows),
        right_with_hit=mean(map(float, with_hit)),
        right_without=mean(map(float, without)),
        difference=independent_difference(*pairs) if with_hit and without else None,
        mean_iou=statistics.fmean(row.best for row in rows),
        recall={f"{level:g}": statistics.fmean(row.recalled[n] for row in rows) for n, level in enumerate(RECALL_AT)},
        precision=sum(row.precise for row in rows) / clips if clips else None,
        coverage=statistics.fmean(row.covered for row in rows),
        repeated=mean(row.repeated for row in rows),
    )


def verdict(found: Grounding) -> str:
    """Whether RL has something to gain by listening elsewhere, in one or two sentences."""
    if not found.precision and not found.hits and found.repeated is None:
        return "The model inserts no clip: there is no listening that could pay."
    if found.hits >= ENOUGH_HITS:
        return f"{_percent(found.hits)}% of the rows hear the right place: by listening elsewhere little can be gained."
    if found.difference is None or found.right_with_hit is None or found.right_without is None:
        return f"No row hears the right place ({_percent(found.hits)}% hits): RL has nothing to start from."
    gain = (1 - found.hits) * (found.right_with_hit - found.right_without)
    rates = f"right in {_percent(found.right_with_hit)}% with a hit and in {_percent(found.right_without)}% without"
    if found.difference[0] > 0:
        return (
            f"Listening pays: {rates}. RL that finds the right place in the other {_percent(1 - found.hits)}% can gain "
            f"up to {100 * gain:.0f} points."
        )
    return (
        f"Listening does not pay yet: {rates}. The answer does not depend on what is heard, so RL cannot gain by "
        "listening elsewhere; teach in SFT what follows from a clip."
    )


def read(file: Path, by: str | None) -> tuple[dict[str, list[Listened]], int]:
    """The rows under each of their labels ("" for all), and how many rows were left out. Raises PredictionsError."""
    predicted = load(file)
    groups: dict[str, list[Listened]] = {"": []}
    left_out = 0
    for row, graded in zip(predicted.rows, grade_all(predicted), strict=True):
        right = graded.strict if graded.strict is not None else graded.official
        found = None if right is None else listened(row, right)
        if found is None:
            left_out += 1
            continue
        for label in ["", *(labels(row, by) if by else ())]:
            groups.setdefault(label, []).append(found)
    if not groups[""]:
        raise PredictionsError(f"{file}: no row has `events` with a label that its answer or question mentions")
    return groups, left_out


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f}"


def show(name: str, groups: Mapping[str, Grounding]) -> tuple[Table, Table]:
    """Whether listening pays, and where the clips are."""
    pays, places = (Table(title=title, title_justify="left", box=None) for title in (f"{name}, in %", ""))
    for heading in ("", "rows", "hits (95%)", "right", "right with a hit", "without", "difference (95%)"):
        pays.add_column(heading, no_wrap=heading.endswith("(95%)"))
    recall = f"recall at {', '.join(f'{level:g}' for level in RECALL_AT)}"
    for heading in ("", "mean IoU", recall, "precision", "coverage", "repeated"):
        places.add_column(heading)
    for label, found in groups.items():
        low, high = found.hits_interval
        between = found.difference and f"[{100 * found.difference[0]:.0f}, {100 * found.difference[1]:.0f}]"
        pays.add_row(
            label or "all",
            str(found.rows),
            f"{100 * found.hits:.1f} [{100 * low:.0f}, {100 * high:.0f}]",
            f"{100 * found.right:.1f}",
            _percent(found.right_with_hit),
            _percent(found.right_without),
            between or "-",
        )
        places.add_row(
            label or "all",
            f"{found.mean_iou:.2f}",
            " ".join(_percent(share) for share in found.recall.values()),
            _percent(found.precision),
            _percent(found.coverage),
            _percent(found.repeated),
        )
    return pays, places


@app.command(help=__doc__)
def main(
    files: Annotated[list[Path], typer.Argument(metavar="OUT.jsonl...", help="What eval.infer wrote.", exists=True)],
    by: Annotated[str | None, typer.Option(help="Also by this field of `meta` or of the row.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="The numbers, by file and group.")] = None,
) -> None:
    console, found = Console(soft_wrap=True), {}
    for file in files:
        try:
            groups, left_out = read(file, by)
        except PredictionsError as error:
            _errors.print(f"eval.grounding: error: {error}", markup=False)
            raise typer.Exit(1) from error
        numbers = {label: grounding(groups[label]) for label in sorted(groups)}
        found[str(file)] = {label or "all": asdict(group) for label, group in numbers.items()}
        console.print(*show(str(file), numbers), sep="\n")
        if left_out:
            console.print(f"{left_out} rows are left out: no event has a label that they mention.")
        console.print(verdict(numbers[""]), "")
    if json_file:
        write_whole(json_file, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app(prog_name="python -m eval.grounding")
