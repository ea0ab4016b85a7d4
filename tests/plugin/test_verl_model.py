"""The actor that verl trains: frozen towers, and packed rows that do not see each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.model import extract_multi_modal_inputs, get_hf_auto_model_class
from verl.utils.tokenizer import hf_processor
from verl.utils.torch_functional import logprobs_from_logits
from verl.workers.rollout.utils import get_max_position_embeddings

import echo_plugins.for_verl.omni  # noqa: F401 - registers the trainable class
from echo_plugins.model import QWEN2_5_OMNI, family_of, hop_length

CLIPS = (0, 1, 4, 8)


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return hf_processor(str(tiny_model))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model)
    auto_class = get_hf_auto_model_class(config)
    assert auto_class is AutoModelForImageTextToText
    return auto_class.from_pretrained(tiny_model, config=config, attn_implementation="sdpa", dtype=torch.float32)


class Row:
    """A response with `num_clips` clips in it: ids, 4-row positions as verl's worker makes them, features, mask."""

    def __init__(self, model_dir: Path, processor: Any, num_clips: int) -> None:
        random = np.random.default_rng(num_clips)
        family, hop = family_of(model_dir), hop_length(model_dir)
        audios = [random.standard_normal(length).astype(np.float32) for length in 4000 + 1600 * np.arange(num_clips)]
        tokenizer = processor.tokenizer
        audio, bos, eos = (
            tokenizer.convert_tokens_to_ids(token)
            for token in (family.audio_token, family.audio_bos_token, family.audio_eos_token)
        )
        ids = tokenizer.encode("<|im_start|>user\nWhich sound?<|im_end|>\n<|im_start|>assistant\n<think>")
        mask = [0] * len(ids)
        for clip in audios:
            said = tokenizer.encode(" <seg>1.00, 2.00</seg>")
            heard = [bos, *[audio] * family.num_audio_tokens(len(clip), hop), eos]
            ids, mask = ids + said + heard, mask + [1] * len(said) + [0] * len(heard)
        said = tokenizer.encode(" a bell</think><answer>B</answer><|im_end|>")
        self.ids = torch.tensor(ids + said)
        self.mask = torch.tensor(mask + [1] * len(said))
        self.inputs: dict[str, torch.Tensor] = {}
        if audios:
            features = processor.feature_extractor(audios, sampling_rate=16_000, return_tensors="pt")
            self.inputs = {
                "input_features": features["input_features"],
                "feature_attention_mask": features["attention_mask"],
            }
        worker: Any = SimpleNamespace(processor=processor)
        positions = AgentLoopWorker._compute_position_ids(
            worker, self.ids[None], torch.ones_like(self.ids)[None], dict(self.inputs)
        )
        self.positions = positions[0]  # (4, tokens)


@pytest.fixture(scope="module")
def rows(tiny_model: Path, processor: Any) -> list[Row]:
    return [Row(tiny_model, processor, count) for count in CLIPS]


def logprobs(model: Any, ids: torch.Tensor, positions: torch.Tensor, rows: Sequence[Row], **mask: Any) -> torch.Tensor:
    """Log-probabilities (batch, tokens) of each token given those before it."""
    inputs = extract_multi_modal_inputs([row.inputs for row in rows])
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **mask, **inputs).logits
    return logprobs_from_logits(logits, torch.roll(ids, -1, dims=1))


def test_packed_rows_with_clips_have_the_log_probs_that_each_has_alone(model: Any, rows: list[Row]) -> None:
    """use_remove_padding packs rows into one sequence without a mask: only 4-row positions keep them apart."""
    with torch.no_grad():
        packed = logprobs(
            model,
            torch.cat([row.ids for row in rows])[None],
            torch.cat([row.positions for row in rows], dim=1)[:, None],
            rows,
            attention_mask=None,
        )[0]
        for row, together in zip(rows, packed.split([len(row.ids) for row in rows]), strict=True):
            alone = logprobs(model, row.ids[None], row.positions[:, None], [row], attention_mask=None)[0]
            torch.testing.assert_close(together[:-1], alone[:-1], atol=2e-5, rtol=0)


