"""An answer that is forced where the budget has run out."""

from collections.abc import Sequence

import pytest

from echo_plugins.model import QWEN2_5_OMNI
from echo_plugins.relisten.segment import Refusal
from echo_plugins.relisten.trajectory import MAX_FORCING_TOKENS, Settings, SpecialIds, StopReason, Trajectory
from echo_plugins.relisten.transcript import parse

AUDIO, BOS, EOS, END = range(256, 260)


def decode(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token < 256).decode()


def out_of_budget(said: str) -> Trajectory:
    """A trajectory of one byte a token that said so much and had no more."""
    trajectory = Trajectory(
        [BOS, AUDIO, EOS],
        160_000,
        16_000,
        SpecialIds(AUDIO, BOS, EOS, frozenset({END})),
        Settings(len(said)),
        decode,
        lambda text: list(text.encode()),
        QWEN2_5_OMNI.num_audio_tokens,
    )
    trajectory.absorb(list(said.encode()), [-1.0] * len(said), "length")
    assert trajectory.stop_reason is StopReason.LENGTH
    return trajectory


@pytest.mark.parametrize(
    ("said", "opening"),
    [
        ("<think>I hear", "</think><answer>"),
        ("<think>I hear</think>so", "<answer>"),
        ("<think>I hear</think><answer>ra", ""),
    ],
)
def test_the_answer_is_opened_by_an_observation_and_sampled_by_the_policy(said: str, opening: str) -> None:
    trajectory = out_of_budget(said)
    trajectory.force_answer(16)
    turn = trajectory.next_turn()
    assert turn is not None and turn.max_tokens == 16 and turn.stop == ()
    answer = [*b"in</answer>", END]
    trajectory.absorb(answer, [-2.0] * len(answer), "stop")
    assert trajectory.stop_reason is StopReason.ANSWERED and trajectory.next_turn() is None
    assert trajectory.text() == f"{said}{opening}in</answer>"
    assert parse(trajectory.text()).answer == ("rain" if said.endswith("ra") else "in")
    assert trajectory.response_mask == [1] * len(said) + [0] * len(opening) + [1] * len(answer)
    assert trajectory.response_logprobs == [-1.0] * len(said) + [0.0] * len(opening) + [-2.0] * len(answer)
    assert len(opening) <= MAX_FORCING_TOKENS


def test_a_forced_answer_is_not_paused_for_a_tag() -> None:
    trajectory = out_of_budget("<think>I hear")
    trajectory.force_answer(40)
    trajectory.absorb(list(b"<seg>1, 2</seg>"), None, "stop")
    assert trajectory.clips == [] and trajectory.attempts[0].refusal is Refusal.TOO_MANY
    assert trajectory.stop_reason is StopReason.LENGTH


def test_nothing_is_forced_on_a_trajectory_that_ended_otherwise() -> None:
    trajectory = out_of_budget("<think>I hear")
    trajectory.fail("no audio")
    with pytest.raises(ValueError, match="not after error"):
        trajectory.force_answer(16)
