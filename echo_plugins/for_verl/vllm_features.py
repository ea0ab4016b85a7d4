"""vLLM 0.24.0 in verl's server: features padded to the longest clip, and made in a thread.

vLLM's processor of an Omni model pads every clip to the feature extractor's window, 300 s in the public checkpoints: up
to 2 s of one core for each clip that a rollout inserts, in the one process that feeds the engine. The frames that count
stay equal bit for bit (echo_plugins/audio.py). eval/engine.py does the same to its own engine.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeThinkerProcessingInfo
from vllm.v1.engine.async_llm import AsyncLLM

from ..audio import pad_to_longest
from ..end_with_client import become_client


def pad_clips_to_longest(processing_info: Any) -> None:
    """Wrap `get_hf_processor`, through which vLLM gets at its one cached processor."""
    original = processing_info.get_hf_processor

    @functools.wraps(original)
    def get_hf_processor(self: Any, **kwargs: Any) -> Any:
        processor = original(self, **kwargs)
        pad_to_longest(processor.feature_extractor)
        return processor

    processing_info.get_hf_processor = get_hf_processor


def render_in_threads(engine: Any) -> None:
    """Wrap `generate`: a prompt with audio is rendered by vLLM's own thread pool before it goes on.

    verl hands over raw prompts (vllm_async_server.py:672), which `generate` renders on the event loop
    (v1/engine/async_llm.py:349): while the features of one clip are made, no other rollout gets its tokens.
    """
    original = engine.generate

    @functools.wraps(original)
    async def generate(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        if isinstance(prompt, dict) and prompt.get("multi_modal_data"):
            (prompt,) = await self.renderer.render_cmpl_async([prompt])
        async for output in original(self, prompt, *args, **kwargs):
            yield output

    engine.generate = generate


pad_clips_to_longest(Qwen2_5OmniThinkerProcessingInfo)
pad_clips_to_longest(Qwen3OmniMoeThinkerProcessingInfo)
render_in_threads(AsyncLLM)
become_client()
