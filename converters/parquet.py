"""Parquet, written row group by row group: memory does not grow with the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import typer

from converters.conversion import CHUNK_ROWS
from echo_plugins.audio_qa import AudioQA, Reason, RowError

EVENT = pa.struct([("label", pa.string()), ("start", pa.float64()), ("end", pa.float64())])
EMBEDDED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

EmbedOption = Annotated[
    bool, typer.Option("--embed-audio", help="Store the audio files' bytes, not their paths; WAV as FLAC.")
]

_FLAC_SUBTYPES = {"PCM_U8": "PCM_S8", "PCM_S8": "PCM_S8", "PCM_16": "PCM_16", "PCM_24": "PCM_24"}
_FLAC_CHANNELS = 8
_GROUP_ROWS = 1_000
_GROUP_ROWS_EMBEDDED = 100  # some 16 MB of 5 s clips: a reader holds one group in memory
_CHUNK_ROWS_EMBEDDED = 10


@dataclass(frozen=True)
class ParquetRows:
    """Rows rendered to objects of `schema`; `embedded` where they hold whole audio files."""

    schema: pa.Schema
    embedded: bool = False
    suffix: str = ".parquet"

    @property
    def chunk_rows(self) -> int:
        return _CHUNK_ROWS_EMBEDDED if self.embedded else CHUNK_ROWS

    def pack(self, items: list[dict[str, Any]]) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist(items, self.schema)

    def take(self, packed: pa.RecordBatch, kept: list[int]) -> pa.RecordBatch:
        return packed.take(pa.array(kept, pa.int64()))

    def write(self, chunks: Iterator[pa.RecordBatch], path: Path) -> None:
        """The bytes hang on the rows alone, not on the chunks that they came in."""
        group_rows = _GROUP_ROWS_EMBEDDED if self.embedded else _GROUP_ROWS
        compression = "none" if self.embedded else "zstd"  # encoded audio does not compress further
        with pq.ParquetWriter(path, self.schema, compression=compression) as writer:
            rows = pa.Table.from_batches([], self.schema)
            for packed in chunks:
                rows = pa.concat_tables([rows, pa.Table.from_batches([packed])])
                while rows.num_rows >= group_rows:
                    writer.write_table(rows.slice(0, group_rows))
                    rows = rows.slice(group_rows)
            if rows.num_rows:
                writer.write_table(rows)


def event_rows(record: AudioQA) -> list[dict[str, Any]]:
    """The events of a record as a list of EVENT; further keys of theirs stay in the manifest."""
    return [{"label": event.label, "start": event.start_seconds, "end": event.end_seconds} for event in record.events]


def embedded_audio(path: str, name: str) -> dict[str, Any]:
    """A file as a column holds it: its own bytes; for a WAV of whole numbers FLAC: the same samples, half the size.
    Raises RowError for a file that cannot be read, which nobody has noticed with --trust-durations."""
    try:
        data, suffix = _file_bytes(path)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, OSError) as error:
        raise RowError(Reason.AUDIO_UNREADABLE, f"{path}: {error}") from error
    return {"bytes": data, "path": name if suffix is None else str(Path(name).with_suffix(suffix))}


@lru_cache(1)  # the questions about a clip mostly follow each other
def _file_bytes(path: str) -> tuple[bytes, str | None]:
    info = soundfile.info(path)
    subtype = _FLAC_SUBTYPES.get(info.subtype) if info.format in ("WAV", "WAVEX") else None
    if subtype is None or info.channels > _FLAC_CHANNELS:
        return Path(path).read_bytes(), None
    frames, rate = soundfile.read(path, dtype="int32", always_2d=True)
    stream = io.BytesIO()
    soundfile.write(stream, frames, rate, format="FLAC", subtype=subtype)
    return stream.getvalue(), ".flac"
