"""Log-probs without flash-attn, which PyPI holds only as source: verl 0.9.1 then takes them token by token in a Python
loop (torch_functional.py, logprobs_from_logits_v2), and rounds those of bfloat16 logits to bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from verl.utils import torch_functional

ROWS = 1024  # at once in float32: 0.6 GB with Qwen's 152,000 tokens


class _LogProbs(torch.autograd.Function):
    """Of `labels` under `logits` (N, V), as float32 (N,). Nothing of the size of the logits is kept beside them: the
    backward pass computes the probabilities anew."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        norms = torch.cat([block.float().logsumexp(-1) for block in logits.split(ROWS)])
        context.save_for_backward(logits, labels, norms)
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1).float() - norms

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, norms = context.saved_tensors
        result = torch.empty_like(logits)
        parts = (tensor.split(ROWS) for tensor in (result, logits, labels, norms, gradient.float()))
        for to, block, ids, norm, weight in zip(*parts, strict=True):
            probabilities = (block.float() - norm.unsqueeze(-1)).exp_()
            weighted = probabilities.mul_(-weight.unsqueeze(-1))
            to.copy_(weighted.scatter_add_(-1, ids.unsqueeze(-1), weight.unsqueeze(-1)))
        return result, None


def log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[labels] in float32. `logits` (..., V) of any floating type, `labels` (...)."""
    flat: Any = _LogProbs.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    return flat.view(labels.shape)


torch_functional.logprobs_from_logits_v2 = log_probs
