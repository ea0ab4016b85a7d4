"""Score predictions by the official rule of MMAR and MMAU, and by a strict one beside it.

    python -m eval.score OUT.jsonl [--json TOTALS.json] [--rows ROWS.jsonl] [--official FILE.json]

The denominator is the benchmark: a row that is missing, failed, or has no answer is wrong, and counted as such.
Accuracies are fractions; the table shows per cent. Intervals are Wilson's, 95%.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from echo_plugins.relisten.transcript import match_choice, official_match

from .benchmarks import BENCHMARKS, BenchmarkError, guess_breakdowns, labels, load_questions
from .predictions import PredictionsError, read_rows, read_sidecar, sidecar_path, write_whole

PREDICTION_KEYS = ("answer_prediction", "model_prediction", "model_output")
OFFICIAL_KEYS = ("thinking_prediction", *PREDICTION_KEYS)
Z_95 = 1.959963984540054

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Graded:
    """The verdicts on one row. `official` and `strict` are None where the answer is withheld."""

    id: str
    official: bool | None
    strict: bool | None
    answered: bool


@dataclass(frozen=True)
class Tally:
    """Rows and what is right of them; fractions of `total`, intervals with them. None where nothing can be scored."""

    total: int
    unanswered: int
    official_accuracy: float | None
    official_interval: tuple[float, float] | None
    strict_accuracy: float | None
    strict_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Predicted:
    """The rows to score. `missing`: ids that the benchmark has and the predictions lack; their rows are there, empty.
    `num_unknown`: rows that are missing too, of which nothing but their number is known."""

    benchmark: str | None
    rows: list[dict[str, Any]]
    breakdowns: tuple[str, ...]
    missing: list[str]
    num_unknown: int


def answer_of(row: Mapping[str, Any], where: str = "row") -> str:
    """What the row predicts, "" when it predicts nothing."""
    for key in PREDICTION_KEYS:
        value = row.get(key)
        if isinstance(value, str):
            return value.strip()
        if value is not None:
            raise PredictionsError(f"{where} {row.get('id')!r}: {key!r} must be text, not {value!r}")
    return ""


def grade(row: Mapping[str, Any]) -> Graded:
    """The verdicts on a row with `choices`, `answer` and a prediction."""
    prediction, answer, choices = answer_of(row), row.get("answer"), row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise PredictionsError(f"row {row['id']!r}: 'choices' must be a list of texts, not {choices!r}")
    if not answer:
        return Graded(str(row["id"]), None, None, bool(prediction))
    # 27 rows of MMAU-mini list a choice twice. It is one choice: its text names the first, either letter its text.
    once = [choice if choice not in choices[:place] else "" for place, choice in enumerate(choices)]
    named, right = match_choice(prediction, once), match_choice(answer, once)
    strict = named is not None and right is not None and choices[named] == choices[right]
    return Graded(str(row["id"]), official_match(prediction, answer, choices), strict, bool(prediction))


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% Wilson interval of `right` of `total`."""
    if not total:
        return 0.0, 1.0
    share, z2 = right / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    # Exactly 0 and 1 at the ends: rounding must not exclude what was observed.
    return (0.0 if right == 0 else centre - half), (1.0 if right == total else centre + half)


def tally(graded: Sequence[Graded], num_unknown: int = 0) -> Tally:
    """Add up verdicts; `num_unknown` more rows were not answered."""
    total = len(graded) + num_unknown
    unanswered = sum(not row.answered for row in graded) + num_unknown
    if any(row.official is None for row in graded):
        return Tally(total, unanswered, None, None, None, None)
    official, strict = sum(bool(row.official) for row in graded), sum(bool(row.strict) for row in graded)
    share = max(total, 1)
    return Tally(total, unanswered, official / share, wilson(official, total), strict / share, wilson(strict, total))


def load(file: Path) -> Predicted:
    """The predictions in `file`, with the rows that its benchmark has and it lacks. Raises PredictionsError."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_rows(file):
        if str(row["id"]) in rows:
            raise PredictionsError(f"{file}, line {number}: row {row['id']!r} is there twice")
        rows[str(row["id"])] = row
    sidecar = read_sidecar(file)
    if sidecar is None:
        if not rows:
            raise PredictionsError(f"{file}: no rows in it")
        found = list(rows.values())
        return Predicted(None, found, guess_breakdowns(found), [], 0)
    name, num_rows = sidecar["identity"]["benchmark"], sidecar["num_rows"]
    breakdowns = BENCHMARKS[name].breakdowns if name in BENCHMARKS else guess_breakdowns(list(rows.values()))
    try:
        questions = load_questions(name, sidecar["questions"])
    except BenchmarkError:
        questions = None
    if questions is None or questions.sha256 != sidecar["identity"]["questions_sha256"]:
        # The questions are elsewhere or others by now: what is missing can be counted, but not broken down.
        return Predicted(name, list(rows.values()), breakdowns, [], max(0, num_rows - len(rows)))
    expected = questions.items[:num_rows]
    missing = [item.id for item in expected if item.id not in rows]
    whole = [rows.get(item.id, item.row) for item in expected]
    return Predicted(name, whole, questions.breakdowns, missing, 0)


def totals(predicted: Predicted, graded: Sequence[Graded]) -> dict[str, Any]:
    """Totals, breakdowns, the macro mean over the first of them, and what became of segments."""
    by: dict[str, dict[str, Tally]] = {}
    for field in predicted.breakdowns:
        groups: dict[str, list[Graded]] = {}
        for row, verdict in zip(predicted.rows, graded, strict=True):
            for label in labels(row, field):
                groups.setdefault(label, []).append(verdict)
        by[field] = {label: tally(groups[label]) for label in sorted(groups)}
    overall = tally(graded, predicted.num_unknown)
    macro = macro_strict = None
    if overall.official_accuracy is not None:
        groups_of_first = list(by[predicted.breakdowns[0]].values()) if by else [overall]
        macro = _mean([group.official_accuracy or 0.0 for group in groups_of_first])
        macro_strict = _mean([group.strict_accuracy or 0.0 for group in groups_of_first])
    return {
        "benchmark": predicted.benchmark,
        **asdict(overall),
        "macro_accuracy": macro,
        "macro_strict_accuracy": macro_strict,
        "macro_over": predicted.breakdowns[0] if predicted.breakdowns else None,
        "missing": len(predicted.missing) + predicted.num_unknown,
        "errors": sum(row.get("stop_reason") == "error" for row in predicted.rows),
        "stop_reasons": dict(Counter(row["stop_reason"] for row in predicted.rows if "stop_reason" in row)),
        "segments": _segments(predicted.rows),
        "by": {field: {label: asdict(group) for label, group in groups.items()} for field, groups in by.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _segments(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tags named, clips inserted, refusals by reason, and rows that heard at least one clip."""
    named = [segment for row in rows for segment in row.get("segments") or []]
    return {
        "named": len(named),
        "inserted": sum(bool(segment.get("inserted")) for segment in named),
        "refused": dict(Counter(segment["refusal"] for segment in named if segment.get("refusal"))),
        "rows_with_clips": sum(any(s.get("inserted") for s in row.get("segments") or []) for row in rows),
    }


