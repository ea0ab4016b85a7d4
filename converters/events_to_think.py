"""A chain of thought from a row's labelled events, for sets that say when something is heard but do not reason."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from echo_plugins.audio_qa import AudioQA, Event
from echo_plugins.relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS, Segment, format_tag, resolve

_TICKS = 100  # a second: a tag has two decimals
_WORD = re.compile(r"\w+")


def think_of_events(
    record: AudioQA, duration_seconds: float | None = None, max_segments: int = MAX_SEGMENTS
) -> str | None:
    """`In <seg>0.50, 1.50</seg> I hear "bell". So the answer is two.`, None where no event can be used.

    It says what the events say and no more. Only events whose label occurs in the question or the choices are named,
    or all of them where none does; at most `max_segments`, one of each label before a second of any, in order of time.
    An event that is too short to be re-listened to is widened to MIN_SEGMENT_SECONDS around its middle. Left out are
    events of a clip shorter than that, events that start at its end, and labels with `<` or `>`, which could read as
    tags. `duration_seconds` is the clip's; without it the row's own, or the end of its last event, stands in.
    """
    if duration_seconds is None:
        duration_seconds = record.duration_seconds or max((event.end_seconds for event in record.events), default=0.0)
    asked = _words(" ".join([record.question, *record.choices]))
    heard = [
        (segment, label)
        for event in record.events
        if (label := " ".join(event.label.replace("_", " ").split())) and not set("<>") & set(label)
        if (segment := _segment(event, duration_seconds))
    ]
    relevant = [(segment, label) for segment, label in heard if _is_named(label, asked)] or heard
    relevant.sort(key=lambda pair: (pair[0].start_seconds, pair[0].end_seconds))
    if not relevant:
        return None
    before: Counter[str] = Counter()
    ranked = []
    for place, (_, label) in enumerate(relevant):
        ranked.append((before[label], place))
        before[label] += 1
    chosen = sorted(place for _, place in sorted(ranked)[:max_segments])
    sentences = [f'In {format_tag(relevant[place][0])} I hear "{relevant[place][1]}".' for place in chosen]
    return " ".join([*sentences, f"So the answer is {record.answer.rstrip('.')}."])


def _segment(event: Event, duration_seconds: float) -> Segment | None:
    """The event in hundredths of a second, inside the clip and long enough to be inserted."""
    last = round(duration_seconds * _TICKS)
    last -= last / _TICKS > duration_seconds
    start, end = round(event.start_seconds * _TICKS), min(round(event.end_seconds * _TICKS), last)
    if event.start_seconds >= duration_seconds:
        return None
    shortest = round(MIN_SEGMENT_SECONDS * _TICKS)
    if end - start < shortest:
        start = max(0, min((start + end - shortest) // 2, last - shortest))
        end = start + shortest
    if end > last:
        return None  # the clip itself is too short
    segment = resolve(Segment(start / _TICKS, end / _TICKS), duration_seconds)
    return segment if isinstance(segment, Segment) else None


@lru_cache(4_096)  # the labels of a set are few
def _words(text: str) -> str:
    """Its words alone, in small letters, a blank around each."""
    return f" {' '.join(_WORD.findall(text.replace('_', ' ').casefold()))} "


def _is_named(label: str, asked: str) -> bool:
    """Whether `asked` names the label, in the singular or the plural."""
    words = _words(label).rstrip()
    return bool(words) and any(f"{words}{plural} " in asked for plural in ("", "s", "es"))
