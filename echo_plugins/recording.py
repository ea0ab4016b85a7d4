"""Which recording a row is cut from, and which seconds of it, over the spellings that data sets use.

Scores count the rows of one recording together; the contamination screen asks whether a benchmark has the same seconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Seconds = tuple[float, float]

# Where sets put the source of a clip: a URL, the video's id alone, or a name that has it (MMAR, MMAU, AVQA, AudioSet,
# AudioCaps, MusicCaps, VGGSound, WavCaps).
URL_KEYS = ("url", "source_url", "webpage_url", "original_url", "video_url", "link", "href", "download_link")
ID_KEYS = (
    "youtube_id",
    "ytid",
    "yt_id",
    "video_id",
    "videoid",
    "video_name",
    "video",
    "recording",
    "segment_id",
    "vid",
)
NAME_KEYS = ("id", "audio_id", "audio_path", "audio", "file_name", "filename", "file", "path", "location")

_IN_URL = re.compile(
    r"(?:youtube(?:-nocookie)?\.com/(?:[^\s\"']*?[?&](?:v|vi)=|(?:shorts|embed|live|v|vi|e)/)|youtu\.be/)"
    r"([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])",
    re.IGNORECASE,
)
_BILIBILI = re.compile(r"(?<![A-Za-z0-9])(BV1[A-Za-z0-9]{9})(?![A-Za-z0-9])")
# An id alone or before the times: VGGSound's ID_000030, AudioSet's YID.wav and ID_30.000_40.000, MMAR's
# ID_00-00-30_00-00-40, MusicCaps' [ID]-[30-40].
_TIME = r"(?:[0-9]{2}-[0-9]{2}-[0-9]{2}|[0-9]+(?:[:.][0-9]+){0,2})"
_NAME = re.compile(rf"Y?\[?(BV1[A-Za-z0-9]{{9}}|[A-Za-z0-9_-]{{11}})\]?(?:[_-]\[?({_TIME})(?:[_-]+({_TIME}))?\]?)?")

_START_KEYS = ("start_time", "start_seconds", "start_time_seconds", "start_s", "start", "onset", "begin", "offset")
_END_KEYS = ("end_time", "end_seconds", "end_time_seconds", "end_s", "end", "offset_end", "stop")
_BOTH_KEYS = ("timestamp", "timestamps", "time_range", "segment", "times")
_CLOCK = re.compile(r"[0-9]+(?::[0-9]+){0,2}(?:[.][0-9]+)?")
_MOST_SECONDS = 86_400.0  # more is no time in a recording: milliseconds, or a number of something else


def sources_of(row: Mapping[str, Any]) -> dict[str, Seconds | None]:
    """The videos that a row names, by their ids; a URL of another site as it is. Each with the seconds that the row's
    own fields or the name say, None where nothing says. `meta` counts as the row itself."""
    fields = _fields(row)
    stated = _interval(fields)
    found: dict[str, Seconds | None] = {}
    for value in _texts(fields, (*URL_KEYS, *ID_KEYS, *NAME_KEYS)):
        ids = [match[1] for pattern in (_IN_URL, _BILIBILI) for match in pattern.finditer(value)]
        for source in ids or ([value.partition("#")[0]] if value.startswith(("http://", "https://")) else []):
            found.setdefault(source, stated)
    for value in _texts(fields, (*ID_KEYS, *NAME_KEYS)):
        stem = re.sub(r"\.[A-Za-z][A-Za-z0-9]{1,4}\Z", "", value.replace("\\", "/").rpartition("/")[2])
        if match := _NAME.fullmatch(stem):
            named = _named_seconds(match[2], match[3])
            found[match[1]] = stated or named or found.get(match[1])
    return found


def recording_of(row: Mapping[str, Any]) -> str:
    """A name that rows of one recording share: what `recording` says, else the video's id, else the audio files."""
    fields = _fields(row)
    if isinstance(recording := fields.get("recording"), (str, int)) and str(recording).strip():
        return str(recording)
    for value in _texts(fields, URL_KEYS):
        for pattern in (_IN_URL, _BILIBILI):
            if match := pattern.search(value):
                return match[1]
    for key in ("audio", "audio_path", "audio_id"):
        value = fields.get(key)
        if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
            return "\n".join(value)
        if isinstance(value, str) and value.strip():
            return value
    return ""


def overlap(first: Seconds | None, second: Seconds | None) -> bool:
    """Whether two stretches of one recording have seconds in common; one that is not known may."""
    return first is None or second is None or (first[0] < second[1] and second[0] < first[1])


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row.get("meta")
    merged = {**(meta if isinstance(meta, Mapping) else {}), **row}
    return {str(key).lower(): value for key, value in merged.items()}


def _texts(fields: Mapping[str, Any], keys: tuple[str, ...]) -> Iterator[str]:
    for key in keys:
        value = fields.get(key)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and each.strip():
                yield each.strip()


def _interval(fields: Mapping[str, Any]) -> Seconds | None:
    for key in _BOTH_KEYS:
        times = list(_times(fields.get(key)))
        if len(times) >= 2 and times[0] < times[-1]:
            return times[0], times[-1]
    start = next((time for key in _START_KEYS for time in _times(fields.get(key))), None)
    if start is None:
        return None
    end = next((time for key in _END_KEYS for time in _times(fields.get(key))), None)
    if end is None and (length := next(_times(fields.get("duration")), None)):
        end = start + length
    return (start, math.inf if end is None else end) if end is None or start < end else None


def _times(value: object) -> Iterator[float]:
    """Seconds in a number, in h:m:s, in a text or list of several."""
    if type(value) in (int, float):
        if 0 <= value < _MOST_SECONDS:  # type: ignore[operator]  narrowed above
            yield float(value)  # type: ignore[arg-type]
    elif isinstance(value, list):
        for each in value:
            yield from _times(each)
    elif isinstance(value, str):
        for clock in _CLOCK.findall(value):
            seconds = 0.0
            for part in clock.split(":"):
                seconds = 60 * seconds + float(part)
            if seconds < _MOST_SECONDS:
                yield seconds


def _named_seconds(start: str | None, end: str | None) -> Seconds | None:
    """Times in a file's name. A start alone is of a clip of 10 s; a large number may be milliseconds: not known."""
    times = [next(_times(time.replace("-", ":")), None) for time in (start, end) if time]
    if not times or None in times or any(time >= 10_000 for time in times if time is not None):
        return None
    first = times[0] or 0.0
    last = times[1] if len(times) > 1 and times[1] is not None else first + 10.0
    return (first, last) if first < last else None
