"""One pass over a source file, shared by importers and exporters: judge rows and their audio, keep the good in order,
put the bad into a side file with file, line, id and reason, and count both."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from converters.atomic import StagedFile
from converters.audio_qa import AudioQA, Reason, RowError, check_times, read_rows
from echo_plugins.audio import SAMPLING_RATE, AudioError, OutsideRootError, parse_fragment, probe, resolve_path
from echo_plugins.model import MAX_AUDIO_SECONDS, QWEN2_5_OMNI

Item = TypeVar("Item")
Result = TypeVar("Result")

# Rows go to the decoding threads in chunks, since a hand-over a row would cost more than judging it.
_CHUNK_ROWS = 64
_CHUNKS_AHEAD_PER_WORKER = 2
_CACHED_FILES = 65_536  # probed files remembered: some 30 MB, whatever the length of the manifest
_LATEST_IDS = 65_536
DEFAULT_WORKERS = 4


# The arguments that several commands share.
ManifestArgument = Annotated[
    Path, typer.Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="AudioQA manifest.")
]
ImportedArgument = Annotated[
    Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, help="JSONL, or JSON that holds one list of rows.")
]
RecordsArgument = Annotated[
    Path, typer.Argument(metavar="OUT.jsonl", dir_okay=False, help="AudioQA manifest, written whole or not at all.")
]
AudioRootOption = Annotated[
    Path,
    typer.Option(exists=True, file_okay=False, help="Folder of the audio; a row's path that leaves it is refused."),
]
RejectedOption = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Side file for rejected rows.", show_default="OUT.rejected.jsonl")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-durations", help="Do not decode the audio of rows that state a duration, only look for it."),
]
WorkersOption = Annotated[int, typer.Option(min=1, help="Threads that decode audio.")]


def new_command() -> typer.Typer:
    """A command-line application with plain tracebacks and no shell-completion options."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class AudioFile:
    """A decoded and measured file of the audio root."""

    path: str
    num_samples: int  # at 16 kHz, as rollout and training will see it

    @property
    def duration_seconds(self) -> float:
        return self.num_samples / SAMPLING_RATE


@dataclass(frozen=True, slots=True)
class Checked:
    """A row and its audio, both judged good."""

    record: AudioQA
    audio: AudioFile


class AudioRoot:
    """The files under one folder. Each is decoded once, however many rows name it."""

    def __init__(self, root: Path, trust_durations: bool = False) -> None:
        self.root = root.resolve()
        self._trust_durations = trust_durations
        self._locate = lru_cache(_CACHED_FILES)(self._locate_once)
        self._probe = lru_cache(_CACHED_FILES)(self._probe_once)

    def measure(self, relative: str) -> AudioFile:
        """Find and decode one file. Raises RowError."""
        return _or_raise(self._probe(relative))

    def check(self, record: AudioQA) -> Checked:
        """Measure the row's audio and hold its times against it. Raises RowError."""
        if self._trust_durations and record.duration_seconds is not None:
            path = _or_raise(self._locate(record.audio))
            audio = AudioFile(path, round(record.duration_seconds * SAMPLING_RATE))
        else:
            audio = self.measure(record.audio)
        check_times(record, audio.duration_seconds)
        return Checked(record, audio)

    # The cache keeps errors too: a broken file that ten thousand rows name is decoded once.
    def _locate_once(self, relative: str) -> str | RowError:
        try:
            path = str(resolve_path(self.root, relative))
        except OutsideRootError as error:
            return RowError(Reason.AUDIO_OUTSIDE_ROOT, str(error))
        except AudioError as error:
            return RowError(Reason.AUDIO_MISSING, str(error))
        if parse_fragment(path)[1] is not None:
            return RowError(Reason.RESERVED_TEXT, f"{relative!r}: rename it, '#t=START,END' at the end means a crop")
        return path

    def _probe_once(self, relative: str) -> AudioFile | RowError:
        path = self._locate(relative)
        if isinstance(path, RowError):
            return path
        try:
            info = probe(path)
        except AudioError as error:
            return RowError(Reason.AUDIO_UNREADABLE, str(error))
        if info.duration_seconds > MAX_AUDIO_SECONDS:
            detail = f"{path}: {info.duration_seconds:.1f} s; models hear the first {MAX_AUDIO_SECONDS} s, so cut it up"
            return RowError(Reason.AUDIO_TOO_LONG, detail)
        if not QWEN2_5_OMNI.num_audio_tokens(info.num_samples):
            return RowError(Reason.AUDIO_TOO_SHORT, f"{path}: {info.duration_seconds:.3f} s give no audio token")
        return AudioFile(path, info.num_samples)


def _or_raise(outcome: Item | RowError) -> Item:
    if isinstance(outcome, RowError):
        raise RowError(outcome.reason, outcome.detail)  # a cached error is shared: raising it would chain tracebacks
    return outcome


@dataclass
class Tally:
    """What became of the rows."""

    source: Path
    target: Path
    side: Path
    read: int = 0
    written: int = 0
    rejected: Counter[Reason] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        dropped = self.rejected.total()
        text = [f"{self.source}: {self.read} rows read, {self.written} written to {self.target}, {dropped} rejected"]
        text += [f"  {count:>8}  {reason}" for reason, count in self.rejected.most_common()]
        if dropped:
            text.append(f"  line and detail of each: {self.side}")
        return text


