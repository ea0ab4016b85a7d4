"""The extension that vLLM's worker process loads:

+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=echo_plugins.for_verl.vllm_worker.WorkerExtension
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from vllm.platforms import current_platform

from ..for_vllm import mend_worker


def keep_linear_weights() -> None:
    """vLLM's CPU linear layers repack their weights for oneDNN and drop `.weight`, so that verl's weight transfer dies
    with an AttributeError and the sender waits for ever. Without oneDNN they work on the live weights."""
    import vllm._custom_ops

    vllm._custom_ops._supports_onednn = False


def keep_expert_weights() -> None:
    """cpu_fused_moe.py:286 repacks the experts into new parameters, which have no `weight_loader` (the same death:
    qwen3_moe.py:625). Without the grouped product the experts are views of the live weights."""
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe

    def check_grouped_gemm(_self: object, _layer: torch.nn.Module) -> tuple[bool, str]:
        return False, "none"

    experts: Any = cpu_fused_moe.CPUFusedMOE
    experts.check_grouped_gemm = check_grouped_gemm


def activate_experts_without_a_config() -> None:
    """cpu_fused_moe.py:53 makes a SiluAndMul in each forward, which asks for vLLM's configuration where none is set."""
    from vllm.model_executor.layers.fused_moe import cpu_fused_moe
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return F.silu(x[..., :half]) * x[..., half:]

    cpu_fused_moe._CPU_MOE_ACT_FN[MoEActivation.SILU] = silu_and_mul


mend_worker()
if current_platform.is_cpu():
    keep_linear_weights()
    keep_expert_weights()
    activate_experts_without_a_config()


class WorkerExtension(vLLMColocateWorkerExtension):
    """verl's own extension; importing this module is what matters."""
