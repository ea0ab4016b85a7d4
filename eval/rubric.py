"""Score how a model reasoned: five binary criteria an item, judged by any OpenAI-compatible model (MMAR-Rubrics).

    python -m eval.rubric OUT.jsonl --rubrics MMAR-meta.jsonl --judge-url URL --judge-model NAME [--json FILE]

An item's answer is judged first, by the official rule; a wrong one scores 0 and no judge is asked. A right one is
judged five times. Two ways of trimming are in use and both are computed: the challenge's text takes five whole runs and
the mean of the middle three, its script the middle three of each item's five judgements (MMAR,
code/evaluation_rubrics.py).

The denominator is the rubrics file: a row that is missing, unanswered, or that the judge failed on counts as 0 and is
shown. Every judgement is in a journal as soon as it is paid for; the same command goes on after a kill.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from echo_plugins.chat_client import KEY_VARIABLE, ChatClient, ChatError, Limits, Reply, Status
from echo_plugins.relisten.transcript import official_match

from .benchmarks import BenchmarkError, Item, breakdowns_of, labels, load_questions
from .judge import Case, criteria_of, read_verdict, request
from .options import KeyValue, key_value
from .predictions import PredictionsError, read_rows, read_sidecar, write_whole
from .progress import progress
from .score import answer_of, predicted_of

JUDGEMENTS = 5  # of each item
MAX_CHARS = 10_000  # the challenge: fewer than this, of the thinking and of the answer
SHOWN = 10  # rows named in a message

_console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Candidate:
    """One item and what is predicted for it. `case` is None where there is nothing to judge: the answer is wrong."""

    item: Item
    thinking: str
    said: str
    correct: bool
    case: Case | None

    @property
    def is_too_long(self) -> bool:
        return len(self.thinking) >= MAX_CHARS or len(self.said) >= MAX_CHARS


@dataclass(frozen=True)
class Judged:
    """The judgements on one item: which criteria each found met, None where the judge failed."""

    candidate: Candidate
    judgements: tuple[tuple[bool, ...] | None, ...]

    @property
    def scores(self) -> list[float]:
        """The share of criteria met in each judgement, 0 where the judge failed; empty when the answer is wrong."""
        return [sum(met) / len(met) if met else 0.0 for met in self.judgements]

    @property
    def num_failed(self) -> int:
        return sum(met is None for met in self.judgements)


@app.command()
def main(
    predictions: Annotated[Path, typer.Argument(help="OUT.jsonl of eval.infer, or a submission: id and predictions.")],
    rubrics: Annotated[
        Path, typer.Option(help="Items with their rubric: MMAR-meta.jsonl, or a manifest with rubrics.")
    ],
    judge_url: Annotated[str, typer.Option(help="Base URL of an OpenAI-compatible server, ending in /v1.")],
    judge_model: Annotated[str, typer.Option(help="The challenge's judge is gpt-4o-2024-11-20.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the totals as JSON.")] = None,
    rows_file: Annotated[
        Path | None, typer.Option("--rows", help="Write each item's judgements as JSON lines.")
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="Write the challenge's submission (JSON lines), once it is valid.")
    ] = None,
    journal: Annotated[
        Path | None, typer.Option(help="What was paid for. Default: OUT.judge.jsonl beside the predictions.")
    ] = None,
    judgements: Annotated[int, typer.Option(min=1, help="Judgements of each item; the rules speak of 5.")] = JUDGEMENTS,
    judge_arg: Annotated[
        list[KeyValue] | None,
        typer.Option(
            parser=key_value,
            metavar="KEY=JSON",
            help="Another field of the judge's request, such as max_tokens=2000; null drops one.",
        ),
    ] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable that holds the judge's key.")] = KEY_VARIABLE,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests open at once.")] = 16,
    requests_per_minute: Annotated[float | None, typer.Option(min=0.001, help="Default: no limit.")] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="Of one request.")] = 120.0,
    attempts: Annotated[int, typer.Option(min=1, help="Of a request that nothing, or no verdict, comes of.")] = 8,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Pay again for what the journal holds as refused or malformed.")
    ] = False,
    zero_long: Annotated[
        bool,
        typer.Option("--zero-long", help=f"Thinking of {MAX_CHARS:,} characters or more scores 0, unread."),
    ] = False,
) -> None:
    """Score how a model reasoned: five criteria an item, judged five times by any OpenAI-compatible model.

    Avg: answers that are right. Rubrics: the mean share of criteria met, 0 for a wrong answer. CRS: the same over right
    answers only. Thinking of 10,000 characters or more is not allowed by the challenge, whose script warns and judges
    it all the same: so does this command, unless --zero-long is given.
    """
    overrides = dict(judge_arg or ())
    limits = Limits(
        concurrency, requests_per_minute, timeout_seconds, max_attempts=attempts, max_unusable=min(attempts, 3)
    )
    try:
        sidecar = read_sidecar(predictions)
        name = sidecar["identity"]["benchmark"] if sidecar else "mmar"
        candidates = load(predictions, rubrics, name)
        if submission:
            write_submission(candidates, submission)
        asked = [None if zero_long and candidate.is_too_long else candidate.case for candidate in candidates]
        client = ChatClient(
            judge_url,
            key_variable=key_variable,
            limits=limits,
            journal=journal or predictions.with_suffix(".judge.jsonl"),
            retry_unusable=retry_errors,
        )
        replies = asyncio.run(_judge_all(client, asked, judge_model, overrides, judgements))
        judged = [
            _judged(candidate, case, found) for candidate, case, found in zip(candidates, asked, replies, strict=True)
        ]
        summary = totals(judged, name)
        summary["judge"] = {
            "model": judge_model,
            "models_said": _models(replies),
            "judgements": judgements,
            "arguments": overrides,
        }
        summary["tokens"] = vars(client.spent)
        if rows_file:
            write_whole(rows_file, "".join(json.dumps(_row(one)) + "\n" for one in judged))
        if json_file:
            write_whole(json_file, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    except KeyboardInterrupt:
        _say("stopped; the same command goes on with the judgements that are left")
        raise typer.Exit(1) from None
    except (ValueError, OSError, ChatError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    show(summary, predictions)
    _report(judged, replies, client)


def load(predictions: Path, rubrics: Path, name: str) -> list[Candidate]:
    """Every item of the rubrics file with what is predicted for it. Raises PredictionsError, BenchmarkError."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_rows(predictions, ours=read_sidecar(predictions) is not None):
        if row.get("id") is None:
            raise PredictionsError(f"{predictions}, line {number}: not a row with an id")
        if str(row["id"]) in rows:
            raise PredictionsError(f"{predictions}, line {number}: row {row['id']!r} is there twice")
        rows[str(row["id"])] = row
    candidates = [
        _candidate(item, rows.pop(item.id, {"id": item.id}), rubrics) for item in load_questions(name, rubrics)
    ]
    if rows:
        raise PredictionsError(f"{predictions}: {len(rows)} rows are not in {rubrics.name}: {_some(rows)}")
    return candidates


