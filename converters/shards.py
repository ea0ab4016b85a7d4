"""An exporter's output: one file, or with `--shard-rows` a folder of shards that a killed run goes on with.

    OUT/part-00000.parquet ...   the good ones of rows 0 to N-1 of the source, and so on
    OUT/rejected.jsonl           the others
    OUT/manifest.json            written last: rows, bytes and SHA-256 of each shard, the settings, what was rejected

The same source and settings give the same bytes, whatever the number of workers and however often the run was killed.
Until the manifest is there, OUT/.resume holds a record of each finished shard; a shard is kept when the record, its
rows of the source, the settings and its own bytes still agree.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer

from converters.atomic import StagedFile
from converters.conversion import (
    Conversion,
    Job,
    Tally,
    conversion_of,
    convert,
    progress,
    refuse_same_file,
    report,
    side_file,
)
from echo_plugins.audio_qa import Raw, Reason, parse_row, read_raw

MANIFEST = "manifest.json"
_RESUME = ".resume"
_PART = re.compile(r"part-[0-9]{5,}\.(?:jsonl|parquet)")

ShardRowsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Make OUT a folder of shards of so many source rows, which a killed run goes on with."),
]


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest names it."""

    file: str
    rows: int
    bytes: int
    sha256: str
    source_rows: int
    source_sha256: str
    rejected: Mapping[str, int]


def export(
    source: Path,
    target: Path,
    rejected: Path | None,
    job: Job,
    workers: int,
    shard_rows: int | None,
    settings: Mapping[str, Any],
) -> Tally:
    """`convert` of the exporters. `settings` is all that the bytes of the output hang on besides the source's rows."""
    if shard_rows is None:
        return convert(source, target, rejected, job, workers, processes=True)
    if target.exists() and not target.is_dir():
        raise typer.BadParameter(f"{target} is a file; with --shard-rows it is a folder", param_hint="OUT")
    side = rejected or target / "rejected.jsonl"
    refuse_same_file(source, target, side)
    tally = Tally(source, target, side)
    try:
        with conversion_of(job, source, workers, processes=True) as conversion, progress(source) as advance:
            folder = _Folder(target, conversion, tally, {**settings, "shard_rows": shard_rows})
            shards = folder.finished_shards()
            for shard in shards:
                tally.add(shard.source_rows, shard.rows, Counter({Reason(k): v for k, v in shard.rejected.items()}))
            rows = islice(read_raw(source, advance), tally.read, None)
            for number in count(len(shards)):
                shard = folder.write_shard(number, islice(rows, shard_rows))
                if not shard.source_rows:
                    break
                shards.append(shard)
            if tally.written and tally.lost is None:
                folder.finish(shards, side)
    except OSError as error:
        typer.echo(f"error: {error}; the same command goes on with the shards that {target} has", err=True)
        raise typer.Exit(1) from error
    report(tally)
    return tally


def remove(source: Path, target: Path, rejected: Path | None) -> None:
    """Remove what an earlier `export` wrote to these places: a file or the shards of a folder, and the side file."""
    side = rejected or (target / "rejected.jsonl" if target.is_dir() else side_file(target))
    refuse_same_file(source, target, side)
    side.unlink(missing_ok=True)
    if not target.is_dir():
        target.unlink(missing_ok=True)
        return
    parts = _own_parts(target)
    (target / MANIFEST).unlink(missing_ok=True)  # first: a folder with a manifest is finished
    for name in parts:
        (target / name).unlink(missing_ok=True)
    if (target / _RESUME).exists():
        shutil.rmtree(target / _RESUME)
    if not any(target.iterdir()):
        target.rmdir()


def _own_parts(folder: Path, settings: Mapping[str, Any] | None = None) -> set[str]:
    """The shards in a folder that an export wrote. With `settings`, raises typer.BadParameter (exit status 2) for a
    folder that holds files of anything else than an export of that format."""
    manifests: list[Mapping[str, Any]] = []
    for file in (folder / MANIFEST, *sorted((folder / _RESUME).glob("part-*.json"))):
        with suppress(FileNotFoundError, orjson.JSONDecodeError):
            manifests.append(orjson.loads(file.read_bytes()))
    if settings and not manifests and not (folder / _RESUME).is_dir() and folder.is_dir() and any(folder.iterdir()):
        raise typer.BadParameter(f"{folder} holds files that no export wrote: give another folder", param_hint="OUT")
    formats = {manifest.get("settings", {}).get("format") for manifest in manifests}
    if settings and formats - {settings["format"]}:
        other = ", ".join(map(str, formats))
        raise typer.BadParameter(f"{folder} holds the shards of {other}: give another folder", param_hint="OUT")
    names = {shard["file"] for manifest in manifests for shard in manifest.get("shards", [manifest.get("shard")])}
    if (folder / _RESUME).is_dir():  # a run can be killed between a shard and its record
        names |= {file.name for file in folder.iterdir() if _PART.fullmatch(file.name)}
    return names


