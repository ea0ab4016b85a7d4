"""Score predictions by their benchmark's official rule, and by a strict one beside it.

    python -m eval.score OUT.jsonl [--json TOTALS.json] [--rows ROWS.jsonl] [--official FILE.json]
                                   [--markdown FILE.md] [--latex FILE.tex]

The denominator is all that was asked: a row that is missing, failed, or has no answer is wrong, and counted as such.
Accuracies are fractions; tables show per cent. Intervals are 95%, and wider where rows share a recording: see stats.py.
Two models on the same rows: `python -m eval.compare`. Several runs of one model: `python -m eval.runs`.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from echo_plugins.recording import recording_of
from echo_plugins.relisten.transcript import choice_letter, named_choice, official_match

from .benchmarks import (
    AUDIO_QA,
    BENCHMARKS,
    BenchmarkError,
    Questions,
    Rule,
    breakdowns_of,
    labels,
    load_questions,
)
from .predictions import (
    PredictionsError,
    json_line,
    read_rows,
    read_sidecar,
    recorded_paths,
    sidecar_path,
    to_json,
    write_whole,
)
from .stats import effective_size, mean_interval, wilson

PREDICTION_KEYS = ("answer_prediction", "model_prediction", "model_output")
RULES: tuple[Literal["official", "strict"], ...] = ("official", "strict")
UNKNOWN_LABEL = "(unknown)"  # of rows that are missing where the questions are not there to say what they are
SHOWN = 5  # rows named in a message

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
    """The verdicts on one row. None: the answer is withheld, the row cannot be used, the question is open (strict
    only), or the rule is none of ours (official only).

    `recording`: what the row is cut from; rows of one are not independent. `problem`: why the row cannot be used.
    """

    id: str
    official: bool | None
    strict: bool | None
    answered: bool
    recording: str = ""
    problem: str | None = None


@dataclass(frozen=True)
class Tally:
    """Rows and what is right of them; fractions of the rows that the rule has a verdict on, with their intervals.
    `scored`: how many those are by the rule that has more of them."""

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
    `num_unknown`: rows that are missing too, of which nothing but their number is known. `num_questions`: how many rows
    the benchmark has, None where that is not known."""

    benchmark: str | None
    sha256: str | None
    rows: list[dict[str, Any]]
    breakdowns: tuple[str, ...]
    missing: list[str]
    num_unknown: int
    shuffled: int | None = None
    num_questions: int | None = None

    @property
    def rule(self) -> Rule:
        return BENCHMARKS[self.benchmark].rule if self.benchmark in BENCHMARKS else "string_match"

    @property
    def revision(self) -> str | None:
        known = BENCHMARKS[self.benchmark].revisions if self.benchmark in BENCHMARKS else {}
        return known.get(self.sha256 or "")


def answer_of(row: Mapping[str, Any]) -> str:
    """What the row predicts, "" when it predicts nothing, or nothing that is text (see `problem_of`)."""
    value = predicted_of(row)
    return value.strip() if isinstance(value, str) else ""


def predicted_of(row: Mapping[str, Any]) -> Any:
    """The prediction as it stands in the row, None when there is none."""
    return next((row[key] for key in PREDICTION_KEYS if row.get(key) is not None), None)


def chosen(row: Mapping[str, Any], prediction: str | None = None) -> str | None:
    """The text of the one choice that the row's prediction names, strictly; None when it names none or several."""
    return named_choice(answer_of(row) if prediction is None else prediction, _choices(row))


def _choices(row: Mapping[str, Any]) -> list[str]:
    choices = row.get("choices")
    return choices if isinstance(choices, list) and all(isinstance(choice, str) for choice in choices) else []


def problem_of(row: Mapping[str, Any]) -> str | None:
    """Why no script could score the row, None when it can be."""
    choices, answer, predicted = row.get("choices"), row.get("answer"), predicted_of(row)
    if not isinstance(choices, list) or _choices(row) != choices:
        return f"'choices' must be a list of texts, not {_shown(choices)}"
    if not isinstance(answer, (str, type(None))):
        return f"'answer' must be text, not {_shown(answer)}"
    if not isinstance(predicted, (str, type(None))):
        return f"the prediction must be text, not {_shown(predicted)}: it counts as wrong"
    return None


def _shown(value: Any) -> str:
    return repr(value)[:80]


def grade(row: Mapping[str, Any], rule: Rule = "string_match") -> Graded:
    """The verdicts on a row with `choices`, `answer` and a prediction. Never raises: what cannot be scored says why.

    As in the official scripts, an empty answer has a verdict, and without choices the answer's words are what counts.
    Without an answer there is no verdict.
    """
    prediction, answer, problem = answer_of(row), row.get("answer"), problem_of(row)
    choices, match = _choices(row), OFFICIAL_RULES.get(rule)
    official = strict = None
    if isinstance(answer, str) and choices == row.get("choices"):
        official = None if match is None else match(response_of(row, rule), answer, choices)
        named = chosen(row)
        strict = named is not None and named == chosen(row, answer) if choices else None
    elif isinstance(answer, str) and rule == "string_match" and not official_match(prediction, "", ()):
        official = False  # a prediction without a word: the script never looks at the choices
    return Graded(str(row["id"]), official, strict, bool(prediction), recording_of(row), problem)


