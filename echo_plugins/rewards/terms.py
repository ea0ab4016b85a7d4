"""Reward terms: each a plain function of one finished trajectory, named by what it pays for.

A term takes a `Record` (and keyword parameters that a preset may set) and returns a number, before its weight. To add
one, decorate it with `@term(NAME)` here, or keep it anywhere and name it in a preset as `path/to/file.py:function`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..relisten.segment import CLOSE_TAG, Segment
from ..relisten.trajectory import Attempt, StopReason
from ..relisten.transcript import Transcript, match_choice, parse

Term = Callable[..., float]

TERMS: dict[str, Term] = {}


def term(name: str) -> Callable[[Term], Term]:
    """Register a term under `name`, which presets and logs use."""

    def register(function: Term) -> Term:
        if name in TERMS:
            raise ValueError(f"two reward terms are called {name!r}")
        TERMS[name] = function
        return function

    return register


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

    Raises ValueError when the ground truth is not one of the choices: such a row could never be answered.
    """

    text: str
    ground_truth: str
    choices: tuple[str, ...] = ()
    duration_seconds: float = 0.0
    attempts: tuple[Attempt, ...] = ()
    stop_reason: StopReason = StopReason.ANSWERED
    answer_logprobs: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.choices and match_choice(self.ground_truth, self.choices) is None:
            raise ValueError(f"the ground truth {self.ground_truth!r} is not one of the choices {list(self.choices)}")

    @property
    def failed(self) -> bool:
        return self.stop_reason is StopReason.ERROR

    @property
    def inserted(self) -> tuple[Segment, ...]:
        """The segments whose clips were in fact put into the context."""
        return tuple(a.segment for a in self.attempts if a.inserted and a.segment is not None)

    @cached_property
    def transcript(self) -> Transcript:
        return parse(self.text)

    @cached_property
    def correct(self) -> bool:
        """The one answer block names the right choice, strictly; for an open question it is the ground truth itself."""
        answer = self.transcript.answer
        if not self.choices:
            return answer is not None and _plain(answer) == _plain(self.ground_truth)
        said = match_choice(answer, self.choices)
        return said is not None and said == match_choice(self.ground_truth, self.choices)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


@term("format")
def well_formed(record: Record) -> float:
    """1 for exactly one think block and then exactly one answer block."""
    return float(record.transcript.well_formed)


@term("accuracy")
def accuracy(record: Record) -> float:
    """1 for the right answer."""
    return float(record.correct)


@term("segment")
def segment(record: Record) -> float:
    """1 for a right answer after at least one clip was inserted: a tag that inserted nothing earns nothing."""
    return float(record.correct and bool(record.inserted))


_BREAK = re.compile(re.escape(CLOSE_TAG) + r"\s*[A-Z<]")


@term("consistency")
def consistency(record: Record, *, per_tag: float = 0.1, floor: float = -0.5) -> float:
    """-`per_tag` for each `</seg>` after which a capital or a `<` comes next, blanks apart; down to `floor`.

    What goes on in the sentence that named the segment costs nothing.
    """
    return max(floor, -per_tag * len(_BREAK.findall(record.text)))
