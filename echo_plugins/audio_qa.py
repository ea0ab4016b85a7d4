"""AudioQA: the one record in the middle. Every importer writes it, every exporter reads it, and this module judges it.

    {"id", "audio", "question", "choices": [..], "answer",
     "think"?, "events"?: [{"label", "start", "end"}], "duration"?, "meta"?}

Labelled audio is the same without a question: what importers make of sets that have labels only, and what
`converters.synthesis` asks questions about.

    {"id", "audio", "events"?: [{"label", "start", "end"}], "duration"?, "meta"?}

`audio` is a path relative to the audio root. Times are seconds. Unknown keys are kept under `meta`, those of an event
with the event. A row that cannot be used raises `RowError` with a `Reason`; nothing is repaired by guessing.

Text is NFC in every field but `id` and `audio`: tokenizers of the Qwen family normalise, so a model cannot write NFD.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


# Characters that nobody sees: controls but tab and line breaks, marks that turn the direction of a text, blanks
# without a width, lone surrogates. A text that holds one looks like another. Many scripts need the joiners U+200C and
# U+200D.
_HIDDEN = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ud800-\udfff]"
)
# A choice that carries its own letter: "(A) a car", "A. a car", "a) a car", "A: a car". "A minor" does not.
_A_LETTER = r"([A-Za-z\uff21-\uff3a])"
_LETTERED = re.compile(
    rf"(?:[(\uff08]{_A_LETTER}[)\uff09]|{_A_LETTER}(?:[.:](?=\s)|[)\uff0e\uff1a\u3001\uff09]))\s*(\S.*)", re.DOTALL
)
_JSON_KEY = re.compile(rb'"\s*:')
_SURROGATE = re.compile("[\ud800-\udfff]")


# A row's tags are asked for up to three times while it is in hand; finding them is the dearest step of a conversion.
tags_of = lru_cache(1_024)(find_tags)


class Reason(StrEnum):
    """Why a row cannot be used."""

    NOT_JSON = "not_json"
    NOT_UTF8 = "not_utf8"
    DUPLICATE_KEY = "duplicate_key"
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
    """One row that cannot be used: the typed reason, and what was seen.

    `fatal`: more than this row is lost, and nobody can say how much: the rest of the file, or a label of some clip.
    `readings`: what the row may have been, for a reader of tables that looks for the clip it belongs to.
    """

    def __init__(
        self, reason: Reason, detail: str, fatal: bool = False, readings: tuple[Mapping[str, Any], ...] = ()
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.fatal = fatal
        self.readings = readings

    def __reduce__(self) -> tuple[type[RowError], tuple[Reason, str, bool]]:
        return RowError, (self.reason, self.detail, self.fatal)  # it crosses between processes


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


Raw = bytes | str | RowError
"""A row as it stands in a file, unparsed; a RowError where the file itself is broken."""


def read_rows(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, object]]:
    """(line, value) of every row of a JSONL file, or of a JSON file that holds one list.

    `value` is a RowError where the line is no JSON. `advance` is told the bytes consumed.
    """
    return ((line, parse_row(raw)) for line, raw in read_raw(path, advance))


def read_raw(path: Path, advance: Callable[[int], None]) -> Iterator[tuple[int, Raw]]:
    """As `read_rows`, for `parse_row`. JSONL is streamed; a JSON list is read into memory as text. Both may be gzipped,
    and in UTF-16."""
    number = 0
    try:
        with opened(path) as stream:
            # A look ahead, not a seek: the source may be a pipe.
            if stream.peek().removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from _read_list(stream.read(), advance)
                return
            for number, line in enumerate(stream, start=1):
                advance(len(line))
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.strip() == b"{":
                        yield 1, _one_object(line + stream.read())
                        return
                if not line.isspace() and line:
                    yield number, line
    except DAMAGE as error:
        yield number + 1, damaged(path, error)


DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError)
"""What reading an `opened` file raises where it is damaged."""


def damaged(path: Path, error: Exception) -> RowError:
    """The refusal of the rest of a file for one of DAMAGE."""
    if isinstance(error, UnicodeDecodeError):
        return RowError(Reason.NOT_UTF8, f"{path}: no {error.encoding} ({error.reason}); the rest is not read", True)
    return RowError(Reason.NOT_JSON, f"{path}: damaged gzip ({error}); the rest is not read", True)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader[Any]]:
    """The bytes of a file or pipe: unpacked where it is gzipped, as UTF-8 where it begins with a mark of UTF-16."""
    with path.open("rb") as file:
        stream: io.BufferedReader[Any] = file
        if stream.peek(2)[:2] == b"\x1f\x8b":
            # Not `read`, which gives nothing of what stands before the damage.
            stream = io.BufferedReader(_Pieces(gzip.GzipFile(fileobj=stream).read1))
        if stream.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = io.TextIOWrapper(stream, "utf-16", newline="")
            stream = io.BufferedReader(_Pieces(lambda size: text.readline(size).encode("utf-8", "surrogatepass")))
        yield stream


class _Pieces(io.RawIOBase):
    """A file whose bytes a function gives, some `size` of them a call, and none at the end."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._rest = self._rest or self._read(len(buffer))
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rest = self._rest[len(taken) :]
        return len(taken)