def test_padded_rows_agree_with_packed_ones(model: Any, rows: list[Row]) -> None:
    width = max(len(row.ids) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row.ids, (0, width - len(row.ids))) for row in rows])
    positions = torch.stack([torch.nn.functional.pad(row.positions, (0, width - len(row.ids))) for row in rows], dim=1)
    mask = torch.stack([(torch.arange(width) < len(row.ids)).long() for row in rows])
    with torch.no_grad():
        padded = logprobs(model, ids, positions, rows, attention_mask=mask)
        for row, together in zip(rows, padded, strict=True):
            alone = logprobs(model, row.ids[None], row.positions[:, None], [row], attention_mask=None)[0]
            torch.testing.assert_close(together[: len(row.ids) - 1], alone[:-1], atol=2e-5, rtol=0)


def test_one_row_positions_let_packed_rows_see_each_other(model: Any, rows: list[Row]) -> None:
    """Why get_rope_index is bound. When this fails, verl or transformers keeps such rows apart by itself."""
    two = [rows[1], rows[2]]
    ids = torch.cat([row.ids for row in two])[None]
    positions = torch.cat([row.positions[0] for row in two])[None]
    with torch.no_grad():
        packed = logprobs(model, ids, positions, two, attention_mask=None)[0, len(two[0].ids) :]
        alone = logprobs(model, two[1].ids[None], two[1].positions[:, None], [two[1]], attention_mask=None)[0]
    assert (packed[:-1] - alone[:-1]).abs().max() > 1e-2


def test_the_towers_are_frozen_before_verl_wraps_the_model_and_the_rest_is_not(model: Any) -> None:
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("thinker.audio_tower.", "thinker.visual."))
        assert parameter.requires_grad is not frozen, name


def test_only_layers_that_every_row_passes_are_sharded_apart(model: Any) -> None:
    """A rank with text only must not wait for the audio tower of another."""
    assert set(model._no_split_modules) == {"Qwen2_5OmniDecoderLayer"}


def test_the_checkpoint_keeps_its_own_names_and_builds_no_talker(model: Any, tiny_model: Path) -> None:
    assert type(model).__name__ == model.config.architectures[0]
    assert all(name.startswith("thinker.") for name, _ in model.named_parameters())
    assert get_max_position_embeddings(AutoConfig.from_pretrained(tiny_model)) > 0


def test_only_sampled_tokens_carry_gradient_and_none_reaches_the_audio_tower(model: Any, rows: list[Row]) -> None:
    row = rows[2]
    inputs = extract_multi_modal_inputs([row.inputs])
    logits = model(
        input_ids=row.ids[None], position_ids=row.positions[:, None], attention_mask=None, use_cache=False, **inputs
    ).logits
    logits.retain_grad()
    labels_are_sampled = torch.roll(row.mask, -1)
    labels_are_sampled[-1] = 0
    values = logprobs_from_logits(logits, torch.roll(row.ids, -1)[None])
    agg_loss(-values, labels_are_sampled[None], loss_agg_mode="token-mean").backward()
    reached = logits.grad[0].abs().sum(-1) > 0
    assert torch.equal(reached, labels_are_sampled.bool())
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(value is None for name, value in gradients.items() if ".audio_tower." in name or ".visual." in name)
    assert all(value is not None for name, value in gradients.items() if ".model.layers." in name)
    model.zero_grad(set_to_none=True)


def test_verls_processor_for_omni_is_saved_under_its_own_name(processor: Any, tmp_path: Path, tiny_model: Path) -> None:
    """verl saves it with every checkpoint."""
    processor.save_pretrained(tmp_path)
    saved = (tmp_path / "processor_config.json").read_text()
    assert saved == (tiny_model / "processor_config.json").read_text()
    assert type(processor).__name__ == "Qwen2_5OmniProcessor"
    assert processor.audio_token_id == processor.tokenizer.convert_tokens_to_ids(QWEN2_5_OMNI.audio_token)
