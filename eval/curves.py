"""The curves of RL runs, after Figure 4 of the paper: what the reward is made of, and how the policy listens.

    python -m eval.curves RUN [RUN ...] -o curves.png [--json curves.json]

RUN is the folder of a recipe's run, its rl/ folder, or a metrics.jsonl of verl. Several runs are overlaid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .predictions import write_whole

COLOURS = ("#0f6e6e", "#d1592a", "#5b4db2", "#2f7ed8", "#a8326e", "#6b7a12")  # of the runs, on light ground
NUM_COLUMNS = 3
SMOOTHED_FROM = 40  # steps; below it every point can be seen for itself
SMOOTHING_SHARE = 0.05  # of the steps, behind each point

_errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class RunError(ValueError):
    """There is nothing to read in a run; the message says what was looked for and where."""


@dataclass(frozen=True)
class Quantity:
    """One panel. `keys` of verl's log are tried in turn; the values of several keys under one `prefix` are added up."""

    name: str
    title: str
    unit: str
    keys: tuple[str, ...] = ()
    prefix: str = ""


QUANTITIES = (
    Quantity("reward", "Reward", "mean score of a trajectory", ("critic/score/mean",)),
    Quantity("accuracy", "Accuracy", "share of right answers", ("reward/acc",)),
    Quantity("segments_named", "Segments named", "a trajectory", ("segments/named",)),
    Quantity("segments_inserted", "Segments heard again", "a trajectory", ("segments/inserted",)),
    Quantity("segments_refused", "Segments refused", "a trajectory", prefix="segments/refused/"),
    Quantity("segment_seconds", "Length of a segment", "seconds", ("segments/seconds",)),
    Quantity("overlap", "Overlap", "share of seconds heard before", ("segments/overlap",)),
    Quantity(
        "reference_kl", "Divergence from the reference", "KL a token", ("actor/kl_loss", "actor/reward_kl_penalty")
    ),
    Quantity("sampled_tokens", "Length of a response", "sampled tokens", ("tokens/sampled", "response_length/mean")),
)
NO_TERMS = ("acc", "failed", "term_errors")  # what is logged under reward/ and is no term of the preset
VALIDATION_ACCURACY = "val-core/"


@dataclass(frozen=True)
class Curve:
    """One quantity of one run. `smooth` is the mean over the steps just before each, empty where there are few."""

    name: str
    title: str
    unit: str
    steps: list[int]
    values: list[float]
    smooth: list[float]
    validation_steps: list[int]
    validation_values: list[float]


@dataclass(frozen=True)
class RunCurves:
    label: str
    path: str
    curves: list[Curve]


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Every complete JSON line. A last line without its newline is what a kill left, and is skipped."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RunError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise RunError(f"{file}, line {number}: not a JSON object but {type(row).__name__}")
            yield row


def metrics_files(run: Path) -> list[Path]:
    """The logs of `run`, the last start's last. The recipe keeps what an earlier start logged as metrics.TIME.jsonl."""
    if run.is_file():
        return [run]
    return next((files for at in (run, run / "rl") if (files := sorted(at.glob("metrics*.jsonl")))), [])


def read_metrics(files: Sequence[Path]) -> dict[int, dict[str, float]]:
    """verl's metrics by step. A step that a later start repeated counts as the later start logged it."""
    steps: dict[int, dict[str, float]] = {}
    for file in files:
        for number, line in enumerate(read_lines(file), 1):
            step, data = line.get("step"), line.get("data")
            if not isinstance(step, int) or not isinstance(data, dict):
                raise RunError(f"{file}, line {number}: not a line of verl's file logger, which has 'step' and 'data'")
            numbers = {
                key: float(value)
                for key, value in data.items()
                if isinstance(value, (int, float)) and math.isfinite(value)
            }
            steps.setdefault(step, {}).update(numbers)
    return dict(sorted(steps.items()))


def read_curves(run: Path, label: str | None = None) -> RunCurves:
    """The curves of one run. Raises RunError where it has none."""
    if not run.exists():
        raise RunError(f"{run}: no such file or folder")
    files = metrics_files(run)
    if not files:
        raise RunError(
            f"{run}: no metrics.jsonl in it or in its rl/. Give the folder of a recipe's run after its rl stage, "
            "or train with trainer.logger=[console,file]"
        )
    curves = curves_of(read_metrics(files))
    if not curves:
        raise RunError(f"{files[-1]}: no finished training step in it yet")
    return RunCurves(label or run.resolve().name, str(run), curves)


def curves_of(metrics: dict[int, dict[str, float]]) -> list[Curve]:
    """A curve for each quantity that was logged; none before the first training step is done."""
    # Step 0, and whatever else has no score, is a validation alone.
    training = {step: data for step, data in metrics.items() if "critic/score/mean" in data}
    curves = [_curve(quantity, training, metrics) for quantity in _quantities(training)]
    return [curve for curve in curves if curve.values]


