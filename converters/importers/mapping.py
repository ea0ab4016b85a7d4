"""From the rows of any source to records: a map that says where each field stands, and presets, maps kept as YAML.

    presets/desed.yaml:   audio: filename          a key of the row; dots walk into objects and lists (qa.options.0)
                          id: "{youtube_id}_{start}"   or a text with keys in it; {a|b} takes the first that is there
                          meta.labels: {from: labels, split: ","}   or a value that is worked on, see `_OPERATIONS`

`event.label`, `event.start`, `event.end` (or `event.duration`) make every row an event, and the rows of one clip one
record; with `events` they are looked up in the items of that list. `meta.NAME` is kept under `meta`. A row with a
question becomes AudioQA, any other labelled audio.
"""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
import yaml

from converters import conversion
from converters.importers.answers import AnswerForm, answer_text
from echo_plugins.audio_qa import (
    DAMAGE,
    END_TOLERANCE_SECONDS,
    FIELDS,
    AudioQA,
    LabelledAudio,
    Reason,
    Record,
    RowError,
    around_the_rows,
    damaged,
    opened,
)

_PRESETS = files("converters.importers") / "presets"
_EVENT_KEYS = ("label", "start", "end", "duration", "kind", "text", "speaker", "confidence")
_FIELD = re.compile(rf"{'|'.join(FIELDS[:-1])}|event\.(?:{'|'.join(_EVENT_KEYS)})|meta\.\w+")
_SLOT = re.compile(r"\{([^{}:]+)(?::([^{}]*))?\}")
_NUMBER = re.compile(
    r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)  # float() would take nan, inf, 1_0 as well
_CLOCK = re.compile(r"([0-9]+):([0-9]{1,2}):([0-9]{1,2}(?:[.,][0-9]+)?)")

MapOption = Annotated[
    list[str],
    typer.Option(
        "--map",
        metavar="FIELD=KEY",
        help=f"Where a field stands in the source; FIELD is one of {', '.join(FIELDS[:-1])}, event.label, event.start, "
        "event.end, event.duration, meta.NAME. Dots walk into objects (qa.text); several keys, "
        "choices=option_a,option_b, make one list; {} fill in a text: audio={id}.wav.",
    ),
]
LabelMapOption = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="TSV or CSV of two columns: the set's label, and what it means."),
]


@dataclass(frozen=True)
class Preset:
    """How the rows of one data set are read. `fields` maps fields to keys, texts or operations, as YAML holds them."""

    format: str = ""
    about: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)
    answer: AnswerForm = AnswerForm.AUTO
    drop: Mapping[str, Any] = field(default_factory=dict)  # a row with this value under this key is left out
    offset: str = ""  # the key of the second at which a row begins; any but 0 is a part of a file, which is refused
    reader: Mapping[str, Any] = field(default_factory=dict)  # what the source format's own reader is told
    end_tolerance: float = END_TOLERANCE_SECONDS  # a label that ends past the clip by no more is cut to it

    def with_map(self, pairs: Sequence[str]) -> Preset:
        """FIELD=KEY words over the preset's own. Raises typer.BadParameter (exit status 2)."""
        given: dict[str, Any] = {}
        for pair in pairs:
            name, equals, key = pair.partition("=")
            if not equals or not key or not _FIELD.fullmatch(name):
                raise typer.BadParameter(f"{pair!r} is not FIELD=KEY; see --help for the fields", param_hint="--map")
            if name in given:
                raise typer.BadParameter(f"{name!r} is mapped twice", param_hint="--map")
            given[name] = key
        return replace(self, fields={**self.fields, **given})


