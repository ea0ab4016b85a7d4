"""One page about a run: rows through every stage, distributions, cost, and a listener for some of its rows.

    python -m converters.synthesis.report RUN [-o report.html]

Self-contained: sounds are in it as WAV, nothing is fetched. A run writes it at its end; this command writes it anew.
"""

from __future__ import annotations

import base64
import heapq
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import orjson
import soundfile
import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from converters import conversion
from converters.atomic import StagedFile
from converters.synthesis.config import Config, ConfigError, read_config
from converters.synthesis.sample import seed_of
from converters.synthesis.summary import StageSummary, Summary, read_summary
from echo_plugins.audio import SAMPLING_RATE, load
from echo_plugins.relisten.segment import Segment, find_tags

TEMPLATE = "report.html.j2"
_UNITS = {"place of segments": "tenth of the clip", "words of reasoning": "words", "segments a row": "segments"}


def write_report(summary: Summary, folder: Path, config: Config, target: Path) -> None:
    """`folder` holds the rows that were written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template(TEMPLATE).render(
        summary=summary,
        stages=[_stage(stage, config) for stage in summary.stages],
        charts=list(_charts(summary)),
        rows=[_row(row, config.audio_root) for row in _sampled(folder, config.report_rows, config.seed)],
        total_tokens=sum(stage.prompt_tokens + stage.completion_tokens for stage in summary.stages),
        total_cost=sum(_cost(stage, config) for stage in summary.stages),
    )
    with StagedFile(target) as staged:
        staged.path.write_text(page, encoding="utf-8")
        staged.commit()


def _stage(stage: StageSummary, config: Config) -> dict[str, Any]:
    widest = max(stage.rows_in, stage.rows_out, 1)
    return {
        **stage.model_dump(),
        "kept_percent": 100 * stage.rows_out / widest,
        "cost": _cost(stage, config),
    }


def _cost(stage: StageSummary, config: Config) -> float:
    """With several models the first one's price stands for all: requests are dealt out evenly, tokens are not counted
    by model."""
    endpoints = config.stages.get(stage.name)
    if not endpoints:
        return 0.0
    price = endpoints[0].price
    return (stage.prompt_tokens * price.prompt + stage.completion_tokens * price.completion) / 1e6


def _charts(summary: Summary) -> Iterator[dict[str, Any]]:
    for name, counts in summary.histograms.items():
        yield _chart(name, counts, _UNITS.get(name, "seconds"))
    yield _chart("domains", summary.domains, "")
    places = {chr(ord("A") + place): count for place, count in summary.answer_places.items()}
    yield _chart("place of the answer", places, "", f"even: p = {summary.answer_places_p:.2g}")
    drafted = {chr(ord("A") + place): count for place, count in summary.drafted_places.items()}
    yield _chart("where the models had put it", drafted, "", f"even: p = {summary.drafted_places_p:.2g}")
    ranks = {f"longer than {rank}": count for rank, count in summary.answer_length_ranks.items()}
    yield _chart("length of the answer among the choices", ranks, "", f"even: p = {summary.answer_length_p:.2g}")
    for stage in summary.stages:
        if stage.tokens_a_request:
            yield _chart(f"tokens of an answer: {stage.name}", stage.tokens_a_request, "tokens")


def _chart(name: str, counts: Mapping[Any, int], unit: str, note: str = "") -> dict[str, Any]:
    highest, total = max(counts.values(), default=1), sum(counts.values())
    bars = [
        {"label": label, "count": count, "percent": 100 * count / highest, "share": 100 * count / total}
        for label, count in counts.items()
    ]
    return {"name": name, "unit": unit, "note": note, "bars": bars}


def _sampled(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows for the listener, a third of them without reasoning where there are any; only ids and seed decide which."""
    picked: dict[str, list[dict[str, Any]]] = {}
    for name in ("sft", "rl"):
        with (folder / f"{name}.jsonl").open("rb") as lines:
            rows = ({"file": name, **orjson.loads(line)} for line in lines)
            picked[name] = heapq.nsmallest(count, rows, key=lambda row: seed_of(seed, "report", row["id"]))
    num_rl = max(min(len(picked["rl"]), count // 3), count - len(picked["sft"]))
    return picked["sft"][: count - num_rl] + picked["rl"][:num_rl]


def _row(row: dict[str, Any], audio_root: Path) -> dict[str, Any]:
    samples = load(audio_root / row["audio"])
    sound = io.BytesIO()
    # Not FLAC: without a table of seek points, which libsndfile writes none of, Chromium cannot go to a segment.
    soundfile.write(sound, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
    duration = len(samples) / SAMPLING_RATE
    segments = [tag.meaning for tag in find_tags(row.get("think") or "") if isinstance(tag.meaning, Segment)]
    return {
        **row,
        "duration": duration,
        "sound": base64.b64encode(sound.getvalue()).decode(),
        "think": _with_buttons(row.get("think") or ""),
        "bars": {
            "heard again": [_bar("", s.start_seconds, s.end_seconds, duration) for s in segments],
            "labelled": [_bar(e["label"], e["start"], e["end"], duration) for e in row.get("events", ())],
        },
        "provenance": json.dumps(row["meta"].get("provenance", []), indent=1),
    }


def _bar(label: str, start: float, end: float, duration: float) -> dict[str, Any]:
    end = min(end, duration)
    left = 100 * start / duration
    width = max(0.4, 100 * (end - start) / duration)
    return {"label": label, "start": start, "end": end, "left": left, "width": min(width, 100 - left)}


def _with_buttons(think: str) -> Markup:
    """The chain of thought with a button for every tag that can be played."""
    parts: list[Markup] = []
    reached = 0
    for tag in find_tags(think):
        if isinstance(tag.meaning, Segment):
            parts.append(escape(think[reached : tag.start]))
            start, end = tag.meaning.start_seconds, tag.meaning.end_seconds
            button = Markup('<button class="tag" data-start="{}" data-end="{}">{:.2f} to {:.2f} s</button>')
            parts.append(button.format(start, end, start, end))
            reached = tag.end
    return Markup("").join([*parts, escape(think[reached:])])


app = conversion.new_command()


@app.command()
def main(
    run: Annotated[Path, typer.Argument(metavar="RUN", exists=True, file_okay=False, help="A run's output folder.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, help="The page.", show_default="RUN/report.html")
    ] = None,
) -> None:
    """Write the page about a run: rows through every stage, distributions, cost, and rows to listen to."""
    try:
        write_report(read_summary(run), run, read_config(run / "run.yaml"), output or run / "report.html")
    except (ConfigError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app(prog_name="python -m converters.synthesis.report")