class _Folder:
    def __init__(self, folder: Path, conversion: Conversion, tally: Tally, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._resume = folder / _RESUME
        self._conversion = conversion
        self._tally = tally
        self._settings = orjson.loads(orjson.dumps(settings))
        self._shard_rows: int = settings["shard_rows"]
        self._suffix = conversion.job.form.suffix
        self._own_parts = _own_parts(folder, settings)
        self._resume.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # a folder with a manifest is finished
        for left in (*folder.glob(".part-*.tmp"), *self._resume.glob(".*.tmp")):
            left.unlink()

    def finished_shards(self) -> list[Shard]:
        """The shards of an earlier run that still hold, from the first on; their ids count as seen."""
        shards: list[Shard] = []
        if not self._tally.source.is_file():
            return shards  # a pipe is read once
        rows = read_raw(self._tally.source, lambda num_bytes: None)
        for number in count():
            shard = self._finished(number)
            if shard is None:
                return shards
            taken = list(islice(rows, self._shard_rows))
            if shard.source_sha256 != _sha256(raw for _, raw in taken):
                return shards
            lines = {orjson.loads(entry)["line"] for entry in self._side(number).open("rb")}
            values = ((line, parse_row(raw)) for line, raw in taken if line not in lines)
            self._conversion.seen.add_all(
                [(line, str(value["id"])) for line, value in values if isinstance(value, dict)]
            )
            shards.append(shard)
        raise AssertionError("unreachable")

    def _finished(self, number: int) -> Shard | None:
        try:
            record = orjson.loads(self._record(number).read_bytes())
        except FileNotFoundError:
            return None
        shard = Shard(**record["shard"])
        return shard if record["settings"] == self._settings and problem_of(self.folder, shard) is None else None

    def write_shard(self, number: int, rows: Iterator[tuple[int, Raw]]) -> Shard:
        """Convert `rows` to the shard of that number. With no row left in the source, nothing is written."""
        file = self.folder / f"part-{number:05d}{self._suffix}"
        source = hashlib.sha256()
        tally = Tally(self._tally.source, file, self._side(number))

        def hashed() -> Iterator[tuple[int, Raw]]:
            for line, raw in rows:
                source.update(_bytes(raw))
                yield line, raw

        with StagedFile(file) as staged, StagedFile(tally.side) as staged_side:
            with staged_side.path.open("wb") as side:
                self._conversion.write(hashed(), number * self._shard_rows, staged.path, side, tally)
            sha256 = sha256_of(staged.path)
            reasons = {str(reason): number for reason, number in sorted(tally.rejected.items())}
            size = staged.path.stat().st_size
            shard = Shard(file.name, tally.written, size, sha256, tally.read, source.hexdigest(), reasons)
            if tally.read:
                staged.commit()
                staged_side.commit()
                _write_json(self._record(number), {"settings": self._settings, "shard": shard})
        self._tally.add(tally.read, tally.written, tally.rejected)
        self._tally.lost = self._tally.lost or tally.lost
        return shard

    def finish(self, shards: list[Shard], side: Path) -> None:
        """One side file of all shards, the manifest, and nothing else in the folder."""
        with StagedFile(side) as staged:
            with staged.path.open("wb") as out:
                for number in range(len(shards)):
                    with self._side(number).open("rb") as stream:
                        shutil.copyfileobj(stream, out)
            staged.commit()
        for name in self._own_parts - {shard.file for shard in shards}:
            (self.folder / name).unlink(missing_ok=True)
        tally = self._tally
        reasons = {str(reason): number for reason, number in sorted(tally.rejected.items())}
        manifest = Manifest(tally.source.name, self._settings, tally.read, tally.written, reasons, shards)
        _write_json(self.folder / MANIFEST, manifest)
        shutil.rmtree(self._resume)

    def _record(self, number: int) -> Path:
        return self._resume / f"part-{number:05d}.json"

    def _side(self, number: int) -> Path:
        return self._resume / f"part-{number:05d}.rejected.jsonl"


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says."""

    source: str
    settings: Mapping[str, Any]
    source_rows: int
    rows: int
    rejected: Mapping[str, int]
    shards: list[Shard]


def read_manifest(folder: Path) -> Manifest:
    """Raises OSError when the folder has none."""
    value = orjson.loads((folder / MANIFEST).read_bytes())
    return Manifest(**{**value, "shards": [Shard(**shard) for shard in value["shards"]]})


def problem_of(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, in words; None when it is as it was written."""
    file = folder / shard.file
    if not file.is_file():
        return f"{shard.file} is missing"
    size, sha256 = file.stat().st_size, sha256_of(file)
    return None if sha256 == shard.sha256 else f"{shard.file} has {size} bytes with other contents, not {shard.bytes}"


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _bytes(raw: Raw) -> bytes:
    return raw if isinstance(raw, bytes) else str(raw).encode("utf-8", "surrogateescape")


def _sha256(rows: Iterator[Raw]) -> str:
    digest = hashlib.sha256()
    for raw in rows:
        digest.update(_bytes(raw))
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    with StagedFile(path) as staged:
        staged.path.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        staged.commit()