def response_of(row: Mapping[str, Any], rule: Rule) -> str:
    """The text for the official script of `rule`. For letter rules, the letter of the choice that the prediction names;
    if it names none, the prediction as it is."""
    named = chosen(row) if rule in ("letter", "first_letter") else None
    return answer_of(row) if named is None else choice_letter(row["choices"].index(named))


def tally(graded: Sequence[Graded]) -> Tally:
    """Add up verdicts."""
    values: list[Any] = []
    scored = 0
    for rule in RULES:
        found = [(verdict, row.recording or row.id) for row in graded if (verdict := getattr(row, rule)) is not None]
        verdicts, size = [verdict for verdict, _ in found], len(found)
        scored, right = max(scored, size), sum(verdicts)
        interval = wilson(right, size, effective_size(verdicts, [recording for _, recording in found]))
        values += [right / size, interval] if found else [None, None]
    return Tally(len(graded), scored, sum(not row.answered for row in graded), *values)


def unknown_rows(predicted: Predicted, graded: Sequence[Graded]) -> list[Graded]:
    """The rows of which only their number is known: wrong by each rule that has a verdict on any other."""
    official, strict = (None if all(getattr(row, rule) is None for row in graded) else False for rule in RULES)
    return [Graded(f"unknown {number}", official, strict, False) for number in range(predicted.num_unknown)]


def load(file: Path) -> Predicted:
    """The predictions in `file`, with the rows that its benchmark has and it lacks. Raises PredictionsError."""
    rows: dict[str, dict[str, Any]] = {}
    sidecar = read_sidecar(file)
    for number, row in read_rows(file, ours=sidecar is not None):
        if row.get("id") is None:
            row = {**row, "id": f"line {number}"}
        if str(row["id"]) in rows:
            raise PredictionsError(f"{file}, line {number}: row {row['id']!r} is there twice")
        rows[str(row["id"])] = row
    if sidecar is None:
        if not rows:
            raise PredictionsError(f"{file}: no rows in it")
        found = list(rows.values())
        return Predicted(None, None, found, breakdowns_of(None, found), [], 0)
    identity, num_rows, ids = sidecar["identity"], sidecar["num_rows"], frozenset(sidecar.get("ids", ()))
    name, sha256, shuffled = identity["benchmark"], identity["questions_sha256"], identity.get("shuffle_choices")
    questions = _questions(sidecar, file)
    if questions is None:
        # The questions are elsewhere or others by now: what is missing can be counted, but not broken down.
        found = list(rows.values())
        return Predicted(
            name, sha256, found, breakdowns_of(name, found), [], max(0, num_rows - len(rows)), shuffled=shuffled
        )
    asked = {item.id for item in itertools.islice((item for item in questions if not ids or item.id in ids), num_rows)}
    # A row that is there was asked too, whatever the sidecar of an older version forgot.
    expected = {item.id: item.row for item in questions if item.id in asked or item.id in rows}
    if strangers := [row_id for row_id in rows if row_id not in expected]:
        raise PredictionsError(
            f"{file}: {len(strangers)} rows are no rows of {questions.file}, such as {strangers[0]!r}: take them out"
        )
    whole = [rows.get(row_id, row) for row_id, row in expected.items()]
    missing = [row_id for row_id in expected if row_id not in rows]
    return Predicted(name, sha256, whole, breakdowns_of(name, whole), missing, 0, shuffled, questions.num_rows)


def _questions(sidecar: Mapping[str, Any], file: Path) -> Questions | None:
    """The questions that were asked, where a file that `sidecar` names still holds them unchanged."""
    identity = sidecar["identity"]
    for path in recorded_paths(sidecar, "questions", file):
        with contextlib.suppress(BenchmarkError):
            questions = load_questions(identity["benchmark"], path)
            if questions.sha256 == identity["questions_sha256"]:
                return questions
    return None