def read_value(path: Path) -> object:
    """The one JSON value of a file, which may be gzipped and in UTF-16; a RowError with its name where it has none."""
    try:
        with opened(path) as stream:
            value = parse_row(stream.read().removeprefix(b"\xef\xbb\xbf"))
    except DAMAGE as error:
        return damaged(path, error)
    return RowError(value.reason, f"{path}: {value.detail}") if isinstance(value, RowError) else value


def _one_object(raw: bytes) -> Raw:
    """The row of a JSON file that is one object over many lines; refused where it only holds the rows in a list."""
    value = parse_row(raw)
    if not isinstance(value, dict):
        detail = value.detail if isinstance(value, RowError) else "no object"
        return RowError(Reason.NOT_JSON, f"one JSON value over many lines, and it is broken: {detail}", True)
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    if "audio" in value or not lists:
        return raw
    return RowError(Reason.NOT_JSON, around_the_rows(value, lists[0]))


def around_the_rows(value: Mapping[str, Any], name: str) -> str:
    """What is wrong with an object whose key `name` holds the rows."""
    return (
        f"one object around {len(value[name])} rows; it has {_shown(sorted(value))}. Take its list: "
        f"jq '.[\"{name}\"]' IN > ROWS.json"
    )


def _read_list(raw: bytes, advance: Callable[[int], None]) -> Iterator[tuple[int, Raw]]:
    # A byte that is no UTF-8 costs its own row: it is kept as a surrogate, which `parse_row` refuses.
    text = raw.decode("utf-8-sig", "surrogateescape")
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = _skip_blanks(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            if rest := text[position + 1 :].strip():
                line += text.count("\n", counted, text.index(rest[0], position + 1))
                yield line, RowError(Reason.NOT_JSON, f"{_shown(rest)} after the list is not read", True)
            return
        try:
            # The standard library finds where the element ends; orjson judges it as it judges a line of JSONL.
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield line, RowError(Reason.NOT_JSON, f"{error}; the rest of the list is not read", True)
            return
        yield line, text[position:end]
        advance(end - counted)
        position = _skip_blanks(text, end)
        if text.startswith(",", position):
            position += 1
        elif not text.startswith("]", position):
            line += text.count("\n", counted, position)
            yield line, RowError(Reason.NOT_JSON, "expected , or ] here; the rest of the list is not read", True)
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
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if isinstance(raw, bytes):
            raw = raw.decode("utf-8", "surrogateescape")
        if bad := _SURROGATE.search(raw):
            return RowError(Reason.NOT_UTF8, f"byte 0x{ord(bad[0]) & 0xFF:02X} at character {bad.start()} of the row")
        return RowError(Reason.NOT_JSON, str(error))
    # orjson takes the last of two equal keys. Looking for them costs more than parsing, so the keys are counted first.
    encoded = raw if isinstance(raw, bytes) else raw.encode()
    known = _num_keys(value)
    if encoded.count(b":") > known and len(_JSON_KEY.findall(encoded)) > known:
        try:
            json.loads(encoded, object_pairs_hook=_without_twins)
        except RowError as error:
            return error
        except (ValueError, RecursionError) as error:  # orjson takes deeper and longer numbers
            return RowError(Reason.NOT_JSON, str(error))
    return value


def _num_keys(value: Any) -> int:
    kind = type(value)
    if kind is not dict and kind is not list:
        return 0
    number = len(value) if kind is dict else 0
    for item in value.values() if kind is dict else value:
        if type(item) is dict or type(item) is list:
            number += _num_keys(item)
    return number


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            detail = f"the key {_shown(key)} is there twice, with {_shown(found[key])} and {_shown(value)}"
            raise RowError(Reason.DUPLICATE_KEY, detail)
        found[key] = value
    return found


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
    return _in_utf8(value, "id")


def _audio(row: Mapping[str, Any]) -> str:
    value = _required(row, "audio")
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, f"'audio' is a path, this is {_shown(value)}")
    if not value.strip():
        raise RowError(Reason.EMPTY_TEXT, "'audio' is empty")
    return _in_utf8(value, "audio")


