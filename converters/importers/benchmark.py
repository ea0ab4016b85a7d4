"""Benchmark files in their official layouts (MMAR, MMAU) -> AudioQA, every other key kept under `meta`.

    python -m converters.importers.benchmark MMAR-meta.jsonl OUT.jsonl --audio-root MMAR

For training-style use of a benchmark, such as looking at its rows. To score a model, give the official file to
`python -m eval.infer --benchmark`: it keeps the few rows that are no sound AudioQA (repeated or empty choices).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from converters import conversion
from converters.conversion import AudioRoot
from converters.importers.answers import AnswerForm
from converters.importers.mapping import Mapper, Preset
from echo_plugins.audio_qa import Reason, Record, RowError


class Layout(StrEnum):
    """Whose file it is."""

    AUTO = "auto"
    MMAR = "mmar"
    MMAU = "mmau"


_AUDIO_KEYS = {Layout.MMAR: "audio_path", Layout.MMAU: "audio_id"}

app = conversion.new_command()


@app.command()
def main(
    source: conversion.ImportedArgument,
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    benchmark: Annotated[Layout, typer.Option(help="Whose layout; auto tells by the key of the audio.")] = Layout.AUTO,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn an official MMAR or MMAU file into an AudioQA manifest.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    audio = AudioRoot(audio_root, follow_links=follow_links)

    def to_record(line: int, row: object) -> Record:
        layout = benchmark if benchmark is not Layout.AUTO else layout_of(row)
        preset = Preset(fields={"audio": _AUDIO_KEYS[layout]}, answer=AnswerForm.TEXT)
        return Mapper(preset, audio, source.stem).record(line, row)

    conversion.import_records(source, target, rejected, audio, to_record, workers)


def layout_of(row: object) -> Layout:
    """The layout whose audio key the row has. Raises RowError."""
    for layout, key in _AUDIO_KEYS.items():
        if isinstance(row, dict) and key in row:
            return layout
    raise RowError(Reason.MISSING_FIELD, f"the row has neither of {sorted(_AUDIO_KEYS.values())}")


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.benchmark")
