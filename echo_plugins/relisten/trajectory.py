"""The turn step: sampled ids in, the next engine call out. RL rollout and inference both run this and nothing else.

Token in, token out. Two streams are kept. The engine's holds one audio placeholder a clip, because the engine expands
it itself; the trainer's holds the expanded placeholders. Masks and log-probs are as long as the trainer's response.

    trajectory = Trajectory(...)
    while (turn := trajectory.next_turn()) is not None:
        output = engine(turn.engine_ids, max_tokens=turn.max_tokens, stop=turn.stop, clips=trajectory.clips)
        trajectory.absorb(output.token_ids, output.logprobs, output.finish_reason)

The observation of rule 3 (DESIGN: the re-listen protocol) is `audio_bos, AUDIO x n, audio_eos`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

from .segment import CLOSE_TAG, MAX_SEGMENTS, MIN_SEGMENT_SECONDS, Refusal, Segment, Tag, find_tags, resolve

# What a log keeps of a tag as written: a policy can write megabytes between the brackets.
MAX_TAG_CHARS = 96
# What `force_answer` puts in takes no more than this, in any vocabulary of bytes or more.
MAX_FORCING_TOKENS = len("</think><answer>")


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWERED = "answered"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True)
class SpecialIds:
    """The model's audio tokens, and every id that ends a message. From the tokenizer by text, never as literals."""

    audio: int
    audio_bos: int
    audio_eos: int
    stop: frozenset[int]


@dataclass(frozen=True)
class Settings:
    """What the protocol leaves open.

    `max_response_tokens` counts sampled tokens and observations. `relisten=False` is grounded mode: tags are text, no
    pause and no clip. `straddle`: a token may hold the end of `</seg>` and more (`>,`); "cut" puts the plain `>` in its
    place as an observation before the clip, "keep" leaves it as sampled.
    """

    max_response_tokens: int
    max_segments: int = MAX_SEGMENTS
    min_segment_seconds: float = MIN_SEGMENT_SECONDS
    straddle: Literal["cut", "keep"] = "cut"
    relisten: bool = True

    def __post_init__(self) -> None:
        if self.max_response_tokens < 1 or self.max_segments < 0 or self.min_segment_seconds <= 0:
            raise ValueError(f"max_response_tokens >= 1, max_segments >= 0, min_segment_seconds > 0 are needed: {self}")
        if self.straddle not in ("cut", "keep"):
            raise ValueError(f'straddle is "cut" or "keep", not {self.straddle!r}')


@dataclass(frozen=True)
class Clip:
    """One inserted clip: samples [start_sample, end_sample) of the source, `num_tokens` audio tokens, and the index in
    the response of its `audio_bos`."""

    segment: Segment
    start_sample: int
    end_sample: int
    num_tokens: int
    position: int


@dataclass(frozen=True)
class Attempt:
    """One tag as written and what became of it: exactly one of `segment` (resolved) and `refusal` is set.

    `inserted` is False for a refusal, and for a segment that grounded mode only reads. `straddled`: the token that
    closed the tag held more than the tag.
    """

    text: str
    segment: Segment | None
    refusal: Refusal | None
    straddled: bool
    inserted: bool


@dataclass(frozen=True)
class Turn:
    """The next engine call: collapsed ids, the tokens that are left, and the stop strings (none: run to the end)."""

    engine_ids: list[int]
    max_tokens: int
    stop: tuple[str, ...]


def expand_placeholders(ids: Iterable[int], audio_id: int, counts: Sequence[int]) -> list[int]:
    """The engine's stream to the trainer's: the k-th `audio_id` becomes `counts[k]` of them.

    Raises ValueError when placeholders and counts differ in number.
    """
    expanded: list[int] = []
    used = 0
    for token in ids:
        if token != audio_id:
            expanded.append(token)
            continue
        if used < len(counts):
            expanded.extend([audio_id] * counts[used])
        used += 1
    if used != len(counts):
        raise ValueError(f"{used} audio placeholders but {len(counts)} clips")
    return expanded


