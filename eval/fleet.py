"""Engines side by side: whichever has a place free takes the next row, and what a dead engine left is done by others.

One engine in this process, or several in Ray actors, on this machine or on the cluster that RAY_ADDRESS names. Each
engine takes rows one by one, so that a slow GPU holds nobody back; only the rows in flight are in memory.

A row that is in flight when its engine dies is asked again; the second time after all others and alone, so that it is
known which row an engine died of; the third time it gets the stop reason `error`. A dead engine is replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from echo_plugins.relisten.trajectory import StopReason

from .benchmarks import Item
from .engine import EngineDied, EngineSettings, Outcome, Question, Sampling, running_engine

MAX_DEATHS = 3  # of engines, with the same row in flight
RAY_STARTS = 3  # attempts

T = TypeVar("T")


class Answerer(Protocol):
    """An engine in this process, or one in a Ray actor."""

    async def answer(self, question: Question, sampling: Sampling) -> Outcome: ...


@dataclass(eq=False)
class Task:
    """A row of run `run`, and how many engines have died with it."""

    run: int
    item: Item
    question: Question
    sampling: Sampling
    deaths: int = 0


Start = Callable[[], AbstractAsyncContextManager[Answerer]]
Finish = Callable[[Task, Outcome], None]


class _Queue:
    """The rows that are to be answered. Everything but `take` is done at once, so that a lane which is cancelled has
    either written its row or still holds it."""

    def __init__(self, tasks: Iterator[Task], finish: Finish) -> None:
        self._fresh = tasks
        self._finish = finish
        self._again: deque[Task] = deque()
        self._suspects: deque[Task] = deque()
        self._in_flight: set[Task] = set()
        self._changed = asyncio.Event()
        self.over = asyncio.Event()
        self.num_finished = 0

    async def take(self) -> Task | None:
        """The next row. None when there is none left, and none that may come back from an engine that dies."""
        while True:
            task = self._again.popleft() if self._again else next(self._fresh, None)
            if task is not None:
                self._in_flight.add(task)
                return task
            if not self._in_flight:
                self._tell()
                return None
            await self._changed.wait()

    async def take_suspect(self) -> Task | None:
        """The next of the rows that two engines died with. Only when `take` has no more."""
        return self._suspects.popleft() if self._suspects else None

    def finish(self, task: Task, outcome: Outcome) -> None:
        self._finish(task, outcome)
        self.num_finished += 1
        self._in_flight.discard(task)
        self._tell()

    def give_back(self, tasks: Sequence[Task], why: str) -> None:
        """Rows that were in flight when their engine died."""
        for task in tasks:
            task.deaths += 1
            self._in_flight.discard(task)
            if task.deaths >= MAX_DEATHS:
                error = f"{MAX_DEATHS} engines died with this row, the last one with it alone: {why}"
                self.finish(task, Outcome("", (), StopReason.ERROR, error, 0, 0, 0.0))
            else:
                (self._again if task.deaths == 1 else self._suspects).append(task)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def answer_all(
    tasks: Iterator[Task],
    starts: Sequence[Start],
    num_lanes: int,
    finish: Finish,
    say: Callable[[str], None],
    *,
    can_restart: bool,
) -> None:
    """Answer every task and `finish` it, with `num_lanes` rows in flight on each of the engines that `starts` start.

    Raises EngineDied when no engine is left and rows are.
    """
    queue = _Queue(tasks, finish)
    some_has_run = False

    async def place(number: int, start: Start) -> EngineDied | None:
        """Where one engine runs, and another when it has died. Returns why it was given up, None when all is done."""
        nonlocal some_has_run
        finished_before, num_in_vain = 0, 0
        while not queue.over.is_set():
            held: set[Task] = set()
            try:
                began = time.monotonic()
                async with _started(start, queue.over) as engine:
                    if engine is None:
                        return None
                    some_has_run = True
                    say(f"engine {number} is ready after {time.monotonic() - began:.0f} s")
                    await _run_lanes(engine, num_lanes, queue.take, queue.finish, held)
                    await _run_lanes(engine, 1, queue.take_suspect, queue.finish, held)
                    queue.over.set()
            except EngineDied as error:
                queue.give_back(list(held), str(error))
                num_in_vain = num_in_vain + 1 if queue.num_finished == finished_before else 0
                finished_before = queue.num_finished
                if queue.over.is_set():
                    return None
                # Where no engine has ever run, the next one would fail as this one did.
                if not can_restart or not some_has_run or num_in_vain >= MAX_DEATHS:
                    if len(starts) > 1:
                        say(f"== engine {number} is given up: {error}")
                    return error
                say(f"== engine {number}: {error}. Its {len(held)} rows are asked again, and another engine is started")
        return None

    given_up = await _all(place(number, start) for number, start in enumerate(starts))
    errors = [error for error in given_up if error is not None]
    if len(errors) == len(starts):
        raise errors[0]


async def _run_lanes(
    engine: Answerer,
    number: int,
    take: Callable[[], Coroutine[Any, Any, Task | None]],
    finish: Finish,
    held: set[Task],
) -> None:
    """Have an engine answer what `take` gives until it gives None. `held`: the rows that it has in flight."""

    async def lane() -> None:
        while (task := await take()) is not None:
            held.add(task)
            outcome = await engine.answer(task.question, task.sampling)
            held.discard(task)
            finish(task, outcome)

    await _all(lane() for _ in range(number))


async def _all(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; when one raises, the others are cancelled and its exception is raised as it is."""
    running = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*running)
    finally:
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@contextlib.asynccontextmanager
async def _started(start: Start, over: asyncio.Event) -> AsyncIterator[Answerer | None]:
    """An engine; None when all is done before it has started, as on a cluster that has no place for it."""
    async with contextlib.AsyncExitStack() as stack:
        starting = asyncio.create_task(stack.enter_async_context(start()))
        waiting = asyncio.create_task(over.wait())
        try:
            await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
            yield await starting if starting.done() else None
        finally:
            for each in (starting, waiting):
                each.cancel()
            await asyncio.gather(starting, waiting, return_exceptions=True)