def official_file(predicted: Predicted, file: Path) -> None:
    """Write what the official scorers and uploads take: every row of the benchmark with all keys they read. A missing
    row has empty predictions, since the scripts leave rows without the key out of the denominator.

    JSONL for a .jsonl (MMAR's script takes both), a JSON list otherwise (MMAU's takes only that).
    """
    rows = []
    for row in predicted.rows:
        answer = answer_of(row)
        rows.append(
            {
                **row,
                "thinking_prediction": row.get("thinking_prediction") or "",
                **dict.fromkeys(PREDICTION_KEYS, answer),
            }
        )
    if file.suffix == ".jsonl":
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_whole(file, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


@app.command()
def main(
    predictions: Annotated[Path, typer.Argument(help="OUT.jsonl of eval.infer, or rows with the same keys.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the totals as JSON.")] = None,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write each row's verdicts as JSON lines.")] = None,
    official: Annotated[
        Path | None,
        typer.Option("--official", help="Write a file for the official scorer or upload (.json or .jsonl)."),
    ] = None,
) -> None:
    """Score predictions by the official rule of MMAR and MMAU, and by a strict one beside it.

    Official: the answer's words are all there, and none that only wrong choices have. Strict: exactly one choice is
    named, by its text or its letter, and it is the answer. Rows that are missing, failed or have no answer are wrong.
    """
    try:
        predicted = load(predictions)
        graded = [grade(row) for row in predicted.rows]
        summary = totals(predicted, graded)
        if json_file:
            write_whole(json_file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if rows_file:
            write_whole(rows_file, "".join(json.dumps(asdict(row)) + "\n" for row in graded))
        if official:
            official_file(predicted, official)
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    show(summary, predictions)
    if predicted.num_unknown:
        _errors.print(
            f"{predicted.num_unknown} rows are missing, and the file of questions that "
            f"{sidecar_path(predictions).name} names is not there unchanged: they count in the total only",
            markup=False,
        )
    if official:
        _errors.print(f"for the official scorer: {official}", markup=False)


def show(summary: Mapping[str, Any], file: Path) -> None:
    """Print the totals and the breakdowns as a table."""
    table = Table(title=f"{summary['benchmark'] or 'predictions'}: {file.name}", title_justify="left")
    table.add_column("")
    for heading in ("rows", "no answer", "official % (95%)", "strict % (95%)"):
        table.add_column(heading, justify="right")
    table.add_row("all", *_cells(summary), style="bold")
    if summary["macro_over"] and summary["macro_accuracy"] is not None:
        macro = (f"{100 * summary[key]:.1f}" + " " * 13 for key in ("macro_accuracy", "macro_strict_accuracy"))
        table.add_row(f"mean over {summary['macro_over']}", "", "", *macro)
    for field, groups in summary["by"].items():
        table.add_section()
        table.add_row(field, style="dim")
        for label, group in groups.items():
            table.add_row(f"  {label}", *_cells(group))
    console = Console(highlight=False)
    console.print(table)
    console.print(_notes(summary), markup=False)


def _cells(group: Mapping[str, Any]) -> list[str]:
    cells = [str(group["total"]), str(group["unanswered"])]
    for rule in ("official", "strict"):
        accuracy, interval = group[f"{rule}_accuracy"], group[f"{rule}_interval"]
        if accuracy is None or interval is None:
            cells.append("withheld")
        else:
            cells.append(f"{100 * accuracy:.1f} ({100 * interval[0]:4.1f}-{100 * interval[1]:5.1f})")
    return cells


def _notes(summary: Mapping[str, Any]) -> str:
    segments = summary["segments"]
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(segments["refused"].items()))
    return (
        f"missing {summary['missing']}, errors {summary['errors']}; "
        f"segments named {segments['named']}, inserted {segments['inserted']} in {segments['rows_with_clips']} rows"
        + (f", refused {refused}" if refused else "")
    )


if __name__ == "__main__":
    app()
