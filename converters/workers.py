"""A function over many items, in order, on several cores: in threads while a decoder works, in processes beyond."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_AHEAD_PER_WORKER = 2
CALLS_PER_PROCESS = 2  # one is worked on while the other's item waits in its pipe: a quarter faster
_GC_THRESHOLD = 100_000  # objects between two searches for cycles: with Python's 700 they take a fifth of the time
DEFAULT_WORKERS = min(8, os.cpu_count() or 1)  # the one process that reads and writes keeps some eight others busy


def ordered_map(function: Callable[[Item], Result], items: Iterator[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, in order, over `workers` threads; a bounded number of items is read ahead."""
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > workers * _ITEMS_AHEAD_PER_WORKER:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def in_chunks(items: Iterator[Item], num_items: int) -> Iterator[list[Item]]:
    while chunk := list(islice(items, num_items)):
        yield chunk


@contextmanager
def in_processes(function: Callable[[Item], Result], count: int) -> Iterator[Callable[[Item], Result]]:
    """`function`, worked by `count` processes, to be called from CALLS_PER_PROCESS times as many threads.

    Function, items and results cross between processes. The processes end with this one, however it ends. Raises
    OSError when one of them dies.
    """
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the locks of running threads
    context.set_forkserver_preload([getattr(function, "__module__", __name__), "soundfile", "soxr"])
    idle: SimpleQueue[Connection] = SimpleQueue()
    pipes: list[Connection] = []
    processes = []
    for _ in range(count):
        ours, theirs = zip(*(context.Pipe() for _ in range(CALLS_PER_PROCESS)), strict=True)
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
        for pipe in theirs:
            pipe.close()  # or the end of the process would not be seen
        processes.append(process)
        pipes += ours
    for pipe in (pipe for call in range(CALLS_PER_PROCESS) for pipe in pipes[call::CALLS_PER_PROCESS]):
        idle.put(pipe)  # each process gets one call before one gets its second

    def call(item: Item) -> Result:
        pipe = idle.get()
        try:
            pipe.send(item)
            result: Any = pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise OSError("a worker process has died; was it out of memory? Try fewer --workers") from error
        finally:
            idle.put(pipe)
        if isinstance(result, OSError):
            raise result
        return result

    try:
        yield call
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.join()


def _serve(pipes: Sequence[Connection], function: Callable[[Any], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the closed pipe ends this process
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    try:
        while True:
            for pipe in wait(pipes):
                assert isinstance(pipe, Connection)
                item = pipe.recv()
                try:
                    result = function(item)
                except OSError as error:
                    result = error
                pipe.send(result)
    except (EOFError, ConnectionError):
        return
