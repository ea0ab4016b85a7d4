"""What it would cost and take to make a set of the papers' size, from what a run measured.

    python -m converters.synthesis.plan RUN [--sft ROWS] [--rl ROWS] [--price STAGE=IN,OUT] [--tokens-per-second ST=N]

A few hundred clips are enough for a run to measure on. Rows for RL can be taken from those for SFT, without their
reasoning; so a set of both sizes needs clips for the larger of SFT alone and both together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.console import Console
from rich.table import Table

from converters import conversion
from converters.synthesis.config import Config, ConfigError, Price, read_config
from converters.synthesis.summary import StageSummary, Summary, read_summary

# EAQA-SFT and EAQA-RL (Echo, its section on data); Audio-Cogito's released set.
PAPER_ROWS = {"eaqa": (75_862, 21_900), "cogito": (545_000, 0)}


@dataclass(frozen=True)
class StagePlan:
    """A stage at the wanted size. `hours` at `tokens_per_second`; None where nothing says how fast it is."""

    name: str
    clips: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    tokens_per_second: float | None
    hours: float | None


@dataclass(frozen=True)
class Plan:
    """`clips` of sound are needed; stages run one after the other."""

    sft_rows: int
    rl_rows: int
    clips: int
    stages: tuple[StagePlan, ...]

    @property
    def cost(self) -> float:
        return sum(stage.cost for stage in self.stages)

    @property
    def hours(self) -> float:
        return sum(stage.hours or 0.0 for stage in self.stages)


def make_plan(
    summary: Summary, config: Config, sft: int, rl: int, prices: dict[str, Price], speeds: dict[str, float]
) -> Plan:
    """Raises ConfigError where the run has written no row of a kind that is wanted."""
    measured = summary.stages[0].rows_out  # clips that could be used
    num_sft = summary.written["sft"] + summary.written["validation"]
    num_all = num_sft + summary.written["rl"]
    if not measured or (sft and not num_sft) or (rl and not num_all):
        raise ConfigError(f"from {measured} clips the run wrote {summary.written}: nothing to reckon from")
    needed = max(sft / num_sft if sft else 0.0, (sft + rl) / num_all if sft + rl else 0.0)
    clips = math.ceil(needed * measured)
    stages = [
        _stage(stage, clips, clips / measured, config, prices, speeds) for stage in summary.stages if stage.requests
    ]
    return Plan(sft, rl, clips, tuple(stages))


def _stage(
    stage: StageSummary,
    clips: int,
    factor: float,
    config: Config,
    prices: dict[str, Price],
    speeds: dict[str, float],
) -> StagePlan:
    prompt, completion = round(stage.prompt_tokens * factor), round(stage.completion_tokens * factor)
    endpoints = config.stages.get(stage.name)
    price = prices.get(stage.name) or (endpoints[0].price if endpoints else Price())
    speed = speeds.get(stage.name) or (stage.timed_tokens / stage.seconds if stage.timed_tokens else None)
    return StagePlan(
        name=stage.name,
        clips=clips,
        requests=round(stage.requests * factor),
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=(prompt * price.prompt + completion * price.completion) / 1e6,
        tokens_per_second=speed,
        hours=(prompt + completion) / speed / 3_600 if speed else None,
    )


app = conversion.new_command()


@app.command()
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="A finished run's folder.")],
    sft: Annotated[int | None, typer.Option(min=0, help="SFT rows wanted.", show_default="the paper's")] = None,
    rl: Annotated[int | None, typer.Option(min=0, help="RL rows wanted.", show_default="the paper's")] = None,
    price: Annotated[
        list[str],
        typer.Option(metavar="STAGE=IN,OUT", help="Money for a million tokens in and out, over the config's."),
    ] = [],  # noqa: B006  typer reads the default, nobody changes it
    tokens_per_second: Annotated[
        list[str],
        typer.Option(metavar="STAGE=N", help="Tokens in and out that the stage's server does a second."),
    ] = [],  # noqa: B006
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the plan as JSON, too.")] = None,
) -> None:
    """Say how many clips, tokens, hours and how much money a set of the papers' size takes, from what RUN measured."""
    try:
        summary, config = read_summary(run), read_config(run / "run.yaml")
        paper_sft, paper_rl = PAPER_ROWS[summary.pipeline]
        plan = make_plan(
            summary,
            config,
            paper_sft if sft is None else sft,
            paper_rl if rl is None else rl,
            {stage: _price(value) for stage, value in _pairs(price, summary)},
            {stage: _speed(value) for stage, value in _pairs(tokens_per_second, summary)},
        )
    except (ConfigError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if json is not None:
        json.write_bytes(
            orjson.dumps(asdict(plan) | {"cost": plan.cost, "hours": plan.hours}, option=orjson.OPT_INDENT_2)
        )
    _show(plan, summary)


def _pairs(words: list[str], summary: Summary) -> list[tuple[str, str]]:
    pairs = []
    for word in words:
        stage, equals, value = word.partition("=")
        if not equals or stage not in {s.name for s in summary.stages if s.requests}:
            asking = ", ".join(s.name for s in summary.stages if s.requests)
            raise typer.BadParameter(f"{word!r} is not STAGE=VALUE with STAGE one of {asking}")
        pairs.append((stage, value))
    return pairs


def _price(value: str) -> Price:
    try:
        prompt, completion = (float(part) for part in value.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is not IN,OUT, the money for a million tokens") from error
    return Price(prompt=prompt, completion=completion)


def _speed(value: str) -> float:
    try:
        speed = float(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is no number of tokens a second") from error
    if speed <= 0:
        raise typer.BadParameter(f"{value!r}: a speed is above 0")
    return speed


def _show(plan: Plan, summary: Summary) -> None:
    measured = summary.stages[0].rows_out
    table = Table(box=None, header_style="bold")
    for name in ("stage", "requests", "tokens in", "tokens out", "tokens/s", "hours", "cost"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        speed, hours = stage.tokens_per_second, stage.hours
        table.add_row(
            stage.name,
            f"{stage.requests:,}",
            f"{stage.prompt_tokens:,}",
            f"{stage.completion_tokens:,}",
            f"{speed:,.0f}" if speed else "?",
            f"{hours:,.1f}" if hours is not None else "?",
            f"{stage.cost:,.2f}",
        )
    table.add_row(
        "all",
        f"{sum(s.requests for s in plan.stages):,}",
        f"{sum(s.prompt_tokens for s in plan.stages):,}",
        f"{sum(s.completion_tokens for s in plan.stages):,}",
        "",
        f"{plan.hours:,.1f}",
        f"{plan.cost:,.2f}",
        style="bold",
    )
    console = Console(highlight=False)
    console.print(
        f"{plan.sft_rows:,} SFT and {plan.rl_rows:,} RL rows need {plan.clips:,} clips, reckoned from {measured:,} "
        f"that gave {summary.written['sft'] + summary.written['validation']:,} and {summary.written['rl']:,}.",
        soft_wrap=True,
    )
    console.print(table)
    console.print("Hours at the speed that the run's servers had; say --tokens-per-second for others.", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="python -m converters.synthesis.plan")
