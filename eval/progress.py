"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_SECONDS = 30.0  # between lines where there is no terminal


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.2f} {self._unit}/s" if task.speed else "")


@contextlib.contextmanager
def progress(console: Console, doing: str, unit: str, total: int) -> Iterator[Callable[[], None]]:
    """A function to call after each of `total` units, such as "rows"."""
    if console.is_terminal:
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(doing, total=total)
            yield lambda: bar.advance(task)
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
            console.print(f"{done}/{total} {unit}, {rate:.2f} {unit}/s, {left} left", markup=False)

    yield advance