def _candidate(item: Item, row: Mapping[str, Any], rubrics: Path) -> Candidate:
    thinking, said = row.get("thinking_prediction") or "", answer_of(row)
    if not isinstance(predicted_of(row), (str, type(None))):
        raise PredictionsError(f"row {item.id!r}: the prediction must be text, not {predicted_of(row)!r}")
    if not isinstance(thinking, str):
        raise PredictionsError(f"row {item.id!r}: 'thinking_prediction' must be text, not {thinking!r}")
    meta = item.row.get("meta")
    fields = {**(meta if isinstance(meta, dict) else {}), **item.row}
    reference = fields.get("thinking", fields.get("think", ""))
    try:
        criteria = criteria_of(fields.get("rubric"))
        if item.answer is None or not isinstance(reference, str):
            raise ValueError("an item to be judged needs the text of its 'answer' and of its 'thinking'")
    except ValueError as error:
        raise BenchmarkError(f"{rubrics}, row {item.id!r}: {error}") from error
    correct = official_match(said, item.answer, item.choices)
    case = Case(item.question, item.answer, reference, criteria, thinking, said) if correct else None
    return Candidate(item, thinking, said, correct, case)


def submission_problems(rows: Sequence[Mapping[str, Any]], ids: Sequence[str]) -> Iterator[str]:
    """What the challenge would not take of a submission, a sentence each: every id once, both texts under MAX_CHARS."""
    given = [str(row.get("id")) for row in rows]
    if missing := set(ids) - set(given):
        yield f"{len(missing)} rows are missing: {_some(sorted(missing))}"
    if unknown := set(given) - set(ids):
        yield f"{len(unknown)} rows are no items of the benchmark: {_some(sorted(unknown))}"
    if twice := [row_id for row_id, count in Counter(given).items() if count > 1]:
        yield f"{len(twice)} rows are there more than once: {_some(sorted(twice))}"
    for key in ("thinking_prediction", "answer_prediction"):
        if bad := [str(row.get("id")) for row in rows if not isinstance(row.get(key), str)]:
            yield f"{key} is no text in {len(bad)} rows: {_some(bad)}"
        if long := [str(row.get("id")) for row in rows if len(str(row.get(key, ""))) >= MAX_CHARS]:
            yield f"{key} has {MAX_CHARS:,} characters or more in {len(long)} rows: {_some(long)}"


