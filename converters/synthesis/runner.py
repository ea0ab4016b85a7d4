"""Run the stages of a pipeline on datatrove's executors, so that a kill at any moment costs the requests in flight.

    RUN/run.yaml, RUN/run.json    links: the config of the last start; its stages, and which folder each writes to
    RUN/STAGE-HASH/rows/*.jsonl   one file a task, written whole; the hash is of all that decides what stands in it
    RUN/STAGE-HASH/inputs/        the config, prompts, thresholds and seeds as they were when the run was planned
    RUN/STAGE-HASH/completions/   datatrove's marker of each finished task; RUN/STAGE-HASH/errors/ why one is not
    RUN/STAGE-HASH/timing/        how long the requests of a task took, for `plan`
    RUN/journal/STAGE/            every answer that was paid for, by the hash of its request; one file a task

A changed prompt, model, seed, threshold, audio root, number of tasks or line of the code that decides rows makes its
stage and those after it run again in folders of their own; whatever requests stay the same are answered from the
journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import importlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import multiprocess.process
import typer
import yaml
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from converters import conversion
from converters.atomic import StagedFile
from converters.synthesis.asker import Asker, Unanswered, Unusable, write_silence
from converters.synthesis.config import Config, ConfigError, Endpoint, ExecutorKind, Limits, read_config
from converters.synthesis.sample import Sample
from converters.synthesis.templates import PROMPTS, Prompts
from echo_plugins.chat_client import ChatClient, ChatError, Journal, journal_entries
from echo_plugins.chat_client import Limits as ServerLimits

# datatrove would log every task to stderr at length; what goes wrong is told once, by `run`.
logger.disable("datatrove")

ROOT = Path(__file__).resolve().parents[2]
_WINDOW_PER_REQUEST = 2  # rows in hand for each request in flight, so that a slow one does not hold up the others
_HASH_CHARS = 10
_POLL_SECONDS = 0.5
_INPUTS = "inputs"
# What decides rows besides the module of a stage's own function. Not the runner: it shows, sends and counts.
_CODE = (
    "converters.conversion",
    "converters.holdout",
    "converters.synthesis.asker",
    "converters.synthesis.filters",
    "converters.synthesis.sample",
    "converters.synthesis.soundprint",
    "converters.synthesis.stages",
    "converters.synthesis.templates",
    "echo_plugins.audio",
    "echo_plugins.audio_qa",
    "echo_plugins.relisten.prompt",
    "echo_plugins.relisten.transcript",
)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StageError(RuntimeError):
    """A stage is not complete; the message says why, and the same command goes on."""


@dataclass(frozen=True)
class Context:
    """What a stage's work may look at."""

    config: Config
    limits: Limits
    folder: Path


