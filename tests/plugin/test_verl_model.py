"""The model that verl trains, by itself: test_exactness.py has it in verl's hands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omni_rows import Row, load_actor, packed_logits
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.model import extract_multi_modal_inputs, get_hf_auto_model_class
from verl.utils.tokenizer import hf_processor
from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits
from verl.workers.rollout.utils import get_max_position_embeddings

from echo_plugins.for_verl.omni import pack_clips, unpack_clips
from echo_plugins.model import FAMILIES, QWEN3_OMNI, family_of

CLIPS = (0, 1, 4, 8)
PROMPT = "<|im_start|>user\nWhich sound?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor(omni_model: Path) -> Any:
    return hf_processor(str(omni_model))


@pytest.fixture(scope="module")
def model(omni_model: Path) -> Any:
    assert get_hf_auto_model_class(AutoConfig.from_pretrained(omni_model)) is AutoModelForImageTextToText
    return load_actor(omni_model)


@pytest.fixture(scope="module")
def rows(omni_model: Path, processor: Any) -> list[Row]:
    """One row for each number of clips in CLIPS, of different lengths."""
    random = np.random.default_rng(0)
    made = []
    for count in CLIPS:
        response: list[str | np.ndarray] = ["<think>"]
        for length in 4000 + 1600 * np.arange(count):
            response += [" <seg>1.00, 2.00</seg>", random.standard_normal(length).astype(np.float32)]
        made.append(Row(omni_model, processor, [PROMPT], [*response, " a bell</think><answer>B</answer><|im_end|>"]))
    return made


def packed_logprobs(model: Any, rows: Sequence[Row]) -> list[torch.Tensor]:
    """For each row the log-probabilities of its tokens but the first, all rows in one sequence."""
    labels = torch.cat([row.ids for row in rows])
    values = logprobs_from_logits(packed_logits(model, rows), torch.roll(labels, -1))
    return [part[:-1] for part in values.split([len(row.ids) for row in rows])]


def test_one_row_positions_let_packed_rows_see_each_other(model: Any, rows: list[Row]) -> None:
    """Why get_rope_index is bound. When this fails, transformers keeps such rows apart by itself."""
    if model.config.model_type == QWEN3_OMNI.model_type:
        pytest.skip("transformers keeps rows of Qwen3-Omni apart by itself")
    first, second = rows[1], rows[2]
    ids = torch.cat([first.ids, second.ids])[None]
    positions = torch.cat([first.positions[0], second.positions[0]])[None]
    inputs = extract_multi_modal_inputs([first.inputs, second.inputs])
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, **inputs).logits
        mixed = logprobs_from_logits(logits, torch.roll(ids, -1, dims=1))[0, len(first.ids) : -1]
        assert (mixed - packed_logprobs(model, [second])[0]).abs().max() > 1e-2


def test_the_towers_are_frozen_before_verl_wraps_the_model_and_the_rest_is_not(model: Any) -> None:
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("thinker.audio_tower.", "thinker.visual."))
        assert parameter.requires_grad is not frozen, name


def test_only_layers_that_every_row_passes_are_sharded_apart(model: Any) -> None:
    """A rank with text only must not wait for the audio tower of another."""
    assert set(model._no_split_modules) == {FAMILIES[model.config.model_type].decoder_layer}


def test_the_checkpoint_keeps_its_own_names_and_builds_no_talker(model: Any, omni_model: Path) -> None:
    assert type(model).__name__ == model.config.architectures[0]
    assert all(name.startswith("thinker.") for name, _ in model.named_parameters())
    assert get_max_position_embeddings(AutoConfig.from_pretrained(omni_model)) > 0


def test_only_sampled_tokens_carry_gradient_and_none_reaches_the_audio_tower(model: Any, rows: list[Row]) -> None:
    row = rows[2]
    logits = packed_logits(model, [row])
    logits.retain_grad()
    labels_are_sampled = torch.roll(row.mask, -1)
    labels_are_sampled[-1] = 0
    values = logprobs_from_logits(logits, torch.roll(row.ids, -1))
    agg_loss(-values[None], labels_are_sampled[None], loss_agg_mode="token-mean").backward()
    assert logits.grad is not None
    reached = logits.grad.abs().sum(-1) > 0
    assert torch.equal(reached, labels_are_sampled.bool())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(value is None for name, value in gradients.items() if ".audio_tower." in name or ".visual." in name)
    assert all(value is not None for name, value in gradients.items() if ".model.layers." in name)
    model.zero_grad(set_to_none=True)


def test_what_the_rollout_may_not_sample_has_no_probability_and_no_gradient(
    model: Any, processor: Any, rows: list[Row]
) -> None:
    logits = packed_logits(model, rows[:1])
    num_tokens = len(processor.tokenizer)
    assert num_tokens < logits.shape[-1], "the ids past the tokenizer's end are part of this"
    banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
    banned[num_tokens:] = True
    banned[processor.tokenizer.convert_tokens_to_ids(list(FAMILIES[model.config.model_type].banned_tokens))] = True
    assert torch.equal(logits.softmax(-1).amax(0) == 0.0, banned)
    before = logits.grad_fn and logits.grad_fn.next_functions
    assert before and "IndexFill" not in str(before), "backward would copy the gradient of all logits"
    entropy_from_logits(logits).sum().backward()
    gradient = model.thinker.lm_head.weight.grad
    assert torch.equal(gradient.abs().sum(-1) == 0.0, banned) and bool(gradient.isfinite().all())
    model.zero_grad(set_to_none=True)


def test_verls_processor_for_omni_is_saved_under_its_own_name(processor: Any, tmp_path: Path, omni_model: Path) -> None:
    """verl saves it with every checkpoint."""
    processor.save_pretrained(tmp_path)
    saved = (tmp_path / "processor_config.json").read_text()
    assert saved == (omni_model / "processor_config.json").read_text()
    assert type(processor).__name__ == type(AutoProcessor.from_pretrained(omni_model)).__name__
    audio_token = family_of(omni_model).audio_token
    assert processor.audio_token_id == processor.tokenizer.convert_tokens_to_ids(audio_token)


def test_clips_travel_without_padding_and_arrive_as_the_extractor_made_them(model: Any, processor: Any) -> None:
    """30 s and eight clips of 3 s: a fifth of the bytes, and the same output of the audio tower to the last bit."""
    random = np.random.default_rng(0)
    clips = [random.standard_normal(16_000 * seconds).astype(np.float32) for seconds in (30, *[3] * 8)]
    made = processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt")
    features, mask = made["input_features"], made["attention_mask"]
    packed = pack_clips(features, mask)
    sent, padded = (
        sum(tensor.untyped_storage().nbytes() for tensor in tensors)  # what a pickle of them holds
        for tensors in (packed.values(), (features, mask))
    )
    assert 4 * sent < padded
    two: Any = extract_multi_modal_inputs([packed, pack_clips(features[1:3], mask[1:3])])
    back = unpack_clips(two["audio_frames"], two["audio_num_frames"])
    heard = back["feature_attention_mask"].bool()
    expected = torch.cat([mask, mask[1:3]]).bool()
    assert torch.equal(heard, expected)
    frames = torch.cat([features, features[1:3]]).transpose(1, 2)
    assert torch.equal(back["input_features"].transpose(1, 2)[heard], frames[expected])
    with torch.no_grad():
        tower = model.thinker.get_audio_features
        direct = tower(torch.cat([features, features[1:3]]), feature_attention_mask=expected.long())
        assert torch.equal(tower(**back).last_hidden_state, direct.last_hidden_state)
