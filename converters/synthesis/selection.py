"""The last stage: what concerns the set, then the files.

    RUN/sft.jsonl   RUN/rl.jsonl   RUN/validation.jsonl    AudioQA, for converters.sft_jsonl and converters.rl_parquet
    RUN/dropped.jsonl                                      every row that is in none of them: stage, reason, detail
    RUN/summary.json   RUN/report.html

Rows are streamed: what grows with the set is a few hashes a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import orjson

from converters.atomic import StagedFile
from converters.holdout import held_recordings
from converters.synthesis.filters import Duplicates
from converters.synthesis.report import write_report
from converters.synthesis.runner import Context, Stage
from converters.synthesis.sample import Sample
from converters.synthesis.summary import SELECT_NAME, Shape, summarise, write_summary
from echo_plugins.audio_qa import RowError

FILES = ("sft", "rl", "validation")


def select(samples: Iterator[Sample], context: Context) -> None:
    """Drop duplicates, set recordings aside, write the rows and what is known about them."""
    config, folder = context.config, context.folder
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        names = (*FILES, "dropped", "kept")
        staged = {name: stack.enter_context(StagedFile(folder / f"{name}.jsonl")) for name in names}
        dropped: Counter[str] = Counter()
        recordings: Counter[str | None] = Counter()
        with staged["kept"].path.open("wb") as kept, staged["dropped"].path.open("wb") as out:
            for sample in _judged(samples, context):
                if sample.dropped is None:
                    recordings[sample.recording] += 1
                    kept.write(sample.model_dump_json(exclude_defaults=True).encode() + b"\n")
                    continue
                if sample.dropped.stage == SELECT_NAME:
                    dropped[sample.dropped.reason] += 1
                row = {"id": sample.id, "audio": sample.audio, **sample.dropped.model_dump()}
                out.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        held = held_recordings(recordings, config.validation_rows) if config.validation_rows else set()
        written: Counter[str] = Counter()
        shape = Shape(context.limits.num_choices)
        with ExitStack() as files:
            outs = {name: files.enter_context(staged[name].path.open("wb")) for name in FILES}
            for sample in _read(staged["kept"].path):
                name = "validation" if sample.recording in held else "sft" if sample.think else "rl"
                row = sample.to_record().to_json()
                outs[name].write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
                written[name] += 1
                shape.add(sample)
        for name in (*FILES, "dropped"):
            staged[name].commit()
    summary = summarise(folder, dict(dropped), {name: written[name] for name in FILES}, shape, context.limits)
    write_summary(summary, folder / "summary.json")
    write_report(summary, folder, config, folder / "report.html")


def _read(file: Path) -> Iterator[Sample]:
    with file.open("rb") as lines:
        for line in lines:
            yield Sample.model_validate_json(line)


def _judged(samples: Iterator[Sample], context: Context) -> Iterator[Sample]:
    limits = context.limits
    duplicates = Duplicates(limits.near_duplicate)
    of_recording: Counter[str] = Counter()
    for sample in samples:
        if sample.dropped is None:
            sample = _judge(sample, duplicates)
        if sample.dropped is None:
            of_recording[sample.recording] += 1
            if 0 < limits.max_per_recording < of_recording[sample.recording]:
                detail = f"{limits.max_per_recording} rows of {sample.recording} are there already"
                sample = sample.drop(SELECT_NAME, "max_per_recording", detail)
        yield sample


def _judge(sample: Sample, duplicates: Duplicates) -> Sample:
    try:
        sample.to_record()
    except RowError as error:
        return sample.drop(SELECT_NAME, str(error.reason), error.detail)
    if (twin := duplicates.find(sample)) is not None:
        return sample.drop(SELECT_NAME, twin[0], f"of {twin[1]}")
    return sample


SELECT = Stage(SELECT_NAME, whole=select, settings=("filters", "validation_rows", "report_rows"))
