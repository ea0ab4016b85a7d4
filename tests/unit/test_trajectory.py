"""The turn step, with a byte tokenizer that also has merged tokens, against scripted and against hostile engines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_plugins.model import QWEN2_5_OMNI
from echo_plugins.relisten.segment import MAX_SEGMENTS, Refusal, Segment, find_tags
from echo_plugins.relisten.trajectory import (
    MAX_TAG_CHARS,
    Settings,
    SpecialIds,
    StopReason,
    Trajectory,
    expand_placeholders,
)

RATE = 16_000
MERGED = [
    b">,",
    b"></",
    b"><",
    b">\n",
    b"</",
    b"seg",
    b"<seg>",
    b"</seg>",
    b"</seg>, ",
    b", ",
    b"1.0, 2.5",
    b"\xe4\xbd",
]
AUDIO, BOS, EOS, END, ENDOFTEXT = range(256 + len(MERGED), 256 + len(MERGED) + 5)
SPECIAL = {AUDIO: b"<|AUDIO|>", BOS: b"<|audio_bos|>", EOS: b"<|audio_eos|>", END: b"<|im_end|>", ENDOFTEXT: b"<|eot|>"}
IDS = SpecialIds(AUDIO, BOS, EOS, frozenset({END, ENDOFTEXT}))
PROMPT = [BOS, AUDIO, EOS, *b"what?"]


def token_bytes(token: int) -> bytes:
    return bytes([token]) if token < 256 else SPECIAL.get(token) or MERGED[token - 256]


def decode(ids: Sequence[int]) -> str:
    return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")


def encode(text: str) -> list[int]:
    return list(text.encode())


def merged(text: bytes) -> int:
    return 256 + MERGED.index(text)


def new_trajectory(max_response_tokens: int = 4_000, seconds: float = 10.0, **options: object) -> Trajectory:
    return Trajectory(
        PROMPT,
        int(seconds * RATE),
        RATE,
        IDS,
        Settings(max_response_tokens, **options),  # type: ignore[arg-type]
        decode,
        encode,
        QWEN2_5_OMNI.num_audio_tokens,
    )


class ScriptedEngine:
    """Plays a token stream as vLLM would: up to the token that completes a stop string, an eos, or `max_tokens`."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = list(script)
        self.at = 0

    def answer(self, max_tokens: int, stop: tuple[str, ...]) -> list[int]:
        sampled: list[int] = []
        while self.at < len(self.script) and len(sampled) < max_tokens:
            sampled.append(self.script[self.at])
            self.at += 1
            if sampled[-1] in IDS.stop or any(text in decode(sampled[-8:]) for text in stop):
                break
        return sampled


@dataclass
class Played:
    trajectory: Trajectory
    turns: list[list[int]]
    logprobs: list[float]


def play(trajectory: Trajectory, script: Sequence[int], with_logprobs: bool = True) -> Played:
    engine = ScriptedEngine([*script, END])
    turns: list[list[int]] = []
    logprobs: list[float] = []
    while (turn := trajectory.next_turn()) is not None:
        sampled = engine.answer(turn.max_tokens, turn.stop)
        values = [-0.25 - len(logprobs) - index for index in range(len(sampled))]
        turns.append(sampled)
        logprobs += values
        trajectory.absorb(sampled, values if with_logprobs else None, None)
    return Played(trajectory, turns, logprobs)


