"""The prompt: one text for SFT, RL and inference, and no way for a data set to smuggle a special token in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.model import FAMILIES
from echo_plugins.relisten.prompt import (
    AUDIO_TAG,
    MODES,
    Mode,
    contains_reserved,
    escape_reserved,
    question_text,
    user_message,
)

PIECES = st.sampled_from(
    ["<|AUDIO|>", "<audio>", "<|im_end|>", "<", "|", ">", "<|", "|>", "audio", "<video>", " ", "x"]
)


@pytest.mark.parametrize(
    "text",
    ["<audio>", "a<image>b", "<VIDEO>", "<|AUDIO|>", "<|audio_bos|>", "<|im_end|>", "<|endoftext|>", "<<|IMAGE|>>"],
)
def test_special_tokens_and_placeholders_are_reserved(text: str) -> None:
    assert contains_reserved(text)


def test_every_token_that_a_family_bans_is_reserved() -> None:
    for family in FAMILIES.values():
        assert all(contains_reserved(token) == token for token in family.banned_tokens)


@pytest.mark.parametrize("text", ["", "a < b > c", "<|>", "<||>", "audio", "< audio>", "a<b|c>d", "<seg>1, 2</seg>"])
def test_plain_text_is_not(text: str) -> None:
    assert contains_reserved(text) is None
    assert escape_reserved(text) == text


@given(st.lists(PIECES, max_size=20).map("".join))
def test_escaped_text_holds_no_reserved_token_and_nothing_but_blanks_is_added(text: str) -> None:
    escaped = escape_reserved(text)
    assert contains_reserved(escaped) is None
    assert escape_reserved(escaped) == escaped
    assert escaped.replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("mode", MODES)
def test_the_user_message_has_exactly_one_placeholder_and_it_comes_first(mode: Mode) -> None:
    message = user_message("What <audio> is <|AUDIO|> this?", ["a <audio>", "<|audio_bos|>"], mode)
    assert message["role"] == "user"
    assert message["content"].startswith(AUDIO_TAG)
    assert message["content"].count(AUDIO_TAG) == 1
    assert contains_reserved(message["content"].removeprefix(AUDIO_TAG)) is None


def test_an_open_question_asks_for_an_answer_and_one_with_choices_for_a_choice() -> None:
    for mode in MODES:
        assert question_text("What?", [], mode).endswith("Then give your answer inside <answer></answer>.")
        assert question_text("What?", ["a", "b"], mode).endswith("Then give your choice inside <answer></answer>.")


def test_choices_stand_one_a_line_under_their_letters() -> None:
    lines = question_text(" Which? ", ["a dog", " a cat "], "interleaved").splitlines()
    assert lines[:3] == ["Which?", "(A) a dog", "(B) a cat"]
    assert len(lines) == 4


def test_grounded_asks_what_interleaved_asks_and_plain_asks_for_no_tags() -> None:
    interleaved, grounded, plain = (question_text("q", ["a", "b"], mode) for mode in MODES)
    assert interleaved == grounded != plain
    assert "<seg>" in grounded and "<seg>" not in plain
    assert all(tag in plain for tag in ("<think>", "</think>", "<answer>", "</answer>"))


def test_a_long_run_of_half_open_brackets_does_not_stall() -> None:
    for text in ("<|" * 2_000_000, "<|" + "a" * 5_000_000, "<" * 5_000_000):
        assert contains_reserved(text) is None
