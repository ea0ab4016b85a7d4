"""Rule 4 with the real vocabulary of Qwen: tokens that hold the end of `</seg>` and more."""

from __future__ import annotations

import base64
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from echo_plugins.model import QWEN2_5_OMNI
from echo_plugins.relisten.trajectory import Settings, SpecialIds, Trajectory

# The splitting rule and the special tokens of Qwen2 (transformers, tokenization_qwen2.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_RANKS = 151_643
IM_END, AUDIO, BOS, EOS = NUM_RANKS + 2, NUM_RANKS + 3, NUM_RANKS + 4, NUM_RANKS + 5
SPECIAL = {"<|im_end|>": IM_END, "<|AUDIO|>": AUDIO, "<|audio_bos|>": BOS, "<|audio_eos|>": EOS}
TAG = "<seg>1.0, 2.5</seg>"


@lru_cache
def vocabulary() -> tiktoken.Encoding:
    spec = find_spec("dashscope")
    assert spec and spec.submodule_search_locations, "pip install --no-deps dashscope: it ships qwen.tiktoken"
    lines = (Path(spec.submodule_search_locations[0]) / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    assert len(ranks) == NUM_RANKS
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=SPECIAL)


def encode(text: str) -> list[int]:
    return vocabulary().encode(text, disallowed_special=())


def decode(ids: list[int]) -> str:
    return vocabulary().decode(ids)


def play(text: str, straddle: str = "cut") -> Trajectory:
    """What becomes of `text` when the policy samples exactly its tokens, engine stop at `</seg>` included."""
    ids = SpecialIds(AUDIO, BOS, EOS, frozenset({IM_END}))
    options = Settings(4_000, straddle=straddle)  # type: ignore[arg-type]
    trajectory = Trajectory([BOS, AUDIO, EOS], 160_000, 16_000, ids, options, decode, encode, count)
    script = [*encode(text), IM_END]
    while (turn := trajectory.next_turn()) is not None:
        sampled: list[int] = []
        while script and not (sampled and turn.stop and "</seg>" in decode(sampled)) and IM_END not in sampled:
            sampled.append(script.pop(0))
        trajectory.absorb(sampled, [-1.0] * len(sampled))
    return trajectory


count: Callable[[int], int] = QWEN2_5_OMNI.num_audio_tokens


def test_the_tag_is_three_tokens_and_what_follows_merges_into_the_last() -> None:
    assert [decode([token]) for token in encode("</seg>")] == ["</", "seg", ">"]
    assert [decode([token]) for token in encode("<seg>")] == ["<", "seg", ">"]
    known = {".": 14276, ",": 8066, "\n": 397, "</think>": 1472, "<seg>": 1784}
    assert {text: encode("</seg>" + text)[2] for text in known} == known


@pytest.mark.parametrize("after", [", then", ". Then", "\nThen", "</think>", ") and", ": a", "; a", '" a', ">, a"])
def test_cut_leaves_before_the_clip_the_very_tokens_of_interleaved_sft(after: str) -> None:
    trajectory = play(f"in {TAG}{after}")
    clip, attempt = trajectory.clips[0], trajectory.attempts[0]
    # ms-swift splits the row at <audio>, so that the text up to the tag is tokenised on its own.
    assert trajectory.response_ids[: clip.position] == encode(f"in {TAG}")
    assert trajectory.response_mask[: clip.position] == [1] * (clip.position - 1) + [0]
    assert attempt.straddled


@pytest.mark.parametrize("after", [", then", ". Then", "\nThen", "</think>"])
def test_keep_leaves_the_sampled_tokens_alone(after: str) -> None:
    trajectory = play(f"in {TAG}{after}", "keep")
    kept = [token for token, mask in zip(trajectory.response_ids, trajectory.response_mask, strict=True) if mask]
    assert kept == [*encode(f"in {TAG}{after}"), IM_END]
    assert trajectory.text() == f"in {TAG}{after}"


@pytest.mark.parametrize("after", [" then", " <seg>3, 4</seg> then", ""])
def test_a_blank_after_the_tag_does_not_straddle(after: str) -> None:
    trajectory = play(f"in {TAG}{after}")
    assert not any(attempt.straddled for attempt in trajectory.attempts)
    assert all(trajectory.response_mask[clip.position - 1] == 1 for clip in trajectory.clips)


def test_keep_reads_adjacent_tags_whose_brackets_share_a_token() -> None:
    trajectory = play(f"in {TAG}<seg>3.0, 4.0</seg> twice", "keep")
    assert [clip.segment.start_seconds for clip in trajectory.clips] == [1.0, 3.0]


@settings(max_examples=100)
@given(
    parts=st.lists(st.one_of(st.just(TAG), st.just("<seg>9, 8</seg>"), st.text(max_size=6)), max_size=8),
    straddle=st.sampled_from(["cut", "keep"]),
)
def test_any_text_in_the_real_vocabulary_keeps_streams_and_masks_aligned(parts: list[str], straddle: str) -> None:
    trajectory = play("".join(parts), straddle)
    assert len(trajectory.response_ids) == len(trajectory.response_mask) == len(trajectory.response_logprobs or [])
    assert trajectory.engine_response_ids.count(AUDIO) == len(trajectory.clips)
    for clip in trajectory.clips:
        before = decode(trajectory.response_ids[: clip.position])
        assert before.endswith("</seg>") if straddle == "cut" else "</seg>" in before[-10:]
