"""What eval's engine has vLLM's worker load: it ends with its client, hears clips as training does, and samples nothing
that is banned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from echo_plugins.end_with_client import end_with_client
from echo_plugins.for_vllm import mend_worker

mend_worker()


class WorkerExtension:
    """vLLM makes it a part of its worker, whose `model_runner` it has."""

    model_runner: Any

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Any:
        end_with_client()
        return super().__new__(cls)

    def ban(self, ids: Sequence[int]) -> None:
        """From now on `ids` have no probability. As a bias of each request, hundreds of ids would be sent with it."""
        model = self.model_runner.model
        original, banned = model.compute_logits, torch.tensor(ids)

        def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
            nonlocal banned
            logits = original(*args, **kwargs)
            if logits is not None:  # as it is where another rank of the engine gathers them
                banned = banned.to(logits.device)
                logits.index_fill_(-1, banned, -torch.inf)
            return logits

        model.compute_logits = compute_logits