def check_invariants(trajectory: Trajectory, max_response_tokens: int) -> None:
    """What holds after any token stream from any engine."""
    ids, mask, clips = trajectory.response_ids, trajectory.response_mask, trajectory.clips
    assert len(ids) == len(mask) <= max_response_tokens
    assert set(mask) <= {0, 1}
    if trajectory.response_logprobs is not None:
        assert len(trajectory.response_logprobs) == len(ids)
        assert all(value == 0.0 for value, kept in zip(trajectory.response_logprobs, mask, strict=True) if not kept)

    runs = [len(list(run)) for token, run in groupby(ids) if token == AUDIO]
    assert runs == [clip.num_tokens for clip in clips]
    assert trajectory.engine_response_ids.count(AUDIO) == len(clips) <= MAX_SEGMENTS
    assert expand_placeholders(trajectory.engine_response_ids, AUDIO, runs) == ids
    for clip in clips:
        end = clip.position + clip.num_tokens + 2
        assert ids[clip.position : end] == [BOS, *[AUDIO] * clip.num_tokens, EOS]
        assert mask[clip.position : end] == [0] * (clip.num_tokens + 2)
        assert 0 <= clip.start_sample < clip.end_sample <= trajectory.duration_seconds * RATE
        assert clip.end_sample - clip.start_sample >= 0.2 * RATE - 1
        assert clip.num_tokens == QWEN2_5_OMNI.num_audio_tokens(clip.end_sample - clip.start_sample)
        assert "</seg>" in decode(ids[: clip.position])[-12:]

    inserted = [attempt.segment for attempt in trajectory.attempts if attempt.inserted]
    assert inserted == [clip.segment for clip in clips]
    assert all((attempt.segment is None) != (attempt.refusal is None) for attempt in trajectory.attempts)
    assert all(len(attempt.text) <= MAX_TAG_CHARS for attempt in trajectory.attempts)
    assert (trajectory.next_turn() is None) == (trajectory.stop_reason is not None)
    if trajectory.stop_reason is StopReason.ANSWERED:
        assert ids[-1] in IDS.stop and mask[-1] == 1


TAGGY = st.sampled_from(
    [
        b"<seg>1.0, 2.5</seg>",
        b"<seg>1.0, 2.5</seg>, and ",
        b"<seg>0, 0.1</seg>",
        b"<seg>9.9, 30</seg>",
        b"<seg>3, 2</seg>",
        b"<seg>40, 50</seg>",
        b"<seg>1.2.3, 4</seg>",
        b"</seg>",
        b"<seg>",
        b"<seg>4,5</seg><seg>5,6</seg>",
        b"</think><answer>A</answer>",
        b"text \xe4\xbd\xa0 ",
    ]
)
# Bytes, merged tokens, whole tags; eos now and then. Never a placeholder: the sampler bans them.
STREAM = st.lists(
    st.one_of(
        TAGGY.map(list),
        st.integers(0, 255 + len(MERGED)).map(lambda token: [token]),
        st.sampled_from([[merged(token)] for token in MERGED]),
        st.just([*b"<seg>2, 4", merged(b"</"), *b"seg", merged(b">,")]),
        st.just([*b"<seg>2, 4", merged(b"</"), *b"seg", merged(b"><"), *b"seg>1,3</seg>"]),
        st.sampled_from([[END], [ENDOFTEXT]]),
    ),
    max_size=40,
).map(lambda parts: [token for part in parts for token in part])


@settings(max_examples=400)
@given(
    stream=STREAM,
    budget=st.one_of(st.integers(1, 60), st.integers(61, 2_000)),
    seconds=st.floats(0.01, 60),
    straddle=st.sampled_from(["cut", "keep"]),
    relisten=st.booleans(),
    max_segments=st.integers(0, MAX_SEGMENTS),
)
def test_any_stream_from_a_stopping_engine_keeps_the_invariants(
    stream: list[int], budget: int, seconds: float, straddle: str, relisten: bool, max_segments: int
) -> None:
    trajectory = new_trajectory(budget, seconds, straddle=straddle, relisten=relisten, max_segments=max_segments)
    engine = ScriptedEngine([*stream, END])
    sampled: list[int] = []
    while (turn := trajectory.next_turn()) is not None:
        assert turn.engine_ids == PROMPT + trajectory.engine_response_ids
        assert turn.max_tokens == budget - len(trajectory.response_ids) >= 1
        assert turn.stop == (("</seg>",) if relisten and len(trajectory.clips) < max_segments else ())
        before, tokens = list(trajectory.response_ids), engine.answer(turn.max_tokens, turn.stop)
        trajectory.absorb(tokens, [-1.0] * len(tokens), None)
        sampled += tokens
        check_invariants(trajectory, budget)
        # Nothing is rewritten but the one straddling token.
        added = trajectory.response_ids[len(before) :]
        assert trajectory.response_ids[: len(before)] == before
        assert added[: len(tokens) - 1] == tokens[:-1]
        assert added[len(tokens) - 1] == tokens[-1] or (straddle == "cut" and trajectory.attempts[-1].straddled)
    if straddle == "keep" or not any(attempt.straddled for attempt in trajectory.attempts):
        kept = [token for token, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if mask]
        assert kept == sampled
    if not relisten or max_segments == 0:
        assert not trajectory.clips
    if sampled[-1] in IDS.stop:
        assert trajectory.stop_reason is StopReason.ANSWERED
    assert trajectory.stop_reason is not StopReason.ERROR


