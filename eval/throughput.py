"""How fast re-listening is: four ways to sample the same tokens, on one engine, in one run.

    python -m eval.throughput --model DIR [--quick] [--json FILE] [--png FILE]

    serial        one call at a time, a trajectory after the other, as the paper's released code does
    ours          all trajectories at once through the turn step: what RL rollouts and inference do
    clips first   no pauses: the same clips in the prompt, then the same tokens in one call
    limit         no pauses and no clips: the same tokens in one call, the engine's own decoding speed

Every arm has the same weights, prompts and sampled tokens: a script in the policy's place decides at which token which
tag is written. The caches of vLLM are emptied before each measurement. What the arms share, the audio of the question
among it, is in every one of them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from echo_plugins.audio import SAMPLING_RATE, crop
from echo_plugins.relisten.segment import Segment, format_tag
from echo_plugins.relisten.trajectory import StopReason, Trajectory, Turn

from .engine import Engine, EngineDied, EngineSettings, Question, Sampling, running_engine

SCRIPT = "echo_script"  # the key of a request's extra_args
ARMS = ("serial", "ours", "clips first", "limit")
BATCHES = (1, 4, 16, 64, 128)
SEGMENTS = (0, 1, 2, 4)
QUICK = ((16, 64), (0, 2), 1)  # batches, segments, repeats
SOURCE_SECONDS = 10.0  # of the clip that a question is about
CLIP_SECONDS = 1.0
SERIAL_ROWS = 4  # of a batch that are run in series: time in series grows with the rows, and with nothing else
FILLER = " the bell rings again and again while a dog barks at the door"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Counts:
    """The engine's work. `prefilled_tokens` were computed as prompts, `cached_tokens` were found in the prefix cache;
    `encoder_runs` are steps in which the audio tower ran, over `encoded_clips` in all. `peak_memory_mib` is the engine
    process's resident memory on a CPU, torch's on a GPU."""

    engine_steps: int = 0
    prefilled_tokens: int = 0
    cached_tokens: int = 0
    encoder_runs: int = 0
    encoded_clips: int = 0
    peak_memory_mib: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """One arm of one setting, once. `seconds` for the whole batch: where `measured_rows` is less, from these rows."""

    batch: int
    segments: int
    arm: str
    repeat: int
    seconds: float
    measured_rows: int
    sampled_tokens: int
    counts: Counts
    client_peak_memory_mib: float

    @property
    def tokens_per_second(self) -> float:
        return self.sampled_tokens / self.seconds


@dataclass(frozen=True)
class Row:
    """A question, its audio, the token ids that are sampled for it, and the segments that these name."""

    id: str
    prompt: list[int]
    waveform: np.ndarray
    script: list[int]
    segments: tuple[Segment, ...]


class ThroughputError(RuntimeError):
    """The arms did not sample what they should: there is nothing to compare."""


class ScriptedEngine(Engine):
    """The engine of inference; its requests carry what is left of their row's script."""

    scripts: Mapping[str, list[int]] = MappingProxyType({})

    def sampling_params(self, trajectory: Trajectory, turn: Turn, row_id: str, sampling: Sampling) -> Any:
        params = super().sampling_params(trajectory, turn, row_id, sampling)
        params.extra_args = {SCRIPT: self.scripts[row_id][sum(trajectory.response_mask) :]}
        return params

    def rows(self, batch: int, segments: int, num_tokens: int, seed: int) -> list[Row]:
        """`batch` rows of `num_tokens` sampled tokens, eos the last, with `segments` tags at places that differ."""
        random = np.random.default_rng([seed, batch, segments])
        question = Question("", "", "", "What is heard at the door?", ("a bell", "a dog", "a car", "rain"))
        prompt = self.prompt_ids(question, "interleaved")
        return [
            Row(
                f"{seed}-{batch}-{segments}-{row}",
                prompt,
                random.standard_normal(round(SOURCE_SECONDS * SAMPLING_RATE), dtype=np.float32) / 10,
                *self._script(segments, num_tokens, random),
            )
            for row in range(batch)
        ]

    def _script(
        self, segments: int, num_tokens: int, random: np.random.Generator
    ) -> tuple[list[int], tuple[Segment, ...]]:
        starts = np.round(random.uniform(0, SOURCE_SECONDS - CLIP_SECONDS, segments), 2)
        named = [Segment(float(start), round(float(start) + CLIP_SECONDS, 2)) for start in starts]
        tags = [self.encode(" " + format_tag(segment)) for segment in named]
        num_words = num_tokens - 1 - sum(map(len, tags))
        if num_words < segments:
            raise ValueError(f"{segments} tags do not fit into {num_tokens} tokens")
        filler = self.encode(FILLER)
        words = (filler * (1 + num_words // len(filler)))[:num_words]
        # Each tag before another word, so that a response has something to say after its last one.
        places = sorted(random.choice(num_words, segments, replace=False).tolist())
        script: list[int] = []
        for place, tag, first in zip(
            [*places, num_words], [*tags, [self.tokenizer.eos_token_id]], [0, *places], strict=True
        ):
            script += words[first:place] + tag
        return script, tuple(named)

    async def arm(self, arm: str, rows: Sequence[Row], sampling: Sampling) -> None:
        """Sample every row's script in the manner of `arm`. Raises ThroughputError when a row came out otherwise."""
        self.scripts = {row.id: row.script for row in rows}
        if arm == "serial":
            for row in rows:
                await self._pausing(row, sampling)
        elif arm == "ours":
            await asyncio.gather(*(self._pausing(row, sampling) for row in rows))
        else:
            await asyncio.gather(*(self._at_once(row, sampling, clips_first=arm == "clips first") for row in rows))

    async def _pausing(self, row: Row, sampling: Sampling) -> None:
        trajectory = self._trajectory(row, row.prompt, sampling)
        await self.run(trajectory, row.waveform, row.id, row.id, sampling)
        _check(row, trajectory, len(row.segments))

    async def _at_once(self, row: Row, sampling: Sampling, clips_first: bool) -> None:
        first = row.prompt.index(self.ids.audio)
        clips, names, prompt = [row.waveform], [row.id], row.prompt
        for segment in row.segments if clips_first else ():
            start, end = segment.sample_bounds(SAMPLING_RATE)
            clips.append(crop(row.waveform, start, end))
            names.append(f"{row.id}:{start}-{end}")
            prompt = [
                *prompt[: first + 2],
                self.ids.audio_bos,
                self.ids.audio,
                self.ids.audio_eos,
                *prompt[first + 2 :],
            ]
        trajectory = self._trajectory(row, prompt, replace(sampling, mode="grounded"))
        turn = trajectory.next_turn()
        assert turn is not None
        params = self.sampling_params(trajectory, turn, row.id, sampling)
        output = await self.generate(turn.engine_ids, clips, names, params, row.id)
        trajectory.absorb(output.outputs[0].token_ids, None, output.outputs[0].finish_reason)
        _check(row, trajectory, 0)

    def _trajectory(self, row: Row, prompt: Sequence[int], sampling: Sampling) -> Trajectory:
        return self.start_trajectory(prompt, len(row.waveform), sampling.turn_settings(sampling.max_tokens))


def _check(row: Row, trajectory: Trajectory, num_clips: int) -> None:
    sampled = [token for token, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if mask]
    if trajectory.stop_reason is not StopReason.ANSWERED or len(trajectory.clips) != num_clips or sampled != row.script:
        raise ThroughputError(
            f"row {row.id} ended with {trajectory.stop_reason} ({trajectory.error}), {len(trajectory.clips)} clips of "
            f"{num_clips} and {len(sampled)} tokens of {len(row.script)}"
        )


async def measure(engine: ScriptedEngine, arm: str, rows: Sequence[Row], segments: int, repeat: int) -> Measurement:
    """Run one arm over `rows` with cold caches."""
    sampling = Sampling(temperature=0.0, max_tokens=engine.max_model_len)
    measured = rows[:SERIAL_ROWS] if arm == "serial" else rows
    await engine.llm.reset_mm_cache()
    await engine.llm.reset_encoder_cache()
    if not await engine.llm.reset_prefix_cache():
        raise ThroughputError("vLLM did not empty its prefix cache: a request of the arm before is still running")
    await engine.llm.collective_rpc("start_counting")
    reset_peak_memory()
    started = time.perf_counter()
    await engine.arm(arm, measured, sampling)
    seconds = time.perf_counter() - started
    counts = Counts(**(await engine.llm.collective_rpc("counts"))[0])
    return Measurement(
        len(rows),
        segments,
        arm,
        repeat,
        seconds * len(rows) / len(measured),
        len(measured),
        sum(len(row.script) for row in rows),
        counts,
        peak_memory_mib(),
    )


def peak_memory_mib() -> float:
    """The most resident memory of this process since `reset_peak_memory`, MiB."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


def reset_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM


@dataclass(frozen=True)
class Cell:
    """One arm of one setting, over its repeats: medians, and the least and the most seconds."""

    batch: int
    segments: int
    arm: str
    seconds: float
    least_seconds: float
    most_seconds: float
    tokens_per_second: float
    counts: Counts

    @classmethod
    def of(cls, repeats: Sequence[Measurement]) -> Cell:
        first = repeats[0]
        seconds = [one.seconds for one in repeats]
        counts = {key: statistics.median(vars(one.counts)[key] for one in repeats) for key in vars(first.counts)}
        return cls(
            first.batch,
            first.segments,
            first.arm,
            statistics.median(seconds),
            min(seconds),
            max(seconds),
            statistics.median(one.tokens_per_second for one in repeats),
            Counts(**counts),
        )


def summarise(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """A row for each setting: its cells by arm, and how ours compares. Ratios are medians over the repeats, in each of
    which the arms ran one after the other: what slows the machine down for a while slows all of them."""
    rows = []
    for batch, segments in dict.fromkeys((one.batch, one.segments) for one in measurements):
        here = [one for one in measurements if (one.batch, one.segments) == (batch, segments)]
        by_arm = {arm: sorted((m for m in here if m.arm == arm), key=lambda m: m.repeat) for arm in ARMS}
        cells = {arm: Cell.of(repeats) for arm, repeats in by_arm.items()}

        def times(arm: str, by_arm: Mapping[str, list[Measurement]] = by_arm) -> float:
            pairs = zip(by_arm[arm], by_arm["ours"], strict=True)
            return statistics.median(other.seconds / ours.seconds for other, ours in pairs)

        rows.append(
            {
                "batch": batch,
                "segments": segments,
                "arms": {arm: asdict(cell) for arm, cell in cells.items()},
                "times_serial": times("serial"),
                "of_clips_first": times("clips first"),
                "of_limit": times("limit"),
                "steps_of_limit": cells["ours"].counts.engine_steps / cells["limit"].counts.engine_steps,
            }
        )
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The settings as a table."""
    shown = Table(
        title="Sampled tokens a second; ours against the others", title_justify="left", box=box.SIMPLE_HEAD, padding=0
    )
    arms = (arm.replace(" ", "\n") for arm in ARMS)
    for name in ("batch", "clips", *arms, "times\nserial", "of clips\nfirst", "of\nlimit", "steps of\nlimit"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            str(row["batch"]),
            str(row["segments"]),
            *(f"{row['arms'][arm]['tokens_per_second']:,.0f}" for arm in ARMS),
            f"{row['times_serial']:.1f}",
            *(f"{row[name]:.2f}" for name in ("of_clips_first", "of_limit", "steps_of_limit")),
        )
    return shown


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Tokens a second over the batch, a panel for each number of segments."""
    from matplotlib.figure import Figure

    panels = sorted({row["segments"] for row in rows})
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = {
        "serial": ("#9a9a9a", "o"),
        "ours": ("#c2410c", "D"),
        "clips first": ("#0f766e", "s"),
        "limit": ("#1e3a8a", "^"),
    }
    for axis, segments in zip(axes, panels, strict=True):
        here = [row for row in rows if row["segments"] == segments]
        for arm, (colour, marker) in styles.items():
            cells = [row["arms"][arm] for row in here]
            tokens = [cell["tokens_per_second"] for cell in cells]
            spread = [
                [
                    value - value * cell["seconds"] / cell["most_seconds"]
                    for value, cell in zip(tokens, cells, strict=True)
                ],
                [
                    value * cell["seconds"] / cell["least_seconds"] - value
                    for value, cell in zip(tokens, cells, strict=True)
                ],
            ]
            axis.errorbar([row["batch"] for row in here], tokens, spread, label=arm, color=colour, marker=marker, ms=4)
        axis.set(xscale="log", yscale="log", xlabel="trajectories at once", title=_counted(segments, "segment"))
        axis.set_xticks([row["batch"] for row in here], [str(row["batch"]) for row in here])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("sampled tokens a second")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


async def _measure_all(
    settings: EngineSettings, batches: Sequence[int], segments: Sequence[int], repeats: int, num_tokens: int, seed: int
) -> list[Measurement]:
    measurements: list[Measurement] = []
    total = len(batches) * len(segments) * repeats * len(ARMS) + len(batches)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    async with running_engine(settings, ScriptedEngine) as engine:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("warming up", total=total)
            for batch in batches:
                await measure(engine, "ours", engine.rows(batch, max(segments), num_tokens, seed), max(segments), 0)
                progress.advance(task)
            for batch in batches:
                for number in segments:
                    rows = engine.rows(batch, number, num_tokens, seed)
                    progress.update(task, description=f"{batch} at once, {_counted(number, 'segment')}")
                    for repeat in range(repeats):
                        for arm in ARMS:
                            measurements.append(await measure(engine, arm, rows, number, repeat))
                            progress.advance(task)
    return measurements


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers such as 1,4,16") from None


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Model directory, Hugging Face layout. Its weights do not matter.")],
    batches: Annotated[str, typer.Option(help="Trajectories at once.")] = ",".join(map(str, BATCHES)),
    segments: Annotated[str, typer.Option(help="Clips inserted in each.")] = ",".join(map(str, SEGMENTS)),
    tokens: Annotated[int, typer.Option(min=8, help="Sampled tokens of each.")] = 120,
    repeats: Annotated[int, typer.Option(min=1, help="Of every arm, in turns.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="A corner of the grid, once.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Every figure, as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="The table as a picture.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    seed: Annotated[int, typer.Option(help="Of the audio and of where the tags are.")] = 0,
) -> None:
    """How fast re-listening is: serial, ours, clips first and the engine's own limit, on one engine in one run."""
    grid = (_numbers(batches), _numbers(segments), repeats)
    sizes, numbers, times = QUICK if quick else grid
    settings = EngineSettings(
        str(model),
        device,
        max_num_seqs=max(sizes),
        max_clips=1 + max(numbers),
        extra={
            "logits_processors": ["eval.throughput_worker:ScriptedPolicy"],
            "worker_extension_cls": "eval.throughput_worker.WorkerExtension",
        },
    )
    try:
        measurements = asyncio.run(_measure_all(settings, sizes, numbers, times, tokens, seed))
    except (ValueError, EngineDied, ThroughputError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", highlight=False, markup=False)
        raise typer.Exit(1) from None
    rows = summarise(measurements)
    Console().print(table(rows))
    if json_file is not None:
        document = {"settings": rows, "measurements": [asdict(one) for one in measurements]}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if png is not None:
        draw(rows, png)


if __name__ == "__main__":
    app()