def _in_utf8(value: str, name: str) -> str:
    """The name of a file as the system gives it may hold bytes that are no UTF-8."""
    if not value.isascii() and _SURROGATE.search(value):
        shown = value.encode("utf-8", "surrogateescape")
        raise RowError(Reason.NOT_UTF8, f"{name!r} is no UTF-8, {shown!r}: rename the file")
    return value


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    value = _required(row, "choices")
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise RowError(Reason.WRONG_TYPE, f"'choices' is a list of texts, this is {_shown(value)}")
    if not MIN_CHOICES <= len(value) <= MAX_CHOICES:
        raise RowError(Reason.WRONG_NUMBER_OF_CHOICES, f"{MIN_CHOICES} to {MAX_CHOICES} are needed, not {len(value)}")
    return tuple([_checked(choice, "choices", False) for choice in value])


def without_letters(choices: tuple[str, ...], answer: str) -> tuple[tuple[str, ...], str]:
    """Choices that all carry their own letters without them, since the prompt letters them; the answer likewise.

    Raises RowError for choices that read the same."""
    found = [_LETTERED.fullmatch(choice) for choice in choices]
    bare = [match[3] for place, match in enumerate(found) if match and _letter(match) == chr(65 + place)]
    if len(bare) == len(choices):
        answer = bare[choices.index(answer)] if answer in choices else answer
        choices = tuple(bare)
    # The scorer folds case, blanks and a final full stop: two choices that differ in nothing else are one.
    if len({" ".join(choice.split()).rstrip(". ").casefold() for choice in choices}) < len(choices):
        raise RowError(Reason.DUPLICATE_CHOICE, f"two choices read the same: {_shown(choices)}")
    return choices, answer


def _letter(match: re.Match[str]) -> str:
    return unicodedata.normalize("NFKC", match[1] or match[2]).upper()


def nfc(value: Any) -> Any:
    """A JSON value with every text of it in NFC; its keys stay."""
    if isinstance(value, str):
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if isinstance(value, list):
        return [nfc(item) for item in value]
    if isinstance(value, dict):
        return {key: nfc(item) for key, item in value.items()}
    return value


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
    event = Event(_checked(label, "label", True), float(start), float(end), nfc(meta) if meta else meta)
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
    return nfc({key: row[key] for key in row if key in others} | (meta or {}) if others else meta or {})
