"""The predictions file: rows appended one by one, resumable after a kill, and a sidecar that says what made them.

OUT.jsonl         one row a line, each flushed when it is written
OUT.run.json      the model, the benchmark, the sampling, the versions; rows of two runs are never mixed in one file
OUT.seed7.jsonl   a further run with another seed, and its own .run.json
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from echo_plugins.relisten.segment import Segment, find_tags
from echo_plugins.relisten.trajectory import Attempt

from .benchmarks import own_benchmark

FSYNC_SECONDS = 5.0  # what a crash of the machine, not of the program, may lose


class PredictionsError(ValueError):
    """The file cannot be used as it is; the message says why and what to do."""


def run_path(file: Path, seed: int, number: int) -> Path:
    """Where run `number` of several goes, which is sampled with `seed`: the first to `file` itself, so that runs can be
    added later."""
    return file if number == 0 else file.with_suffix(f".seed{seed}{file.suffix}")


def sidecar_path(file: Path) -> Path:
    return file.with_suffix(".run.json")


def read_sidecar(file: Path) -> dict[str, Any] | None:
    """What made the predictions in `file`, None where nothing says."""
    path = sidecar_path(file)
    if not path.is_file():
        return None
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PredictionsError(f"{path}: not JSON ({error})") from error
    if not isinstance(sidecar, dict) or not isinstance(sidecar.get("identity"), dict):
        raise PredictionsError(f"{path}: not what eval.infer writes; without it the rows are scored as they are")
    if "definition" in sidecar:
        own_benchmark(sidecar["definition"])
    return sidecar


def read_rows(file: Path, *, ours: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every complete row. In `ours`, which eval.infer wrote, a last line without its newline is
    what a kill left, and is skipped; in others' files it is a row, and a row may lack its id."""
    with file.open("rb") as lines:
        yield from _rows(lines, file, ours=ours)


def _rows(lines: Iterable[bytes], file: Path, *, ours: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if (ours and not line.endswith(b"\n")) or (not ours and line.isspace()):
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PredictionsError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or (ours and row.get("id") is None):
            raise PredictionsError(f"{file}, line {number}: not a row with an id")
        yield number, row


def segment_row(attempt: Attempt) -> dict[str, Any]:
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


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; with escapes where it has a lone surrogate, which no file in UTF-8 can hold."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


def json_line(row: Mapping[str, Any]) -> str:
    return to_json(row) + "\n"


def recorded_paths(sidecar: Mapping[str, Any], key: str, file: Path) -> list[Path]:
    """Where the questions or the audio that `sidecar` names may lie: where they were, and where they are by now if the
    folder around them and the predictions in `file` was moved."""
    relative = sidecar.get("relative", {}).get(key)
    return [Path(sidecar[key]), *([] if relative is None else [file.resolve().parent / relative])]


def write_whole(file: Path, content: str | Iterable[str]) -> None:
    """Write `content`, one text or several, to `file` whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines([content] if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


class Predictions:
    """The predictions file of a run, open for appending by this process alone.

    `done` holds the ids of the rows in it. `run` has an `identity`, `num_rows`, and `ids` where not all rows of the
    questions are asked. The sidecar holds the ids of all that was ever asked of the file, so that its score never
    forgets a row. Rows that are `unwanted` are taken out.

    Raises PredictionsError when another process appends to it, when something other than `run` made it, or when it
    holds a row twice.
    """

    def __init__(
        self,
        file: Path,
        run: Mapping[str, Any],
        *,
        overwrite: bool = False,
        unwanted: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._stream = _locked(file)
        except BlockingIOError as error:
            raise PredictionsError(f"{file}: another process is writing to it") from error
        try:
            if overwrite:
                self._stream.truncate(0)
            self.run = run if overwrite else self._joined(run)
            self.done = self._repair()
            if unwanted is not None and self.done:
                self._take_out(unwanted)
            write_whole(sidecar_path(file), to_json(self.run, indent=2) + "\n")
        except BaseException:
            self._stream.close()
            raise
        self._synced = time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it."""
        self._stream.write(json_line(row).encode())
        self._stream.flush()
        self.done.add(str(row["id"]))
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _joined(self, run: Mapping[str, Any]) -> Mapping[str, Any]:
        """`run`, asked for what was asked of the file before too."""
        before = read_sidecar(self._file)
        is_empty = not self._stream.seek(0, os.SEEK_END)
        if before is None:
            if is_empty:
                return run
            raise PredictionsError(f"{self._file} has rows but no {sidecar_path(self._file).name}: --overwrite it")
        now = json.loads(json.dumps(run["identity"]))
        if before["identity"] != now:
            if is_empty:
                return run
            changed = "; ".join(_differences(before["identity"], now))
            raise PredictionsError(
                f"{self._file} was made by another run ({changed}). "
                "Give the same settings to go on, another --output, or --overwrite"
            )
        if "ids" in before and "ids" in run:
            ids = sorted({*before["ids"], *run["ids"]})
            return {**run, "ids": ids, "num_rows": len(ids)}
        all_of_them = before if "ids" in run else run
        return {**{key: value for key, value in run.items() if key != "ids"}, "num_rows": all_of_them["num_rows"]}

    def _repair(self) -> set[str]:
        """Cut a torn last line off, and return the ids of the rows that are there."""
        self._stream.seek(0)
        ids: set[str] = set()
        for number, row in _rows(self._stream, self._file):
            if (row_id := str(row["id"])) in ids:
                raise PredictionsError(f"{self._file}, line {number}: row {row_id!r} is there twice: --overwrite it")
            ids.add(row_id)
        self._stream.seek(0)
        self._stream.truncate(sum(len(line) for line in self._stream if line.endswith(b"\n")))
        return ids

    def _take_out(self, unwanted: Callable[[Mapping[str, Any]], bool]) -> None:
        """Put a file without the unwanted rows in the place of this one. It is locked before it is there."""
        temporary = self._file.with_name(f".{self._file.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        stream = _locked(temporary)
        try:
            self._stream.seek(0)
            for _, row in _rows(self._stream, self._file):
                if unwanted(row):
                    self.done.discard(str(row["id"]))
                else:
                    stream.write(json_line(row).encode())
            stream.flush()
            os.fsync(stream.fileno())
            temporary.replace(self._file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            stream.close()
            raise
        self._stream.close()
        self._stream = stream


def _locked(file: Path) -> BinaryIO:
    """`file`, open for appending and locked. Raises BlockingIOError when another process holds the lock.

    A record lock: unlike flock's, the engine's process does not inherit it and may outlive a killed parent. Closing any
    other handle of the file would release it.
    """
    while True:
        stream = file.open("a+b")
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                    return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # the file was replaced after it was opened: this lock is of nobody's file


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`name: was -> is` of every value that differs, nested ones by their path."""
    found: list[str] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found