@settings(max_examples=400)
@given(
    answers=st.lists(
        st.tuples(
            st.lists(st.one_of(TAGGY.map(list), st.integers(0, ENDOFTEXT).map(lambda token: [token])), max_size=12).map(
                lambda parts: [token for part in parts for token in part]
            ),
            st.booleans(),
            st.sampled_from([None, "stop", "length", "completed", "abort"]),
        ),
        max_size=12,
    ),
    budget=st.integers(1, 600),
    straddle=st.sampled_from(["cut", "keep"]),
)
def test_no_answer_of_a_hostile_engine_breaks_the_invariants(
    answers: list[tuple[list[int], bool, str | None]], budget: int, straddle: str
) -> None:
    trajectory = new_trajectory(budget, straddle=straddle)
    for tokens, has_logprobs, reason in answers:
        if trajectory.stop_reason is not None:
            with pytest.raises(ValueError, match="ended"):
                trajectory.absorb(tokens, None, reason)
            break
        left = trajectory.tokens_left
        trajectory.absorb(tokens, [-1.0] * len(tokens) if has_logprobs else None, reason)
        check_invariants(trajectory, budget)
        if not tokens or len(tokens) > left or {AUDIO, BOS, EOS} & set(tokens) or reason == "abort":
            assert trajectory.stop_reason is StopReason.ERROR and trajectory.error
        if not has_logprobs and trajectory.stop_reason is not StopReason.ERROR:
            assert trajectory.response_logprobs is None


def test_a_clip_follows_its_tag_and_sampling_goes_on_after_it() -> None:
    played = play(new_trajectory(), b"in <seg>1.0, 2.5</seg> a dog <seg>4, 5</seg>. done")
    trajectory = played.trajectory
    assert [clip.segment for clip in trajectory.clips] == [Segment(1.0, 2.5), Segment(4.0, 5.0)]
    assert [(clip.start_sample, clip.end_sample) for clip in trajectory.clips] == [(16_000, 40_000), (64_000, 80_000)]
    assert trajectory.text() == "in <seg>1.0, 2.5</seg> a dog <seg>4, 5</seg>. done"
    assert trajectory.num_turns == 3
    assert decode(trajectory.response_ids[: trajectory.clips[0].position]) == "in <seg>1.0, 2.5</seg>"
    kept = [
        value for value, mask in zip(trajectory.response_logprobs or [], trajectory.response_mask, strict=True) if mask
    ]
    assert kept == played.logprobs


def test_a_straddling_token_is_cut_to_the_tag_and_its_rest_dropped() -> None:
    trajectory = play(new_trajectory(), [*b"<seg>1, 2</seg", merged(b">,"), *b" so"]).trajectory
    position = trajectory.clips[0].position
    assert trajectory.response_ids[position - 1] == ord(">")
    assert trajectory.response_mask[position - 2 : position] == [1, 0]
    assert (trajectory.response_logprobs or [])[position - 1] == 0.0
    assert trajectory.attempts[0].straddled
    assert trajectory.text() == "<seg>1, 2</seg> so"


def test_a_kept_straddling_token_stays_as_sampled_with_the_clip_after_it() -> None:
    trajectory = play(new_trajectory(straddle="keep"), [*b"<seg>1, 2</seg", merged(b">,"), *b" so"]).trajectory
    position = trajectory.clips[0].position
    assert trajectory.response_ids[position - 1] == merged(b">,")
    assert trajectory.response_mask[position - 1] == 1
    assert trajectory.attempts[0].straddled
    assert trajectory.text() == "<seg>1, 2</seg>, so"


def test_a_refused_tag_is_never_cut() -> None:
    trajectory = play(new_trajectory(), [*b"<seg>2, 1</seg", merged(b">,"), *b" so"]).trajectory
    assert trajectory.response_ids == [*b"<seg>2, 1</seg", merged(b">,"), *b" so", END]
    assert trajectory.response_mask == [1] * len(trajectory.response_ids)


