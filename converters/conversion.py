"""One pass over a source file, shared by importers and exporters: judge rows and their audio, keep the good in order,
put the bad into a side file with file, line, id and reason, and count both."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Generic, Protocol, TypeVar

import numpy as np
import orjson
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from converters.atomic import StagedFile
from converters.workers import CALLS_PER_PROCESS, DEFAULT_WORKERS, in_chunks, in_processes, ordered_map
from echo_plugins.audio import (
    SAMPLING_RATE,
    AudioError,
    OutsideRootError,
    TooLongError,
    parse_fragment,
    probe,
    resolve_path,
    too_long,
)
from echo_plugins.audio_qa import (
    AnyRecord,
    AudioQA,
    Reason,
    Record,
    RowError,
    check_times,
    cut_ends,
    parse_row,
    read_raw,
)
from echo_plugins.model import MAX_AUDIO_SECONDS, QWEN2_5_OMNI, max_audio_seconds

Item = TypeVar("Item")

# Rows go to the workers in chunks, since a hand-over a row would cost more than judging it. Threads get small ones, so
# that the files of a small manifest are decoded side by side.
CHUNK_ROWS = 500
_CHUNK_ROWS_OF_THREADS = 100
_PROCESSES_FROM_BYTES = 16 << 20  # starting processes takes a second, in which one core converts 20,000 rows
_CACHED_FILES = 65_536  # probed files remembered: some 30 MB, whatever the length of the manifest
_LATEST_IDS = 65_536


# The arguments that several commands share.
ManifestArgument = Annotated[
    Path, typer.Argument(metavar="IN.jsonl", exists=True, dir_okay=False, help="AudioQA manifest.")
]
ImportedArgument = Annotated[
    Path,
    typer.Argument(metavar="IN", exists=True, dir_okay=False, help="JSONL, or JSON that holds one list; also gzipped."),
]
RecordsArgument = Annotated[
    Path, typer.Argument(metavar="OUT.jsonl", dir_okay=False, help="The manifest, written whole or not at all.")
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
LinksOption = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="Take links under the audio root that point out of it, as the Hugging Face cache, git-annex and DVC make.",
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Checkpoint whose window and audio tokens count; a clip that it does not hear to its end is refused.",
        show_default=f"Qwen2.5-Omni, {MAX_AUDIO_SECONDS} s",
    ),
]
WorkersOption = Annotated[
    int, typer.Option(min=1, help="Threads that decode audio; processes where the manifest is large.")
]


def window_of(model: Path | None) -> float:
    """Seconds of a clip that the model hears. Raises typer.BadParameter (exit status 2)."""
    try:
        return MAX_AUDIO_SECONDS if model is None else max_audio_seconds(model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


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
class Checked(Generic[AnyRecord]):
    """A row and its audio, both judged good."""

    record: AnyRecord
    audio: AudioFile


class AudioRoot:
    """The files under one folder. Each is decoded once, however many rows name it. A clip of more than `max_seconds`
    is refused, since models cut off the rest without a word."""

    def __init__(
        self,
        root: Path,
        trust_durations: bool = False,
        cut_ends_seconds: float | None = None,
        max_seconds: float = MAX_AUDIO_SECONDS,
        follow_links: bool = False,
    ) -> None:
        self.root = root.resolve()
        self._cut_ends_seconds = cut_ends_seconds
        self._trust_durations = trust_durations
        self._max_seconds = max_seconds
        self._follow_links = follow_links
        self._locate = lru_cache(_CACHED_FILES)(self._locate_once)
        self._probe = lru_cache(_CACHED_FILES)(self._probe_once)

    def __reduce__(self) -> tuple[type[AudioRoot], tuple[Any, ...]]:
        settings = (self._trust_durations, self._cut_ends_seconds, self._max_seconds, self._follow_links)
        return AudioRoot, (self.root, *settings)  # a worker process has a cache of its own

    @property
    def settings(self) -> dict[str, Any]:
        """What the rows of an exporter hang on."""
        return {
            "audio_root": str(self.root),
            "trust_durations": self._trust_durations,
            "max_seconds": self._max_seconds,
            "follow_links": self._follow_links,
        }

    def measure(self, relative: str) -> AudioFile:
        """Find and decode one file. Raises RowError."""
        return _or_raise(self._probe(relative))

    def check(self, record: AnyRecord) -> Checked[AnyRecord]:
        """Measure the row's audio and hold its times against it. Events that end within `cut_ends_seconds` after it are
        cut to it. Raises RowError."""
        if self._trust_durations and record.duration_seconds is not None:
            path = _or_raise(self._locate(record.audio))
            audio = _or_raise(self._judged(path, round(record.duration_seconds * SAMPLING_RATE)))
        else:
            audio = self.measure(record.audio)
        if self._cut_ends_seconds is not None:
            record = cut_ends(record, audio.duration_seconds, self._cut_ends_seconds)
        check_times(record, audio.duration_seconds)
        return Checked(record, audio)

    # The cache keeps errors too: a broken file that ten thousand rows name is decoded once.
    def _locate_once(self, relative: str) -> str | RowError:
        try:
            path = str(resolve_path(self.root, relative, self._follow_links))
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
            info = probe(path, self._max_seconds)
        except TooLongError as error:
            return RowError(Reason.AUDIO_TOO_LONG, str(error))
        except AudioError as error:
            return RowError(Reason.AUDIO_UNREADABLE, str(error))
        return self._judged(path, info.num_samples)

    def _judged(self, path: str, num_samples: int) -> AudioFile | RowError:
        seconds = num_samples / SAMPLING_RATE
        if seconds > self._max_seconds:
            return RowError(Reason.AUDIO_TOO_LONG, too_long(path, seconds, self._max_seconds))
        if not QWEN2_5_OMNI.num_audio_tokens(num_samples):
            return RowError(Reason.AUDIO_TOO_SHORT, f"{path}: {seconds:.3f} s give no audio token")
        return AudioFile(path, num_samples)


def _or_raise(outcome: Item | RowError) -> Item:
    if isinstance(outcome, RowError):
        # A cached error is shared: raising it would chain tracebacks.
        raise RowError(outcome.reason, outcome.detail, outcome.fatal)
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
    lost: RowError | None = None  # the first fatal one

    def add(self, read: int, written: int, rejected: Counter[Reason]) -> None:
        self.read += read
        self.written += written
        self.rejected += rejected

    def lines(self) -> list[str]:
        dropped = self.rejected.total()
        text = [f"{self.source}: {self.read} rows read, {self.written} written to {self.target}, {dropped} rejected"]
        text += [f"  {count:>8}  {reason}" for reason, count in self.rejected.most_common()]
        if dropped:
            text.append(f"  line and detail of each: {self.side}")
        return text


class SeenIds:
    """The lines of ids, 16 MB for a million: 64-bit hashes of the ids, all but the latest in a few sorted arrays."""

    def __init__(self) -> None:
        self._latest: dict[int, int] = {}
        self._runs: list[np.ndarray] = []  # of hash and line

    def add(self, row_id: str, line: int) -> RowError | None:
        """Keep an id that is new; a known one is refused with the line of the first."""
        return self.add_all([(line, row_id)]).get(0)

    def add_all(self, rows: Sequence[tuple[int, str]]) -> dict[int, RowError]:
        """Keep the ids of (line, id) that are new. The places of the others in `rows`, each with its refusal."""
        keys = [hash(row_id) for _, row_id in rows]
        known = self._earlier(keys)
        for place, (key, (line, _)) in enumerate(zip(keys, rows, strict=True)):
            if key in self._latest:
                known[place] = self._latest[key]
            elif place not in known:
                self._latest[key] = line
        if len(self._latest) >= _LATEST_IDS:
            run = np.fromiter(self._latest.items(), np.dtype((np.int64, 2)), len(self._latest))
            self._latest.clear()
            while self._runs and len(self._runs[-1]) <= len(run):  # so that there are few, whatever their number of ids
                run = np.concatenate([self._runs.pop(), run])
            self._runs.append(run[run[:, 0].argsort(kind="stable")])
        return {
            place: RowError(Reason.DUPLICATE_ID, f"id {rows[place][1]!r} stands in line {first} too")
            for place, first in known.items()
        }

    def _earlier(self, keys: list[int]) -> dict[int, int]:
        """The places of keys that the arrays hold, and the lines that they have there."""
        asked = np.array(keys, np.int64)
        known: dict[int, int] = {}
        for run in self._runs:
            found = run[np.minimum(run[:, 0].searchsorted(asked), len(run) - 1)]
            known |= {int(place): int(found[place, 1]) for place in np.flatnonzero(found[:, 0] == asked)}
        return known


class Form(Protocol):
    """A kind of output file. `pack` works in the worker, on a chunk of rendered rows; the rest where it is written."""

    @property
    def suffix(self) -> str: ...

    @property
    def chunk_rows(self) -> int: ...

    def pack(self, items: list[Any]) -> Any: ...

    def take(self, packed: Any, kept: list[int]) -> Any:
        """Those rows of a packed chunk that are named by their places."""
        ...

    def write(self, chunks: Iterator[Any], path: Path) -> None:
        """All chunks to one file, in bounded memory."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """One JSON object a line; rows are rendered to bytes."""

    suffix: str = ".jsonl"
    chunk_rows: int = CHUNK_ROWS

    def pack(self, items: list[bytes]) -> list[bytes]:
        return items

    def take(self, packed: list[bytes], kept: list[int]) -> list[bytes]:
        return [packed[place] for place in kept]

    def write(self, chunks: Iterator[list[bytes]], path: Path) -> None:
        with path.open("wb") as out:
            for packed in chunks:
                out.writelines(packed)


Numbered = tuple[int, Any]
"""Line and row: unparsed as `read_raw` gives it, or a JSON value, or the RowError that there is in its place."""


@dataclass(frozen=True)
class Judged:
    """A chunk of rows: the good ones packed for the file, the others named."""

    num_read: int
    good: list[tuple[int, str]]  # line and id
    packed: Any
    rejected: list[tuple[int, str | None, RowError]]


@dataclass(frozen=True)
class Job:
    """What becomes of a row. Worker processes get a copy: `to_record` and `render` are functions of modules then.

    `render(checked, index)` gets the row's place in the source, from 0, and may raise RowError for what its own format
    cannot take.
    """

    audio: AudioRoot
    to_record: Callable[[int, object], Record]
    render: Callable[[Checked, int], Any]
    form: Form

    def __call__(self, chunk: list[tuple[int, Numbered]]) -> Judged:
        good: list[tuple[int, str]] = []
        items: list[Any] = []
        rejected: list[tuple[int, str | None, RowError]] = []
        for index, (line, raw) in chunk:
            value = parse_row(raw) if isinstance(raw, (bytes, str)) else raw
            row_id = value["id"] if isinstance(value, dict) and isinstance(value.get("id"), str) else None
            try:
                record = self.to_record(line, _or_raise(value))
                row_id = record.id
                items.append(self.render(self.audio.check(record), index))
                good.append((line, row_id))
            except RowError as error:
                rejected.append((line, row_id, error.with_traceback(None)))  # a traceback would keep the chunk alive
        return Judged(len(chunk), good, self.form.pack(items), rejected)


class Conversion:
    """The rows of one source on their way into files: refuses an id that came before, keeps the side file, counts."""

    def __init__(
        self, job: Job, judge: Callable[[list[tuple[int, Numbered]]], Judged], workers: int, chunk_rows: int
    ) -> None:
        self.job = job
        self._chunk_rows = chunk_rows
        self.seen = SeenIds()
        self._judge = judge
        self._workers = workers

    def write(self, rows: Iterator[Numbered], first_index: int, path: Path, side: BinaryIO, tally: Tally) -> None:
        """Judge `rows` and write the good ones to `path`, in order."""
        chunks = in_chunks(enumerate(rows, start=first_index), self._chunk_rows)
        judged = ordered_map(self._judge, chunks, self._workers)
        self.job.form.write((self._new(chunk, side, tally) for chunk in judged), path)

    def _new(self, chunk: Judged, side: BinaryIO, tally: Tally) -> Any:
        twins = self.seen.add_all(chunk.good)
        tally.read += chunk.num_read
        tally.written += len(chunk.good) - len(twins)
        rejected, packed = chunk.rejected, chunk.packed
        if twins:
            rejected += [(*chunk.good[place], error) for place, error in twins.items()]
            rejected.sort(key=lambda entry: entry[0])
            packed = self.job.form.take(packed, [place for place in range(len(chunk.good)) if place not in twins])
        for line, row_id, error in rejected:
            tally.rejected[error.reason] += 1
            if error.fatal and tally.lost is None:
                tally.lost = RowError(error.reason, f"line {line}: {error.detail}")
            entry = {
                "file": _printable(str(tally.source)),
                "line": line,
                "id": row_id and _printable(row_id),
                "reason": str(error.reason),
                "detail": _printable(error.detail),
            }
            side.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        return packed


def _printable(text: str) -> str:
    """The names of files may hold bytes that are no UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def conversion_of(job: Job, source: Path, workers: int, processes: bool) -> Iterator[Conversion]:
    """A conversion with its workers: processes where they are allowed and the source is large, otherwise threads."""
    if processes and workers > 1 and source.stat().st_size >= _PROCESSES_FROM_BYTES:
        with in_processes(job, workers) as judge:
            yield Conversion(job, judge, workers * CALLS_PER_PROCESS, job.form.chunk_rows)
    else:
        yield Conversion(job, job, workers, min(_CHUNK_ROWS_OF_THREADS, job.form.chunk_rows))