def connect_ray(say: Callable[[str], None]) -> None:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine."""
    # Read when Ray starts its processes. Its default niceness is 15: whatever else the machine does would come first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    for attempt in range(1, RAY_STARTS + 1):
        if ray.is_initialized():
            return
        try:
            # "local": else Ray joins whatever cluster was started last on this machine, and waits for it if it is gone.
            address = os.environ.get("RAY_ADDRESS") or "local"
            ray.init(address, include_dashboard=None if address != "local" else False, logging_level=logging.ERROR)
        except Exception as error:  # Ray raises no narrower one (_private/node.py:440 of 2.60)
            # A raylet gives its dashboard agent 15 s to import what it needs: on a loaded machine it takes longer.
            if "timed out during startup" not in str(error) or attempt == RAY_STARTS:
                raise
            say(f"Ray did not start within its own time limit; attempt {attempt + 1} of {RAY_STARTS}")


def num_cluster_gpus() -> int:
    """GPUs of the Ray cluster that we joined."""
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


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
        return await _result(self._actor.answer.remote(question, sampling))


async def _result(reference: Any) -> Any:
    """What an actor returns, or raises; EngineDied when its process is gone."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return await reference
    except RayActorError as error:
        reason = str(error).strip().splitlines()
        raise EngineDied(f"the process of an engine died ({reason[0] if reason else type(error).__name__})") from error
    except RayTaskError as error:
        raise error.cause from None  # ours, and not the transcript of it


@contextlib.asynccontextmanager
async def ray_engine(settings: EngineSettings) -> AsyncIterator[Answerer]:
    """An engine with GPUs of its own, wherever Ray has them."""
    import ray

    options = {
        "num_cpus": 0,
        "num_gpus": settings.tensor_parallel_size if settings.device == "cuda" else 0,
        "max_concurrency": settings.concurrency + 1,
    }
    actor: Any = ray.remote(_Actor).options(**options).remote()
    try:
        await _result(actor.start.remote(settings))
        yield _RayEngine(actor)
        await _result(actor.stop.remote())
    finally:
        ray.kill(actor)
