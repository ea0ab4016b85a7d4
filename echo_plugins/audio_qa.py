"""AudioQA: the one record in the middle. Every importer writes it, every exporter reads it, and this module judges it.

    {"id", "audio", "question", "choices": [..], "answer",
     "think"?, "events"?: [{"label", "start", "end"}], "duration"?, "meta"?}

Labelled audio is the same without a question: what importers make of sets that have labels only, and what
`converters.synthesis` asks questions about.

    {"id", "audio", "events"?: [{"label", "start", "end"}], "duration"?, "meta"?}

`audio` is a path relative to the audio root. Times are seconds. Unknown keys are kept under `meta`, those of an event
with the event. A row that cannot be used raises `RowError` with a `Reason`; nothing is repaired by guessing.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import orjson

from echo_plugins.relisten.prompt import contains_reserved
from echo_plugins.relisten.segment import CLOSE_TAG, MAX_SEGMENTS, OPEN_TAG, Refusal, find_tags, resolve

MIN_CHOICES = 2
MAX_CHOICES = 26  # the prompt letters them A to Z
END_TOLERANCE_SECONDS = 0.05  # labels and tags are rounded: an END may pass the clip by this

# Our own grammar inside a data set's text would open or close blocks that the writer never meant.
_GRAMMAR = ("<think>", "</think>", "<answer>", "</answer>")


# Characters that nobody sees: NUL, the controls that turn the direction of a text round, blanks without a width. A text
# that holds one looks like another. The joiners U+200C and U+200D are letters' business in many scripts.
_HIDDEN = re.compile("[\x00\u200b\u202a-\u202e\u2066-\u2069\ufeff]")
# A choice that carries its own letter: "(A) a car", "A. a car", "A) a car", "A: a car". "A minor" does not.
_LETTERED = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s+(\S.*)", re.DOTALL)


# A row's tags are asked for up to three times while it is in hand; finding them is the dearest step of a conversion.
tags_of = lru_cache(1_024)(find_tags)


class Reason(StrEnum):
    """Why a row cannot be used."""

    NOT_JSON = "not_json"
    NOT_A_TABLE = "not_a_table"
    NOT_A_TEXTGRID = "not_a_textgrid"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    DUPLICATE_ID = "duplicate_id"
    EMPTY_TEXT = "empty_text"
    RESERVED_TEXT = "reserved_text"
    HIDDEN_CHARACTER = "hidden_character"
    WRONG_NUMBER_OF_CHOICES = "wrong_number_of_choices"
    DUPLICATE_CHOICE = "duplicate_choice"
    ANSWER_NOT_A_CHOICE = "answer_not_a_choice"
    AMBIGUOUS_ANSWER = "ambiguous_answer"
    BAD_DURATION = "bad_duration"
    BAD_EVENT = "bad_event"
    MALFORMED_TAG = "malformed_tag"
    SEGMENT_OUTSIDE_AUDIO = "segment_outside_audio"
    SEGMENT_TOO_SHORT = "segment_too_short"
    TOO_MANY_TAGS = "too_many_tags"
    AUDIO_OUTSIDE_ROOT = "audio_outside_root"
    AUDIO_MISSING = "audio_missing"
    AUDIO_UNREADABLE = "audio_unreadable"
    AUDIO_TOO_LONG = "audio_too_long"
    AUDIO_TOO_SHORT = "audio_too_short"
    LEFT_OUT = "left_out"
    NOT_WHOLE = "not_a_whole_recording"
    INCOMPLETE_LABELS = "incomplete_labels"
    NO_THINK = "no_think"
    # What `converters.check` finds in exported files.
    PLACEHOLDER_MISMATCH = "placeholder_mismatch"
    MALFORMED_RESPONSE = "malformed_response"
    NOT_AS_ROLLOUT = "not_as_rollout"


class RowError(ValueError):
    """One row that cannot be used: the typed reason, and what was seen."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[RowError], tuple[Reason, str]]:
        return RowError, (self.reason, self.detail)  # it crosses between processes


@dataclass(frozen=True, slots=True)
class Event:
    """A labelled stretch of the clip."""

    label: str
    start_seconds: float
    end_seconds: float
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "start": self.start_seconds, "end": self.end_seconds, **self.meta}


