"""Inference on real vLLM: the turn step end to end, rows that go wrong, and results that depend on the row alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from echo_plugins.audio import load, resolve_path
from echo_plugins.model import family_of
from echo_plugins.relisten.segment import MAX_SEGMENTS, Refusal
from echo_plugins.relisten.trajectory import StopReason, Trajectory
from eval.engine import EngineSettings, Outcome, Question, Sampling, running_engine

GREEDY = Sampling(temperature=0.0, max_tokens=300)


@pytest.fixture(scope="module")
def rows(soundscapes: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (soundscapes / "test.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def clip(rows: list[dict[str, Any]]) -> str:
    """A clip that all scripted segments lie in, or past the end of, as they mean to."""
    return next(row["audio"] for row in rows if 2.5 < row["duration"] < 9.0)


@pytest.fixture(scope="module")
def questions(soundscapes: Path, rows: list[dict[str, Any]]) -> list[Question]:
    """Questions that the tiny model babbles at."""
    return [
        Question(row["id"], str(soundscapes), row["audio"], row["question"], tuple(row["choices"])) for row in rows[:12]
    ]


def what_was_said(outcomes: list[Outcome]) -> list[tuple[str, str, int]]:
    return [(outcome.response, outcome.stop_reason, outcome.num_sampled_tokens) for outcome in outcomes]


def tokens_of(session: Any, *seconds: float) -> int:
    return sum(session.engine.count_audio_tokens(round(16_000 * duration)) for duration in seconds)


def test_named_segments_are_heard_and_the_answer_follows(engine_session: Any, clip: str) -> None:
    (outcome,) = engine_session.answer(engine_session.scripted("clips", clip), sampling=GREEDY)
    assert outcome.stop_reason is StopReason.ANSWERED
    assert [attempt.inserted for attempt in outcome.attempts] == [True, True]
    assert [attempt.straddled for attempt in outcome.attempts] == [True, False]
    # each clip with its bos and eos, and the plain `>` in place of the first tag's `>,`
    assert outcome.num_inserted_tokens == 1 + tokens_of(engine_session, 1.0, 0.5) + 4
    assert outcome.response == (
        "<think>First <seg>0.50, 1.50</seg> then <seg>2.00, 2.50</seg> again.</think><answer>one</answer>"
    )


@pytest.mark.parametrize(
    ("arm", "silent"),
    [({}, [False, False, False]), ({"clip": "silent"}, [False, True, True]), ({"deaf": True}, [True] * 3)],
)
def test_a_control_arm_hears_another_sound_at_the_same_places(
    engine_session: Any, clip: str, monkeypatch: pytest.MonkeyPatch, arm: dict[str, Any], silent: list[bool]
) -> None:
    heard: list[Any] = []
    generate = engine_session.engine.generate

    async def keeping(engine_ids: Any, clips: Any, *others: Any) -> Any:
        heard[:] = clips
        return await generate(engine_ids, clips, *others)

    monkeypatch.setattr(engine_session.engine, "generate", keeping)
    question = engine_session.scripted("clips", clip)
    (outcome,) = engine_session.answer(question, sampling=replace(GREEDY, **arm))
    assert outcome.stop_reason is StopReason.ANSWERED and [not sound.any() for sound in heard] == silent
    assert [len(sound) for sound in heard[1:]] == [16_000, 8_000]


def test_a_straddling_token_is_left_as_sampled_when_asked(engine_session: Any, clip: str) -> None:
    keep = Sampling(temperature=0.0, max_tokens=300, straddle="keep")
    (outcome,) = engine_session.answer(engine_session.scripted("clips", clip), sampling=keep)
    assert outcome.num_inserted_tokens == tokens_of(engine_session, 1.0, 0.5) + 4
    assert "</seg>, then" in outcome.response


def test_refused_segments_insert_nothing_and_generation_goes_on(engine_session: Any, clip: str) -> None:
    (outcome,) = engine_session.answer(engine_session.scripted("refusals", clip), sampling=GREEDY)
    assert outcome.stop_reason is StopReason.ANSWERED
    assert [attempt.refusal for attempt in outcome.attempts] == [
        Refusal.PAST_END,
        Refusal.TOO_SHORT,
        Refusal.REVERSED,
        Refusal.MALFORMED,
        None,
    ]
    assert outcome.response.endswith("<answer>two</answer>")


def test_after_the_last_allowed_segment_the_model_can_still_answer(engine_session: Any, clip: str) -> None:
    long = Sampling(temperature=0.0, max_tokens=600)
    (outcome,) = engine_session.answer(engine_session.scripted("many", clip), sampling=long)
    assert [attempt.inserted for attempt in outcome.attempts] == [True] * MAX_SEGMENTS + [False] * 2
    assert {attempt.refusal for attempt in outcome.attempts[MAX_SEGMENTS:]} == {Refusal.TOO_MANY}
    assert outcome.stop_reason is StopReason.ANSWERED


def test_what_is_banned_is_not_sampled_however_likely(engine_session: Any, clip: str) -> None:
    engine, sampling = engine_session.engine, Sampling(temperature=1.0, max_tokens=20)
    assert {engine.ids.audio, len(engine.tokenizer)} < set(engine.banned_ids)
    waveform = load(engine_session.audio_root / clip)
    trajectory = engine.trajectory(engine_session.scripted("nothing", clip), len(waveform), sampling)
    turn = trajectory.next_turn()
    params = engine.sampling_params(trajectory, turn, "row", sampling)
    params.logit_bias = dict.fromkeys(engine.banned_ids, 100.0)
    output = engine_session.run(engine.generate(turn.engine_ids, [waveform], [clip], params, "likely"))
    assert output.outputs[0].token_ids and not set(output.outputs[0].token_ids) & set(engine.banned_ids)


@pytest.mark.parametrize("mode", ["grounded", "plain"])
def test_nothing_is_inserted_in_the_other_modes(engine_session: Any, clip: str, mode: Any) -> None:
    sampling = Sampling(mode=mode, temperature=0.0, max_tokens=300)
    (outcome,) = engine_session.answer(engine_session.scripted("clips", clip), sampling=sampling)
    assert outcome.num_inserted_tokens == 0 and outcome.stop_reason is StopReason.ANSWERED
    assert [attempt.segment is not None for attempt in outcome.attempts] == [True, True]


def test_the_budget_counts_what_is_inserted(engine_session: Any, clip: str) -> None:
    tight = Sampling(temperature=0.0, max_tokens=22)
    (outcome,) = engine_session.answer(engine_session.scripted("clips", clip), sampling=tight)
    assert outcome.stop_reason is StopReason.LENGTH
    assert outcome.num_sampled_tokens + outcome.num_inserted_tokens == 22
    assert [attempt.refusal for attempt in outcome.attempts] == [Refusal.NO_BUDGET]


def test_many_at_once_say_what_each_says_alone(engine_session: Any, questions: list[Question], clip: str) -> None:
    session, sampling = engine_session, Sampling(temperature=0.0, max_tokens=40)
    asked = [*questions, session.scripted("clips", clip), session.scripted("many", clip)]

    async def listen(question: Question) -> Trajectory:
        waveform = load(resolve_path(question.audio_root, question.audio))
        trajectory = session.engine.trajectory(question, len(waveform), sampling)
        await session.engine.run(trajectory, waveform, question.audio, question.id, sampling)
        return trajectory

    async def listen_to_all() -> list[Trajectory]:
        return await asyncio.gather(*(listen(question) for question in asked))

    for one, other in zip(
        [session.run(listen(question)) for question in asked], session.run(listen_to_all()), strict=True
    ):
        assert_same_up_to_a_tie(one, other)


def assert_same_up_to_a_tie(one: Trajectory, other: Trajectory) -> None:
    """A batch adds up in another order than a row alone, so the likeliest of two equally likely tokens may change."""
    assert one.response_logprobs is not None and other.response_logprobs is not None
    pairs = zip(one.response_ids, other.response_ids, strict=False)
    same = next((place for place, (first, second) in enumerate(pairs) if first != second), len(one.response_ids))
    reach = min(same + 1, len(one.response_ids))
    np.testing.assert_allclose(one.response_logprobs[:reach], other.response_logprobs[:reach], atol=1e-3)


def test_sampling_depends_on_the_seed_and_the_row_not_on_order_or_company(
    engine_session: Any, questions: list[Question]
) -> None:
    sampling = Sampling(temperature=1.0, seed=1, max_tokens=60)
    forward = engine_session.answer(*questions, sampling=sampling)
    backward = engine_session.answer(*reversed(questions), sampling=sampling)
    assert what_was_said(forward) == what_was_said(backward[::-1])
    other = engine_session.answer(*questions, sampling=Sampling(temperature=1.0, seed=2, max_tokens=60))
    assert all(one.response != two.response for one, two in zip(forward, other, strict=True))
    again = [Question(f"{question.id}'", *list(vars(question).values())[1:]) for question in questions]
    renamed = engine_session.answer(*again, sampling=sampling)
    assert all(one.response != two.response for one, two in zip(forward, renamed, strict=True))


def test_more_prompts_at_once_than_fit_one_step_are_answered(engine_session: Any, clip: str) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=20)
    asked = [
        Question(f"{number}", str(engine_session.audio_root), clip, f"{number} " + "why " * 700, ("a", "b"))
        for number in range(16)
    ]
    assert len(engine_session.engine.prompt_ids(asked[0], "plain")) * len(asked) > 8192
    assert all(outcome.error is None for outcome in engine_session.answer(*asked, sampling=sampling))


def test_each_turn_has_a_seed_of_its_own() -> None:
    seeds = {Sampling(seed=seed).turn_seed(row, turn) for seed in (0, 1) for row in ("a", "b") for turn in (0, 1)}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def bad_audio(soundscapes: Path) -> dict[str, str]:
    """Files that cannot be heard, and what is said of each."""
    folder = soundscapes / "bad"
    folder.mkdir()
    (folder / "text.wav").write_text("no sound")
    (folder / "empty.wav").write_bytes(b"")
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    soundfile.write(folder / "whole.wav", noise, 16_000)
    (folder / "cut.wav").write_bytes((folder / "whole.wav").read_bytes()[:20_000])
    soundfile.write(folder / "nan.wav", np.where(noise > 0.49, np.nan, noise), 16_000, subtype="FLOAT")
    soundfile.write(folder / "long.wav", np.zeros(16_000 * 301, np.float32), 16_000)
    soundfile.write(folder / "tiny.wav", noise[:100], 16_000)
    return {
        "bad/text.wav": "not readable as audio",
        "bad/empty.wav": "bad/empty.wav",
        "bad/cut.wav": "cut off",
        "bad/nan.wav": "NaN",
        "bad/long.wav": "hears no more than",
        "bad/tiny.wav": "too short",
        "bad/none.wav": "no such file",
        "../outside.wav": "leaves the audio root",
    }


def test_bad_audio_is_an_outcome_with_the_reason_and_its_neighbours_are_answered(
    engine_session: Any, bad_audio: dict[str, str], clip: str, tiny_model: Path
) -> None:
    session = engine_session
    if family_of(tiny_model).window_seconds > 301:
        bad_audio = {name: reason for name, reason in bad_audio.items() if name != "bad/long.wav"}
    asked = [session.scripted("text", name) for name in bad_audio]
    good = session.scripted("text", clip)
    outcomes = session.answer(good, *asked, good, sampling=GREEDY)
    for outcome, reason in zip(outcomes[1:-1], bad_audio.values(), strict=True):
        assert outcome.stop_reason is StopReason.ERROR and outcome.response == ""
        assert reason in (outcome.error or ""), outcome.error
    for outcome in (outcomes[0], outcomes[-1]):
        assert outcome.stop_reason is StopReason.ANSWERED and outcome.error is None


def test_a_question_longer_than_the_context_is_an_outcome_with_the_reason(engine_session: Any, clip: str) -> None:
    question = Question("long", str(engine_session.audio_root), clip, "why " * 5000, ("a", "b"))
    (outcome,) = engine_session.answer(question, sampling=GREEDY)
    assert outcome.stop_reason is StopReason.ERROR and "tokens and the engine takes 4096" in (outcome.error or "")


def test_placeholders_in_a_question_are_text(engine_session: Any, clip: str, tiny_model: Path) -> None:
    audio = family_of(tiny_model).audio_token
    text = f"Is {audio} or <audio> heard? Answer by script text"
    question = Question("odd", str(engine_session.audio_root), clip, text, (audio, "b"))
    ids = engine_session.engine.prompt_ids(question, "interleaved")
    assert ids.count(engine_session.engine.ids.audio) == 1
    assert engine_session.answer(question, sampling=GREEDY)[0].stop_reason is StopReason.ANSWERED


def test_a_second_engine_in_one_process_is_refused(engine_session: Any, tiny_model: Path) -> None:
    async def start() -> None:
        async with running_engine(EngineSettings(str(tiny_model), "cpu")):
            pass

    with pytest.raises(RuntimeError, match="has an engine already"):
        engine_session.run(start())