RowWork = Callable[[Sample, Asker, Context], Awaitable[list[Sample]]]
SourceWork = Callable[[Context, int, int], Iterator[Sample]]
Screen = Callable[[Context], Callable[[Sample], Sample]]
SetWork = Callable[[Iterator[Sample], Context], None]


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline: exactly one of `source`, `rows`, `screen` and `whole`.

    `source(context, rank, tasks)` makes the first rows; `rows` makes rows of a row, most by asking a model;
    `screen(context)` gives a judge that is shown the rows of all tasks, one after the other, and drops some; `whole`
    makes files of the rows of all tasks. `prompts` and `settings` (keys of the config) decide the outcome. A stage that
    `asks` needs a model in the config; an `optional` one is left out without.
    """

    name: str
    source: SourceWork | None = None
    rows: RowWork | None = None
    screen: Screen | None = None
    whole: SetWork | None = None
    prompts: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    asks: bool = False
    optional: bool = False
    several_models: bool = False

    @property
    def code(self) -> str:
        """The version of the code that decides its rows."""
        work = self.source or self.rows or self.screen or self.whole
        names = {*_CODE, str(work.__module__)}
        files = [importlib.import_module(name).__file__ for name in sorted(names)]
        return hashlib.sha256("".join(_file_hash(Path(file)) for file in files if file).encode()).hexdigest()


@dataclass(frozen=True)
class Placed:
    """A stage in a run: its folder, and where its rows come from."""

    stage: Stage
    folder: Path
    before: Path | None
    endpoints: tuple[Endpoint, ...]
    tasks: int

    def rows_file(self, rank: int) -> Path:
        return rows_file(self.folder, rank)

    @property
    def finished_tasks(self) -> int:
        return sum(1 for _ in self.folder.glob("completions/*"))

    @property
    def finished(self) -> bool:
        return self.finished_tasks >= self.tasks


def rows_file(folder: Path, rank: int) -> Path:
    return folder / "rows" / f"{rank:05d}.jsonl"


def read_samples(file: Path) -> Iterator[Sample]:
    with file.open("rb") as lines:
        for line in lines:
            yield Sample.model_validate_json(line)


def place(stages: Sequence[Stage], config: Config, prompts: Prompts) -> list[Placed]:
    """The stages that this config runs, each in the folder named by what decides its outcome. Raises ConfigError."""
    unknown = set(config.stages) - {stage.name for stage in stages if stage.asks}
    if unknown:
        known = ", ".join(stage.name for stage in stages if stage.asks)
        raise ConfigError(f"stages: {', '.join(sorted(unknown))}: no such stage asks a model; those that do: {known}")
    placed: list[Placed] = []
    identity = f"{_file_hash(config.input)} {config.audio_root}"
    before: Path | None = None
    for stage in stages:
        endpoints = tuple(config.stages.get(stage.name, ()))
        if stage.asks and not endpoints:
            if stage.optional:
                continue
            raise ConfigError(
                f"stages: {stage.name} asks a model and none is given: {stage.name}: {{url: .., model: ..}}"
            )
        if len(endpoints) > 1 and not stage.several_models:
            raise ConfigError(f"stages: {stage.name} takes one model, {len(endpoints)} are given")
        decides = {
            "before": identity,
            "stage": stage.name,
            "code": stage.code,
            "models": [endpoint.identity() for endpoint in endpoints],
            "prompts": {name: prompts.version(name) for name in stage.prompts},
            "settings": {name: _setting(config, name) for name in stage.settings},
            "seed": config.seed,
            "tasks": config.tasks,
        }
        identity = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        folder = config.output / f"{stage.name}-{identity[:_HASH_CHARS]}"
        placed.append(Placed(stage, folder, before, endpoints, 1 if stage.whole or stage.screen else config.tasks))
        before = folder
    return placed


def _setting(config: Config, name: str) -> Any:
    """What a setting says, whatever file it says it in."""
    if name == "filters":
        return config.limits().model_dump()
    if name == "benchmarks":
        return [[_file_hash(benchmark.file), str(benchmark.audio_root)] for benchmark in config.benchmarks]
    value = config.model_dump(mode="json")[name]
    return _file_hash(config.seeds) if name == "seeds" else value


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stamps(stage: Stage, config: Config) -> dict[str, list[int]]:
    """Size and time of change of the large files that a stage reads: they are hashed once, when a run is planned."""
    files = [config.input] if stage.source else []
    files += [benchmark.file for benchmark in config.benchmarks] if "benchmarks" in stage.settings else []
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


class StageStep(PipelineStep):
    """One stage as datatrove runs it: `run` does the task `rank` of `world_size`.

    It holds names and paths only, so that it can be sent to any process: the stage is looked up there. All that was
    planned is read from the stage's folder, so that an edit while the task was queued changes nothing.
    """

    type = "synthesis"

    def __init__(
        self, module: str, placed: Placed, config: Config, workers: int, drop_unanswered: bool, owner: int | None
    ) -> None:
        self.name = placed.stage.name
        super().__init__()
        self._module = module
        self._stage = placed.stage.name
        self._folder = str(placed.folder)
        self._before = str(placed.before) if placed.before else None
        self._tasks = placed.tasks
        self._code = placed.stage.code
        self._stamps = _stamps(placed.stage, config)
        self._workers = workers
        self._drop_unanswered = drop_unanswered
        self._owner = owner  # process id of the run, where its tasks are on the same machine

    def run(self, data: object = None, rank: int = 0, world_size: int = 1) -> None:  # type: ignore[override]
        """Raises StageError, after as much was done and written down as could be."""
        folder = Path(self._folder)
        config = read_config(folder / _INPUTS / "run.yaml")
        prompts = Prompts(config.prompts)
        stages: Sequence[Stage] = importlib.import_module(self._module).STAGES
        stage = next(stage for stage in stages if stage.name == self._stage)
        before = Path(self._before) if self._before else None
        placed = Placed(stage, folder, before, tuple(config.stages.get(stage.name, ())), self._tasks)
        complaint = placed.folder / "errors" / f"{rank:05d}.txt"
        complaint.unlink(missing_ok=True)
        try:
            self._check_unchanged(stage, config)
            self._work(placed, Context(config, config.limits(), placed.folder), prompts, rank, world_size)
        except (ChatError, ConfigError, StageError, OSError) as error:
            complaint.parent.mkdir(parents=True, exist_ok=True)
            complaint.write_text(f"{error}\n", encoding="utf-8")
            raise StageError(str(error)) from error

    def _check_unchanged(self, stage: Stage, config: Config) -> None:
        now = _stamps(stage, config)
        changed = [file for file, stamp in self._stamps.items() if now.get(file) != stamp]
        if stage.code != self._code:
            changed.append("the code of the stage")
        if changed:
            raise StageError(f"{', '.join(changed)} changed since the run was planned: give the same command again")

    def _work(self, placed: Placed, context: Context, prompts: Prompts, rank: int, tasks: int) -> None:
        stage = placed.stage
        if stage.screen is not None or stage.whole is not None:
            assert placed.before is not None
            files = [rows_file(placed.before, number) for number in range(context.config.tasks)]
            if stage.screen is not None:
                _screen(files, placed, stage.screen(context))
            elif stage.whole is not None:
                stage.whole((sample for file in files for sample in read_samples(file)), context)
                _publish(placed, context.config.output)
            return
        with StagedFile(placed.rows_file(rank)) as staged:
            with staged.path.open("wb") as out:
                if stage.source is not None:
                    for sample in stage.source(context, rank, tasks):
                        out.write(_line(sample))
                else:
                    asyncio.run(self._ask(placed, context, prompts, rank, out.write))
            staged.commit()

    async def _ask(
        self, placed: Placed, context: Context, prompts: Prompts, rank: int, write: Callable[[bytes], object]
    ) -> None:
        assert placed.before is not None and placed.stage.rows is not None
        work = placed.stage.rows
        unanswered: list[str] = []

        async def one(sample: Sample) -> list[Sample]:
            if sample.dropped:
                return [sample]
            try:
                return await work(sample, asker, context)
            except Unusable as error:
                known = sample.model_copy(update={"provenance": [*sample.provenance, *error.provenance]})
                return [known.drop(self._stage, str(error.status), error.detail)]
            except Unanswered as error:
                unanswered.append(str(error))
                return [sample.drop(self._stage, "unanswered", str(error))]

        started = time.monotonic()
        watch = asyncio.ensure_future(_end_with(self._owner))
        async with _clients(placed, context, rank, self._workers) as clients:
            silence = _silence(context.config)
            asker = Asker(
                self._stage,
                list(zip(placed.endpoints, clients, strict=True)),
                prompts,
                context.config.seed,
                context.config.audio_root,
                silence,
            )
            room = max(1, _WINDOW_PER_REQUEST * sum(client.limits.concurrency for client in clients))
            try:
                before = read_samples(rows_file(placed.before, rank))
                async with contextlib.aclosing(_in_order(one, before, room)) as results:
                    async for samples in results:
                        for sample in samples:
                            write(_line(sample))
            finally:
                watch.cancel()
                if clients:
                    _note_time(placed.folder, rank, time.monotonic() - started, self._workers, clients)
        if unanswered and not self._drop_unanswered:
            raise StageError(
                f"{len(unanswered)} rows got no answer ({unanswered[0]}). Give the same command again to ask for them; "
                "--drop-unanswered goes on without them"
            )


def _screen(files: Sequence[Path], placed: Placed, judge: Callable[[Sample], Sample]) -> None:
    for number, file in enumerate(files):
        with StagedFile(placed.rows_file(number)) as staged:
            with staged.path.open("wb") as out:
                for sample in read_samples(file):
                    out.write(_line(sample if sample.dropped else judge(sample)))
            staged.commit()


async def _end_with(owner: int | None) -> None:
    """End a process of a pool when the one that started it, or the run, was killed: it would go on paying."""
    parent = os.getppid()
    while multiprocess.process.parent_process() is not None:
        if os.getppid() != parent or (owner is not None and not Path(f"/proc/{owner}").exists()):
            os._exit(1)
        await asyncio.sleep(_POLL_SECONDS)


def _end_helpers_with_this_process() -> None:
    """datatrove starts a multiprocessing manager, which would outlive a run that is killed."""
    prctl = ctypes.CDLL(None).prctl
    os.register_at_fork(after_in_child=lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))


def _line(sample: Sample) -> bytes:
    return sample.model_dump_json(exclude_defaults=True).encode() + b"\n"


async def _in_order(
    function: Callable[[Sample], Awaitable[list[Sample]]], samples: Iterator[Sample], room: int
) -> AsyncGenerator[list[Sample], None]:
    """`function` of every row, in order, `room` of them in hand at once. The first error ends the others."""
    pending: deque[asyncio.Future[list[Sample]]] = deque()
    try:
        for sample in samples:
            pending.append(asyncio.ensure_future(function(sample)))
            if len(pending) >= room:
                yield await pending.popleft()
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


@contextlib.asynccontextmanager
async def _clients(placed: Placed, context: Context, rank: int, workers: int) -> AsyncIterator[list[ChatClient]]:
    """A client for each model of the stage; the tasks that run at once share an endpoint's limits."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number, endpoint in enumerate(placed.endpoints):
            rate = endpoint.requests_per_minute
            limits = ServerLimits(
                concurrency=max(1, endpoint.concurrency // workers),
                requests_per_minute=rate / workers if rate else None,
                timeout_seconds=endpoint.timeout_seconds,
                max_attempts=endpoint.max_attempts,
                max_unusable=1,  # the asker tries again with another seed
                longest_wait_seconds=endpoint.longest_wait_seconds,
                first_wait_seconds=min(1.0, endpoint.longest_wait_seconds),
            )
            journals = context.config.output / "journal" / placed.stage.name
            journal = journals / f"{rank:05d}-of-{placed.tasks:05d}-{number}.jsonl"
            # Other divisions into tasks; the own one is left to its tasks, which may be writing.
            others = set(journals.glob(f"*-{number}.jsonl")) - set(journals.glob(f"*-of-{placed.tasks:05d}-*"))
            if others and placed.before is not None:
                _carry_over(journal, sorted(others), {s.id for s in read_samples(rows_file(placed.before, rank))})
            client = ChatClient(endpoint.url, key_variable=endpoint.key_variable, limits=limits, journal=journal)
            clients.append(await stack.enter_async_context(client))
        yield clients


def _carry_over(journal: Path, others: Iterable[Path], ids: set[str]) -> None:
    """Take over what was paid for these rows when the input was dealt out to another number of tasks.

    Raises ChatError where another process writes to `journal`, or one of `others` is no journal.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in others:
        with file.open("rb") as lines:
            found.update((key, entry) for key, entry, _ in journal_entries(lines, file) if entry.get("label") in ids)
    own = Journal(journal)
    for key, entry in found.items():
        if own.get(key) is None:
            own.append(key, entry)
    own.close()


def _note_time(folder: Path, rank: int, seconds: float, workers: int, clients: list[ChatClient]) -> None:
    retries: Counter[str] = sum((client.retries for client in clients), Counter())
    entry = {
        "seconds": round(seconds, 3),
        "workers": workers,
        "concurrency": sum(client.limits.concurrency for client in clients),
        "prompt_tokens": sum(client.spent.prompt_tokens for client in clients),
        "completion_tokens": sum(client.spent.completion_tokens for client in clients),
        "retries": dict(retries),
    }
    file = folder / "timing" / f"{rank:05d}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")


def run(
    module: str, config_file: Path, names: Sequence[str], drop_unanswered: bool = False, force: str | None = None
) -> list[Placed]:
    """Run the named stages of a pipeline, all of them when none is named; `force` and those after it also where they
    are done. Raises ConfigError and StageError."""
    config = read_config(config_file)
    taken = config.output / "run.yaml"
    if taken.exists() and not taken.is_symlink():
        raise ConfigError(f"{taken} is not of a run, which would put its own there: give yours another name")
    prompts = Prompts(config.prompts)
    placed = place(importlib.import_module(module).STAGES, config, prompts)
    chosen = choose(placed, names, force)
    config.output.mkdir(parents=True, exist_ok=True)
    for stage in _from(placed, force):
        for name in ("completions", "errors", "timing"):
            shutil.rmtree(stage.folder / name, ignore_errors=True)
    for stage in chosen:
        _freeze(module, stage, placed, config)
    for name in ("run.yaml", "run.json"):
        _link(chosen[-1].folder / _INPUTS / name, config.output)
    with StagedFile(_silence(config)) as staged:
        write_silence(staged.path, config.silence_seconds)
        staged.commit()
    if config.executor.kind is ExecutorKind.SLURM:
        _submit(module, chosen, config, drop_unanswered)
        return chosen
    if config.executor.kind is ExecutorKind.LOCAL:
        _end_helpers_with_this_process()
    for stage in chosen:
        _run_stage(module, stage, config, drop_unanswered)
    return chosen


def _freeze(module: str, placed: Placed, stages: Sequence[Placed], config: Config) -> None:
    """Copy the small inputs of a stage into its folder. The folder's name covers what decides rows, so another start
    that comes to the same folder writes the same; where its servers are is the later start's."""
    inputs = placed.folder / _INPUTS
    seeds, thresholds = inputs / "seeds.yaml", inputs / "filters.yaml"
    for folder in filter(None, (PROMPTS, config.prompts)):
        for file in filter(Path.is_file, folder.rglob("*")):
            _write(inputs / "prompts" / file.relative_to(folder), file.read_bytes())
    _write(seeds, config.seeds.read_bytes())
    _write(thresholds, config.filters_file.read_bytes())
    frozen = config.model_copy(update={"prompts": inputs / "prompts", "seeds": seeds, "filters_file": thresholds})
    _write(inputs / "run.yaml", yaml.safe_dump(frozen.model_dump(mode="json"), sort_keys=False).encode())
    entries = [
        {"stage": p.stage.name, "folder": p.folder.name, "models": [e.model for e in p.endpoints]} for p in stages
    ]
    _write(inputs / "run.json", json.dumps({"pipeline": module, "stages": entries}, indent=2).encode() + b"\n")


def _silence(config: Config) -> Path:
    """Its length is in its name: another start must not change what a queued task plays."""
    return config.output / f"silence-{config.silence_seconds:g}.wav"


def _from(placed: Sequence[Placed], name: str | None) -> Sequence[Placed]:
    """The stage of that name and those after it; none without a name."""
    return [p for number, p in enumerate(placed) if name in [before.stage.name for before in placed[: number + 1]]]


def choose(placed: Sequence[Placed], names: Sequence[str], force: str | None = None) -> list[Placed]:
    """Raises ConfigError for a name that is no stage, and for a stage whose rows are not there yet."""
    known = [p.stage.name for p in placed]
    if wrong := [name for name in (*names, *filter(None, [force])) if name not in known]:
        raise ConfigError(f"no stage {', '.join(wrong)} in this config; it has {', '.join(known)}")
    chosen = [p for p in placed if not names or p.stage.name in names]
    if force is not None and force not in [p.stage.name for p in chosen]:
        raise ConfigError(f"--force {force}: only {', '.join(names)} would be run; add --stage {force}")
    anew = _from(placed, force)
    ready = {p.folder for p in placed if p.finished and p not in anew} | {p.folder for p in chosen}
    for p in chosen:
        if p.before is not None and p.before not in ready:
            raise ConfigError(
                f"stage {p.stage.name} starts from {p.before.name}, which is not finished: run that first"
            )
    return chosen


def _write(file: Path, data: bytes) -> None:
    with StagedFile(file) as staged:
        staged.path.write_bytes(data)
        staged.commit()


def _publish(placed: Placed, output: Path) -> None:
    """The files of the last stage under names that stay the same: links, so that nothing is there twice."""
    for file in placed.folder.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(".")
            and file.name != "executor.json"
            and file.name != "stats.json"
        ):
            _link(file, output)


