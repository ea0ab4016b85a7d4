"""Say what kind of file this is and what is wrong with it, row by row.

    python -m converters.check FILE [--audio-root DIR]

Knows AudioQA manifests, labelled audio, SFT rows (ms-swift JSONL), RL rows (verl Parquet) and predictions (eval). Audio
is decoded: absolute paths always, relative ones under `--audio-root`. Of a folder of shards the manifest's sums are
checked; give a shard to look at its rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from converters import conversion, shards
from converters.conversion import AudioFile, AudioRoot, SeenIds
from converters.rl_parquet import schema
from converters.sft_jsonl import interleave
from converters.workers import in_chunks, ordered_map
from echo_plugins.audio import AudioError, parse_fragment, probe
from echo_plugins.audio_qa import AudioQA, LabelledAudio, Reason, RowError, check_tags, read_rows
from echo_plugins.relisten.prompt import AUDIO_TAG
from echo_plugins.relisten.segment import OPEN_TAG
from echo_plugins.relisten.transcript import parse


class Kind(StrEnum):
    """What a file holds."""

    AUDIO_QA = "AudioQA manifest"
    LABELLED = "labelled audio"
    SFT = "SFT rows (ms-swift)"
    RL = "RL rows (verl)"
    PREDICTION = "predictions"


# A kind, and the keys that tell it; the first that fits is taken.
_TELLING_KEYS = {
    Kind.SFT: ("messages",),
    Kind.PREDICTION: ("model_response", "stop_reason"),
    Kind.AUDIO_QA: ("question", "choices", "answer"),
    Kind.LABELLED: ("audio",),
}
_PREDICTION_KEYS = ("id", "model_response", "segments", "answer_prediction", "model_prediction", "stop_reason")
_CHUNK_ROWS = 100
_PARQUET_MAGIC = b"PAR1"

app = conversion.new_command()


@app.command()
def main(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, help="JSONL, JSON or Parquet; or a folder of shards.")
    ],
    audio_root: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder that relative audio paths start from.")
    ] = None,
    model: conversion.ModelOption = None,
    follow_links: conversion.LinksOption = False,
    limit: Annotated[int, typer.Option(min=0, help="Problems to print; all are counted.")] = 20,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Say what kind of file FILE is and what is wrong with it, row by row.

    Exit status: 0 nothing is wrong, 1 something is, 2 wrong usage.
    """
    if file.is_dir():
        _check_shards(file)
        return
    window = conversion.window_of(model)

    def files_under(root: Path) -> AudioRoot:
        return AudioRoot(root, max_seconds=window, follow_links=follow_links)

    try:
        with conversion.progress(file) as advance:
            kind, rows = _open(file, advance)
            judge = _JUDGES[kind](audio_root, files_under)
            problems: Counter[Reason] = Counter()
            shown: list[str] = []
            ids = SeenIds()
            read = 0
            chunks = ordered_map(
                lambda chunk: [_judged(judge, *numbered) for numbered in chunk],
                in_chunks(rows, _CHUNK_ROWS),
                workers,
            )
            for line, row_id, error in chain.from_iterable(chunks):
                read += 1
                if error is None and row_id is not None:
                    error = ids.add(row_id, line)
                if error is None:
                    continue
                problems[error.reason] += 1
                if len(shown) < limit:
                    shown.append(f"{file}:{line}: {row_id or '-'}: {error}")
    except (OSError, pa.ArrowException, RowError) as error:
        typer.echo(f"error: {file}: {error}", err=True)
        raise typer.Exit(1) from error
    for text in shown:
        typer.echo(text)
    typer.echo(f"{file}: {kind}, {read} rows, {problems.total()} with problems")
    for reason, count in problems.most_common():
        typer.echo(f"  {count:>8}  {reason}")
    if kind in (Kind.AUDIO_QA, Kind.LABELLED) and audio_root is None:
        typer.echo("  the audio was not opened: give --audio-root DIR")
    if problems or not read:
        raise typer.Exit(1)


