"""Features as Echo makes them, against the extractor as each family's own processor in transformers calls it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessorKwargs

from echo_plugins.audio import AudioError, crop, pad_to_longest
from echo_plugins.model import FAMILIES, QWEN2_5_OMNI, QWEN3_OMNI, OmniFamily, family_of

BY_ITS_PROCESSOR: dict[str, dict[str, Any]] = {
    "silence": {"padding": "max_length"},  # Qwen2_5OmniProcessor.__call__
    "mirror": Qwen3OmniMoeProcessorKwargs._defaults["audio_kwargs"],
}
# 0.2 s, frames and blocks of 100 frames at their bounds, 30 s of the public extractors, and what is near them.
LENGTHS = [
    *(201, 319, 320, 321, 1_530, 3_199, 3_200, 3_201, 15_999, 16_000, 16_001, 79_999, 80_000, 80_001),
    *(479_999, 480_000),
]


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
        (161,),
        (1_530, 700),
    ],
)
def test_valid_frames_are_the_stock_ones_bit_for_bit(lengths: tuple[int, ...]) -> None:
    clips = noise(*lengths)
    stock, tight = extract(extractor(), clips), extract(pad_to_longest(extractor(), QWEN2_5_OMNI), clips)
    frames = int(stock["attention_mask"].sum(-1).max())
    assert tight["input_features"].shape == (len(lengths), 128, frames)
    assert np.array_equal(tight["attention_mask"], stock["attention_mask"][:, :frames])
    assert stock["attention_mask"][:, frames:].sum() == 0
    for row, mask in enumerate(stock["attention_mask"]):
        valid = mask.astype(bool)
        assert np.array_equal(tight["input_features"][row][:, valid[:frames]], stock["input_features"][row][:, valid])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_clip_sounds_as_in_the_familys_own_processor(family: OmniFamily, length: int) -> None:
    options = BY_ITS_PROCESSOR[family.clip_end]
    clip = noise(length)
    stock = extract(extractor(), clip, **options)
    ours = extract(pad_to_longest(extractor(), family), clip)
    heard = stock["attention_mask"][0].astype(bool)
    assert np.array_equal(ours["input_features"][0][:, : heard.sum()], stock["input_features"][0][:, heard])
    assert int(ours["attention_mask"].sum()) == heard.sum() == family.num_frames(length)
    assert family.num_audio_tokens(length) == family.tokens_of_frames(int(heard.sum()))


def test_beyond_the_extractors_window_a_family_that_pads_nothing_hears_all() -> None:
    for length in (480_001, 640_000):
        stock = extract(extractor(), noise(length), **BY_ITS_PROCESSOR["mirror"])
        ours = extract(pad_to_longest(extractor(), QWEN3_OMNI), noise(length))
        assert np.array_equal(ours["input_features"], stock["input_features"])
        assert ours["attention_mask"].sum() == length // 160 >= 3000


def test_a_clip_over_the_window_is_refused_and_not_cut() -> None:
    with pytest.raises(AudioError, match="hears 30 s at most"):
        extract(pad_to_longest(extractor(), QWEN2_5_OMNI), noise(480_001, 5_000))
    with pytest.raises(AudioError, match="hears 2400 s at most"):
        extract(pad_to_longest(extractor(), QWEN3_OMNI), [np.zeros(2400 * 16_000 + 1, np.float32)])


def test_a_clip_too_short_to_be_mirrored_has_no_tokens() -> None:
    with pytest.raises(RuntimeError, match="Padding size"):
        extract(extractor(), noise(200), **BY_ITS_PROCESSOR["mirror"])
    assert QWEN3_OMNI.num_audio_tokens(200) == 0 < QWEN3_OMNI.num_audio_tokens(201)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_clips_of_one_call_do_not_change_each_other(family: OmniFamily) -> None:
    clips = noise(5_000, 60_001, 3_333)
    together = extract(pad_to_longest(extractor(), family), clips)
    for row, clip in enumerate(clips):
        frames = family.num_frames(len(clip))
        alone = extract(pad_to_longest(extractor(), family), [clip])
        assert together["attention_mask"][row].sum() == frames == alone["attention_mask"].sum()
        assert np.array_equal(together["input_features"][row][:, :frames], alone["input_features"][0][:, :frames])


def test_memory_follows_the_clip_and_not_the_window() -> None:
    stock, tight = (
        extract(extractor(300), noise(16_000)),
        extract(pad_to_longest(extractor(300), QWEN2_5_OMNI), noise(16_000)),
    )
    assert stock["input_features"].nbytes > 15_000_000
    assert tight["input_features"].nbytes == 128 * 100 * 4


def test_a_single_waveform_and_a_crop_are_taken_like_a_list() -> None:
    (clip,) = noise(32_000)
    piece = crop(clip, 8_000, 24_000)
    tight = pad_to_longest(extractor(), QWEN2_5_OMNI)
    assert np.array_equal(extract(tight, piece)["input_features"], extract(tight, [piece.copy()])["input_features"])


def test_it_is_changed_once_and_still_saves_under_its_own_name(tmp_path: Any) -> None:
    tight = pad_to_longest(pad_to_longest(extractor(), QWEN2_5_OMNI), QWEN2_5_OMNI)
    assert type(tight).__mro__[1] is WhisperFeatureExtractor
    tight.save_pretrained(tmp_path)
    again = WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert type(again) is WhisperFeatureExtractor
    assert again.n_samples == tight.n_samples


@pytest.mark.parametrize("length", [3_199, 3_200, 3_201, 16_000, 16_079, 480_001])
def test_vllm_hears_a_clip_as_training_does(omni_model: Path, length: int) -> None:
    """The processor of its engine, without the engine."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from echo_plugins.for_vllm import make_features_as_in_training

    make_features_as_in_training()
    family = family_of(omni_model)
    if length > family.window_samples(WhisperFeatureExtractor.from_pretrained(omni_model)):
        pytest.skip("over the window of the tiny checkpoint")
    limits: Any = {"audio": 2, "image": family.images_in_engine, "video": 0}
    processor = MULTIMODAL_REGISTRY.create_processor(
        ModelConfig(model=str(omni_model), dtype="float32", limit_mm_per_prompt=limits)
    )
    clips = noise(length, 5_000)
    items = processor.info.parse_mm_data({"audio": [(clip, 16_000) for clip in clips]})
    made: Any = processor(family.audio_placeholder * 2, mm_items=items)
    ours = pad_to_longest(WhisperFeatureExtractor.from_pretrained(omni_model), family)
    for clip, item, place in zip(clips, made["mm_kwargs"]["audio"], made["mm_placeholders"]["audio"], strict=True):
        expected = extract(ours, [clip])
        heard = expected["attention_mask"][0].astype(bool)
        features = item["input_audio_features"].data.numpy()
        assert np.array_equal(features, expected["input_features"][0][:, heard])
        assert place.length == family.num_audio_tokens(len(clip), ours.hop_length)