def _link(file: Path, output: Path) -> None:
    link = output / f".{file.name}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(file.relative_to(output))
    link.replace(output / file.name)


def _executor(module: str, placed: Placed, config: Config, drop_unanswered: bool, **more: Any) -> PipelineExecutor:
    workers = min(config.executor.workers, placed.tasks)
    owner = os.getpid() if config.executor.kind is ExecutorKind.LOCAL else None
    step = StageStep(module, placed, config, workers, drop_unanswered, owner)
    options = {"tasks": placed.tasks, "workers": workers, "logging_dir": str(placed.folder), **more}
    if config.executor.kind is ExecutorKind.RAY:
        return RayPipelineExecutor([step], **options, **config.executor.options)
    if config.executor.kind is ExecutorKind.SLURM:
        return SlurmPipelineExecutor([step], job_name=f"echo-{placed.stage.name}", **options, **config.executor.options)
    return LocalPipelineExecutor([step], **options, **config.executor.options)


def _run_stage(module: str, placed: Placed, config: Config, drop_unanswered: bool) -> None:
    if placed.finished:
        typer.echo(f"{placed.stage.name}: done before, in {placed.folder}", err=True)
        if placed.stage.whole:
            _publish(placed, config.output)
        return
    if config.executor.kind is ExecutorKind.RAY:
        _join_ray(config.executor.address)
    executor = _executor(module, placed, config, drop_unanswered)
    with _progress(placed, config):
        try:
            executor.run()
        except StageError as error:
            raise StageError(f"{placed.stage.name}: {error}") from error
    if left := executor.get_incomplete_ranks(skip_completed=True):
        # Ray's executor keeps to itself what its tasks died of.
        texts = [file.read_text(encoding="utf-8").strip() for file in sorted(placed.folder.glob("errors/*.txt"))]
        why = texts[0] if texts else f"see {placed.folder}/logs"
        raise StageError(f"{placed.stage.name}: {len(left)} of {placed.tasks} tasks are not finished: {why}")