def _check_shards(folder: Path) -> None:
    """The bytes and sums that the manifest states; exit status 1 when one is off."""
    try:
        manifest = shards.read_manifest(folder)
    except OSError as error:
        typer.echo(f"error: {error}; a folder of shards has a manifest once it is whole", err=True)
        raise typer.Exit(1) from error
    wrong = [problem for shard in manifest.shards if (problem := shards.problem_of(folder, shard))]
    for problem in wrong:
        typer.echo(f"{folder}: {problem}")
    typer.echo(f"{folder}: {len(manifest.shards)} shards, {manifest.rows} rows, {len(wrong)} with problems")
    if wrong:
        raise typer.Exit(1)


Judge = Callable[[Any], str | None]
"""Takes a row, returns its id. Raises RowError."""

Files = Callable[[Path], AudioRoot]
"""The files under a folder, judged by what the command was told of model and links."""


def _judged(judge: Judge, line: int, row: object) -> tuple[int, str | None, RowError | None]:
    row_id = row.get("id") if isinstance(row, dict) else None
    try:
        if isinstance(row, RowError):
            raise row
        if not isinstance(row, dict):
            raise RowError(Reason.NOT_AN_OBJECT, f"a row is a JSON object, this is a {type(row).__name__}")
        return line, judge(row), None
    except RowError as error:
        return line, row_id if isinstance(row_id, str) else None, error


def _open(file: Path, advance: Callable[[int], None]) -> tuple[Kind, Iterator[tuple[int, object]]]:
    with file.open("rb") as stream:
        if stream.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            return Kind.RL, _parquet_rows(file, advance)
    rows = read_rows(file, advance)
    # Whatever stands before the first readable row is judged with the kind that this row tells.
    head: list[tuple[int, object]] = []
    for numbered in rows:
        head.append(numbered)
        row = numbered[1]
        if isinstance(row, dict):
            kind = next((kind for kind, keys in _TELLING_KEYS.items() if any(key in row for key in keys)), None)
            if kind is None:
                known = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in _TELLING_KEYS.items())
                raise RowError(Reason.MISSING_FIELD, f"line {numbered[0]} has no key that tells a kind ({known})")
            return kind, chain(head, rows)
    raise RowError(Reason.NOT_JSON, f"no JSON object in its {len(head)} rows")


