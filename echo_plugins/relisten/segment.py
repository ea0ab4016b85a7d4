"""Segments: the `<seg>START, END</seg>` grammar and what becomes of a tag against a clip of known duration.

Times are seconds. A tag that cannot be re-listened to is not an error but a typed `Refusal`, to be counted and logged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

OPEN_TAG = "<seg>"
CLOSE_TAG = "</seg>"

MIN_SEGMENT_SECONDS = 0.2  # 3,200 samples at 16 kHz; below it the audio encoder yields under 5 tokens
HIT_IOU = 0.5  # a clip whose intersection over union with an event is above this one meets it
MAX_SEGMENTS = 8  # inserted clips a trajectory; the paper's policy uses 1.9 on average (section 5)

# The longest body that can be a pair of times. It bounds every search, so that a tag of 10 MB costs nothing.
MAX_BODY_CHARS = 80

# ASCII digits only: float() would take Unicode digits, `1_0`, `nan` and `1e9` as well. 21 decimals are the most that
# Python writes for a float without an exponent: 17 digits after 0.0001.
_TIME = r"[ \t\r\n]*([0-9]{1,9}(?:\.[0-9]{0,21})?)[ \t\r\n]*"
_BODY = re.compile(f"{_TIME},{_TIME}")


class Refusal(StrEnum):
    """Why a tag inserted nothing."""

    MALFORMED = "malformed"
    REVERSED = "reversed"  # or empty: START >= END
    PAST_END = "past_end"
    TOO_SHORT = "too_short"
    TOO_MANY = "too_many"
    NO_BUDGET = "no_budget"
    NOT_PAUSED = "not_paused"  # the engine ran past the tag, as speculative decoding can


@dataclass(frozen=True)
class Segment:
    """[start_seconds, end_seconds) of the clip, as the policy named it or as it was resolved."""

    start_seconds: float
    end_seconds: float

    @property
    def duration_seconds(self) -> float:
        return self.end_seconds - self.start_seconds

    def sample_bounds(self, sampling_rate: int) -> tuple[int, int]:
        """The samples [first, last) at `sampling_rate` hertz. SFT, rollout and inference all crop with this."""
        return round(self.start_seconds * sampling_rate), round(self.end_seconds * sampling_rate)


@dataclass(frozen=True)
class Tag:
    """A closed tag in a text: `text[start:end]` is the whole of it, and what its body means."""

    start: int
    end: int
    meaning: Segment | Refusal


def parse_body(body: str) -> Segment | Refusal:
    """What stands between `<seg>` and `</seg>`: a segment, or MALFORMED, or REVERSED."""
    match = _BODY.fullmatch(body) if len(body) <= MAX_BODY_CHARS else None
    if match is None:
        return Refusal.MALFORMED
    segment = Segment(float(match[1]), float(match[2]))
    return segment if segment.start_seconds < segment.end_seconds else Refusal.REVERSED


def find_tags(text: str) -> list[Tag]:
    """Every `</seg>` of `text` with the nearest `<seg>` before it, in linear time.

    A closing tag without an opening one since the previous close is a MALFORMED tag of its own.
    """
    tags: list[Tag] = []
    floor = 0
    while (close := text.find(CLOSE_TAG, floor)) >= 0:
        end = close + len(CLOSE_TAG)
        open_ = text.rfind(OPEN_TAG, floor, close)
        if open_ < 0:
            tags.append(Tag(close, end, Refusal.MALFORMED))
        else:
            tags.append(Tag(open_, end, parse_body(text[open_ + len(OPEN_TAG) : close])))
        floor = end
    return tags


def resolve(
    segment: Segment, duration_seconds: float, min_segment_seconds: float = MIN_SEGMENT_SECONDS
) -> Segment | Refusal:
    """Cut END to the duration; refuse what starts at or past the end, or is shorter than `min_segment_seconds`."""
    if segment.start_seconds >= segment.end_seconds:
        return Refusal.REVERSED
    if segment.start_seconds >= duration_seconds:
        return Refusal.PAST_END
    cut = Segment(segment.start_seconds, min(segment.end_seconds, duration_seconds))
    # A tag of exactly the minimum must pass whatever its decimals: 1.2 - 1.0 is 0.19999999999999996.
    return cut if cut.duration_seconds >= min_segment_seconds - 1e-9 else Refusal.TOO_SHORT


def format_tag(segment: Segment) -> str:
    """The tag as our data writes it: two decimals, one blank after the comma."""
    return f"{OPEN_TAG}{segment.start_seconds:.2f}, {segment.end_seconds:.2f}{CLOSE_TAG}"


def union_seconds(segments: Sequence[Segment]) -> float:
    """Seconds that at least one of the segments covers."""
    total, reached = 0.0, 0.0
    for segment in sorted(segments, key=lambda s: s.start_seconds):
        total += max(0.0, segment.end_seconds - max(segment.start_seconds, reached))
        reached = max(reached, segment.end_seconds)
    return total


def shared_seconds(some: Sequence[Segment], others: Sequence[Segment]) -> float:
    """Seconds that segments of both cover."""
    return union_seconds(some) + union_seconds(others) - union_seconds([*some, *others])


def iou(some: Sequence[Segment], others: Sequence[Segment]) -> float:
    """Intersection over union of the seconds that each covers, from 0 to 1."""
    union = union_seconds([*some, *others])
    return shared_seconds(some, others) / union if union else 0.0


def overlap_ratio(segments: Sequence[Segment]) -> float:
    """1 - union / sum of durations: 0 when nothing is heard twice, towards 1 as the same seconds are named again."""
    total = sum(segment.duration_seconds for segment in segments)
    return max(0.0, 1.0 - union_seconds(segments) / total) if total > 0 else 0.0
