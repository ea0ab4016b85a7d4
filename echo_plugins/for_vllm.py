"""vLLM 0.24.0 makes the features of an Omni model as training makes them: for verl's server and for eval/engine.py."""

from __future__ import annotations

import functools
from typing import Any

from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
from vllm.model_executor.models.qwen3_omni_moe_thinker import (
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
def make_features_as_in_training() -> None:
    pad_clips_to_longest(Qwen2_5OmniThinkerProcessingInfo, QWEN2_5_OMNI)
    pad_clips_to_longest(Qwen3OmniMoeThinkerProcessingInfo, QWEN3_OMNI)
    leave_clips_as_they_are()