@dataclass(frozen=True, slots=True)
class AudioQA:
    """A question about one clip, its choices, the right one, and where there is one a chain of thought with tags."""

    id: str
    audio: str
    question: str
    choices: tuple[str, ...]
    answer: str
    think: str | None = None
    events: tuple[Event, ...] = ()
    duration_seconds: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: object) -> AudioQA:
        """Judge all that can be judged without the audio. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(Reason.NOT_AN_OBJECT, f"a row is a JSON object, this is {_shown(row)}")
        duration = _duration(row.get("duration"))
        choices, answer = without_letters(_choices(row), _text(row, "answer"))
        if answer not in choices:
            raise RowError(Reason.ANSWER_NOT_A_CHOICE, f"answer {_shown(answer)} is not among {_shown(choices)}")
        think = None if row.get("think") is None else _text(row, "think")
        if think is not None:
            check_tags(think, duration)
        return cls(
            id=_id(row),
            audio=_audio(row),
            question=_text(row, "question", tags_allowed=False),
            choices=choices,
            answer=answer,
            think=think,
            events=_events(row.get("events"), duration),
            duration_seconds=duration,
            meta=_meta(row, _FIELD_SET),
        )

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a manifest; optional fields only where they are set."""
        row: dict[str, Any] = {
            "id": self.id,
            "audio": self.audio,
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.answer,
        }
        if self.think is not None:
            row["think"] = self.think
        return row | _optional(self)


