"""vLLM 0.24.0 in verl's server: features padded to the longest clip, and made in a thread.

vLLM's processor of an Omni model pads every clip to the feature extractor's window, 300 s in the public checkpoints: up
to 2 s of one core for each clip that a rollout inserts, in the one process that feeds the engine. The frames that count
stay equal bit for bit (echo_plugins/for_vllm.py, which eval/engine.py uses too).
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from ..end_with_client import become_client
from ..for_vllm import make_features_as_in_training


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


make_features_as_in_training()
render_in_threads(AsyncLLM)
become_client()
