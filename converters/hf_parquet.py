"""AudioQA manifest -> Parquet that Hugging Face `datasets` loads with an Audio column, to share or to look at.

    python -m converters.hf_parquet IN.jsonl OUT.parquet --audio-root DIR [--embed-audio]
    datasets.load_dataset("parquet", data_files="OUT.parquet")

For training use `converters.rl_parquet`: verl must not decode every clip while it loads. `meta` is JSON as text, since
its keys differ from row to row.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import orjson
import pyarrow as pa
import typer

from converters import conversion, shards
from converters.conversion import AudioRoot, Checked, Job, from_manifest
from converters.parquet import EMBEDDED, EVENT, EmbedOption, ParquetRows, embedded_audio, event_rows
from echo_plugins.audio_qa import AudioQA

_COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "id": (pa.string(), "string"),
    "audio": (EMBEDDED, {"_type": "Audio"}),
    "question": (pa.string(), "string"),
    "choices": (pa.list_(pa.string()), ["string"]),
    "answer": (pa.string(), "string"),
    "think": (pa.string(), "string"),
    "events": (pa.list_(EVENT), [{"label": "string", "start": "float64", "end": "float64"}]),
    "duration": (pa.float64(), "float64"),
    "meta": (pa.string(), "string"),
}


def schema() -> pa.Schema:
    """The columns, and the features of them as `datasets` 4 reads them from the metadata of a file."""
    info = {"info": {"features": {name: _feature(kind) for name, (_, kind) in _COLUMNS.items()}}}
    columns = [(name, column) for name, (column, _) in _COLUMNS.items()]
    return pa.schema(columns, metadata={"huggingface": orjson.dumps(info).decode()})


def _feature(kind: Any) -> dict[str, Any]:
    if isinstance(kind, str):
        return {"dtype": kind, "_type": "Value"}
    if isinstance(kind, list):
        return {"feature": _feature(kind[0]), "_type": "List"}
    return kind if "_type" in kind else {name: _feature(inner) for name, inner in kind.items()}


def hf_row(checked: Checked[AudioQA], index: int, embed_audio: bool) -> dict[str, Any]:
    """One row of `schema`."""
    record, audio = checked.record, checked.audio
    return {
        "id": record.id,
        "audio": embedded_audio(audio.path, record.audio) if embed_audio else {"bytes": None, "path": audio.path},
        "question": record.question,
        "choices": list(record.choices),
        "answer": record.answer,
        "think": record.think,
        "events": event_rows(record),
        "duration": audio.duration_seconds,
        "meta": orjson.dumps(record.meta).decode(),
    }


app = conversion.new_command()


@app.command()
def main(
    source: conversion.ManifestArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="Written whole or not at all.")],
    audio_root: conversion.AudioRootOption,
    embed_audio: EmbedOption = False,
    rejected: conversion.RejectedOption = None,
    trust_durations: conversion.TrustOption = False,
    follow_links: conversion.LinksOption = False,
    shard_rows: shards.ShardRowsOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn an AudioQA manifest into Parquet with an Audio column for Hugging Face datasets.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    audio = AudioRoot(audio_root, trust_durations, follow_links=follow_links)
    render = partial(hf_row, embed_audio=embed_audio)
    job = Job(audio, from_manifest, render, ParquetRows(schema(), embed_audio))
    settings = {"format": "hf_parquet", "embed_audio": embed_audio} | audio.settings
    shards.export(source, target, rejected, job, workers, shard_rows, settings)


if __name__ == "__main__":
    app(prog_name="python -m converters.hf_parquet")
