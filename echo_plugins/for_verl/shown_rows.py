"""Some rows of a validation in the trackers that can play sound: tensorboard and wandb."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from ..audio import SAMPLING_RATE, AudioError, load

_log = logging.getLogger(__name__)


def show_rows(loggers: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], step: int) -> None:
    """Send rows of the validation log (trainer.py, trajectory_row) to verl's `loggers`, by their names there: question,
    response, verdict, and the sound."""
    writer, wandb = getattr(loggers.get("tensorboard"), "writer", None), loggers.get("wandb")
    if writer is None and wandb is None:
        return
    table = []
    for row in rows:
        text = as_text(row)
        sound = None
        if row["audio"]:
            try:
                sound = load(row["audio"])
            except AudioError as error:
                text += f"\n\n{error}"
        if writer is not None:
            writer.add_text(f"validation/{row['id']}", text, step)
            if sound is not None:
                writer.add_audio(f"validation/{row['id']}", sound, step, SAMPLING_RATE)
        if wandb is not None:
            played = None if sound is None else wandb.Audio(sound, sample_rate=SAMPLING_RATE)
            table.append([row["id"], played, row["question"], row["text"], row["ground_truth"], row["score"]])
    if wandb is not None and table:
        columns = ["id", "audio", "question", "response", "answer", "score"]
        wandb.log({"validation/rows": wandb.Table(columns, table)}, step=step)


def as_text(row: Mapping[str, Any]) -> str:
    """A row as Markdown. The response is a block of code, or its tags would be taken for HTML."""
    right = "right" if row["components"].get("acc") else "wrong"
    verdict = f"{right}, the answer is {row['ground_truth']}; score {row['score']:.3f}"
    return f"{row['question']}\n\n```\n{row['text']}\n```\n\n{verdict}"