def grade_all(predicted: Predicted) -> list[Graded]:
    """The verdicts on all rows. Where no row has an answer that is not empty, the answers are withheld: no verdicts."""
    graded = [grade(row, predicted.rule) for row in predicted.rows]
    if any(row.get("answer") for row in predicted.rows):
        return graded
    return [replace(verdict, official=None, strict=None) for verdict in graded]


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
    unknown = unknown_rows(predicted, graded)
    by: dict[str, dict[str, Tally]] = {}
    for field in predicted.breakdowns:
        groups = groups_of(predicted, graded, lambda row, field=field: labels(row, field))
        by[field] = {label: tally(groups[label]) for label in sorted(groups)}
        if unknown:
            by[field][UNKNOWN_LABEL] = tally([*groups.get(UNKNOWN_LABEL, []), *unknown])
    overall = tally([*graded, *unknown])
    heard = groups_of(predicted, graded, lambda row: [str(_num_inserted(row))])
    stop_reasons = Counter(str(row["stop_reason"]) for row in predicted.rows if "stop_reason" in row)
    return {
        "benchmark": predicted.benchmark,
        "revision": predicted.revision,
        "questions_sha256": predicted.sha256,
        "rule": predicted.rule,
        "questions": predicted.num_questions,
        **asdict(overall),
        **_macro([] if unknown else list(by[predicted.breakdowns[0]].values()) if by else [overall]),
        "macro_over": predicted.breakdowns[0] if predicted.breakdowns else None,
        "recordings": len({row.recording or row.id for row in [*graded, *unknown]}),
        "missing": len(predicted.missing) + predicted.num_unknown,
        "errors": stop_reasons["error"],
        "unusable": [row.id for row in graded if row.problem is not None],
        "no_key": [row.id for row in graded if row.problem is None and row.official is None and row.strict is None],
        "stop_reasons": dict(stop_reasons),
        "segments": _segments(predicted.rows),
        "by": {field: {label: asdict(group) for label, group in groups.items()} for field, groups in by.items()},
        "by_clips": {number: asdict(tally(heard[number])) for number in sorted(heard, key=int)},
    }


def _macro(groups: Sequence[Tally]) -> dict[str, Any]:
    """The mean of the groups' accuracies by either rule, and its interval. A group without a key has none; where some
    rows' groups are not known there is no mean."""
    found: dict[str, Any] = {}
    for rule, name in (("official", "macro"), ("strict", "macro_strict")):
        shares = [
            (accuracy, getattr(group, f"{rule}_interval"))
            for group in groups
            if (accuracy := getattr(group, f"{rule}_accuracy")) is not None
        ]
        found[f"{name}_accuracy"] = statistics.fmean(accuracy for accuracy, _ in shares) if shares else None
        found[f"{name}_interval"] = mean_interval(shares) if shares else None
    return found


def _segments_of(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    segments = row.get("segments")
    return [each for each in segments if isinstance(each, Mapping)] if isinstance(segments, list) else []


def _num_inserted(row: Mapping[str, Any]) -> int:
    return sum(bool(segment.get("inserted")) for segment in _segments_of(row))


def _segments(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tags named, clips inserted and their length, refusals by reason, and rows that heard at least one clip."""
    named = [segment for row in rows for segment in _segments_of(row)]
    inserted = [segment for segment in named if segment.get("inserted")]
    bounds: list[tuple[Any, Any]] = [(segment.get("start"), segment.get("end")) for segment in inserted]
    seconds = [end - start for start, end in bounds if type(start) in (int, float) and type(end) in (int, float)]
    return {
        "named": len(named),
        "inserted": len(inserted),
        "refused": dict(Counter(str(segment["refusal"]) for segment in named if segment.get("refusal"))),
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
        write_whole(file, map(json_line, rows))
    else:
        write_whole(file, to_json(list(rows), indent=2) + "\n")


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
        problems = [(row.id, row.problem) for row in graded if row.problem is not None]
        if len(problems) == len(graded) > 0:
            raise PredictionsError(
                f"{predictions}: no row can be scored. The first, {problems[0][0]!r}: {problems[0][1]}"
            )
        if json_file:
            write_whole(json_file, to_json(summary, indent=2) + "\n")
        if rows_file:
            write_whole(rows_file, map(json_line, map(_verdicts, graded)))
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
    for row_id, problem in problems[:SHOWN]:
        _errors.print(f"== row {row_id!r} cannot be used: {problem}", markup=False)
    if len(problems) > SHOWN:
        _errors.print(f"== ... and {len(problems) - SHOWN} more rows cannot be used", markup=False)
    if predicted.num_unknown:
        _errors.print(
            f"== {predicted.num_unknown} rows are missing, and the file of questions that "
            f"{sidecar_path(predictions).name} names is not there unchanged: they are wrong in the total and under "
            f"{UNKNOWN_LABEL}, and there is no mean over groups",
            markup=False,
        )
    if official:
        _errors.print(f"for the official scorer: {official}", markup=False)


def _verdicts(row: Graded) -> dict[str, Any]:
    """A line of --rows."""
    verdicts = {"id": row.id, "official": row.official, "strict": row.strict, "answered": row.answered}
    return verdicts if row.problem is None else verdicts | {"problem": row.problem}


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
    if summary["unusable"]:
        notes.append(f"{len(summary['unusable'])} rows cannot be used: {_some(summary['unusable'])}")
    if summary["no_key"]:
        what = "withheld answers, open questions"
        notes.append(
            f"{len(summary['no_key'])} rows have no key here ({what}), and no verdict: {_some(summary['no_key'])}"
        )
    if summary["questions"] is not None and summary["total"] < summary["questions"]:
        notes.append(f"{summary['total']} of {summary['questions']} rows of the benchmark were asked")
    if summary["recordings"] < summary["total"]:
        notes.append(f"intervals are of {summary['recordings']} recordings: rows of one are not independent")
    if summary["rule"] == "nv_embed":
        notes.append("the official rule is an embedding model and judges: write the --official file for their script")
    return "\n".join(notes)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


if __name__ == "__main__":
    app()