class Trajectory:
    """One rollout: turns and observations up to a stop reason.

    Args:
        prompt_engine_ids: the prompt with one audio placeholder a clip, as the engine takes it.
        num_samples: length of the source clip at `sampling_rate`; segments resolve against it.
        decode: ids -> text, special tokens kept. encode: text -> ids, nothing added.
        count_audio_tokens: samples -> audio tokens, the model's own length formula.

    Read after every `absorb`: `response_ids`, `response_mask` (1 sampled, 0 observed), `response_logprobs` (None when
    the engine gave none), `engine_response_ids`, `clips`, `attempts`, `stop_reason`, `error`, `num_turns`.
    """

    def __init__(
        self,
        prompt_engine_ids: Sequence[int],
        num_samples: int,
        sampling_rate: int,
        ids: SpecialIds,
        settings: Settings,
        decode: Callable[[list[int]], str],
        encode: Callable[[str], list[int]],
        count_audio_tokens: Callable[[int], int],
    ) -> None:
        self._prompt = list(prompt_engine_ids)
        self._num_samples = num_samples
        self._sampling_rate = sampling_rate
        self._ids = ids
        self._settings = settings
        self._decode = decode
        self._encode = encode
        self._count_audio_tokens = count_audio_tokens
        self._scanned = 0  # tags that end in engine_response_ids[: _scanned] are recorded; each token is read once
        self._carry = ""  # what a straddling token held after its tag, where it was left in: `><` opens the next tag
        self.response_ids: list[int] = []
        self.response_mask: list[int] = []
        self.response_logprobs: list[float] | None = []
        self.engine_response_ids: list[int] = []
        self.clips: list[Clip] = []
        self.attempts: list[Attempt] = []
        self.stop_reason: StopReason | None = None
        self.error: str | None = None
        self.num_turns = 0

    @property
    def duration_seconds(self) -> float:
        return self._num_samples / self._sampling_rate

    @property
    def tokens_left(self) -> int:
        return self._settings.max_response_tokens - len(self.response_ids)

    def text(self) -> str:
        """The response as text, without the audio tokens of the observations and without eos."""
        unsaid = {self._ids.audio, self._ids.audio_bos, self._ids.audio_eos} | self._ids.stop
        return self._decode([token for token in self.engine_response_ids if token not in unsaid])

    def next_turn(self) -> Turn | None:
        """The next engine call, or None when the trajectory has ended."""
        if self.stop_reason is not None:
            return None
        return Turn(self._prompt + self.engine_response_ids, self.tokens_left, self._stop())

    def fail(self, error: str) -> None:
        """End with ERROR: the engine or the audio failed. What was sampled so far stays."""
        self.stop_reason, self.error = StopReason.ERROR, error

    def force_answer(self, max_more_tokens: int) -> None:
        """After LENGTH: open the answer with an observation, where none is open yet, and let the policy go on for that
        many tokens, without a pause. For inference under a budget; a rollout in training is never forced.

        Raises ValueError when the trajectory has not ended for its length.
        """
        if self.stop_reason is not StopReason.LENGTH:
            raise ValueError(f"an answer is forced where the budget has run out, not after {self.stop_reason}")
        said = self.text()
        opening = "" if "<answer>" in said else "<answer>" if "</think>" in said else "</think><answer>"
        ids = self._encode(opening)
        self._settings = replace(
            self._settings, max_response_tokens=len(self.response_ids) + len(ids) + max_more_tokens, max_segments=0
        )
        self._observe(ids, ids)
        self.stop_reason = None

    def absorb(
        self, token_ids: Sequence[int], logprobs: Sequence[float] | None, finish_reason: str | None = None
    ) -> None:
        """Take one engine answer: append it, act on the tag that it may end in, or end.

        `finish_reason` is the engine's; not every engine can tell "stop" from "length", so the ids decide.
        Raises ValueError when log-probs and ids differ in number, or when the trajectory has ended.
        """
        if self.stop_reason is not None:
            raise ValueError(f"the trajectory has ended ({self.stop_reason})")
        if logprobs is not None and len(logprobs) != len(token_ids):
            raise ValueError(f"{len(logprobs)} log-probs for {len(token_ids)} tokens")
        self.num_turns += 1
        if len(token_ids) > self.tokens_left:
            return self.fail(f"the engine returned {len(token_ids)} tokens where {self.tokens_left} were left")
        forbidden = {self._ids.audio, self._ids.audio_bos, self._ids.audio_eos}.intersection(token_ids)
        if forbidden:
            # Rule 5: the sampler bans them. One that came all the same would shift every clip after it.
            return self.fail(f"the engine sampled the placeholder ids {sorted(forbidden)}")

        pauses = bool(self._stop())
        self._extend(list(token_ids), logprobs, mask=1)
        self.engine_response_ids.extend(token_ids)
        if finish_reason in ("abort", "error"):
            return self.fail(f"the engine ended the turn with {finish_reason!r}")
        if not token_ids:
            return self.fail("the engine returned no token")

        paused = self._read_tags(pauses)
        if token_ids[-1] in self._ids.stop:
            self.stop_reason = StopReason.ANSWERED
        elif self.tokens_left <= 0 or not paused:
            # Short of the budget without eos or tag, the engine met its own limit: its context window.
            self.stop_reason = StopReason.LENGTH
        return None

    def _stop(self) -> tuple[str, ...]:
        can_insert = self._settings.relisten and len(self.clips) < self._settings.max_segments
        return (CLOSE_TAG,) if can_insert else ()

    def _extend(self, ids: list[int], logprobs: Sequence[float] | None, mask: int) -> None:
        self.response_ids.extend(ids)
        self.response_mask.extend([mask] * len(ids))
        if logprobs is None:
            self.response_logprobs = None  # absent for a part is absent: none is invented
        elif self.response_logprobs is not None:
            self.response_logprobs.extend(float(value) for value in logprobs)

    def _read_tags(self, pauses: bool) -> bool:
        """Record the tags closed since the last call and insert the clip of one that the last token closed.

        True when the engine paused at a tag, whatever became of it.
        """
        unread = self.engine_response_ids[self._scanned :]
        self._scanned = len(self.engine_response_ids)
        text = self._carry + self._decode(unread)
        tags = find_tags(text)
        if not tags:
            return False
        before = self._carry + self._decode(unread[:-1])
        paused = pauses and len(find_tags(before)) < len(tags)
        for tag in tags[:-1] if paused else tags:
            self._record(text, tag, self._pass_over(tag, pauses), straddled=False)
        if paused:
            tag = tags[-1]
            closing = text[len(before) : tag.end] if text.startswith(before) else None
            straddled = tag.end < len(text)
            self._carry = text[tag.end :]
            outcome = self._resolve(tag)
            if isinstance(outcome, Segment):
                outcome = self._insert(outcome, closing if straddled else None)
            self._record(text, tag, outcome, straddled)
            self._scanned = len(self.engine_response_ids)
        return paused

    def _resolve(self, tag: Tag) -> Segment | Refusal:
        if isinstance(tag.meaning, Refusal):
            return tag.meaning
        return resolve(tag.meaning, self.duration_seconds, self._settings.min_segment_seconds)

    def _pass_over(self, tag: Tag, pauses: bool) -> Segment | Refusal:
        """What to say of a tag at which the engine did not pause."""
        outcome = self._resolve(tag)
        if isinstance(outcome, Refusal) or not self._settings.relisten:
            return outcome
        return Refusal.NOT_PAUSED if pauses else Refusal.TOO_MANY

    def _record(self, text: str, tag: Tag, outcome: Segment | Refusal, straddled: bool) -> None:
        refusal = outcome if isinstance(outcome, Refusal) else None
        segment = outcome if isinstance(outcome, Segment) else None
        inserted = segment is not None and self._settings.relisten
        written = text[tag.start : tag.end]
        self.attempts.append(Attempt(written[:MAX_TAG_CHARS], segment, refusal, straddled, inserted))

    def _insert(self, segment: Segment, closing: str | None) -> Segment | Refusal:
        """Put the observation after the tag, all of it or nothing. `closing` is the part of the straddling last token
        that belongs to the tag, None when nothing is to be cut."""
        plain: list[int] = []
        if closing is not None and self._settings.straddle == "cut":
            ids = self._encode(closing)
            plain = ids if self._decode(ids) == closing else []
        first, last = segment.sample_bounds(self._sampling_rate)
        last = min(last, self._num_samples)
        num_tokens = self._count_audio_tokens(last - first)
        added = num_tokens + 2 + (len(plain) - 1 if plain else 0)
        if added >= self.tokens_left:  # at least one token must be left to go on with
            return Refusal.NO_BUDGET
        if num_tokens < 1:
            return Refusal.TOO_SHORT
        if plain:
            self._carry = ""
            for stream in (self.response_ids, self.response_mask, self.engine_response_ids):
                stream.pop()
            if self.response_logprobs is not None:
                self.response_logprobs.pop()
            self._observe(plain, plain)
        self.clips.append(Clip(segment, first, last, num_tokens, position=len(self.response_ids)))
        bos, audio, eos = self._ids.audio_bos, self._ids.audio, self._ids.audio_eos
        self._observe([bos, *[audio] * num_tokens, eos], [bos, audio, eos])
        return segment

    def _observe(self, ids: list[int], engine_ids: list[int]) -> None:
        self._extend(ids, [0.0] * len(ids) if self.response_logprobs is not None else None, mask=0)
        self.engine_response_ids.extend(engine_ids)