def _quantities(training: dict[int, dict[str, float]]) -> list[Quantity]:
    """QUANTITIES, with the terms of the reward right after it."""
    logged = dict.fromkeys(key for data in training.values() for key in sorted(data) if key.startswith("reward/"))
    names = [name for key in logged if (name := key.removeprefix("reward/")) not in NO_TERMS]
    terms = [Quantity(f"reward/{name}", f"Reward: {name}", "weighted", (f"reward/{name}",)) for name in names]
    return [QUANTITIES[0], *terms, *QUANTITIES[1:]]


def _curve(quantity: Quantity, training: dict[int, dict[str, float]], metrics: dict[int, dict[str, float]]) -> Curve:
    steps, values = [], []
    for step, data in training.items():
        if quantity.prefix:
            parts = [value for key, value in data.items() if key.startswith(quantity.prefix)]
            value = sum(parts) if parts else None
        else:
            value = next((data[key] for key in quantity.keys if key in data), None)
        if value is not None:
            steps.append(step)
            values.append(value)
    validation = _validation(metrics) if quantity.name == "accuracy" else {}
    return Curve(
        quantity.name,
        quantity.title,
        quantity.unit,
        steps,
        values,
        _smooth(values),
        list(validation),
        list(validation.values()),
    )


def _validation(metrics: dict[int, dict[str, float]]) -> dict[int, float]:
    """Accuracy on the validation rows: the mean over data sources, where there are several."""
    found: dict[int, float] = {}
    for step, data in metrics.items():
        means = [v for key, v in data.items() if key.startswith(VALIDATION_ACCURACY) and "/acc/mean@" in key]
        if means:
            found[step] = sum(means) / len(means)
    return found


def _smooth(values: Sequence[float]) -> list[float]:
    if len(values) < SMOOTHED_FROM:
        return []
    window = max(2, round(len(values) * SMOOTHING_SHARE))
    pieces = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(piece) / len(piece) for piece in pieces]


def labels_for(runs: Sequence[Path]) -> list[str]:
    """Short names for the runs: the last parts of their paths, as many as it takes to tell them apart."""
    parts = [run.resolve().with_suffix("").parts[1:] if run.is_file() else run.resolve().parts[1:] for run in runs]
    for count in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(each[-count:]) or "/" for each in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {run}" for number, run in enumerate(runs, 1)]


def draw(runs: Sequence[RunCurves], file: Path) -> None:
    """Write the panels as a PNG, whole or not at all: one panel a quantity, one line a run."""
    from matplotlib.figure import Figure

    titles = dict.fromkeys((curve.name, curve.title, curve.unit) for run in runs for curve in run.curves)
    num_rows = math.ceil(len(titles) / NUM_COLUMNS)
    figure = Figure(figsize=(4.1 * NUM_COLUMNS, 2.7 * num_rows + 0.5), dpi=120, layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False)
    for axes, (name, title, unit) in zip(grid.flat, titles, strict=False):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_ylabel(unit, fontsize=8, color="#666666")
        axes.grid(True, color="#e4e4e4", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(labelsize=8, colors="#555555")
        axes.xaxis.get_major_locator().set_params(integer=True)
        for number, run in enumerate(runs):
            curve = next((curve for curve in run.curves if curve.name == name), None)
            if curve is None:
                continue
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(curve.steps, curve.values, color=colour, alpha=0.25 if curve.smooth else 1, linewidth=1.4)
            if curve.smooth:
                axes.plot(curve.steps, curve.smooth, color=colour, linewidth=1.8)
            if curve.validation_values:
                axes.plot(curve.validation_steps, curve.validation_values, "o", color=colour, markersize=5, mfc="white")
    for axes in list(grid.flat)[len(titles) :]:
        axes.set_visible(False)
    figure.supxlabel("step   (open circles: validation)", fontsize=9, color="#666666")
    if len(runs) > 1:
        lines = [grid[0, 0].plot([], [], color=COLOURS[i % len(COLOURS)], label=r.label)[0] for i, r in enumerate(runs)]
        figure.legend(handles=lines, loc="outside upper left", ncols=min(len(runs), 4), frameon=False, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.tmp.png")
    try:
        figure.savefig(unfinished, format="png")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A recipe's run, its rl/, or a metrics.jsonl.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture.")] = Path("curves.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the curves as JSON too.")] = None,
) -> None:
    """Draw the curves of RL runs: the reward and its terms, how many segments the policy names and how long they are,
    how much it hears twice, and how far it has gone from the reference."""
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"{output} must end in .png", param_hint="--output")
    try:
        found = [read_curves(run, label) for run, label in zip(runs, labels_for(runs), strict=True)]
        draw(found, output)
        if json_file:
            content = {"runs": [asdict(run) for run in found]}
            write_whole(json_file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except (ValueError, OSError) as error:
        _errors.print(f"error: {error}", markup=False)
        raise typer.Exit(1) from None
    steps = ", ".join(f"{run.label} to step {run.curves[0].steps[-1]}" for run in found)
    _errors.print(f"{output}: {len(found[0].curves)} panels; {steps}", markup=False)


if __name__ == "__main__":
    app()
