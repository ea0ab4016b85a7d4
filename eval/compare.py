"""Compare two prediction files on the rows that both have: who is better, by how much, and where they differ.

    python -m eval.compare BEFORE.jsonl AFTER.jsonl [--json FILE] [--rows CHANGED.jsonl] [--markdown FILE.md]
    python -m eval.compare BASE.jsonl ARM.jsonl ARM.jsonl ... [--json FILE] [--markdown FILE.md]

Several files are each compared with the first, as the arms of `eval.infer --arms` are; their p-values are corrected for
their number (Holm).

Pairs of rows are compared, so that questions which both find easy or hard do not blur the difference: McNemar's exact
test on the rows where just one is right, and Tango's 95% interval of the difference. Rows of one recording
count together.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .benchmarks import labels
from .predictions import PredictionsError, json_line, write_whole
from .score import RULES, Graded, Predicted, answer_of, grade_all, load
from .stats import difference_interval, effective_size, holm, mcnemar, wilson

SHOWN = 10  # changed rows on the screen; --rows has all of them

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Paired:
    """Rows that both have, how many of them just one is right on, and what follows for the difference."""

    total: int
    before: float
    after: float
    only_before: int
    only_after: int
    difference: float
    interval: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Pair:
    """A row of both files, with the verdicts on it."""

    before_row: Mapping[str, Any]
    after_row: Mapping[str, Any]
    before: Graded
    after: Graded

    def verdicts(self, rule: str) -> tuple[bool, bool] | None:
        """None where the row cannot be scored by that rule."""
        verdicts = getattr(self.before, rule), getattr(self.after, rule)
        return None if None in verdicts else verdicts


def pair_up(before: Predicted, after: Predicted) -> list[Pair]:
    """The rows that both are asked, a row that one did not answer among them. Raises PredictionsError."""
    if None not in (before.sha256, after.sha256) and before.sha256 != after.sha256:
        raise PredictionsError(
            f"they answer other questions: sha256 {before.sha256} ({before.benchmark}) and {after.sha256} "
            f"({after.benchmark})"
        )
    if before.num_unknown or after.num_unknown:
        raise PredictionsError("rows are missing, and the file of questions is not there unchanged to say which")
    second = {str(row["id"]): (row, verdict) for row, verdict in zip(after.rows, grade_all(after), strict=True)}
    pairs = [
        Pair(row, second[verdict.id][0], verdict, second[verdict.id][1])
        for row, verdict in zip(before.rows, grade_all(before), strict=True)
        if verdict.id in second
    ]
    if not pairs:
        raise PredictionsError("no row is in both")
    if differing := [pair.before.id for pair in pairs if pair.before_row.get("answer") != pair.after_row.get("answer")]:
        raise PredictionsError(
            f"{len(differing)} rows have another answer key in the second file; the first: {differing[0]}"
        )
    return pairs


def paired(verdicts: Sequence[tuple[bool, bool]], recordings: Sequence[str]) -> Paired:
    """What pairs of verdicts say. `recordings`: of each pair, since rows of one are not independent."""
    total = len(verdicts)
    changes = [after - before for before, after in verdicts]
    by_recording: Counter[str] = Counter()
    for recording, change in zip(recordings, changes, strict=True):
        by_recording[recording] += change
    worth = effective_size(changes, recordings) / total
    only_before = sum(before and not after for before, after in verdicts)
    only_after = sum(after and not before for before, after in verdicts)
    return Paired(
        total,
        sum(before for before, _ in verdicts) / total,
        sum(after for _, after in verdicts) / total,
        only_before,
        only_after,
        (only_after - only_before) / total,
        difference_interval(only_before * worth, only_after * worth, total * worth),
        mcnemar(list(by_recording.values())),
    )


def compare(pairs: Sequence[Pair], breakdowns: Sequence[str]) -> dict[str, Any]:
    """By rule, over all rows and by each breakdown. A rule that scores no row is None."""
    summary: dict[str, Any] = {"rows": len(pairs)}
    for rule in RULES:
        scored = [pair for pair in pairs if pair.verdicts(rule) is not None]
        by: dict[str, dict[str, list[Pair]]] = {field: {} for field in breakdowns}
        for pair in scored:
            for field in breakdowns:
                for label in labels(pair.before_row, field):
                    by[field].setdefault(label, []).append(pair)
        summary[rule] = None
        if scored:
            summary[rule] = asdict(_paired(scored, rule))
            summary[rule]["by"] = {
                field: {label: asdict(_paired(groups[label], rule)) for label in sorted(groups)}
                for field, groups in by.items()
            }
    return summary


def _paired(pairs: Sequence[Pair], rule: str) -> Paired:
    verdicts = [verdicts for pair in pairs if (verdicts := pair.verdicts(rule)) is not None]
    return paired(verdicts, [pair.before.recording or pair.before.id for pair in pairs])


def changed_rows(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """The rows on which a verdict differs, with what each said."""
    for pair in pairs:
        verdicts = {rule: pair.verdicts(rule) for rule in RULES}
        if not any(both is not None and both[0] != both[1] for both in verdicts.values()):
            continue
        yield {
            "id": pair.before.id,
            "question": pair.before_row.get("question"),
            "answer": pair.before_row.get("answer"),
            "before": answer_of(pair.before_row),
            "after": answer_of(pair.after_row),
            **{
                rule: None if both is None else {"before": both[0], "after": both[1]} for rule, both in verdicts.items()
            },
        }


@app.command()
def main(
    before: Annotated[Path, typer.Argument(help="Predictions of eval.infer.")],
    after: Annotated[
        list[Path], typer.Argument(help="Other predictions on the same questions; several: each with BEFORE.")
    ],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison as JSON.")] = None,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write the rows that changed as JSON lines.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown.")] = None,
) -> None:
    """Compare two prediction files on the rows that both are asked.

    p is McNemar's, exact and two-sided, and not corrected for the number of groups that are looked at.
    """
    if len(after) > 1:
        return _compare_arms(before, after, json_file, markdown)
    try:
        first, second = load(before), load(after[0])
        pairs = pair_up(first, second)
        summary = compare(pairs, first.breakdowns)
        changed = list(changed_rows(pairs))
        if json_file:
            write_whole(json_file, json.dumps({**summary, "changed": len(changed)}, indent=2) + "\n")
        if rows_file:
            write_whole(rows_file, map(json_line, changed))
        lines = list(_lines(summary))
        if markdown:
            write_whole(markdown, f"### {before} -> {after[0]}\n\n{_markdown(lines, HEADINGS)}")
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    _show(lines, changed, f"{before} -> {after[0]}")
    if left_out := len(first.rows) + len(second.rows) - 2 * len(pairs):
        _errors.print(f"{left_out} rows are in one of the files only, and left out", markup=False)


ARM_HEADINGS = ("rows", "right % (95%)", "difference (95%)", "p, Holm")


def _compare_arms(base: Path, arms: Sequence[Path], json_file: Path | None, markdown: Path | None) -> None:
    """Each of `arms` with `base`, a line each, by the strict rule."""
    try:
        first = load(base)
        found = {}
        for arm in arms:
            pairs = [pair for pair in pair_up(first, load(arm)) if pair.verdicts("strict") is not None]
            if not pairs:
                raise PredictionsError(f"{arm}: no row has a verdict by the strict rule")
            found[arm.stem] = _paired(pairs, "strict")
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    corrected = holm([paired.p for paired in found.values()])
    one = next(iter(found.values()))
    lines: dict[str, list[str]] = {base.stem: [str(one.total), _share(one.before, one.total), "", ""]}
    for (name, arm), p in zip(found.items(), corrected, strict=True):
        difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in (arm.difference, *arm.interval)))
        lines[name] = [str(arm.total), _share(arm.after, arm.total), difference, f"{p:.2g}"]
    if json_file:
        content = {name: asdict(arm) | {"p_holm": p} for (name, arm), p in zip(found.items(), corrected, strict=True)}
        write_whole(json_file, json.dumps({"base": base.stem, "arms": content}, indent=2) + "\n")
    if markdown:
        write_whole(markdown, _markdown(list(lines.items()), ARM_HEADINGS))
    table = Table("", *ARM_HEADINGS, title=f"each against {base}", title_justify="left", box=None)
    for name, cells in lines.items():
        table.add_row(name, *cells)
    Console(highlight=False).print(table)


def _share(share: float, total: int) -> str:
    low, high = wilson(share * total, total)
    return f"{100 * share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


HEADINGS = ("rows", "before %", "after %", "only before", "only after", "difference (95%)", "p")


def _lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str] | None]]:
    for rule in RULES:
        if summary[rule] is None:
            continue
        yield rule, _cells(summary[rule])
        for field, groups in summary[rule]["by"].items():
            yield field, None
            yield from ((f"  {label}", _cells(group)) for label, group in groups.items())


def _cells(group: Mapping[str, Any]) -> list[str]:
    low, high = group["interval"]
    return [
        str(group["total"]),
        f"{100 * group['before']:.1f}",
        f"{100 * group['after']:.1f}",
        str(group["only_before"]),
        str(group["only_after"]),
        f"{100 * group['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})",
        f"{group['p']:.2g}",
    ]


def _markdown(lines: Sequence[tuple[str, list[str] | None]], headings: Sequence[str]) -> str:
    rows = [f"| | {' | '.join(headings)} |", "|---" * (1 + len(headings)) + "|"]
    for label, cells in lines:
        rows.append(f"| {label.strip()} | {' | '.join(cells or [''] * len(headings))} |")
    return "\n".join(rows) + "\n"


def _show(lines: Sequence[tuple[str, list[str] | None]], changed: Sequence[Mapping[str, Any]], title: str) -> None:
    console = Console(highlight=False)
    # Headings of two lines, so that no number is cut on a terminal of 80 columns.
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in HEADINGS:
        table.add_column(heading.replace(" ", "\n"), justify="right", overflow="fold")
    for label, cells in lines:
        if label in RULES:
            table.add_section()
        table.add_row(label, *(cells or ()), style="dim" if cells is None else "bold" if label in RULES else None)
    console.print(table)
    console.print(f"{len(changed)} rows changed" + (f"; the first {SHOWN}:" if len(changed) > SHOWN else ":"))
    for row in changed[:SHOWN]:
        said = f"{row['before'][:60]!r} -> {row['after'][:60]!r}, key {row['answer']!r}"
        console.print(f"  {row['id']}: {said}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
