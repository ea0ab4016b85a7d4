"""AudioQA manifest -> the Parquet that verl reads.

    python -m converters.rl_parquet IN.jsonl OUT.parquet --audio-root DIR [--embed-audio]

`audios` holds absolute paths, or with `--embed-audio` the files themselves (WAV as FLAC). There is no Hugging Face
metadata in the schema: with it `datasets` would decode every clip while loading.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import typer

from converters import conversion, shards
from converters.conversion import AudioRoot, Checked, Job, from_manifest
from converters.parquet import EMBEDDED, EVENT, EmbedOption, ParquetRows, embedded_audio, event_rows
from echo_plugins.audio_qa import AudioQA
from echo_plugins.model import QWEN2_5_OMNI, OmniFamily, family_of, hop_length
from echo_plugins.relisten.prompt import Mode, user_message

_HOP_LENGTH = 160  # samples a frame in the public checkpoints
AGENT_NAME = "relisten"  # the name under which for_verl registers the re-listening agent loop

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def schema(embed_audio: bool = False) -> pa.Schema:
    """The columns of an RL file."""
    return pa.schema(
        [
            ("data_source", pa.string()),
            ("prompt", pa.list_(_MESSAGE)),
            ("audios", pa.list_(EMBEDDED if embed_audio else pa.string())),
            ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("question", pa.string()),
                        ("choices", pa.list_(pa.string())),
                        ("events", pa.list_(EVENT)),
                        ("duration", pa.float64()),
                        ("index", pa.int64()),
                        ("num_audio_tokens", pa.int64()),
                        ("mode", pa.string()),
                    ]
                ),
            ),
            ("agent_name", pa.string()),
        ]
    )


def rl_row(
    checked: Checked[AudioQA],
    index: int,
    data_source: str,
    mode: Mode,
    count_audio_tokens: Callable[[int], int],
    embed_audio: bool = False,
) -> dict[str, Any]:
    """One verl row. The ground truth is the full text of the right choice; `index` is the row's place in the source."""
    record, audio = checked.record, checked.audio
    embedded = embedded_audio(audio.path, record.audio) if embed_audio else audio.path
    return {
        "data_source": data_source,
        "prompt": [user_message(record.question, record.choices, mode)],
        "audios": [embedded],
        "reward_model": {"style": "rule", "ground_truth": record.answer},
        "extra_info": {
            "id": record.id,
            "question": record.question,
            "choices": list(record.choices),
            "events": event_rows(record) or None,
            "duration": audio.duration_seconds,
            "index": index,
            "num_audio_tokens": count_audio_tokens(audio.num_samples),
            "mode": mode,
        },
        "agent_name": AGENT_NAME,
    }


app = conversion.new_command()


@app.command()
def main(
    source: conversion.ManifestArgument,
    target: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="Written whole or not at all.")],
    audio_root: conversion.AudioRootOption,
    embed_audio: EmbedOption = False,
    mode: Annotated[Mode, typer.Option(help="The instruction in the prompt; plain asks for no tags.")] = "interleaved",
    data_source: Annotated[
        str | None, typer.Option(help="Name that verl groups validation scores by.", show_default="IN's name")
    ] = None,
    model: conversion.ModelOption = None,
    rejected: conversion.RejectedOption = None,
    trust_durations: conversion.TrustOption = False,
    follow_links: conversion.LinksOption = False,
    shard_rows: shards.ShardRowsOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn an AudioQA manifest into RL rows for verl.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    family, hop = _audio_of(model)
    name = data_source or source.stem
    window = conversion.window_of(model)
    audio = AudioRoot(audio_root, trust_durations, max_seconds=window, follow_links=follow_links)
    count = partial(family.num_audio_tokens, hop_length=hop)
    render = partial(rl_row, data_source=name, mode=mode, count_audio_tokens=count, embed_audio=embed_audio)
    job = Job(audio, from_manifest, render, ParquetRows(schema(embed_audio), embed_audio))
    settings = {"format": "rl_parquet", "data_source": name, "mode": mode, "embed_audio": embed_audio}
    settings |= {"model_type": family.model_type, "hop_length": hop} | audio.settings
    shards.export(source, target, rejected, job, workers, shard_rows, settings)


def _audio_of(model: Path | None) -> tuple[OmniFamily, int]:
    """Family and hop length to count audio tokens with. Raises typer.BadParameter (exit status 2)."""
    if model is None:
        return QWEN2_5_OMNI, _HOP_LENGTH
    try:
        return family_of(model), hop_length(model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error


if __name__ == "__main__":
    app(prog_name="python -m converters.rl_parquet")