def require_columns(pairs: Sequence[str], rows: Iterable[Any], where: str, item_fields: Iterable[str] = ()) -> None:
    """Each FIELD=KEY of `--map` must name a key that some row has: a typed name would lose a field in silence. `rows`
    are read until all are found. `item_fields` are looked up in the items of a list, so no row has them. Raises
    typer.BadParameter (exit status 2)."""
    named = [pair.partition("=") for pair in pairs]
    wanted = [(field_, key) for field_, _, key in named if field_ not in item_fields]
    names: set[str] = set()
    for row in rows if wanted else ():
        if not isinstance(row, Mapping):
            continue
        names.update(row)
        wanted = [(field_, slot) for field_, key in wanted for slot in _slots(key, row) if not _has_one(row, slot)]
        if not wanted:
            return
    for field_, slot in wanted:
        close = difflib.get_close_matches(slot.split("|")[0].strip(), names, 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        shown = ", ".join(sorted(names)) or "none"
        raise typer.BadParameter(
            f"{where} has no column {slot!r} for {field_}{hint} It has: {shown}", param_hint="--map"
        )


def _slots(key: str, row: Mapping[str, Any]) -> list[str]:
    """The keys that a KEY of `--map` is made of."""
    return [match[1] for match in _SLOT.finditer(key)] or ([key] if key in row else key.split(","))


def _has_one(row: Mapping[str, Any], slot: str) -> bool:
    return any(_has(row, way.strip()) for way in slot.split("|"))


def _has(row: Any, key: str) -> bool:
    """Whether a path leads anywhere, be it to null."""
    if isinstance(row, Mapping) and key in row:
        return True
    first, _, rest = key.partition(".")
    if isinstance(row, Mapping):
        return first in row and bool(rest) and _has(row[first], rest)
    if isinstance(row, list) and first.isdigit():
        return not rest or int(first) >= len(row) or _has(row[int(first)], rest)
    return False


AnswerOption = Annotated[
    AnswerForm | None,
    typer.Option(
        "--answer",
        help="How the answer is given; auto takes the choice's text or its letter, never a number.",
        show_default="the preset's, or auto",
    ),
]


@cache
def preset_names(format_: str) -> list[str]:
    return sorted(
        path.name.removesuffix(".yaml")
        for path in _PRESETS.iterdir()
        if path.name.endswith(".yaml") and yaml.safe_load(path.read_text()).get("format") == format_
    )


def load_preset(name: str | None, format_: str) -> Preset:
    """A preset of ours by name, or a YAML file of the user's own. Raises typer.BadParameter (exit status 2)."""
    if name is None:
        return Preset()
    path = Path(name) if name.endswith((".yaml", ".yml")) else _PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(preset_names(format_))
        raise typer.BadParameter(f"no preset {name!r}; there are {known}, or give a .yaml", param_hint="--preset")
    try:
        values = yaml.safe_load(path.read_text())
        preset = Preset(**{**values, "answer": AnswerForm(values.get("answer", "auto"))})
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--preset") from error
    if preset.format != format_:
        raise typer.BadParameter(f"{name!r} is a preset of converters.importers.{preset.format}", param_hint="--preset")
    if unknown := [key for key in preset.fields if not _FIELD.fullmatch(key)]:
        raise typer.BadParameter(f"{path}: {unknown} are no fields", param_hint="--preset")
    return preset


def preset_option(format_: str) -> Any:
    """The `--preset` option of the importer of that format."""
    help_ = f"A data set's own layout: {', '.join(preset_names(format_))}; or a YAML file like those in presets/."
    return typer.Option(metavar="NAME|FILE.yaml", help=help_)


@dataclass(frozen=True)
class Mapper:
    """Rows to records under a preset. `name` and the line make an id where the source has none."""

    preset: Preset
    audio: conversion.AudioRoot
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    mapped: set[str] = field(default_factory=set)  # labels that were met and that `labels` has
    unmapped: set[str] = field(default_factory=set)  # and those that it has not

    @property
    def item_fields(self) -> list[str]:
        """The fields that are looked up in the items of a list of events, not in the row."""
        fields = self.preset.fields
        return [name for name in fields if name.startswith("event.")] if "events" in fields else []

    def record(self, line: int, row: object) -> Record:
        """A row that is a whole record. Raises RowError."""
        found = self._found(line, row)
        if "events" in found:
            items = [self._event(item, item) for item in self._items(found["events"])]
            found["events"] = [self._ended(item, found.get("audio")) for item in items]
        elif (event := self._event(row, None)) is not None:
            found["events"] = [event]
        return _record(found)

    def clips(self, rows: Iterable[conversion.Numbered]) -> Iterator[conversion.Numbered]:
        """Rows that are events, gathered to one row a clip, for `record_of_clip`. A clip with a bad row is left out
        whole: what it lacks would pass for silence. Where nobody can say which clips a bad row belongs to, all are left
        out. All clips are held in memory."""
        clips: dict[str, tuple[int, dict[str, Any]]] = {}
        counts: Counter[str] = Counter()
        spoilt: dict[str, int] = {}
        all_spoilt: int | None = None
        num_rows = 0
        for line, row in rows:
            num_rows += 1
            try:
                if isinstance(row, RowError):
                    raise row
                found = self._found(line, row)
                event = self._event(row, None)
                if event is not None and "\n" in event["label"]:  # it has taken in the row of another clip
                    detail = f"the label {event['label'][:80]!r} goes over lines: a quote is not closed"
                    raise RowError(Reason.BAD_EVENT, detail, fatal=True)
            except RowError as error:
                if error.reason is not Reason.LEFT_OUT:
                    named = {self._audio(reading) for reading in error.readings or (row,)} - {None}
                    if not named and not error.fatal:
                        detail = f"{error.detail}; so any clip may lack a label"
                        error = RowError(error.reason, detail, fatal=True)
                    if error.fatal and all_spoilt is None:
                        all_spoilt = line
                    spoilt |= {audio: line for audio in named if audio and audio not in spoilt}
                yield line, error
                continue
            audio = found["audio"]
            counts[audio] += 1
            _, clip = clips.setdefault(audio, (line, found | {"events": []}))
            if event is not None:
                clip["events"].append(event)
            _gather(clip.get("meta", {}), found.get("meta", {}))
        typer.echo(f"{self.name}: {num_rows} rows, gathered to {len(clips)} clips", err=True)
        for audio, (line, clip) in clips.items():
            if (bad := spoilt.get(audio, all_spoilt)) is not None:
                whose = "of the same clip is bad" if audio in spoilt else "may be of the same clip and is bad"
                detail = f"{audio}: line {bad} {whose}, so its {counts[audio]} good rows are left out"
                yield line, RowError(Reason.INCOMPLETE_LABELS, detail)
            else:
                yield line, clip

    def _audio(self, row: object) -> str | None:
        """The clip that a row names; None where it names none, or not in UTF-8."""
        try:
            audio = self._value(row, self.preset.fields.get("audio", "audio")) if isinstance(row, dict) else None
            if not isinstance(audio, str) or not audio.strip():
                return None
            audio.encode()
        except (RowError, UnicodeEncodeError):
            return None
        return relative_audio(audio, self.audio.root)

    def _found(self, line: int, row: object) -> dict[str, Any]:
        """The fields of a row but for its events, `meta` gathered. Raises RowError."""
        if not isinstance(row, dict):
            raise RowError(Reason.NOT_AN_OBJECT, f"a row is a JSON object, this is a {type(row).__name__}")
        for key, value in self.preset.drop.items():
            if look_up(row, key) == value:
                raise RowError(Reason.LEFT_OUT, f"{key} is {value!r}, which the preset leaves out")
        offset = look_up(row, self.preset.offset) if self.preset.offset else None
        if offset is not None and seconds(offset, self.preset.offset):
            detail = f"it begins at {self.preset.offset} {offset} of its file: cut the parts out to files (sox, ffmpeg)"
            raise RowError(Reason.NOT_WHOLE, detail)
        specs = self.preset.fields
        taken = set(keys_of(specs.values()))
        own_names = {name for name in FIELDS[:-1] if name not in specs and name not in taken}
        taken |= own_names
        found = {
            name: self._value(row, specs.get(name, name)) for name in {*specs, *own_names}.intersection(FIELDS[:-1])
        }
        form = self.preset.answer
        if (keyed := self._keyed_choices(row, specs, found.get("choices"))) is not None:
            # The key decides, never the place. A letter that is no key names no choice.
            said = found.get("answer")
            found |= {"choices": list(keyed.values()), "answer": keyed.get(_key(said), said)}
            form = AnswerForm.TEXT if form in (AnswerForm.AUTO, AnswerForm.LETTER) else form
        found["choices"] = choices_of(found.get("choices"))
        if isinstance(found.get("duration"), str):
            found["duration"] = seconds(found["duration"], "duration", Reason.BAD_DURATION)
        if not isinstance(found.get("audio"), str) or not found["audio"].strip():
            raise RowError(Reason.MISSING_FIELD, self._no_audio(row))
        own = _object_of(row.get("meta"))
        others = {key: value for key, value in row.items() if key not in taken and key != "meta"}
        named = {name[5:]: self._value(row, spec) for name, spec in specs.items() if name.startswith("meta.")}
        others |= own if isinstance(own, dict) else {} if own is None else {"meta": own}
        found["meta"] = others | {key: value for key, value in named.items() if value not in (None, [])}
        if found.get("id") is None:
            found["id"] = self.name + (f"-{line:07d}" if "event.label" not in specs else f"-{found.get('audio')}")
        found["audio"] = relative_audio(found["audio"], self.audio.root)
        if isinstance(found["choices"], list) and found.get("answer") is not None:
            found["answer"] = answer_text(found["answer"], found["choices"], form)
        return {name: value for name, value in found.items() if value is not None}

    def _no_audio(self, row: Mapping[str, Any]) -> str:
        for key, value in row.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                return around_the_rows(row, key)
        spec = self.preset.fields.get("audio", "audio")
        return f"no 'audio' in the row by {str(spec)!r}; it has {sorted(map(str, row))}"[:200]

    def _keyed_choices(self, row: Mapping[str, Any], specs: Mapping[str, Any], choices: Any) -> Any:
        """Choices by their keys, in the order of the keys: those of an object, or of columns of which some are empty.
        None for a list, whose places are its letters."""
        if isinstance(choices, Mapping):
            keyed = {_key(key): value for key, value in choices.items() if value not in (None, "")}
            return dict(sorted(keyed.items(), key=lambda item: (len(item[0]), item[0])))
        spec = specs.get("choices")
        if not isinstance(spec, str) or "," not in spec or spec in row or "{" in spec:
            return None
        values = [look_up(row, part.strip()) for part in spec.split(",")]
        if all(value not in (None, "") for value in values):
            return None
        return {chr(65 + place): value for place, value in enumerate(values) if value not in (None, "")}

    def _ended(self, item: Any, audio: Any) -> Any:
        """The last of `intervals` lasts until the end of the clip."""
        if isinstance(item, dict) and item.get("end", 0) is None and isinstance(audio, str):
            return item | {"end": self.audio.measure(audio).duration_seconds}
        return item

    def _items(self, events: Any) -> list[Any]:
        if not isinstance(events, list):
            raise RowError(Reason.WRONG_TYPE, f"'events' is a list, this is {str(events)[:80]}")
        return events

    def _event(self, row: Any, item: Any) -> Any:
        """The event of a row, or an item of a row's list of events; None where neither label nor time is given."""
        specs = {name[6:]: spec for name, spec in self.preset.fields.items() if name.startswith("event.")}
        if not specs:
            return item
        if not isinstance(row, dict):
            raise RowError(Reason.BAD_EVENT, f"an event is an object, this is {str(row)[:80]}")
        found = {name: self._value(row, spec) for name, spec in specs.items()}
        found = {name: value for name, value in found.items() if value is not None}
        if not found.keys() & {"label", "start", "end", "duration"}:
            return None
        start = seconds(found.get("start"), "start")
        span = found.pop("duration", None)
        end = seconds(found.get("end"), "end") if span is None else added(start, seconds(span, "duration"))
        if not isinstance(found.get("label"), str):
            raise RowError(Reason.BAD_EVENT, f"the label is a text, this is {str(found.get('label'))[:80]}")
        if not 0 <= start < end:
            raise RowError(Reason.BAD_EVENT, f"0 <= start < end is needed, in seconds: {start:g} to {end:g}")
        return found | {"start": start, "end": end}

    def _value(self, row: Any, spec: Any) -> Any:
        if isinstance(spec, list):
            return [value for value in (self._value(row, part) for part in spec) if value is not None]
        if isinstance(spec, Mapping):
            return self._worked(row, spec)
        if not isinstance(spec, str):
            return spec
        if "{" not in spec:
            if "," in spec and spec not in row:
                return self._value(row, [part.strip() for part in spec.split(",")])
            return look_up(row, spec)
        filled = [(match, _first(row, match[1])) for match in _SLOT.finditer(spec)]
        if any(value is None for _, value in filled):
            return None
        if len(filled) == 1 and filled[0][0][0] == spec and not filled[0][0][2]:
            return filled[0][1]  # the value itself, a list or a number too
        values = iter(filled)
        return _SLOT.sub(lambda match: format(str(next(values)[1]), match[2] or ""), spec)

    def _worked(self, row: Any, spec: Mapping[str, Any]) -> Any:
        if "value" in spec:
            return spec["value"]
        value = self._value(row, spec["from"])
        if value is None:
            return None
        for name, argument in spec.items():
            if name == "minus":
                value = added(seconds(value, "from"), -seconds(self._value(row, argument), "minus"))
            elif name == "labels":
                if self.labels:
                    (self.mapped if str(value) in self.labels else self.unmapped).add(str(value))
                value = self.labels.get(str(value), value)
            elif name == "intervals":
                value = _intervals(value, self._value(row, argument), spec.get("kind"))
            elif name not in ("from", "kind"):
                value = _OPERATIONS[name](value, argument)
        return value


def _split(value: Any, separator: str) -> list[str]:
    return [part.strip() for part in str(value).split(separator) if part.strip()]


def _pattern(value: Any, pattern: Mapping[str, str]) -> str | None:
    (find, put), *_ = pattern.items()
    match = re.fullmatch(find, str(value))
    return match.expand(put) if match else None


def _replaced(value: Any, pairs: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_replaced(item, pairs) for item in value]
    for old, new in pairs.items():
        value = str(value).replace(old, new)
    return value


_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "split": _split,  # a text to a list
    "join": lambda value, between: between.join(map(str, value)) if isinstance(value, list) else value,
    "replace": _replaced,  # {OLD: NEW}, in a text or in each of a list
    "pattern": _pattern,  # {REGEX: TEXT with \1}; None where it does not match
    "times": lambda value, factor: seconds(value, "from") * factor,
    "clock": lambda value, _: clock_seconds(value),  # hours:minutes:seconds
}
"""What else a map can do with a value, besides `value` (a constant), `minus` (another key), `labels` (the label map)
and `intervals` (labels and their start times, each until the next, to a list of events; `kind` beside it is theirs)."""


