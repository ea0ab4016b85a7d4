"""The extension that vLLM's worker process loads on a machine without an accelerator:

+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=echo_plugins.for_verl.vllm_worker.CPUWorkerExtension
"""

from __future__ import annotations

import vllm._custom_ops
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension

# vLLM's CPU linear layers repack their weights for oneDNN and drop `.weight`, so that verl's weight transfer dies with
# an AttributeError and the sender waits for ever. Without oneDNN they work on the live weights.
vllm._custom_ops._supports_onednn = False


class CPUWorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension; importing this module is what matters."""
