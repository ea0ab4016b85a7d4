"""AudioQA manifest -> the Parquet that verl reads.

    python -m converters.rl_parquet IN.jsonl OUT.parquet --audio-root DIR [--embed-audio]

`audios` holds absolute paths, or with `--embed-audio` the files' own bytes. There is no Hugging Face metadata in the
schema: with it `datasets` would decode every clip while loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from converters import conversion
from converters.conversion import AudioRoot, Checked, Conversion, from_manifest
from echo_plugins.model import QWEN2_5_OMNI, family_of, hop_length
from echo_plugins.relisten.prompt import Mode, user_message

AGENT_NAME = "relisten"  # the name under which for_verl registers the re-listening agent loop
_GROUP_ROWS = 1_000
_GROUP_ROWS_EMBEDDED = 100  # some 16 MB of 5 s clips: a reader holds one group in memory

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
_EVENT = pa.struct([("label", pa.string()), ("start", pa.float64()), ("end", pa.float64())])
_EMBEDDED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def schema(embed_audio: bool = False) -> pa.Schema:
    """The columns of an RL file."""
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(_MESSAGE)),
            ("audios", pa.list_(_EMBEDDED if embed_audio else pa.string())),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("question", pa.string()),
                        ("choices", pa.list_(pa.string())),
                        ("events", pa.list_(_EVENT)),
                        ("duration", pa.float64()),
                        ("index", pa.int64()),
                        ("num_audio_tokens", pa.int64()),
                    ]
                ),
            ),
            ("agent_name", pa.string()),
        ]
    )


def rl_row(
    checked: Checked,
    index: int,
    data_source: str,
    mode: Mode,
    count_audio_tokens: Callable[[int], int],
    embed_audio: bool = False,
) -> dict[str, Any]:
    """One verl row. The ground truth is the full text of the right choice."""
    record, audio = checked.record, checked.audio
    embedded = {"bytes": Path(audio.path).read_bytes(), "path": record.audio} if embed_audio else audio.path
    return {
        "data_source": data_source,
        "prompt": [user_message(record.question, record.choices, mode)],
        "audios": [embedded],
        "reward_model": {"style": "rule", "ground_truth": record.answer},
        "extra_info": {
            "id": record.id,
            "question": record.question,
            "choices": list(record.choices),
            "events": [
                {"label": event.label, "start": event.start_seconds, "end": event.end_seconds}
                for event in record.events
            ],
            "duration": audio.duration_seconds,
            "index": index,
            "num_audio_tokens": count_audio_tokens(audio.num_samples),
        },
        "agent_name": AGENT_NAME,
    }


def write_parquet(rows: Iterator[dict[str, Any]], path: Path, embed_audio: bool) -> None:
    """Row group by row group, so that memory does not grow with the file."""
    columns = schema(embed_audio)
    group_rows = _GROUP_ROWS_EMBEDDED if embed_audio else _GROUP_ROWS
    compression = "none" if embed_audio else "zstd"  # encoded audio does not compress further
    with pq.ParquetWriter(path, columns, compression=compression) as writer:
        while group := list(islice(rows, group_rows)):
            writer.write_batch(pa.RecordBatch.from_pylist(group, columns))


app = conversion.new_command()


@app.command()
def main(
    source: conversion.ManifestArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet", dir_okay=False, help="Written whole or not at all.")],
    audio_root: conversion.AudioRootOption,
    embed_audio: Annotated[
        bool, typer.Option("--embed-audio", help="Store the audio files' bytes, not their paths.")
    ] = False,
    mode: Annotated[Mode, typer.Option(help="The instruction in the prompt; plain asks for no tags.")] = "interleaved",
    data_source: Annotated[
        str | None, typer.Option(help="Name that verl groups validation scores by.", show_default="IN's name")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Checkpoint to count audio tokens for.", show_default="Qwen2.5-Omni"
        ),
    ] = None,
    rejected: conversion.RejectedOption = None,
    trust_durations: conversion.TrustOption = False,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn an AudioQA manifest into RL rows for verl.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    name = data_source or source.stem
    count = _token_counter(model)

    def write(rows: Conversion, path: Path) -> None:
        rendered = rows.rows(lambda checked, index: rl_row(checked, index, name, mode, count, embed_audio))
        write_parquet(rendered, path, embed_audio)

    audio = AudioRoot(audio_root, trust_durations)
    conversion.convert(source, target, rejected, audio, from_manifest, write, workers)


def _token_counter(model: Path | None) -> Callable[[int], int]:
    if model is None:
        return QWEN2_5_OMNI.num_audio_tokens
    try:
        family, hop = family_of(model), hop_length(model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    return lambda num_samples: family.num_audio_tokens(num_samples, hop)


if __name__ == "__main__":
    app(prog_name="python -m converters.rl_parquet")
