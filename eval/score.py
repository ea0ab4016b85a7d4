"""Score predictions by their benchmark's official rule, and by a strict one beside it.

    python -m eval.score OUT.jsonl [--json TOTALS.json] [--rows ROWS.jsonl] [--official FILE.json]
                                   [--markdown FILE.md] [--latex FILE.tex]

The denominator is the benchmark: a row that is missing, failed, or has no answer is wrong, and counted as such.
Accuracies are fractions; tables show per cent. Intervals are 95%: Wilson's, and of a mean over groups the bootstrap's.
Two models on the same rows: `python -m eval.compare`. Several runs of one model: `python -m eval.runs`.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from echo_plugins.relisten.transcript import choice_letter, named_choice, official_match

from .benchmarks import AUDIO_QA, BENCHMARKS, BenchmarkError, Rule, breakdowns_of, labels, load_questions
from .predictions import PredictionsError, read_rows, read_sidecar, sidecar_path, write_whole
from .stats import macro_interval, wilson

PREDICTION_KEYS = ("answer_prediction", "model_prediction", "model_output")
RULES: tuple[Literal["official", "strict"], ...] = ("official", "strict")

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def letter_match(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """MMSU's script: the choice that the letter names is the answer. None of its exceptions: a row in which it finds no
    letter is wrong here, where the script leaves it out."""
    place = _official_letter(prediction)
    return place is not None and place < len(choices) and choices[place] == answer


def first_letter_match(prediction: str, answer: str, choices: Sequence[str]) -> bool:
    """AIR-Bench's score_foundation.py: as MMSU's, but of two equal choices the first alone is right."""
    return answer in choices and _official_letter(prediction) == list(choices).index(answer)


def _official_letter(prediction: str) -> int | None:
    """The place of the letter that both scripts read: the first character, else the last but one ("It is A.")."""
    said = prediction.strip().replace("\n", "")
    if said == "None":
        return None
    read = next((character for character in (said[:1], said[-2:-1]) if character and character in "ABCD"), None)
    return None if read is None else ord(read) - ord("A")


OFFICIAL_RULES: Mapping[Rule, Callable[[str, str, Sequence[str]], bool]] = {
    "string_match": official_match,
    "letter": letter_match,
    "first_letter": first_letter_match,
}


@dataclass(frozen=True)
class Graded:
    """The verdicts on one row; None where it cannot be scored: the answer is withheld, the question is an open one, or
    (official only) the rule is none of ours."""

    id: str
    official: bool | None
    strict: bool | None
    answered: bool


@dataclass(frozen=True)
class Tally:
    """Rows and what is right of them; fractions of `scored`, the rows that have a key, with their intervals."""

    total: int
    scored: int
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
    sha256: str | None
    rows: list[dict[str, Any]]
    breakdowns: tuple[str, ...]
    missing: list[str]
    num_unknown: int
    shuffled: int | None = None

    @property
    def rule(self) -> Rule:
        return BENCHMARKS[self.benchmark].rule if self.benchmark in BENCHMARKS else "string_match"

    @property
    def revision(self) -> str | None:
        known = BENCHMARKS[self.benchmark].revisions if self.benchmark in BENCHMARKS else {}
        return known.get(self.sha256 or "")


def answer_of(row: Mapping[str, Any], where: str = "row") -> str:
    """What the row predicts, "" when it predicts nothing."""
    for key in PREDICTION_KEYS:
        value = row.get(key)
        if isinstance(value, str):
            return value.strip()
        if value is not None:
            raise PredictionsError(f"{where} {row.get('id')!r}: {key!r} must be text, not {value!r}")
    return ""


def chosen(row: Mapping[str, Any], prediction: str | None = None) -> str | None:
    """The text of the one choice that the row's prediction names, strictly; None when it names none or several."""
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise PredictionsError(f"row {row['id']!r}: 'choices' must be a list of texts, not {choices!r}")
    return named_choice(answer_of(row) if prediction is None else prediction, choices)


def grade(row: Mapping[str, Any], rule: Rule = "string_match") -> Graded:
    """The verdicts on a row with `choices`, `answer` and a prediction."""
    prediction, answer, named = answer_of(row), row.get("answer"), chosen(row)
    if not answer or not row["choices"]:
        return Graded(str(row["id"]), None, None, bool(prediction))
    match = OFFICIAL_RULES.get(rule)
    official = None if match is None else match(response_of(row, rule), answer, row["choices"])
    strict = named is not None and named == chosen(row, answer)
    return Graded(str(row["id"]), official, strict, bool(prediction))


