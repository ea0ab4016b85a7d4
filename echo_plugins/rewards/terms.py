"""Reward terms: each a plain function of one finished trajectory, named by what it pays for.

A term takes a `Record` (and keyword parameters that a preset may set) and returns a number, before its weight. To add
one, decorate it with `@term(NAME)` here, or keep it anywhere and name it in a preset as `path/to/file.py:function`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..relisten.segment import CLOSE_TAG, Segment, find_tags, iou, overlap_ratio
from ..relisten.trajectory import Attempt, StopReason
from ..relisten.transcript import Transcript, is_right, parse

Term = Callable[..., float]

TERMS: dict[str, Term] = {}

Confidence = Literal["none", "linear", "quadratic"]


class MissingInformation(LookupError):
    """What a term needs is not in the record: no log-probabilities, no events. The term is 0 there, and counted."""


def term(name: str) -> Callable[[Term], Term]:
    """Register a term under `name`, which presets and logs use."""

    def register(function: Term) -> Term:
        if name in TERMS:
            raise ValueError(f"two reward terms are called {name!r}")
        TERMS[name] = function
        return function

    return register


@dataclass(frozen=True)
class Event(Segment):
    """A labelled stretch of the clip, from the data set."""

    label: str


@dataclass(frozen=True)
class Record:
    """One finished trajectory, as a term sees it.

    Args:
        text: the response without the placeholders of the observations, so that what follows a tag in it is what the
            policy wrote next.
        ground_truth: the right choice (its text or letter), or the answer in words where there are no choices.
        choices: the choices in the order of the prompt; empty for an open question.
        duration_seconds: length of the audio that the segments are named in.
        attempts: every tag, what became of it, and whether its clip was inserted.
        stop_reason: why the trajectory ended; ERROR is a failed rollout, which scores 0.
        answer_logprobs: of each sampled token of the answer, None where there is no answer or the engine gave none.
        question: without the choices.
        events: what can be heard when, None where the data set does not say.

    Raises ValueError when the ground truth is not one of the choices: such a row could never be answered.
    """

    text: str
    ground_truth: str
    choices: tuple[str, ...] = ()
    duration_seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    stop_reason: StopReason = StopReason.ANSWERED
    answer_logprobs: Sequence[float] | None = None
    question: str = ""
    events: tuple[Event, ...] | None = None

    def __post_init__(self) -> None:
        is_right(None, self.ground_truth, self.choices)

    @property
    def failed(self) -> bool:
        return self.stop_reason is StopReason.ERROR

    @cached_property
    def transcript(self) -> Transcript:
        return parse(self.text)

    @cached_property
    def correct(self) -> bool:
        """The one answer block names the right choice, strictly; for an open question it is the ground truth itself."""
        return is_right(self.transcript.answer, self.ground_truth, self.choices)

    @cached_property
    def _reasoned_with(self) -> tuple[Attempt, ...]:
        """The tags before the answer. What comes after it cannot have led to it, and earns nothing."""
        _, opening, after = self.text.partition("<answer>")
        return self.attempts[: len(self.attempts) - len(find_tags(after))] if opening else self.attempts

    @property
    def named(self) -> tuple[Segment, ...]:
        """The segments that were named before the answer and not refused."""
        return tuple(attempt.segment for attempt in self._reasoned_with if attempt.segment is not None)

    @property
    def heard(self) -> tuple[Segment, ...]:
        """Those of them whose clips were in fact put into the context."""
        return tuple(a.segment for a in self._reasoned_with if a.inserted and a.segment is not None)

    @property
    def answer_probability(self) -> float:
        """With which probability the whole answer was sampled, all of its tokens: to pad it only makes it smaller.
        Raises MissingInformation."""
        if self.answer_logprobs is None:
            raise MissingInformation("there are no log-probabilities of the answer")
        return math.exp(math.fsum(self.answer_logprobs))


@term("format")
def well_formed(record: Record) -> float:
    """1 for exactly one think block and then exactly one answer block."""
    return float(record.transcript.well_formed)


@term("accuracy")
def accuracy(record: Record, *, confidence: Confidence = "none") -> float:
    """1 for the right answer; with `confidence`, from -1 to 1 by the probability p of the answer.

    linear: p when right, -p when wrong. quadratic: 1 - (1 - p)^2 when right, -p^2 when wrong (the released code's
    forms, there of the answer's first token only). No one answer block: 0.
    """
    if confidence == "none":
        return float(record.correct)
    if confidence not in ("linear", "quadratic"):
        raise ValueError(f"confidence is none, linear or quadratic, not {confidence!r}")
    if record.transcript.answer is None:
        return 0.0
    probability = record.answer_probability
    if confidence == "linear":
        return probability if record.correct else -probability
    return 1 - (1 - probability) ** 2 if record.correct else -(probability**2)


@term("segment")
def segment(record: Record, *, quota: int = 1, confidence: Confidence = "none") -> float:
    """1 for a right answer after at least `quota` clips were inserted, for fewer their share of it; with `confidence`,
    times what `accuracy` gives. A tag that inserted nothing, or came after the answer, earns nothing.
    """
    if quota < 1:
        raise ValueError(f"quota is 1 or more, not {quota}")
    return max(0.0, accuracy(record, confidence=confidence)) * min(len(record.heard), quota) / quota


@term("non_overlap")
def non_overlap(record: Record) -> float:
    """The share of the inserted seconds that were not heard before: 1 / n for n times the same; 0 without a clip."""
    return 1 - overlap_ratio(record.heard) if record.heard else 0.0


@term("grounding")
def grounding(record: Record, *, about: Literal["mentioned", "all"] = "mentioned") -> float:
    """Intersection over union, in seconds, of all named segments with the events that the question is about.

    Those are the events whose label the question or the right answer mentions, as whole words; all events where it
    mentions none, or where `about` is all. Raises MissingInformation where the data set names no events.
    """
    if about not in ("mentioned", "all"):
        raise ValueError(f"about is mentioned or all, not {about!r}")
    if not record.events:
        raise MissingInformation("the row has no events")
    said = f"{record.question} {record.ground_truth}"
    mentioned = [event for event in record.events if mentions(said, event.label)]
    events = record.events if about == "all" or not mentioned else mentioned
    return iou(record.named, events)


def mentions(text: str, label: str) -> bool:
    """Whether `text` has the label as whole words, in any case."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) is not None


_BREAK = re.compile(re.escape(CLOSE_TAG) + r"\s*[A-Z<]")


@term("consistency")
def consistency(record: Record, *, per_tag: float = 0.1, floor: float = -0.5) -> float:
    """-`per_tag` for each `</seg>` after which a capital or a `<` comes next, blanks apart; down to `floor`.

    What goes on in the sentence that named the segment costs nothing.
    """
    return max(floor, 0.0 - per_tag * len(_BREAK.findall(record.text)))
