"""What eval.throughput has vLLM's process load: a script in the policy's place, and a count of the engine's work."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from . import worker
from .throughput import SCRIPT, Counts, peak_memory_mib, reset_peak_memory


class ScriptedPolicy(LogitsProcessor):
    """A request whose `extra_args` hold a SCRIPT of token ids samples these, whatever the model would say."""

    def __init__(self, _config: Any, _device: torch.device, _is_pin_memory: bool) -> None:
        self.scripts: dict[int, tuple[list[int], list[int]]] = {}  # row of the batch -> script, tokens so far

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self.scripts, batch_update, lambda params, _, said: ((params.extra_args or {}).get(SCRIPT, []), said)
        )

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [row for row, (script, said) in self.scripts.items() if len(said) < len(script)]
        if rows:
            wanted = [self.scripts[row][0][len(self.scripts[row][1])] for row in rows]
            logits[rows] = -1e4
            logits[rows, wanted] = 0.0
        return logits


class WorkerExtension(worker.WorkerExtension):
    """Counts what the model runner is given."""

    def start_counting(self) -> None:
        """Count from zero. The first call wraps the model runner."""
        if not hasattr(self, "_counts"):
            execute = self.model_runner.execute_model

            def counted(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
                self._count(scheduler_output)
                return execute(scheduler_output, *args, **kwargs)

            self.model_runner.execute_model = counted
        self._counts = Counts()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        reset_peak_memory()

    def counts(self) -> dict[str, float]:
        """A `Counts`, as a dictionary."""
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mib()
        return {**vars(self._counts), "peak_memory_mib": peak}

    def _count(self, scheduled: Any) -> None:
        if not scheduled.total_num_scheduled_tokens:
            return
        counts, tokens = self._counts, scheduled.num_scheduled_tokens
        new = {request.req_id: request for request in scheduled.scheduled_new_reqs}
        counts.engine_steps += 1
        # A prompt in parts comes back as a running request with more than one token.
        counts.prefilled_tokens += sum(count for name, count in tokens.items() if name in new or count > 1)
        counts.cached_tokens += sum(request.num_computed_tokens for request in new.values())
        counts.encoder_runs += bool(scheduled.scheduled_encoder_inputs)
        counts.encoded_clips += sum(len(clips) for clips in scheduled.scheduled_encoder_inputs.values())
