"""What vLLM 0.24.0 lacks for re-listening, for verl's server and for eval/engine.py: it makes the features of an Omni
model as training makes them, takes a prompt that ends in a clip, and hears a short clip as training does."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeAudioEncoder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerMultiModalProcessor,
    Qwen3OmniMoeThinkerProcessingInfo,
)

from .audio import pad_to_longest
from .model import QWEN2_5_OMNI, QWEN3_OMNI, OmniFamily


def pad_clips_to_longest(processing_info: Any, family: OmniFamily) -> None:
    """Wrap `get_hf_processor`, through which vLLM gets at its one cached processor."""
    original = processing_info.get_hf_processor

    @functools.wraps(original)
    def get_hf_processor(self: Any, **kwargs: Any) -> Any:
        processor = original(self, **kwargs)
        pad_to_longest(processor.feature_extractor, family)
        return processor

    processing_info.get_hf_processor = get_hf_processor


def leave_clips_as_they_are() -> None:
    """qwen3_omni_moe_thinker.py:1224 puts zeros after a clip until its last frame is whole, which transformers and
    ms-swift do not: one more frame, and often one more token, than in training. It does so because clips of one call
    would otherwise depend on each other, which `pad_to_longest` does not let happen. The class above has the method
    without that."""
    if "_call_hf_processor" in vars(Qwen3OmniMoeThinkerMultiModalProcessor):
        del Qwen3OmniMoeThinkerMultiModalProcessor._call_hf_processor


@functools.cache
def hear_short_clips_as_beside_longer_ones() -> None:
    """The audio tower of Qwen3-Omni cuts clips into chunks of a second and pads all chunks to the longest of its call
    (qwen3_omni_moe_thinker.py:470, transformers' `chunk_and_pad_features` too). Its convolutions carry the padding into
    the last tokens, so a clip under a second sounds different alone: log-probs differ by up to 2e-4 in the tiny model.
    Training hears it beside the question's sound. vLLM hears it alone, so here a chunk of silence goes beside it.

    Training still differs where every clip of a micro-batch is under a second. In vLLM's worker process.
    """
    tower: Any = Qwen3OmniMoeAudioEncoder
    original = tower.forward

    @functools.wraps(original)
    def forward(
        self: Any, input_features: torch.Tensor, feature_lens: torch.Tensor, aftercnn_lens: torch.Tensor
    ) -> torch.Tensor:
        chunk = 2 * self.n_window
        if int(feature_lens.max()) >= chunk:
            return original(self, input_features, feature_lens, aftercnn_lens)
        silence = input_features.new_zeros(input_features.shape[0], chunk)
        added = feature_lens.new_tensor([chunk])
        heard = original(
            self,
            torch.cat([input_features, silence], 1),
            torch.cat([feature_lens, added]),
            torch.cat([aftercnn_lens, self._get_cnn_output_lengths(added).to(aftercnn_lens)]),
        )
        return heard[: int(aftercnn_lens.sum())]

    tower.forward = forward


@functools.cache
def take_prompts_that_end_in_a_clip() -> None:
    """qwen3_omni_moe_thinker.py:2259 counts the position of a clip's start twice, and of the token after its end never.
    A prompt that ends in a clip, as each turn after a segment does, then has one position too many, and the engine dies
    ("Position ids length mismatch"). Positions of text and sound without pictures count from 0, as transformers'
    `get_rope_index` has them. In vLLM's worker process."""
    model: Any = Qwen3OmniMoeThinkerForConditionalGeneration
    original = model.get_mrope_input_positions

    @functools.wraps(original)
    def get_mrope_input_positions(self: Any, input_tokens: Any, mm_features: Any) -> tuple[torch.Tensor, int]:
        if all(feature.modality == "audio" for feature in mm_features):
            return torch.arange(len(input_tokens)).repeat(3, 1), 0
        return original(self, input_tokens, mm_features)

    model.get_mrope_input_positions = get_mrope_input_positions


def mend_worker() -> None:
    """All that vLLM's worker process needs. Its extensions call it as they are imported."""
    take_prompts_that_end_in_a_clip()
    hear_short_clips_as_beside_longer_ones()


@functools.cache
def make_features_as_in_training() -> None:
    pad_clips_to_longest(Qwen2_5OmniThinkerProcessingInfo, QWEN2_5_OMNI)
    pad_clips_to_longest(Qwen3OmniMoeThinkerProcessingInfo, QWEN3_OMNI)
    leave_clips_as_they_are()
