"""The record that passes through the stages: a clip, then a question about it, then what was found out about that.

A row that is dropped stays in the files with its reason, so that what went in can be found in what came out.
"""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import BaseModel, ConfigDict

from echo_plugins.audio_qa import AudioQA


class Provenance(BaseModel):
    """One request that a row is made of. `prompt` is NAME@VERSION; `attempts` are the client's, mostly unpaid."""

    model_config = ConfigDict(frozen=True)

    stage: str
    model: str
    prompt: str
    seed: int
    time: str
    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    attempts: int
    status: str


class Drop(BaseModel):
    """Where and why a row left."""

    model_config = ConfigDict(frozen=True)

    stage: str
    reason: str
    detail: str


class Sample(BaseModel):
    """`think_lost` says why a chain of thought was taken away: the row can then only go to RL. `drafted_place`: where
    the model had put the answer among the choices, before they were shuffled. `sound_print`: see soundprint.py.
    `compared_by`: by what the clip could be compared with the benchmarks; None where there are none."""

    id: str
    clip: str
    audio: str
    audio_sha256: str
    recording: str
    duration: float
    domain: str
    sound_print: str = ""
    compared_by: list[str] | None = None
    events: list[dict[str, Any]] = []
    meta: dict[str, Any] = {}
    caption: dict[str, str] = {}
    level: str | None = None
    question: str | None = None
    choices: list[str] = []
    answer: str | None = None
    drafted_place: int | None = None
    skill: str | None = None
    think: str | None = None
    think_lost: Drop | None = None
    silence_accuracy: float | None = None
    pass_rate: float | None = None
    provenance: list[Provenance] = []
    dropped: Drop | None = None

    def drop(self, stage: str, reason: str, detail: str) -> Sample:
        return self.model_copy(update={"dropped": Drop(stage=stage, reason=reason, detail=detail)})

    def without_think(self, stage: str, reason: str, detail: str) -> Sample:
        return self.model_copy(update={"think": None, "think_lost": Drop(stage=stage, reason=reason, detail=detail)})

    def to_record(self) -> AudioQA:
        """The row as AudioQA. Raises RowError for what no exporter would take."""
        meta = {key: value for key, value in self.meta.items() if key not in _LARGE_META}
        made = {
            "clip": self.clip,
            "recording": self.recording,
            "domain": self.domain,
            "level": self.level,
            "skill": self.skill,
            "silence_accuracy": self.silence_accuracy,
            "pass_rate": self.pass_rate,
            "provenance": [step.model_dump() for step in self.provenance],
        }
        row = {
            "id": self.id,
            "audio": self.audio,
            "question": self.question,
            "choices": self.choices,
            "answer": self.answer,
            "think": self.think,
            "events": self.events,
            "duration": self.duration,
            "meta": meta | {key: value for key, value in made.items() if value is not None},
        }
        return AudioQA.from_json(row)


_LARGE_META = {"beats", "question", "choices", "answer", "think"}  # of a source row; the new row has its own


def seed_of(*parts: object) -> int:
    """A seed of 31 bits from anything that has a text; the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