def _intervals(labels: Any, starts: Any, kind: str | None) -> list[dict[str, Any]]:
    if not isinstance(labels, list) or not isinstance(starts, list) or len(labels) != len(starts):
        raise RowError(Reason.BAD_EVENT, f"a list of labels and one as long of times are needed: {str(starts)[:80]}")
    times = [seconds(start, "start") for start in starts]
    ends: list[float | None] = [*times[1:], None]
    return [
        {"label": label, "start": start, "end": end} | ({"kind": kind} if kind else {})
        for label, start, end in zip(labels, times, ends, strict=True)
        if end is None or end > start
    ]


def seconds(value: Any, name: str, reason: Reason = Reason.BAD_EVENT) -> float:
    """A finite number, or a text of one. Raises RowError: `[0-9.]+` takes 1.2.3, and float() then raises."""
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(reason, f"{name} {str(value)[:80]!r} is no number of seconds")
    return float(value)


def added(first: float, second: float) -> float:
    """The sum of two times as they are written: 0.1 and 0.2 are 0.3."""
    return float(Decimal(repr(first)) + Decimal(repr(second)))


def clock_seconds(value: Any) -> float:
    """`00:16:16,059` to seconds. Raises RowError."""
    match = _CLOCK.fullmatch(str(value).strip())
    if match is None:
        raise RowError(Reason.BAD_EVENT, f"{str(value)[:80]!r} is no hours:minutes:seconds")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3].replace(",", "."))


