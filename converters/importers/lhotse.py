"""lhotse cuts (JSONL, also gzipped) -> labelled audio, a record a cut, its supervisions as events.

    python -m converters.importers.lhotse cuts.jsonl.gz OUT.jsonl --audio-root DIR

Only whole recordings of one file can be taken: write others out first (`cuts.save_audios`). lhotse is not needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from converters import conversion
from converters.conversion import AudioRoot
from converters.importers.mapping import added, look_up, relative_audio, seconds
from echo_plugins.audio_qa import END_TOLERANCE_SECONDS, LabelledAudio, Reason, Record, RowError

app = conversion.new_command()


@app.command()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="IN", exists=True, dir_okay=False, help="A CutSet, .jsonl or .jsonl.gz.")
    ],
    target: conversion.RecordsArgument,
    audio_root: conversion.AudioRootOption,
    follow_links: conversion.LinksOption = False,
    rejected: conversion.RejectedOption = None,
    workers: conversion.WorkersOption = conversion.DEFAULT_WORKERS,
) -> None:
    """Turn lhotse cuts into a manifest of labelled audio.

    Rows that cannot be used go to the side file with line and reason. Exit status: 0 done, 1 failed, 2 wrong usage.
    """
    audio = AudioRoot(audio_root, cut_ends_seconds=END_TOLERANCE_SECONDS, follow_links=follow_links)

    def to_record(line: int, cut: object) -> Record:
        return record_of_cut(cut, audio.root)

    conversion.import_records(source, target, rejected, audio, to_record, workers)


def record_of_cut(cut: object, root: Path) -> Record:
    """A MonoCut or MultiCut that is a whole recording. Raises RowError."""
    sources = look_up(cut, "recording.sources")
    if not isinstance(cut, dict) or not isinstance(sources, list):
        raise RowError(Reason.MISSING_FIELD, "no cut with a recording; of a mixed cut, the mix has to be saved first")
    if len(sources) != 1 or look_up(sources[0], "type") != "file":
        raise RowError(Reason.NOT_WHOLE, f"the recording has {len(sources)} sources, one file is needed")
    if transforms := look_up(cut, "recording.transforms"):
        detail = f"the recording is changed when it is read ({str(transforms)[:80]}): write the cuts out (save_audios)"
        raise RowError(Reason.NOT_WHOLE, detail)
    start, whole = seconds(cut.get("start"), "start"), seconds(look_up(cut, "recording.duration"), "duration")
    duration = seconds(cut.get("duration"), "duration")
    if start or abs(duration - whole) > END_TOLERANCE_SECONDS:
        detail = f"{duration:g} s from {start:g} s of a recording of {whole:g} s: write the cuts out (save_audios)"
        raise RowError(Reason.NOT_WHOLE, detail)
    supervisions, custom = cut.get("supervisions") or [], cut.get("custom") or {}
    if not isinstance(supervisions, list) or not isinstance(custom, dict):
        raise RowError(Reason.WRONG_TYPE, "'supervisions' is a list, 'custom' an object")
    row = {
        "id": cut.get("id"),
        "audio": relative_audio(str(look_up(sources[0], "source")), root),
        "duration": duration,
        "events": [_event(supervision) for supervision in supervisions],
        "meta": {"recording": look_up(cut, "recording.id"), "domain": "speech", **custom},
    }
    texts = [str(supervision["text"]) for supervision in supervisions if supervision.get("text")]
    if texts:
        row["meta"]["transcript"] = " ".join(texts)
    return LabelledAudio.from_json(row)


def _event(supervision: Any) -> dict[str, Any]:
    if not isinstance(supervision, dict):
        raise RowError(Reason.BAD_EVENT, f"a supervision is an object, this is {str(supervision)[:80]}")
    start = seconds(supervision.get("start"), "start")
    end = added(start, seconds(supervision.get("duration"), "duration"))
    known = {name: supervision[name] for name in ("text", "speaker", "language", "gender") if supervision.get(name)}
    label = supervision.get("speaker") or "speech"
    return {"label": label, "start": start, "end": end, "kind": "speech"} | known


if __name__ == "__main__":
    app(prog_name="python -m converters.importers.lhotse")
