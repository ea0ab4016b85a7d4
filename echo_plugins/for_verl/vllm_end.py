"""vLLM's processes end with verl's server, in the workers that verl starts for it: ../end_with_client.py.

verl 0.9.1 lets a worker end with its parent, EngineCore (vllm_rollout/utils.py, set_death_signal), and nothing lets
EngineCore end with the server: killed with its raylet, both would keep the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import verl.workers.rollout.vllm_rollout.utils as utils

from ..end_with_client import end_with_client


def watch_the_server(module: Any) -> None:
    """Wrap `set_death_signal`, which verl's extension calls first in each worker."""
    original = module.set_death_signal

    @functools.wraps(original)
    def set_death_signal() -> None:
        original()
        end_with_client()

    module.set_death_signal = set_death_signal


watch_the_server(utils)