def _object_of(value: Any) -> Any:
    """`meta` as it was, where a table of ours holds it as the text of a JSON object."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    return value


def _record(found: dict[str, Any]) -> Record:
    if found.get("question") is not None or found.get("choices") is not None:
        return AudioQA.from_json(found)
    return LabelledAudio.from_json(found)


def record_of_clip(line: int, clip: object) -> Record:
    """`to_record` after `Mapper.clips`. Raises RowError."""
    if not isinstance(clip, dict):
        raise RowError(Reason.NOT_AN_OBJECT, f"a clip is an object, this is a {type(clip).__name__}")
    return _record(clip)


def _gather(meta: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lists of the rows of one clip, such as captions, are put together; of anything else the first stays."""
    for key, value in more.items():
        if isinstance(value, list) and isinstance(meta.get(key), list):
            meta[key] += [item for item in value if item not in meta[key]]


def keys_of(specs: Iterable[Any]) -> Iterator[str]:
    for spec in specs:
        if isinstance(spec, list):
            yield from keys_of(spec)
        elif isinstance(spec, Mapping):
            yield from keys_of(spec[name] for name in ("from", "minus", "intervals") if name in spec)
        elif isinstance(spec, str):
            slots = [match[1] for match in _SLOT.finditer(spec)] or [spec]
            for slot in slots:
                for key in (slot, *slot.split("|"), *slot.split(",")):
                    yield key.strip()