@pytest.mark.parametrize(("first", "straddle"), [(b"<seg>1, 2</seg", "keep"), (b"<seg>2, 1</seg", "cut")])
def test_a_straddling_token_left_in_can_open_the_next_tag(first: bytes, straddle: Literal["cut", "keep"]) -> None:
    script = [*first, merged(b"><"), *b"seg>3, 4</seg> ok"]
    trajectory = play(new_trajectory(straddle=straddle), script).trajectory
    assert [attempt.text for attempt in trajectory.attempts] == [decode(list(first)) + ">", "<seg>3, 4</seg>"]
    assert trajectory.clips[-1].segment == Segment(3.0, 4.0)


@pytest.mark.parametrize(
    ("tag", "refusal"),
    [
        (b"<seg>1.2.3, 4</seg>", Refusal.MALFORMED),
        (b"<seg>nan, 4</seg>", Refusal.MALFORMED),
        (b"</seg>", Refusal.MALFORMED),
        (b"<seg>5, 4</seg>", Refusal.REVERSED),
        (b"<seg>4, 4</seg>", Refusal.REVERSED),
        (b"<seg>10, 11</seg>", Refusal.PAST_END),
        (b"<seg>1, 1.1</seg>", Refusal.TOO_SHORT),
        (b"<seg>9.9, 12</seg>", Refusal.TOO_SHORT),
    ],
)
def test_a_refused_segment_inserts_nothing_and_generation_goes_on(tag: bytes, refusal: Refusal) -> None:
    trajectory = play(new_trajectory(), tag + b" still <seg>1, 2</seg> here").trajectory
    assert [attempt.refusal for attempt in trajectory.attempts] == [refusal, None]
    assert len(trajectory.clips) == 1
    assert trajectory.stop_reason is StopReason.ANSWERED


def test_a_clip_that_does_not_fit_is_refused_whole_and_the_rest_is_sampled() -> None:
    tag = b"<seg>0, 9</seg>"  # 225 audio tokens
    budget = len(tag) + 225 + 2
    trajectory = play(new_trajectory(budget), tag + b" so").trajectory
    assert trajectory.attempts[0].refusal is Refusal.NO_BUDGET
    assert trajectory.response_ids == [*tag, *b" so", END]
    fits = play(new_trajectory(budget + 1), tag + b" so").trajectory
    assert len(fits.clips) == 1
    assert len(fits.response_ids) == budget + 1
    assert fits.stop_reason is StopReason.LENGTH


def test_a_segment_of_no_audio_token_is_too_short_whatever_the_minimum() -> None:
    trajectory = play(new_trajectory(min_segment_seconds=0.001), b"<seg>1, 1.01</seg> so").trajectory
    assert trajectory.attempts[0].refusal is Refusal.TOO_SHORT
    assert not trajectory.clips


def test_after_the_last_allowed_segment_there_is_no_stop_and_the_model_can_answer() -> None:
    trajectory = play(new_trajectory(max_segments=2), b"<seg>1, 2</seg>" * 4 + b"<answer>A</answer>").trajectory
    assert len(trajectory.clips) == 2
    assert [attempt.refusal for attempt in trajectory.attempts] == [None, None, Refusal.TOO_MANY, Refusal.TOO_MANY]
    assert trajectory.num_turns == 3
    assert trajectory.text().endswith("<answer>A</answer>")


def test_refused_tags_do_not_use_up_the_allowed_segments() -> None:
    trajectory = play(new_trajectory(max_segments=1), b"<seg>2, 1</seg>" * 5 + b"<seg>1, 2</seg>").trajectory
    assert len(trajectory.clips) == 1


def test_grounded_mode_reads_tags_and_inserts_nothing() -> None:
    trajectory = play(new_trajectory(relisten=False), b"<seg>1, 2</seg> a <seg>3, 1</seg> b").trajectory
    assert not trajectory.clips
    assert trajectory.num_turns == 1
    assert [(attempt.segment, attempt.refusal) for attempt in trajectory.attempts] == [
        (Segment(1.0, 2.0), None),
        (None, Refusal.REVERSED),
    ]
    assert not any(attempt.inserted for attempt in trajectory.attempts)