def _submit(module: str, chosen: list[Placed], config: Config, drop_unanswered: bool) -> None:
    """Hand all stages to Slurm, each waiting for the one before it."""
    depends: PipelineExecutor | None = None
    for placed in chosen:
        if not placed.finished:
            depends = _executor(module, placed, config, drop_unanswered, depends=depends)
    if depends is None:
        typer.echo(f"all done before, in {config.output}", err=True)
        return
    depends.run()
    typer.echo(f"submitted; the files will be in {config.output}", err=True)


def _join_ray(address: str | None) -> None:
    import ray  # only where it is asked for: the import takes seconds

    if not ray.is_initialized():
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
        # "local": else Ray joins whatever cluster was started last on this machine, and waits for it if it is gone.
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        ray.init(address=address, runtime_env={"env_vars": environment}, logging_level=logging.WARNING)


@contextlib.contextmanager
def _progress(placed: Placed, config: Config) -> Iterator[None]:
    """Finished tasks and paid answers, on stderr, only where somebody is looking. The tasks may be anywhere."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        typer.echo(
            f"{placed.stage.name}: {placed.tasks - placed.finished_tasks} of {placed.tasks} tasks to do", err=True
        )
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    journals = config.output / "journal" / placed.stage.name
    over = threading.Event()

    def watch() -> None:
        read: dict[Path, int] = {}
        answers = 0
        while not over.wait(_POLL_SECONDS):
            for file in journals.glob(f"*-of-{placed.tasks:05d}-*.jsonl"):
                with file.open("rb") as lines:
                    lines.seek(read.get(file, 0))
                    answers += lines.read().count(b"\n")
                    read[file] = lines.tell()
            paid = f", {answers} answers" if answers else ""
            bar.update(task, completed=placed.finished_tasks, description=f"{placed.stage.name}{paid}; tasks")

    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(placed.stage.name, total=placed.tasks)
        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def describe(placed: Sequence[Placed], config: Config, prompts: Prompts) -> str:
    """What a run would do, stage by stage."""
    lines = [f"input   {config.input}", f"output  {config.output}", f"tasks   {config.tasks} on {config.executor.kind}"]
    for p in placed:
        state = "done" if p.finished else f"{p.tasks - p.finished_tasks} of {p.tasks} tasks to do"
        lines.append(f"{p.stage.name}: {state}, in {p.folder.name}")
        lines += [f"    {e.model} at {e.url}, {e.concurrency} at once, {json.dumps(e.sampling)}" for e in p.endpoints]
        lines += [f"    prompt {name}@{prompts.version(name)}" for name in p.stage.prompts]
    return "\n".join(lines)


def command(module: str, summary: str) -> typer.Typer:
    """The command line of a pipeline."""
    app = conversion.new_command()

    @app.command(help=summary)
    def main(
        config_file: Annotated[
            Path, typer.Argument(metavar="CONFIG.yaml", exists=True, dir_okay=False, help="What to run; see config.py.")
        ],
        stage: Annotated[
            list[str], typer.Option(help="Only this stage; can be given several times. Default: all.")
        ] = [],  # noqa: B006  typer reads the default, nobody changes it
        force: Annotated[
            str | None,
            typer.Option(metavar="STAGE", help="Do this stage and those after it anew, also where they are done."),
        ] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, with which prompts.")] = False,
        drop_unanswered: Annotated[
            bool, typer.Option("--drop-unanswered", help="Go on without the rows that a server gave no answer for.")
        ] = False,
    ) -> None:
        try:
            if dry_run:
                config = read_config(config_file)
                prompts = Prompts(config.prompts)
                placed = place(importlib.import_module(module).STAGES, config, prompts)
                typer.echo(describe(choose(placed, stage, force), config, prompts))
                return
            run(module, config_file, stage, drop_unanswered, force)
        except ConfigError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except (StageError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from error

    return app