def write_submission(candidates: Sequence[Candidate], file: Path) -> None:
    """Write what the challenge takes: every item, its thinking and its answer. Raises PredictionsError when it would
    not take them; nothing is shortened, since the challenge forbids editing what a model thought."""
    rows = [
        {"id": one.item.row["id"], "thinking_prediction": one.thinking, "answer_prediction": one.said}
        for one in candidates
    ]
    if problems := list(submission_problems(rows, [one.item.id for one in candidates])):
        raise PredictionsError(f"no submission was written: {'; '.join(problems)}")
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    unanswered = sum(not row["answer_prediction"] for row in rows)
    _say(f"the submission: {file}, {len(rows)} rows, {unanswered} without an answer")


async def _judge_all(
    client: ChatClient, cases: Sequence[Case | None], model: str, overrides: Mapping[str, Any], judgements: int
) -> list[list[Reply]]:
    """The replies on each case, none where there is no case. Raises ChatError."""
    number = judgements * sum(case is not None for case in cases)
    _say(f"{len(cases)} items, {number // judgements} with the right answer: {number} judgements")
    async with client:
        with progress(_console, "judging", "judgements", number) as advance:
            try:
                async with asyncio.TaskGroup() as group:

                    async def judge(case: Case, repeat: int) -> Reply:
                        body = request(case, model, overrides)
                        reply = await client.ask(body, repeat=repeat, check=lambda said: read_verdict(said, case))
                        advance()
                        return reply

                    tasks = [
                        [group.create_task(judge(case, repeat)) for repeat in range(judgements)] if case else []
                        for case in cases
                    ]
            except* ChatError as failed:
                raise failed.exceptions[0] from None
        return [[task.result() for task in each] for each in tasks]


def _judged(candidate: Candidate, case: Case | None, replies: Sequence[Reply]) -> Judged:
    found = [read_verdict(reply.content, case) if case and reply.status is Status.OK else None for reply in replies]
    return Judged(candidate, tuple(found))


def middle(values: Sequence[float]) -> float:
    """The mean without the highest and the lowest, where there are three or more: of five, the middle three."""
    kept = sorted(values)[1:-1] if len(values) > 2 else values
    return sum(kept) / len(kept) if kept else 0.0


def scores(judged: Sequence[Judged]) -> dict[str, Any]:
    """Avg, and Rubrics and CRS by both rules, over all of `judged`; CRS is None where no answer is right."""
    total, correct = len(judged), sum(one.candidate.correct for one in judged)
    num_runs = max((len(one.judgements) for one in judged), default=0)
    runs = [sum(one.scores[run] for one in judged if one.judgements) / max(total, 1) for run in range(num_runs)]
    by_items = sum(middle(one.scores) for one in judged) / max(total, 1)
    by_runs = middle(runs)
    average = correct / max(total, 1)
    return {
        "total": total,
        "correct": correct,
        "avg": average,
        "rubrics_of_runs": by_runs,
        "rubrics_of_items": by_items,
        "crs_of_runs": by_runs / average if correct else None,
        "crs_of_items": by_items / average if correct else None,
        "runs": runs,
        "failed_judgements": sum(one.num_failed for one in judged),
    }