def response_of(row: Mapping[str, Any], rule: Rule) -> str:
    """What the official script of `rule` is given: the prediction, and where it wants a letter that of the choice which
    the prediction names. Nothing is made of a prediction that names none."""
    named = chosen(row) if rule in ("letter", "first_letter") else None
    return answer_of(row) if named is None else choice_letter(row["choices"].index(named))


def tally(graded: Sequence[Graded], num_unknown: int = 0) -> Tally:
    """Add up verdicts; `num_unknown` more rows were not answered."""
    scored = sum(row.strict is not None for row in graded)
    scored += num_unknown if scored else 0
    values: list[Any] = []
    for rule in RULES:
        verdicts = [verdict for row in graded if (verdict := getattr(row, rule)) is not None]
        right = sum(verdicts)
        values += [right / scored, wilson(right, scored)] if verdicts else [None, None]
    return Tally(len(graded) + num_unknown, scored, sum(not row.answered for row in graded) + num_unknown, *values)


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
        return Predicted(None, None, found, breakdowns_of(None, found), [], 0)
    identity, num_rows, ids = sidecar["identity"], sidecar["num_rows"], frozenset(sidecar.get("ids", ()))
    name, sha256, shuffled = identity["benchmark"], identity["questions_sha256"], identity.get("shuffle_choices")
    try:
        questions = load_questions(name, sidecar["questions"])
    except BenchmarkError:
        questions = None
    if questions is None or questions.sha256 != sha256:
        # The questions are elsewhere or others by now: what is missing can be counted, but not broken down.
        found = list(rows.values())
        return Predicted(
            name, sha256, found, breakdowns_of(name, found), [], max(0, num_rows - len(rows)), shuffled=shuffled
        )
    asked = itertools.islice((item for item in questions if not ids or item.id in ids), num_rows)
    expected = {item.id: item.row for item in asked}
    whole = [rows.get(row_id, row) for row_id, row in expected.items()]
    missing = [row_id for row_id in expected if row_id not in rows]
    return Predicted(name, sha256, whole, breakdowns_of(name, whole), missing, 0, shuffled=shuffled)


def grade_all(predicted: Predicted) -> list[Graded]:
    return [grade(row, predicted.rule) for row in predicted.rows]


def groups_of(
    predicted: Predicted, graded: Sequence[Graded], names: Callable[[Mapping[str, Any]], Sequence[str]]
) -> dict[str, list[Graded]]:
    """Verdicts under each of the names that their row has."""
    groups: dict[str, list[Graded]] = {}
    for row, verdict in zip(predicted.rows, graded, strict=True):
        for name in names(row):
            groups.setdefault(name, []).append(verdict)
    return groups


def totals(predicted: Predicted, graded: Sequence[Graded]) -> dict[str, Any]:
    """Totals, breakdowns, the macro mean over the first of them, and what became of segments."""
    by: dict[str, dict[str, Tally]] = {}
    for field in predicted.breakdowns:
        groups = groups_of(predicted, graded, lambda row, field=field: labels(row, field))
        by[field] = {label: tally(groups[label]) for label in sorted(groups)}
    overall = tally(graded, predicted.num_unknown)
    heard = groups_of(predicted, graded, lambda row: [str(_num_inserted(row))])
    return {
        "benchmark": predicted.benchmark,
        "revision": predicted.revision,
        "questions_sha256": predicted.sha256,
        "rule": predicted.rule,
        **asdict(overall),
        **_macro(list(by[predicted.breakdowns[0]].values()) if by else [overall]),
        "macro_over": predicted.breakdowns[0] if predicted.breakdowns else None,
        "missing": len(predicted.missing) + predicted.num_unknown,
        "errors": sum(row.get("stop_reason") == "error" for row in predicted.rows),
        "stop_reasons": dict(Counter(row["stop_reason"] for row in predicted.rows if "stop_reason" in row)),
        "segments": _segments(predicted.rows),
        "by": {field: {label: asdict(group) for label, group in groups.items()} for field, groups in by.items()},
        "by_clips": {number: asdict(tally(heard[number])) for number in sorted(heard, key=int)},
    }