def test_the_eos_that_was_sampled_is_trained_on_and_none_is_made_up() -> None:
    answered = play(new_trajectory(), b"yes").trajectory
    assert answered.response_ids == [*b"yes", END] and answered.response_mask[-1] == 1
    assert answered.stop_reason is StopReason.ANSWERED
    cut_off = play(new_trajectory(2), b"yes").trajectory
    assert cut_off.response_ids == [*b"ye"] and cut_off.stop_reason is StopReason.LENGTH


def test_an_eos_on_the_last_token_of_the_budget_is_an_answer() -> None:
    assert play(new_trajectory(4), b"yes").trajectory.stop_reason is StopReason.ANSWERED


def test_a_tag_the_engine_ran_past_is_recorded_and_inserts_nothing() -> None:
    trajectory = new_trajectory()
    trajectory.absorb([*b"<seg>1, 2</seg> and on", END], None, "stop")
    assert [attempt.refusal for attempt in trajectory.attempts] == [Refusal.NOT_PAUSED]
    assert trajectory.stop_reason is StopReason.ANSWERED


def test_missing_log_probs_stay_missing_and_none_is_invented() -> None:
    trajectory = new_trajectory()
    trajectory.absorb([*b"<seg>1, 2</seg>"], [-1.0] * 15, None)
    assert len(trajectory.response_logprobs or []) == len(trajectory.response_ids)
    trajectory.absorb([*b"ok", END], None, None)
    assert trajectory.response_logprobs is None
    with pytest.raises(ValueError, match="2 log-probs for 3 tokens"):
        new_trajectory().absorb([1, 2, 3], [-1.0, -1.0], None)


@pytest.mark.parametrize("token", [AUDIO, BOS, EOS])
def test_a_sampled_placeholder_ends_in_an_error_before_it_enters_a_stream(token: int) -> None:
    trajectory = new_trajectory()
    trajectory.absorb([*b"a", token], None, None)
    assert trajectory.stop_reason is StopReason.ERROR
    assert str(token) in (trajectory.error or "")
    assert trajectory.response_ids == trajectory.engine_response_ids == []


def test_a_trajectory_that_failed_keeps_what_was_sampled() -> None:
    trajectory = new_trajectory()
    trajectory.absorb([*b"<seg>1, 2</seg>"], None, None)
    held = list(trajectory.response_ids)
    trajectory.fail("engine died")
    assert trajectory.response_ids == held
    assert trajectory.next_turn() is None
    assert trajectory.error == "engine died"


def test_the_log_keeps_only_the_head_of_an_endless_tag() -> None:
    trajectory = play(new_trajectory(200_000), b"<seg>" + b"1" * 100_000 + b"</seg> ok").trajectory
    assert trajectory.attempts[0].refusal is Refusal.MALFORMED
    assert len(trajectory.attempts[0].text) == MAX_TAG_CHARS


def test_expanding_counts_placeholders_against_clips() -> None:
    assert expand_placeholders([1, AUDIO, 2, AUDIO], AUDIO, [2, 0]) == [1, AUDIO, AUDIO, 2]
    for counts in ([], [1], [1, 1, 1]):
        with pytest.raises(ValueError, match="2 audio placeholders"):
            expand_placeholders([AUDIO, AUDIO], AUDIO, counts)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_response_tokens": 0},
        {"max_response_tokens": 9, "max_segments": -1},
        {"max_response_tokens": 9, "min_segment_seconds": 0.0},
        {"max_response_tokens": 9, "straddle": "drop"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"needed|straddle"):
        Settings(**wrong)  # type: ignore[arg-type]


@settings(max_examples=200)
@given(stream=STREAM, straddle=st.sampled_from(["cut", "keep"]))
def test_the_attempts_are_the_tags_of_the_text(stream: list[int], straddle: str) -> None:
    trajectory = play(new_trajectory(straddle=straddle), stream).trajectory
    text = trajectory.text()
    written = [text[tag.start : tag.end][:MAX_TAG_CHARS] for tag in find_tags(text)]
    assert [attempt.text for attempt in trajectory.attempts] == written


def tags_of(text: str) -> Iterator[str]:
    return (match[0] for match in re.finditer(r"<seg>[^<]*</seg>", text))


def test_a_thousand_tags_take_linear_time() -> None:
    trajectory = play(new_trajectory(100_000, max_segments=0), b"<seg>2, 1</seg>" * 4_000).trajectory
    assert len(trajectory.attempts) == sum(1 for _ in tags_of(trajectory.text())) == 4_000
