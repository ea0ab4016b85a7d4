"""Several runs of one model on the same questions: mean and spread, pass@k, majority vote, consistency.

    python -m eval.infer ... --output OUT.jsonl --runs 8     # OUT.jsonl, OUT.seed1.jsonl ... OUT.seed7.jsonl
    python -m eval.runs OUT.jsonl OUT.seed*.jsonl [--json FILE]

A vote is for the choice that an answer names, strictly: an answer that names none is no vote, and a tie elects nobody.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .predictions import PredictionsError, write_whole
from .score import RULES, Predicted, chosen, grade_all, load
from .stats import pass_at_k, wilson

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def majority(votes: Sequence[str | None]) -> str | None:
    """The choice with the most votes; None where there are no votes or the most are shared."""
    ranked = Counter(vote for vote in votes if vote is not None).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def agreement(votes: Sequence[str | None]) -> float:
    """The share of the pairs of runs that name the same choice. Runs that name none agree with nobody."""
    pairs = list(itertools.combinations(votes, 2))
    return sum(first is not None and first == second for first, second in pairs) / len(pairs)


def summarise(runs: Sequence[Predicted]) -> dict[str, Any]:
    """What several runs say of a model. Raises PredictionsError when they are not runs on the same rows."""
    ids = [[str(row["id"]) for row in run.rows] for run in runs]
    if len(runs) < 2:
        raise PredictionsError("several runs are needed; one is for eval.score")
    if len({run.sha256 for run in runs}) > 1 or any(set(other) != set(ids[0]) for other in ids) or runs[0].num_unknown:
        raise PredictionsError("these are not runs on the same rows of the same questions")
    by_id = [
        dict(zip(names, zip(run.rows, grade_all(run), strict=True), strict=True))
        for names, run in zip(ids, runs, strict=True)
    ]
    summary: dict[str, Any] = {"runs": len(runs), "rows": len(ids[0])}
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k <= len(runs)} | {len(runs)})
    for rule in RULES:
        verdicts = [[getattr(run[row_id][1], rule) for run in by_id] for row_id in ids[0]]
        scored = [row for row in verdicts if None not in row]
        if not scored:
            summary[rule] = None
            continue
        shares = [statistics.fmean(run) for run in zip(*scored, strict=True)]
        summary[rule] = {
            "rows": len(scored),
            "accuracies": shares,
            "mean_accuracy": statistics.fmean(shares),
            "standard_deviation": statistics.stdev(shares),
            "pass_at_k": {str(k): statistics.fmean(pass_at_k(sum(row), len(row), k) for row in scored) for k in ks},
        }
    votes = {row_id: [chosen(run[row_id][0]) for run in by_id] for row_id in ids[0]}
    elected = {row_id: majority(row) for row_id, row in votes.items()}
    keys = {row_id: chosen(row, row["answer"]) for row_id, (row, _) in by_id[0].items() if row.get("answer")}
    right = sum(elected[row_id] is not None and elected[row_id] == key for row_id, key in keys.items())
    return {
        **summary,
        "majority_accuracy": right / len(keys) if keys else None,
        "majority_interval": wilson(right, len(keys)) if keys else None,
        "without_majority": sum(choice is None for choice in elected.values()),
        "consistency": {
            "choices_shuffled": len({run.shuffled for run in runs}) > 1,
            "pairwise": statistics.fmean(agreement(row) for row in votes.values()),
            "unanimous": statistics.fmean(agreement(row) == 1.0 for row in votes.values()),
        },
    }


@app.command()
def main(
    predictions: Annotated[list[Path], typer.Argument(help="One file a run, as eval.infer --runs writes them.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON.")] = None,
) -> None:
    """Sum up several runs of one model: mean and spread, pass@k (unbiased), majority vote, consistency.

    Where the choices were shuffled with another seed in each run, consistency is that over their order.
    """
    try:
        summary = summarise([load(file) for file in predictions])
        if json_file:
            write_whole(json_file, json.dumps(summary, indent=2) + "\n")
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    _show(summary)


def _show(summary: dict[str, Any]) -> None:
    table = Table("%", *RULES, title=f"{summary['runs']} runs of {summary['rows']} rows", title_justify="left")
    scored = {rule: summary[rule] for rule in RULES if summary[rule]}

    def row(label: str, cell: Any) -> None:
        table.add_row(label, *(cell(scored[rule]) if rule in scored else "not scored" for rule in RULES))

    row("mean and spread", lambda of: f"{100 * of['mean_accuracy']:.1f} \u00b1 {100 * of['standard_deviation']:.1f}")
    for k in next(iter(scored.values()))["pass_at_k"] if scored else ():
        row(f"pass@{k}", lambda of, k=k: f"{100 * of['pass_at_k'][k]:.1f}")
    if summary["majority_accuracy"] is not None:
        low, high = summary["majority_interval"]
        table.add_row("majority", "", f"{100 * summary['majority_accuracy']:.1f} ({100 * low:.1f}-{100 * high:.1f})")
    console, consistency = Console(highlight=False), summary["consistency"]
    console.print(table)
    order = ", the choices in another order each time" if consistency["choices_shuffled"] else ""
    console.print(
        f"two runs name the same choice in {100 * consistency['pairwise']:.1f}% of rows, all of them in "
        f"{100 * consistency['unanimous']:.1f}%{order}; {summary['without_majority']} rows elect no choice",
        soft_wrap=True,
    )


if __name__ == "__main__":
    app()