@dataclass(frozen=True, slots=True)
class LabelledAudio:
    """One clip and what is known about it: timed events, and under `meta` what is said of the whole clip."""

    id: str
    audio: str
    events: tuple[Event, ...] = ()
    duration_seconds: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: object) -> LabelledAudio:
        """Judge all that can be judged without the audio. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(Reason.NOT_AN_OBJECT, f"a row is a JSON object, this is {_shown(row)}")
        duration = _duration(row.get("duration"))
        events = _events(row.get("events"), duration)
        return cls(_id(row), _audio(row), events, duration, _meta(row, _LABELLED_FIELD_SET))

    def to_json(self) -> dict[str, Any]:
        """The row as it stands in a manifest; optional fields only where they are set."""
        return {"id": self.id, "audio": self.audio, **_optional(self)}


Record = AudioQA | LabelledAudio


def _optional(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if record.events:
        row["events"] = [event.to_json() for event in record.events]
    if record.duration_seconds is not None:
        row["duration"] = record.duration_seconds
    if record.meta:
        row["meta"] = record.meta
    return row


AnyRecord = TypeVar("AnyRecord", bound=Record)


def recording_of(record: Record) -> str:
    """What splits keep together: the source recording where the set names one, else the audio file."""
    return str(record.meta.get("recording") or record.audio)


LABELLED_FIELDS = ("id", "audio", "events", "duration", "meta")
FIELDS = ("id", "audio", "question", "choices", "answer", "think", "events", "duration", "meta")
_FIELD_SET, _LABELLED_FIELD_SET = frozenset(FIELDS), frozenset(LABELLED_FIELDS)
_EVENT_FIELDS = ("label", "start", "end")


def check_times(record: Record, duration_seconds: float) -> None:
    """Events, tags and the stated duration against the decoded clip. Raises RowError."""
    stated = record.duration_seconds
    if stated is not None and abs(stated - duration_seconds) > END_TOLERANCE_SECONDS:
        raise RowError(Reason.BAD_DURATION, f"duration says {stated:g} s, the file decodes to {duration_seconds:g} s")
    for event in record.events:
        _check_event_end(event, duration_seconds)
    if isinstance(record, AudioQA) and record.think is not None:
        check_tags(record.think, duration_seconds)


def cut_ends(record: AnyRecord, duration_seconds: float, tolerance_seconds: float) -> AnyRecord:
    """The record with its events in order, and ends that pass the clip by no more than the tolerance cut to it."""
    events = [
        replace(event, end_seconds=duration_seconds)
        if duration_seconds < event.end_seconds <= duration_seconds + tolerance_seconds
        and event.start_seconds < duration_seconds
        else event
        for event in record.events
    ]
    ordered = sorted(events, key=lambda event: (event.start_seconds, event.end_seconds))
    return replace(record, events=tuple(ordered)) if ordered else record


def check_tags(text: str, duration_seconds: float | None) -> None:
    """Every tag of a training text must be one that a clip follows: well formed, inside the clip, not too short, and at
    most MAX_SEGMENTS of them. A tag without a clip would teach to name segments and hear nothing. Raises RowError.

    Without a duration the grammar, the length and the number are judged.
    """
    tags = tags_of(text)
    if len(tags) > MAX_SEGMENTS:
        raise RowError(Reason.TOO_MANY_TAGS, f"{len(tags)} tags, and a clip follows the first {MAX_SEGMENTS} only")
    for tag in tags:
        if isinstance(tag.meaning, Refusal):
            raise RowError(Reason.MALFORMED_TAG, f"{tag.meaning} tag {_shown(text[tag.start : tag.end])}")
        if resolve(tag.meaning, math.inf if duration_seconds is None else duration_seconds) is Refusal.TOO_SHORT:
            raise RowError(Reason.SEGMENT_TOO_SHORT, f"no clip follows {text[tag.start : tag.end]}: it is too short")
        if duration_seconds is not None and (
            tag.meaning.start_seconds >= duration_seconds
            or tag.meaning.end_seconds > duration_seconds + END_TOLERANCE_SECONDS
        ):
            detail = f"{text[tag.start : tag.end]} in a clip of {duration_seconds:g} s"
            raise RowError(Reason.SEGMENT_OUTSIDE_AUDIO, detail)
    if text.count(OPEN_TAG) > len(tags):
        raise RowError(Reason.MALFORMED_TAG, f"{OPEN_TAG} without its {CLOSE_TAG}")


_NOT_TEXT = {
    b"\xff\xfe": "UTF-16: iconv -f UTF-16 -t UTF-8 IN > OUT",
    b"\xfe\xff": "UTF-16: iconv -f UTF-16 -t UTF-8 IN > OUT",
    b"\x1f\x8b": "gzipped: gunzip it first",
}

Raw = bytes | str | RowError
"""A row as it stands in a file, unparsed; a RowError where the file itself is broken."""


def read_rows(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, object]]:
    """(line, value) of every row of a JSONL file, or of a JSON file that holds one list.

    `value` is a RowError where the line is no JSON. `advance` is told the bytes consumed.
    """
    return ((line, parse_row(raw)) for line, raw in read_raw(path, advance))


def read_raw(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Raw]]:
    """As `read_rows`, for `parse_row`. JSONL is streamed; a JSON list is read into memory as text."""
    with path.open("rb") as stream:
        # A look ahead, not a seek: the source may be a pipe.
        for magic, what in _NOT_TEXT.items():
            if stream.peek().startswith(magic):
                yield 1, RowError(Reason.NOT_JSON, f"{path.name} is {what}")
                return
        if stream.peek().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_list(stream.read(), advance)
            return
        for number, line in enumerate(stream, start=1):
            advance(len(line))
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.isspace() and line:
                yield number, line


def _read_list(raw: bytes, advance: Callable[[int], None]) -> Iterator[tuple[int, Raw]]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield 1, RowError(Reason.NOT_JSON, f"not UTF-8: {error}")
        return
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            return
        try:
            # The standard library finds where the element ends; orjson judges it as it judges a line of JSONL.
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, RowError(Reason.NOT_JSON, f"{error}; the rest of the list is not read")
            return
        yield line, text[position:end]
        advance(end - counted)
        position = _skip_blanks(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            yield line, RowError(Reason.NOT_JSON, "expected , or ] here; the rest of the list is not read")
            return


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def parse_row(raw: Raw) -> object:
    """The JSON value of a row, or the RowError that says why it has none."""
    if isinstance(raw, RowError):
        return raw
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return RowError(Reason.NOT_JSON, str(error))


def _shown(value: object, limit: int = 80) -> str:
    """`value` for a message: a row can hold megabytes."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _required(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise RowError(Reason.MISSING_FIELD, f"{name!r} is missing; the row has {_shown(sorted(row))}")
    return value


def _text(row: Mapping[str, Any], name: str, tags_allowed: bool = True) -> str:
    value = _required(row, name)
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"{name!r} is text, this is {_shown(value)}")
    return _checked(value, name, tags_allowed)