def totals(judged: Sequence[Judged], name: str) -> dict[str, Any]:
    """The scores of all items and of each group of the benchmark's breakdowns."""
    rows = [one.candidate.item.row for one in judged]
    by: dict[str, dict[str, Any]] = {}
    for field in breakdowns_of(name, rows):
        groups: dict[str, list[Judged]] = {}
        for one in judged:
            for label in labels(one.candidate.item.row, field):
                groups.setdefault(label, []).append(one)
        by[field] = {label: scores(groups[label]) for label in sorted(groups)}
    return {
        "benchmark": name,
        **scores(judged),
        "unanswered": sum(not one.candidate.said for one in judged),
        "rows_with_failed_judgements": sum(one.num_failed > 0 for one in judged),
        "too_long": sum(one.candidate.is_too_long for one in judged),
        "by": by,
    }


def _row(judged: Judged) -> dict[str, Any]:
    return {
        "id": judged.candidate.item.id,
        "correct": judged.candidate.correct,
        "score": middle(judged.scores),
        "judgements": [None if met is None else [int(one) for one in met] for met in judged.judgements],
    }


def show(summary: Mapping[str, Any], file: Path) -> None:
    """Print the scores as a table, in per cent but for CRS."""
    table = Table(
        title=f"{summary['benchmark']}: {file.name}, judged by {summary['judge']['model']}", title_justify="left"
    )
    table.add_column("")
    for heading in ("items", "Avg", "Rubrics\nof runs", "Rubrics\nof items", "CRS\nof runs", "CRS\nof items"):
        table.add_column(heading, justify="right")
    table.add_row("all", *_cells(summary), style="bold")
    for field, groups in summary["by"].items():
        table.add_section()
        table.add_row(field, style="dim")
        for label, group in groups.items():
            table.add_row(f"  {label}", *_cells(group))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        "of runs: the middle three of five whole runs (the challenge's text); of items: the middle three of the five "
        "judgements of each item (its script)",
        markup=False,
    )


def _cells(group: Mapping[str, Any]) -> list[str]:
    crs = ("-" if group[key] is None else f"{group[key]:.3f}" for key in ("crs_of_runs", "crs_of_items"))
    per_cent = (f"{100 * group[key]:.2f}" for key in ("avg", "rubrics_of_runs", "rubrics_of_items"))
    return [str(group["total"]), *per_cent, *crs]


def _report(judged: Sequence[Judged], replies: Sequence[Sequence[Reply]], client: ChatClient) -> None:
    """Say what went wrong, and what it cost."""
    if failed := [one.candidate.item.id for one in judged if one.num_failed]:
        counts = ", ".join(f"{count} {status}" for status, count in client.statuses.items() if status is not Status.OK)
        why = next(reply.error for each in replies for reply in each if reply.status is not Status.OK)
        _say(f"the judge failed on {len(failed)} items ({counts}), which count as 0 there: {_some(failed)}")
        _say(f"  the first: {why}")
        _say("  the same command asks again for what was not paid for; with --retry-errors for the rest too")
    if too_long := [one.candidate.item.id for one in judged if one.candidate.is_too_long]:
        _say(
            f"{len(too_long)} items are longer than the challenge allows ({MAX_CHARS:,} characters): {_some(too_long)}"
        )
    if client.retries:
        _say("asked again: " + ", ".join(f"{count} x {reason}" for reason, count in client.retries.most_common()))
    spent, replayed = client.spent, sum(reply.replayed for each in replies for reply in each)
    _say(
        f"cost: {spent.prompt_tokens:,} tokens in, {spent.completion_tokens:,} out ({spent.reasoning_tokens:,} of them "
        f"reasoning); {replayed} judgements came from the journal"
    )


def _models(replies: Sequence[Sequence[Reply]]) -> list[str]:
    """The names that the server gave: which snapshot judged."""
    return sorted({reply.model for each in replies for reply in each if reply.model})


def _some(ids: Sequence[str] | Mapping[str, Any]) -> str:
    shown = ", ".join(list(ids)[:SHOWN])
    return shown if len(ids) <= SHOWN else f"{shown}, ..."


def _say(message: str) -> None:
    _console.print(message, markup=False)


if __name__ == "__main__":
    app()