def _parquet_rows(file: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, object]]:
    parquet = pq.ParquetFile(file)
    columns = parquet.schema_arrow
    missing = set(schema().names).difference(columns.names)
    if missing:
        raise RowError(
            Reason.MISSING_FIELD,
            f"no file of converters.rl_parquet, the one kind of Parquet known here: it lacks {sorted(missing)}",
        )
    if b"huggingface" in (columns.metadata or {}):
        raise RowError(
            Reason.WRONG_TYPE, "it has Hugging Face metadata, which makes `datasets` decode all audio at once"
        )
    number = 0
    for batch in parquet.iter_batches(batch_size=100):
        advance(file.stat().st_size * batch.num_rows // max(1, parquet.metadata.num_rows))
        for row in batch.to_pylist():
            number += 1
            yield number, row


def _manifest_judge(record_type: type[AudioQA] | type[LabelledAudio], audio_root: Path | None, files: Files) -> Judge:
    audio = files(audio_root) if audio_root else None

    def judge(row: Any) -> str:
        record = record_type.from_json(row)
        if audio:
            audio.check(record)
        return record.id

    return judge


def _sft_judge(audio_root: Path | None, files_under: Files) -> Judge:
    audio = files_under(Path("/"))
    base = (audio_root or Path()).resolve()

    def judge(row: Any) -> None:
        messages, references = row.get("messages"), row.get("audios")
        if not _are_messages(messages) or [messages[0]["role"], messages[-1]["role"]] != ["user", "assistant"]:
            raise RowError(Reason.WRONG_TYPE, "'messages' goes from user to assistant, each {role, content}")
        if not isinstance(references, list) or not all(isinstance(reference, str) for reference in references):
            raise RowError(Reason.WRONG_TYPE, "'audios' is a list of paths")
        _count_placeholders("".join(message["content"] for message in messages), len(references))
        files = [audio.measure(str(base / parse_fragment(reference)[0])) for reference in references]
        response = messages[-1]["content"]
        transcript = parse(response)
        if not transcript.well_formed or not transcript.answer:
            raise RowError(Reason.MALFORMED_RESPONSE, "the response is not one <think> block, then one <answer> block")
        check_tags(response.replace(AUDIO_TAG, ""), files[0].duration_seconds if files else None)
        if AUDIO_TAG in response:
            _check_interleaved(response, references, files[0])

    return judge


def _check_interleaved(response: str, references: list[str], clip: AudioFile) -> None:
    """The same placeholders and crops as the rollout would insert for this text."""
    expected, fragments = interleave(response.replace(AUDIO_TAG, ""), clip)
    if response != expected:
        raise RowError(Reason.NOT_AS_ROLLOUT, f"{AUDIO_TAG} does not stand after each {OPEN_TAG} tag that resolves")
    bounds = [parse_fragment(reference)[1] for reference in references[-len(fragments) :]]
    if bounds != [parse_fragment(fragment)[1] for fragment in fragments]:
        raise RowError(Reason.NOT_AS_ROLLOUT, f"the crops {bounds} are not the tags' own: {fragments}")


def _rl_judge(audio_root: Path | None, files: Files) -> Judge:
    audio = files(Path("/"))
    base = (audio_root or Path()).resolve()

    def judge(row: Any) -> str:
        messages, references, extra = row["prompt"], row["audios"], row["extra_info"]
        if not _are_messages(messages) or not isinstance(references, list) or not isinstance(extra, dict):
            raise RowError(Reason.WRONG_TYPE, "'prompt' and 'audios' are lists, 'extra_info' is an object")
        _count_placeholders("".join(message["content"] for message in messages), len(references))
        truth, choices = (row["reward_model"] or {}).get("ground_truth"), extra.get("choices") or []
        if truth not in choices:
            raise RowError(Reason.ANSWER_NOT_A_CHOICE, f"ground truth {truth!r} is not among {choices!r}")
        if not row["agent_name"]:
            raise RowError(Reason.MISSING_FIELD, "'agent_name' is empty, so verl would not re-listen")
        for reference in references:
            if isinstance(reference, dict):
                seconds = _embedded_seconds(reference)
            else:
                seconds = audio.measure(str(base / reference)).duration_seconds
            if abs(seconds - (extra.get("duration") or 0)) > 0.001:
                detail = f"extra_info.duration says {extra.get('duration')} s, the audio has {seconds:.3f} s"
                raise RowError(Reason.BAD_DURATION, detail)
        return str(extra.get("id"))

    return judge


def _embedded_seconds(reference: dict[str, Any]) -> float:
    try:
        return probe(reference.get("bytes") or b"").duration_seconds
    except AudioError as error:
        raise RowError(Reason.AUDIO_UNREADABLE, f"{reference.get('path')}: {error}") from error


def _prediction_judge(audio_root: Path | None, files: Files) -> Judge:
    def judge(row: Any) -> str:
        missing = [key for key in _PREDICTION_KEYS if key not in row]
        if missing:
            raise RowError(Reason.MISSING_FIELD, f"{missing} are missing")
        return str(row["id"])

    return judge


_JUDGES: dict[Kind, Callable[[Path | None, Files], Judge]] = {
    Kind.AUDIO_QA: partial(_manifest_judge, AudioQA),
    Kind.LABELLED: partial(_manifest_judge, LabelledAudio),
    Kind.SFT: _sft_judge,
    Kind.RL: _rl_judge,
    Kind.PREDICTION: _prediction_judge,
}


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages)
        and all(isinstance(message.get("role"), str) for message in messages)
    )


def _count_placeholders(text: str, num_audios: int) -> None:
    if text.count(AUDIO_TAG) != num_audios:
        detail = f"{text.count(AUDIO_TAG)} {AUDIO_TAG} placeholders for {num_audios} audios"
        raise RowError(Reason.PLACEHOLDER_MISMATCH, detail)


if __name__ == "__main__":
    app(prog_name="python -m converters.check")