def _key(value: Any) -> str:
    """A choice's key, or an answer that may be one: (b), B. and b are B."""
    return str(value).strip().strip("().:").strip().upper()


def _first(row: Any, keys: str) -> Any:
    values = (look_up(row, key.strip()) for key in keys.split("|"))
    return next((value for value in values if value is not None), None)


def look_up(row: Any, key: str) -> Any:
    """The value under a key; one with dots in its name, or a path into objects and lists. None where there is none."""
    if isinstance(row, dict) and key in row:
        return row[key]
    value = row
    for part in key.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def choices_of(value: Any) -> Any:
    """A list as it is, the values of {"A": .., "B": ..}; numbers as text."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        value = [str(item) if type(item) in (int, float) else item for item in value]
    return value


def relative_audio(path: str, root: Path) -> str:
    """`path` relative to the audio root where it is an absolute path inside it; otherwise tidied (`./a` is `a`)."""
    plain = Path(path)
    if plain.is_absolute() and plain.is_relative_to(root):
        plain = plain.relative_to(root)
    return plain.as_posix()


def read_label_map(path: Path | None) -> dict[str, str]:
    """Two columns, parted by a tab or a comma. Raises typer.BadParameter (exit status 2)."""
    if path is None:
        return {}
    try:
        with opened(path) as stream:
            lines = stream.read().decode("utf-8-sig").splitlines()
    except DAMAGE as error:
        raise typer.BadParameter(
            f"{damaged(path, error).detail}; save it as UTF-8", param_hint="--label-map"
        ) from error
    rows = list(
        csv.reader(lines, delimiter="\t" if any("\t" in line for line in lines) else ",", skipinitialspace=True)
    )
    for number, cells in enumerate(rows, start=1):
        if cells and len(cells) != 2:
            columns = "columns" if len(cells) > 1 else "column"
            detail = (
                f"{path}: line {number} has {len(cells)} {columns}; two are needed, the set's label and its meaning"
            )
            raise typer.BadParameter(detail, param_hint="--label-map")
    return {cells[0].strip(): cells[1].strip() for cells in rows if cells}