class SeenIds:
    """A set of ids that a million rows cost 8 MB: 64-bit hashes, all but the latest in one sorted array."""

    def __init__(self) -> None:
        self._latest: set[int] = set()
        self._sorted = np.empty(0, np.int64)

    def add(self, row_id: str) -> bool:
        """False when it was there before."""
        key = np.int64(hash(row_id))
        place = int(self._sorted.searchsorted(key))
        if int(key) in self._latest or (place < len(self._sorted) and self._sorted[place] == key):
            return False
        self._latest.add(int(key))
        if len(self._latest) >= _LATEST_IDS:
            latest = np.fromiter(self._latest, np.int64, len(self._latest))
            self._sorted = np.sort(np.concatenate([self._sorted, latest]))
            self._latest = set()
        return True


class Conversion:
    """The rows of one source file, judged. `rows` yields the good ones, rendered, in the order of the file."""

    def __init__(
        self,
        tally: Tally,
        side: BinaryIO,
        audio: AudioRoot,
        to_record: Callable[[int, object], AudioQA],
        workers: int,
        advance: Callable[[int], None],
    ) -> None:
        self.tally = tally
        self._side = side
        self._audio = audio
        self._to_record = to_record
        self._workers = workers
        self._advance = advance
        self._seen = SeenIds()

    def rows(self, render: Callable[[Checked, int], Item]) -> Iterator[Item]:
        """`render(checked, index)` of every good row; it may raise RowError for what its own format cannot take."""
        for line, row_id, outcome in self._judged():
            self.tally.read += 1
            try:
                checked = _or_raise(outcome)
                self._refuse_twin(checked.record.id)
                item = render(checked, self.tally.written)
            except RowError as error:
                self._reject(line, row_id, error)
                continue
            self.tally.written += 1
            yield item

    def _refuse_twin(self, row_id: str) -> None:
        if not self._seen.add(row_id):
            raise RowError(Reason.DUPLICATE_ID, f"id {row_id!r} stands in an earlier row too")

    def _reject(self, line: int, row_id: str | None, error: RowError) -> None:
        self.tally.rejected[error.reason] += 1
        entry = {
            "file": str(self.tally.source),
            "line": line,
            "id": row_id,
            "reason": str(error.reason),
            "detail": error.detail,
        }
        self._side.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

    def _judged(self) -> Iterator[tuple[int, str | None, Checked | RowError]]:
        return ordered_map(self._judge, read_rows(self.tally.source, self._advance), self._workers)

    def _judge(self, numbered: tuple[int, object]) -> tuple[int, str | None, Checked | RowError]:
        line, value = numbered
        row_id = value["id"] if isinstance(value, dict) and isinstance(value.get("id"), str) else None
        try:
            record = self._to_record(line, _or_raise(value))
            row_id = record.id
            return line, row_id, self._audio.check(record)
        except RowError as error:
            return line, row_id, error


def ordered_map(function: Callable[[Item], Result], items: Iterator[Item], workers: int) -> Iterator[Result]:
    """`function` of every item, in order, over `workers` threads; a bounded number of items is read ahead."""
    pending: deque[Future[list[Result]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while chunk := list(islice(items, _CHUNK_ROWS)):
            pending.append(pool.submit(lambda chunk: [function(item) for item in chunk], chunk))
            if len(pending) > workers * _CHUNKS_AHEAD_PER_WORKER:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def write_records(conversion: Conversion, path: Path) -> None:
    """`write` of the importers: AudioQA rows, each with its duration."""

    def render(checked: Checked, index: int) -> bytes:
        record = replace(checked.record, duration_seconds=checked.audio.duration_seconds)
        return orjson.dumps(record.to_json(), option=orjson.OPT_APPEND_NEWLINE)

    with path.open("wb") as out:
        out.writelines(conversion.rows(render))


def from_manifest(line: int, row: object) -> AudioQA:
    """`to_record` of the exporters: the source is an AudioQA manifest already."""
    return AudioQA.from_json(row)


def convert(
    source: Path,
    target: Path,
    rejected: Path | None,
    audio: AudioRoot,
    to_record: Callable[[int, object], AudioQA],
    write: Callable[[Conversion, Path], None],
    workers: int = DEFAULT_WORKERS,
) -> Tally:
    """Run a conversion and print its summary to stderr. `write(conversion, path)` writes all rows to `path`.

    `target` appears whole or not at all, and not when no row was good: then exit status 1. The side file is always
    written, empty when nothing was rejected. Usage and file errors end the command with one line, status 2 and 1.
    """
    side = rejected or target.with_name(f"{target.name}.rejected.jsonl")
    if len({path.resolve() for path in (source, target, side)}) < 3:
        raise typer.BadParameter(f"input, output and rejected file must differ: {source}, {target}, {side}")
    tally = Tally(source, target, side)
    try:
        with StagedFile(side) as staged_side, StagedFile(target) as staged:
            with progress(source) as advance, staged_side.path.open("wb") as stream:
                write(Conversion(tally, stream, audio, to_record, workers, advance), staged.path)
            staged_side.commit()
            if tally.written:
                staged.commit()
    except OSError as error:
        typer.echo(f"error: {error}; {target} is left as it was", err=True)
        raise typer.Exit(1) from error
    for text in tally.lines():
        typer.echo(text, err=True)
    if not tally.written:
        typer.echo(f"error: no row of {source} could be used, so {target} was not written", err=True)
        raise typer.Exit(1)
    return tally


@contextmanager
def progress(source: Path) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of `source`, on stderr, only where somebody is looking."""
    console = Console(file=sys.stderr)
    name, percent = TextColumn("{task.description}"), TextColumn("{task.percentage:>3.0f}%")
    columns = (name, BarColumn(), percent, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task: TaskID = bar.add_task(source.name, total=source.stat().st_size or None)
        waiting = 0

        def advance(num_bytes: int) -> None:
            nonlocal waiting
            waiting += num_bytes
            if waiting >= 1 << 16:  # a bar update costs more than a row
                bar.advance(task, waiting)
                waiting = 0

        yield advance
