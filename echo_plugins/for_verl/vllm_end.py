"""What ends when in verl's rollout: vLLM's processes with verl's server, and the server where vLLM refuses new weights.

verl 0.9.1 lets a worker end with its parent, EngineCore (vllm_rollout/utils.py, set_death_signal), and nothing lets
EngineCore end with the server: killed with its raylet, both would keep the GPU. And where a worker raises in the weight
sync, the actor that sends the weights waits for its answer for ever (bucketed_weight_transfer.py).
"""

from __future__ import annotations

import functools
from typing import Any

import verl.workers.rollout.vllm_rollout.utils as utils

from ..end_with_client import end_with_client
from .engine_watch import end_where_weights_are_refused


def watch_the_server(module: Any) -> None:
    """Wrap `set_death_signal`, which verl's extension calls first in each worker."""
    original = module.set_death_signal

    @functools.wraps(original)
    def set_death_signal() -> None:
        original()
        end_with_client()

    module.set_death_signal = set_death_signal


watch_the_server(utils)
end_where_weights_are_refused(utils.vLLMColocateWorkerExtension)
