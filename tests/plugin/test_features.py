"""Features padded to the longest clip only, against the stock extractor of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from echo_plugins.audio import crop, pad_to_longest
from echo_plugins.model import QWEN2_5_OMNI


def extractor(chunk_length: int = 30) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=128, chunk_length=chunk_length)


def extract(feature_extractor: Any, clips: Any, **options: Any) -> Any:
    # As Qwen2_5OmniProcessor calls it.
    options = {"sampling_rate": 16_000, "padding": "max_length", "return_attention_mask": True} | options
    return feature_extractor(clips, return_tensors="np", **options)


def noise(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.uniform(-0.8, 0.8, length).astype(np.float32) for length in lengths]


@pytest.mark.parametrize(
    "lengths",
    [
        (3_200,),
        (3_201,),
        (16_000, 3_200),
        (79_999, 80_000, 80_001),
        (479_999,),
        (480_000,),
        (500_000, 5_000),
        (161,),
        (1_530, 700),
    ],
)
def test_valid_frames_are_the_stock_ones_bit_for_bit(lengths: tuple[int, ...]) -> None:
    clips = noise(*lengths)
    stock, tight = extract(extractor(), clips), extract(pad_to_longest(extractor()), clips)
    frames = int(stock["attention_mask"].sum(-1).max())
    assert tight["input_features"].shape == (len(lengths), 128, frames)
    assert np.array_equal(tight["attention_mask"], stock["attention_mask"][:, :frames])
    assert stock["attention_mask"][:, frames:].sum() == 0
    for row, mask in enumerate(stock["attention_mask"]):
        valid = mask.astype(bool)
        assert np.array_equal(tight["input_features"][row][:, valid[:frames]], stock["input_features"][row][:, valid])


def test_the_frames_give_as_many_audio_tokens_as_the_length_formula() -> None:
    for length in (3_200, 3_359, 16_000, 40_001, 200_123):
        frames = int(extract(pad_to_longest(extractor()), noise(length))["attention_mask"].sum())
        assert QWEN2_5_OMNI.tokens_of_frames(frames) == QWEN2_5_OMNI.num_audio_tokens(length), length


def test_memory_follows_the_clip_and_not_the_window() -> None:
    stock, tight = extract(extractor(300), noise(16_000)), extract(pad_to_longest(extractor(300)), noise(16_000))
    assert stock["input_features"].nbytes > 15_000_000
    assert tight["input_features"].nbytes == 128 * 100 * 4


def test_a_single_waveform_and_a_crop_are_taken_like_a_list() -> None:
    (clip,) = noise(32_000)
    piece = crop(clip, 8_000, 24_000)
    tight = pad_to_longest(extractor())
    assert np.array_equal(extract(tight, piece)["input_features"], extract(tight, [piece.copy()])["input_features"])


def test_one_clip_of_several_is_not_changed_by_its_neighbours() -> None:
    short, long = noise(5_000, 60_000)
    tight = pad_to_longest(extractor())
    alone, together = extract(tight, [short]), extract(tight, [short, long])
    frames = alone["input_features"].shape[-1]
    assert np.array_equal(together["input_features"][0, :, :frames], alone["input_features"][0])


def test_it_is_changed_once_and_still_saves_under_its_own_name(tmp_path: Any) -> None:
    tight = pad_to_longest(pad_to_longest(extractor()))
    assert type(tight).__mro__[1] is WhisperFeatureExtractor
    tight.save_pretrained(tmp_path)
    again = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is WhisperFeatureExtractor
    assert again.n_samples == tight.n_samples
