"""A local Hugging Face data set (Parquet, Arrow, or a `save_to_disk` folder) -> AudioQA or labelled audio.

    python -m converters.importers.hf IN OUT.jsonl --audio-root DIR --audio-column audio --map question=query

pyarrow reads the rows, so that nothing is decoded: embedded audio is written to AUDIO_ROOT/NAME/ byte for byte, a path
is taken as it is. NAME is OUT's; a file that is there already with the same bytes is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from converters import conversion
from converters.atomic import StagedFile
from converters.conversion import AudioRoot, Numbered
from converters.importers.answers import AnswerForm
from converters.importers.mapping import MapOption, Mapper, Preset, require_columns
from echo_plugins.audio_qa import Reason, Record, RowError

_BATCH_ROWS = 16  # a row can hold minutes of sound

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
    require_columns(map_, _schema(files[0]).names, str(files[0]))

    def to_record(line: int, row: object) -> Record:
        if isinstance(row, dict) and isinstance(row.get(audio_column), dict):
            name = f"{source.stem}-{line:07d}"
            row = row | {audio_column: _audio_path(row[audio_column], audio.root, target.stem, name)}
        return mapper.record(line, row)

    try:
        conversion.import_records(
            source, target, rejected, audio, to_record, workers, lambda advance: _rows(files, audio_column, advance)
        )
    except pa.ArrowException as error:
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


def _rows(files: list[Path], audio_column: str, advance: Callable[[int], None]) -> Iterator[Numbered]:
    number = 0
    for file in files:
        for batch in _batches(file, audio_column):
            for row in batch.to_pylist():
                number += 1
                yield number, row
        advance(file.stat().st_size)


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


def _audio_path(value: dict[str, Any], root: Path, folder: str, name: str) -> str:
    """The path of an Audio value under the root; embedded bytes are written there first. Raises RowError."""
    data, path = value.get("bytes"), value.get("path")
    if data is None:
        if not isinstance(path, str):
            raise RowError(Reason.MISSING_FIELD, "the audio has neither bytes nor a path")
        return path
    suffix = PurePosixPath(path).suffix if isinstance(path, str) else ".audio"
    file = root / folder / f"{name}{suffix if suffix[1:].isalnum() else '.audio'}"
    if not file.is_file() or hashlib.sha256(file.read_bytes()).digest() != hashlib.sha256(data).digest():
        with StagedFile(file) as staged:
            staged.path.write_bytes(data)
            staged.commit()
    return file.relative_to(root).as_posix()


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.hf")
