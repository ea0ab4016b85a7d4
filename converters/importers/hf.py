"""A local Hugging Face data set (Parquet, Arrow, or a `save_to_disk` folder) -> AudioQA or labelled audio.

    python -m converters.importers.hf IN OUT.jsonl --audio-root DIR --audio-column audio --map question=query

pyarrow reads the rows, so that nothing is decoded: embedded audio is written to AUDIO_ROOT/NAME/ byte for byte, under a
name made of its bytes, so that rows of the same sound share a file. NAME is OUT's. A path is taken as it is.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import typer

from converters import conversion
from converters.atomic import StagedFile
from converters.conversion import AudioRoot, Numbered
from converters.importers.answers import AnswerForm
from converters.importers.mapping import MapOption, Mapper, Preset, require_columns
from echo_plugins.audio_qa import Reason, Record, RowError

_BATCH_ROWS = 16  # a row can hold minutes of sound
_CHUNK_ROWS = 10  # read ahead for each worker
_NAME_DIGITS = 24  # of the SHA-256 of the bytes

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[Path, typer.Argument(metavar="IN", exists=True, help="A Parquet or Arrow file, or a folder.")],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    audio_column: Annotated[str, typer.Option(help="The column of the audio.")] = "audio",
    map_: MapOption = [],  # noqa: B006  typer reads the default, nobody changes it
    answer: Annotated[AnswerForm, typer.Option(help="How the answer is given.")] = AnswerForm.AUTO,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn a local Hugging Face data set into a manifest; the line of a rejected row is its number.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    layout = Preset(fields={"audio": audio_column}, answer=answer).with_map(map_)
    audio = AudioRoot(audio_root, cut_ends_seconds=layout.end_tolerance, follow_links=follow_links)
    mapper = Mapper(layout, audio, source.stem)
    files = _data_files(source)

    def to_record(line: int, row: object) -> Record:
        if isinstance(row, dict) and isinstance(value := row.get(audio_column), dict | bytes):
            value = {"bytes": value} if isinstance(value, bytes) else value
            row = row | {audio_column: _audio_path(value, audio.root, target.stem)}
        return mapper.record(line, row)

    def rows(advance: Callable[[int], None]) -> Iterator[Numbered]:
        return _rows(files, audio_column, advance)

    try:
        require_columns(map_, [_names(_schema(files[0]))], str(files[0]), mapper.item_fields)
        conversion.import_records(source, target, rejected, audio, to_record, workers, rows, _CHUNK_ROWS)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for the name of a column
        typer.echo(f"error: {source}: {error}", err=True)
        raise typer.Exit(1) from error


def _data_files(source: Path) -> list[Path]:
    # map, filter and shuffle leave `cache-*.arrow` beside the data of a save_to_disk folder: other rows, or indices.
    found = [source] if source.is_file() else sorted([*source.rglob("*.parquet"), *source.rglob("*.arrow")])
    files = [file for file in found if source.is_file() or not file.name.startswith("cache-")]
    if not files:
        raise typer.BadParameter(f"{source} holds no .parquet and no .arrow file", param_hint="IN")
    return files


def _schema(file: Path) -> pa.Schema:
    if file.suffix == ".parquet":
        return pq.read_schema(file)
    with pa.memory_map(str(file)) as memory, pa.ipc.open_stream(memory) as stream:
        return stream.schema


def _names(fields: Iterable[pa.Field]) -> dict[str, Any]:
    """The columns and the fields inside them, as a row that has all of them."""
    return {field.name: _names(field.type) if pa.types.is_struct(field.type) else None for field in fields}


def _rows(files: list[Path], audio_column: str, advance: Callable[[int], None]) -> Iterator[Numbered]:
    number = 0
    for file in files:
        for batch in _batches(file, audio_column):
            for row in _values(batch):
                number += 1
                yield number, row
        advance(file.stat().st_size)


def _values(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows; a RowError for one that Python cannot hold: text that is no UTF-8, a date before the year 1. A damaged
    Arrow file is found out by `validate`: without it the process dies on an offset that leads nowhere."""
    try:
        batch.validate(full=True)
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for place in range(batch.num_rows):
            piece = batch.slice(place, 1)
            try:
                piece.validate(full=True)
                yield from piece.to_pylist()
            except (ValueError, OverflowError) as error:
                yield RowError(Reason.NOT_UTF8 if "UTF8" in str(error) else Reason.WRONG_TYPE, str(error))


def _batches(file: Path, audio_column: str) -> Iterator[pa.RecordBatch]:
    """The rows without what JSON cannot hold, such as images."""
    if file.suffix == ".parquet":
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(_BATCH_ROWS, columns=_columns(parquet.schema_arrow, audio_column))
    else:  # `datasets` writes Arrow streams
        with pa.memory_map(str(file)) as memory, pa.ipc.open_stream(memory) as stream:
            columns = _columns(stream.schema, audio_column)
            for batch in stream:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS).select(columns)


def _columns(schema: pa.Schema, audio_column: str) -> list[str]:
    """Raises typer.BadParameter (exit status 2) when the audio's is not among them."""
    if audio_column not in schema.names:
        names = ", ".join(schema.names)
        raise typer.BadParameter(f"no column {audio_column!r}, only {names}", param_hint="--audio-column")
    return [column.name for column in schema if column.name == audio_column or "binary" not in str(column.type)]


def _audio_path(value: dict[str, Any], root: Path, folder: str) -> str:
    """The path of an Audio value under the root; embedded bytes are written there first. Raises RowError."""
    data, path = value.get("bytes"), value.get("path")
    if not isinstance(data, bytes):
        if not isinstance(path, str):
            raise RowError(Reason.MISSING_FIELD, "the audio has neither bytes nor a path")
        return path
    suffix = PurePosixPath(path).suffix if isinstance(path, str) else ""
    name = hashlib.sha256(data).hexdigest()[:_NAME_DIGITS]
    file = root / folder / f"{name}{suffix if suffix[1:].isalnum() else _suffix_of(data)}"
    if not file.is_file() or file.stat().st_size != len(data):
        with StagedFile(file) as staged:
            staged.path.write_bytes(data)
            staged.commit()
    return file.relative_to(root).as_posix()


def _suffix_of(data: bytes) -> str:
    try:
        return f".{soundfile.info(io.BytesIO(data)).format.lower()}"
    except (soundfile.LibsndfileError, RuntimeError):
        return ".audio"


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.hf")