def _checked(value: str, name: str, tags_allowed: bool) -> str:
    text = value.strip()
    if not text:
        raise RowError(Reason.EMPTY_TEXT, f"{name!r} is empty")
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)  # as the tokenizers of Qwen write it
    if hidden := _HIDDEN.search(text):
        raise RowError(Reason.HIDDEN_CHARACTER, f"{name!r} holds U+{ord(hidden[0]):04X} at character {hidden.start()}")
    if "<" in text:
        grammar = _GRAMMAR if tags_allowed else (*_GRAMMAR, OPEN_TAG, CLOSE_TAG)
        reserved = contains_reserved(text) or next((token for token in grammar if token in text), None)
        if reserved:
            raise RowError(Reason.RESERVED_TEXT, f"{name!r} holds {reserved}, which the model or the format reserves")
    return text


def _id(row: Mapping[str, Any]) -> str:
    value = _required(row, "id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"'id' is text or a whole number, this is {_shown(value)}")
    if not value.strip():
        raise RowError(Reason.EMPTY_TEXT, "'id' is empty")
    return value


def _audio(row: Mapping[str, Any]) -> str:
    value = _required(row, "audio")
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"'audio' is a path, this is {_shown(value)}")
    if not value.strip():
        raise RowError(Reason.EMPTY_TEXT, "'audio' is empty")
    return value


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = _required(row, "choices")
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise RowError(Reason.WRONG_TYPE, f"'choices' is a list of texts, this is {_shown(value)}")
    if not MIN_CHOICES <= len(value) <= MAX_CHOICES:
        raise RowError(Reason.WRONG_NUMBER_OF_CHOICES, f"{MIN_CHOICES} to {MAX_CHOICES} are needed, not {len(value)}")
    choices = tuple([_checked(choice, "choices", False) for choice in value])
    # The scorer folds case, blanks and a final full stop: two choices that differ in nothing else are one.
    if len({" ".join(choice.split()).rstrip(". ").casefold() for choice in choices}) < len(choices):
        raise RowError(Reason.DUPLICATE_CHOICE, f"two choices read the same: {_shown(choices)}")
    return choices


def without_letters(choices: tuple[str, ...], answer: str) -> tuple[tuple[str, ...], str]:
    """Choices that all carry their own letters without them, since the prompt letters them; the answer likewise."""
    found = [_LETTERED.fullmatch(choice) for choice in choices]
    bare = [match[3] for place, match in enumerate(found) if match and (match[1] or match[2]) == chr(65 + place)]
    if len(bare) < len(choices) or len({text.casefold() for text in bare}) < len(bare):
        return choices, answer
    return tuple(bare), bare[choices.index(answer)] if answer in choices else answer


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  neither bool nor a subclass


def _duration(value: Any) -> float | None:
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise RowError(Reason.BAD_DURATION, f"'duration' is a positive number of seconds, this is {_shown(value)}")
    return float(value)


def _events(value: Any, duration_seconds: float | None) -> tuple[Event, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(Reason.WRONG_TYPE, f"'events' is a list of objects, this is {_shown(value)}")
    return tuple([_event(item, duration_seconds) for item in value])


def _event(item: object, duration_seconds: float | None) -> Event:
    if not isinstance(item, dict):
        raise RowError(Reason.BAD_EVENT, f"an event is an object with label, start and end, this is {_shown(item)}")
    label, start, end = item.get("label"), item.get("start"), item.get("end")
    if not isinstance(label, str) or not label.strip():
        raise RowError(Reason.BAD_EVENT, f"an event needs a label: {_shown(item)}")
    if not _is_number(start) or not _is_number(end) or not 0 <= start < end:
        raise RowError(Reason.BAD_EVENT, f"0 <= start < end is needed, in seconds: {_shown(item)}")
    meta = {key: item[key] for key in item if key not in _EVENT_FIELDS} if len(item) > len(_EVENT_FIELDS) else {}
    event = Event(_checked(label, "label", True), float(start), float(end), meta)
    if duration_seconds is not None:
        _check_event_end(event, duration_seconds)
    return event


def _check_event_end(event: Event, duration_seconds: float) -> None:
    if event.end_seconds > duration_seconds + END_TOLERANCE_SECONDS:
        raise RowError(Reason.BAD_EVENT, f"{_shown(event.to_json())} ends after the clip of {duration_seconds:g} s")


def _meta(row: dict[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    meta = row.get("meta")
    if meta is not None and not isinstance(meta, dict):
        raise RowError(Reason.WRONG_TYPE, f"'meta' is an object, this is {_shown(meta)}")
    others = row.keys() - fields
    return {key: row[key] for key in row if key in others} | (meta or {}) if others else meta or {}