def from_manifest(line: int, row: object) -> AudioQA:
    """`to_record` of the exporters: the source is an AudioQA manifest already."""
    return AudioQA.from_json(row)


def convert(
    source: Path,
    target: Path,
    rejected: Path | None,
    job: Job,
    workers: int = DEFAULT_WORKERS,
    rows: Callable[[Callable[[int], None]], Iterator[Numbered]] | None = None,
    processes: bool = False,
) -> Tally:
    """Run a conversion into one file and print its summary to stderr. `rows(advance)` reads a source that is no JSONL,
    and tells `advance` the bytes it has consumed. `processes` says that `job` may go to worker processes.

    `target` appears whole or not at all, and not when no row was good: then exit status 1. The side file is always
    written, empty when nothing was rejected. Usage and file errors end the command with one line, status 2 and 1.
    """
    side = rejected or side_file(target)
    refuse_same_file(source, target, side)
    tally = Tally(source, target, side)
    try:
        with (
            StagedFile(side) as staged_side,
            StagedFile(target) as staged,
            conversion_of(job, source, workers, processes) as conversion,
        ):
            with progress(source) as advance, staged_side.path.open("wb") as stream:
                numbered = rows(advance) if rows else read_raw(source, advance)
                conversion.write(numbered, 0, staged.path, stream, tally)
            staged_side.commit()
            if tally.written:
                staged.commit()
    except OSError as error:
        typer.echo(f"error: {error}; {target} is left as it was", err=True)
        raise typer.Exit(1) from error
    report(tally)
    return tally


