"""The closing table of a recipe: what was trained, for how long, what it scores, and where things are.

    python script/summary.py RUN_DIR

Reads what the stages left in RUN_DIR, and writes the same as RUN_DIR/summary.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MODES = ("interleaved", "grounded", "plain")


@dataclass(frozen=True)
class StageSummary:
    stage: str
    seconds: float
    starts: int
    what: str
    where: str


@dataclass(frozen=True)
class Scores:
    """One prediction file. Accuracies are shares of all rows, None where the benchmark withholds the answers; `chance`
    is that of guessing among each row's choices."""

    name: str
    mode: str
    total: int
    unanswered: int
    chance: float
    clips_per_row: float
    official_accuracy: float | None
    official_interval: tuple[float, float] | None
    strict_accuracy: float | None
    strict_interval: tuple[float, float] | None


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        yield from (json.loads(line) for line in file)


def sft_log(sft_dir: Path) -> str:
    """Steps and loss, from ms-swift's log. A resumed run logs on in the same file. Only every SFT_LOG_STEPS'th step has
    a line with its loss; the closing line has the number of the last step."""
    losses, last, held = {}, 0, ""
    for path in sorted(sft_dir.glob("logging.jsonl")):
        for line in json_lines(path):
            if "global_step/max_steps" in line:
                step = int(str(line["global_step/max_steps"]).partition("/")[0])
                last = max(last, step)
                if "eval_loss" in line:
                    held = f", {line['eval_loss']:.2f} on held rows"
                if "loss" in line:
                    losses[step] = line["loss"]
    if not losses:
        return ""
    first, latest = min(losses), max(losses)
    loss = f"{losses[first]:.2f} -> {losses[latest]:.2f}" if first < latest else f"{losses[first]:.2f} at step {first}"
    return f"{last} steps, loss {loss}{held}"


def rl_metrics(rl_dir: Path) -> dict[int, dict[str, float]]:
    """verl's metrics by step. Each start of the trainer has its own file; a step that it repeated counts once."""
    steps: dict[int, dict[str, float]] = {}
    for path in sorted(rl_dir.glob("metrics*.jsonl")):
        for line in json_lines(path):
            steps.setdefault(line["step"], {}).update(line["data"])
    return {step: data for step, data in sorted(steps.items()) if "critic/score/mean" in data}


def rl_log(rl_dir: Path) -> str:
    steps = rl_metrics(rl_dir)
    if not steps:
        return ""
    scores = [data["critic/score/mean"] for data in steps.values()]
    clips = [data.get("segments/inserted", 0.0) for data in steps.values()]
    name = "training/rollout_probs_diff_mean"  # not with RL_BYPASS=True
    differences = [data[name] for data in steps.values() if name in data]
    clips_each = sum(clips) / len(clips)
    return f"{len(steps)} steps, reward {scores[0]:.2f} -> {scores[-1]:.2f}, {clips_each:.2f} clips a trajectory" + (
        f", |rollout - actor| at most {max(differences):.0e}" if differences else ""
    )


def stage_summaries(run_dir: Path) -> list[StageSummary]:
    found = []
    for path in run_dir.glob("manifests/*.json"):
        manifest = json.loads(path.read_text())
        stage = manifest["stage"]
        what = {"sft": sft_log, "rl": rl_log}.get(stage, lambda _: "")(run_dir / manifest["output"])
        if not manifest["finished"]:
            what = "not finished"
        found.append(
            (
                manifest["started"],
                StageSummary(stage, manifest["seconds"], manifest["starts"], what, manifest["output"]),
            )
        )
    return [summary for _, summary in sorted(found, key=lambda pair: pair[0])]


def scores(predictions: Path) -> Scores:
    """The totals of `eval.score` beside MODE.jsonl, and what the rows themselves say."""
    totals = json.loads(predictions.with_suffix(".json").read_text())
    rows = list(json_lines(predictions))
    return Scores(
        name=predictions.parent.name + (", SFT" if predictions.parent.parent.name == "gate" else ""),
        mode=predictions.stem,
        total=totals["total"],
        unanswered=totals["unanswered"],
        chance=sum(1 / len(row["choices"]) for row in rows) / len(rows),
        clips_per_row=totals["segments"]["inserted"] / totals["total"],
        official_accuracy=totals["official_accuracy"],
        official_interval=totals["official_interval"],
        strict_accuracy=totals["strict_accuracy"],
        strict_interval=totals["strict_interval"],
    )


def percent(share: float | None, interval: tuple[float, float] | None) -> str:
    if share is None or interval is None:
        return "-"
    return f"{100 * share:.1f} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def show(run_dir: Path, stages: list[StageSummary], results: list[Scores]) -> None:
    console = Console()
    table = Table("stage", "time", "what", "in", title="What was run", title_justify="left", box=None)
    for stage in stages:
        time = duration(stage.seconds) + (f", the last of {stage.starts} starts" if stage.starts > 1 else "")
        table.add_row(stage.stage, time, stage.what, stage.where)
    console.print(table, "")
    table = Table(title="Scores in %, with 95% intervals", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("data", "mode", "rows", "official", "strict", "chance", "no answer", "clips"):
        table.add_column(heading, no_wrap=heading in ("data", "mode", "official", "strict"))
    for result in results:
        table.add_row(
            result.name,
            result.mode,
            str(result.total),
            percent(result.official_accuracy, result.official_interval),
            percent(result.strict_accuracy, result.strict_interval),
            f"{100 * result.chance:.1f}",
            str(result.unanswered),
            f"{result.clips_per_row:.2f}",
        )
    console.print(
        table, "", f"Everything is in {run_dir}; this table as JSON: {run_dir / 'summary.json'}", soft_wrap=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="the RUN_DIR of a recipe, after its score stage")
    run_dir = parser.parse_args().run_dir.resolve()
    found = [
        path
        for folder in ("gate", "eval")
        for mode in MODES
        for path in run_dir.glob(f"{folder}/*/{mode}.jsonl")
        if path.with_suffix(".json").exists()
    ]
    if not found:
        print(
            f"summary.py: error: no scored predictions under {run_dir / 'eval'}; run the stages infer and score",
            file=sys.stderr,
        )
        return 1
    stages = stage_summaries(run_dir)
    results = [scores(path) for path in sorted(found, key=lambda path: path.parent.name)]  # before RL first
    summary = {"stages": [asdict(stage) for stage in stages], "scores": [asdict(result) for result in results]}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(run_dir, stages, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
