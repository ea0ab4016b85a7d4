"""What ends when in verl's rollout: vLLM's processes with verl's server, and the server with its engine and where vLLM
refuses new weights.

verl 0.9.1 lets a worker end with its parent, EngineCore (vllm_rollout/utils.py, set_death_signal), and nothing lets
EngineCore end with the server: killed with its raylet, both would keep the GPU. And where a worker raises in the weight
sync, the actor that sends the weights waits for its answer for ever (bucketed_weight_transfer.py). A server whose
EngineCore has died lives on and fails every request, as vLLM means it to (core_client.py, start_engine_core_monitor).
"""

from __future__ import annotations

import functools
from typing import Any

import verl.workers.rollout.vllm_rollout.utils as utils
import wrapt

from ..end_with_client import end_with_client
from .engine_watch import end_the_process, end_where_weights_are_refused, note_failure


def watch_the_server(module: Any) -> None:
    """Wrap `set_death_signal`, which verl's extension calls first in each worker."""
    original = module.set_death_signal

    @functools.wraps(original)
    def set_death_signal() -> None:
        original()
        end_with_client()

    module.set_death_signal = set_death_signal


def end_with_the_engine(module: Any) -> None:
    """Wrap what the server does when EngineCore has ended by itself, before any request is told so; a regular shutdown
    has no `failed_proc_name`."""
    manager = module.CoreEngineProcManager
    original = manager.shutdown

    @functools.wraps(original)
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.failed_proc_name:
            note_failure(f"{self.failed_proc_name} of a vLLM server has died: killed, out of memory, or crashed")
            end_the_process()
        original(self, *args, **kwargs)

    manager.shutdown = shutdown


watch_the_server(utils)
wrapt.register_post_import_hook(end_with_the_engine, "vllm.v1.engine.utils")
end_where_weights_are_refused(utils.vLLMColocateWorkerExtension)