def _macro(groups: Sequence[Tally]) -> dict[str, Any]:
    """The mean of the groups' accuracies by either rule, and its interval. A group without a key has none."""
    found: dict[str, Any] = {}
    for rule, name in (("official", "macro"), ("strict", "macro_strict")):
        shares = [
            (accuracy, group.scored) for group in groups if (accuracy := getattr(group, f"{rule}_accuracy")) is not None
        ]
        counts = [(round(accuracy * scored), scored) for accuracy, scored in shares]
        found[f"{name}_accuracy"] = statistics.fmean(accuracy for accuracy, _ in shares) if shares else None
        found[f"{name}_interval"] = macro_interval(counts) if shares else None
    return found


def _num_inserted(row: Mapping[str, Any]) -> int:
    return sum(bool(segment.get("inserted")) for segment in row.get("segments") or [])


def _segments(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tags named, clips inserted and their length, refusals by reason, and rows that heard at least one clip."""
    named = [segment for row in rows for segment in row.get("segments") or []]
    seconds = [segment["end"] - segment["start"] for segment in named if segment.get("inserted")]
    return {
        "named": len(named),
        "inserted": len(seconds),
        "refused": dict(Counter(segment["refusal"] for segment in named if segment.get("refusal"))),
        "rows_with_clips": sum(_num_inserted(row) > 0 for row in rows),
        "mean_seconds": round(statistics.fmean(seconds), 3) if seconds else None,
        "median_seconds": round(statistics.median(seconds), 3) if seconds else None,
    }


def official_file(predicted: Predicted, file: Path) -> None:
    """Write what the official scorers and uploads take: every row of the benchmark with all keys they read. A missing
    row has empty predictions, since the scripts leave rows without the key out of the denominator.

    JSONL for a .jsonl (MMSU's and AIR-Bench's scripts, MMAR's too), Parquet for a .parquet (MMAU-Pro's), a JSON list
    otherwise (MMAU's).
    """
    rule = predicted.rule
    if predicted.shuffled is not None and rule in ("letter", "first_letter"):
        raise PredictionsError(
            "these choices were shuffled: their letters are not those that the official script reads"
        )
    rows = (
        {
            **row,
            "thinking_prediction": row.get("thinking_prediction") or "",
            **dict.fromkeys(PREDICTION_KEYS, answer_of(row)),
            "response": response_of(row, rule),
        }
        for row in predicted.rows
    )
    if file.suffix == ".parquet":
        _write_parquet(list(rows), file)
    elif file.suffix == ".jsonl":
        write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        write_whole(file, json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n")


def _write_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    temporary = file.with_name(f".{file.name}.tmp")
    parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    temporary.replace(file)


@app.command()
def main(
    predictions: Annotated[Path, typer.Argument(help="OUT.jsonl of eval.infer, or rows with the same keys.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the totals as JSON.")] = None,
    rows_file: Annotated[Path | None, typer.Option("--rows", help="Write each row's verdicts as JSON lines.")] = None,
    official: Annotated[
        Path | None,
        typer.Option("--official", help="Write a file for the official scorer or upload (.json, .jsonl or .parquet)."),
    ] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the table as Markdown.")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="Write a row of a LaTeX table.")] = None,
    name: Annotated[str | None, typer.Option(help="What that row is called. Default: the file's name.")] = None,
) -> None:
    """Score predictions by their benchmark's official rule, and by a strict one beside it.

    Official, for MMAR, MMAU and manifests: the answer's words are all there, and none that only wrong choices have.
    Strict: exactly one choice is named, by its text or its letter, and it is the answer. Rows that are missing, failed
    or have no answer are wrong.
    """
    try:
        predicted = load(predictions)
        graded = grade_all(predicted)
        summary = totals(predicted, graded)
        if json_file:
            write_whole(json_file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if rows_file:
            write_whole(rows_file, "".join(json.dumps(asdict(row)) + "\n" for row in graded))
        if official:
            official_file(predicted, official)
        if markdown:
            write_whole(markdown, as_markdown(summary, predictions))
        if latex:
            write_whole(latex, as_latex(summary, name or predictions.stem))
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    show(summary, predictions)
    if predicted.num_unknown:
        _errors.print(
            f"== {predicted.num_unknown} rows are missing, and the file of questions that "
            f"{sidecar_path(predictions).name} names is not there unchanged: they count in the total only",
            markup=False,
        )
    if official:
        _errors.print(f"for the official scorer: {official}", markup=False)


HEADINGS = ("rows", "no answer", "official % (95%)", "strict % (95%)")


def table_of(summary: Mapping[str, Any]) -> Iterator[tuple[str, list[str] | None]]:
    """The table, a (label, cells) a line; a heading of a section has no cells."""
    yield "all", _cells(summary)
    if summary["macro_over"] and summary["macro_strict_accuracy"] is not None:
        macro = [_percent(summary[f"{key}_accuracy"], summary[f"{key}_interval"]) for key in ("macro", "macro_strict")]
        yield f"mean over {summary['macro_over']}", ["", "", *macro]
    for field, groups in (*summary["by"].items(), ("clips heard", summary["by_clips"])):
        yield field, None
        for label, group in groups.items():
            yield f"  {label}", _cells(group)


def show(summary: Mapping[str, Any], file: Path) -> None:
    """Print the totals and the breakdowns as a table."""
    table = Table(title=_title(summary, file), title_justify="left")
    table.add_column("")
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for label, cells in table_of(summary):
        if cells is None:
            table.add_section()
        table.add_row(label, *(cells or ()), style="dim" if cells is None else "bold" if label == "all" else None)
    console = Console(highlight=False)
    console.print(table)
    console.print(_notes(summary), markup=False, soft_wrap=True)


def as_markdown(summary: Mapping[str, Any], file: Path) -> str:
    """The same table for a README or a pull request."""
    lines = [f"### {_title(summary, file)}", "", f"| | {' | '.join(HEADINGS)} |", "|---|---:|---:|---:|---:|"]
    for label, cells in table_of(summary):
        name = f"**{label}**" if cells is None else label.strip().replace("|", "\\|")
        lines.append(f"| {name} | {' | '.join(cells or [''] * len(HEADINGS))} |")
    return "\n".join([*lines, "", *_notes(summary).splitlines()]) + "\n"


def as_latex(summary: Mapping[str, Any], name: str) -> str:
    """One row of a table: the groups of the first breakdown, their mean, all rows; by the official rule where we have
    it, else by the strict one. A comment names the columns."""
    rule, macro = ("official", "macro") if summary["official_accuracy"] is not None else ("strict", "macro_strict")
    groups = summary["by"].get(summary["macro_over"], {})
    shares = {label: group[f"{rule}_accuracy"] for label, group in groups.items()}
    shares |= {f"mean over {summary['macro_over']}": summary[f"{macro}_accuracy"]} if groups else {}
    shares |= {"all": summary[f"{rule}_accuracy"]}
    cells = ["--" if share is None else f"{100 * share:.1f}" for share in shares.values()]
    columns = " & ".join(["model", *(_escape_latex(label) for label in shares)])
    return f"% {columns} ({rule}, % of {summary['scored']} rows)\n{' & '.join([_escape_latex(name), *cells])} \\\\\n"


def _escape_latex(text: str) -> str:
    words = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(
        words.get(character, f"\\{character}" if character in "&%$#_{}" else character) for character in text
    )


def _title(summary: Mapping[str, Any], file: Path) -> str:
    pinned = "" if summary["benchmark"] in (None, AUDIO_QA) else f", {summary['revision'] or 'revision unpinned'}"
    return f"{summary['benchmark'] or 'predictions'}{pinned}: {file.name}"


def _cells(group: Mapping[str, Any]) -> list[str]:
    scores = [_percent(group[f"{rule}_accuracy"], group[f"{rule}_interval"]) for rule in RULES]
    return [str(group["total"]), str(group["unanswered"]), *scores]


def _percent(accuracy: float | None, interval: Sequence[float] | None) -> str:
    if accuracy is None or interval is None:
        return "not scored"
    return f"{100 * accuracy:.1f} ({100 * interval[0]:4.1f}-{100 * interval[1]:5.1f})"


def _notes(summary: Mapping[str, Any]) -> str:
    segments = summary["segments"]
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(segments["refused"].items()))
    notes = [
        f"missing {summary['missing']}, errors {summary['errors']}; "
        f"segments named {segments['named']}, inserted {segments['inserted']} in {segments['rows_with_clips']} rows"
        + (f", {segments['mean_seconds']:.2f} s each on average" if segments["inserted"] else "")
        + (f", refused {refused}" if refused else "")
    ]
    if without := summary["total"] - summary["scored"]:
        notes.append(f"{without} rows have no key here (withheld answers, open questions): not in the accuracies")
    if summary["rule"] == "nv_embed":
        notes.append("the official rule is an embedding model and judges: write the --official file for their script")
    return "\n".join(notes)


if __name__ == "__main__":
    app()