def side_file(target: Path) -> Path:
    """Where rejected rows go unless `--rejected` says otherwise."""
    return target.with_name(f"{target.name}.rejected.jsonl")


def refuse_same_file(*paths: Path) -> None:
    """Raises typer.BadParameter (exit status 2)."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise typer.BadParameter(f"input, output and rejected file must differ: {', '.join(map(str, paths))}")


def report(tally: Tally) -> None:
    """What came in, what went out, why the rest did not; exit status 1 when nothing went out, or when the source could
    not be read to its end."""
    for text in tally.lines():
        typer.echo(f"== {text}", err=True)  # a recipe shows such lines: see script/watch.py
    if tally.lost:
        kept = f"{tally.target} has {tally.written} good rows" if tally.written else "nothing was written"
        typer.echo(
            f"error: {tally.source}: {tally.lost.detail}; {kept}. Mend the line or take it out, and run again", err=True
        )
        raise typer.Exit(1)
    if not tally.written:
        typer.echo(f"error: no row of {tally.source} could be used, so {tally.target} was not written", err=True)
        raise typer.Exit(1)


def import_records(
    source: Path,
    target: Path,
    rejected: Path | None,
    audio: AudioRoot,
    to_record: Callable[[int, Any], Record],
    workers: int = DEFAULT_WORKERS,
    rows: Callable[[Callable[[int], None]], Iterator[Numbered]] | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tally:
    """`convert` of the importers: a manifest of AudioQA or labelled audio, each record with its decoded duration."""
    form = JsonLines(chunk_rows=chunk_rows)
    return convert(source, target, rejected, Job(audio, to_record, _manifest_line, form), workers, rows)


def _manifest_line(checked: Checked, index: int) -> bytes:
    record = replace(checked.record, duration_seconds=checked.audio.duration_seconds)
    try:
        return orjson.dumps(record.to_json(), default=str, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:  # a whole number of more than 64 bits, a file's name under `meta`
        raise RowError(Reason.WRONG_TYPE, f"'meta' or an event holds what JSON cannot: {error}") from error


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
