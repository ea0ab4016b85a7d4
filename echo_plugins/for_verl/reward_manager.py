"""verl's reward manager: a finished rollout becomes a `Record`, a preset scores it, every component goes into the log.

    reward.reward_manager.source=importlib reward.reward_manager.name=EchoRewardManager
    reward.reward_manager.module.path=pkg://echo_plugins.for_verl.reward_manager
    +reward.reward_kwargs.preset=paper

Training and validation go through the same preset, so their scores are on the same scale. Of the agent loop's
`extra_fields` it reads `attempts` (list of Attempt), `stop_reason`, `duration_seconds` and, where there is one,
`answer_logprobs`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from omegaconf import DictConfig
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ..relisten.trajectory import StopReason
from ..rewards import Preset, Record, load_preset

_log = logging.getLogger(__name__)


def preset_from_config(config: DictConfig) -> Preset:
    """The preset that `reward.reward_kwargs.preset` names, the paper's by default. Raises PresetError."""
    return load_preset(config.reward.get("reward_kwargs", {}).get("preset", "paper"))


class EchoRewardManager(RewardManagerBase):
    """Scores one rollout. `reward_extra_info` has the same keys in every row: `acc`, `failed`, `term_errors` and
    `reward_NAME` for each term of the preset, weighted."""

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any, **_unused: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self._decode = tokenizer.decode
        self.preset = preset_from_config(config)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        return await asyncio.to_thread(self.score, data[len(data) - 1])  # of several outputs the last, as verl's own do

    def score(self, item: Any) -> dict[str, Any]:
        """A failed rollout, and a row that no answer could satisfy, score 0 and are counted as failed."""
        extra_info = item.non_tensor_batch.get("extra_info") or {}
        try:
            record = self._record(item, extra_info)
        except ValueError as error:
            _log.error("row %s scored 0: %s", extra_info.get("id"), error)
            record = Record(text="", ground_truth="", stop_reason=StopReason.ERROR)
        scored = self.preset.score(record)
        return {
            "reward_score": scored.score,
            "reward_extra_info": {
                "acc": float(record.correct and not record.failed),
                "failed": float(record.failed),
                "term_errors": float(len(scored.errors)),
                **{f"reward_{name}": value for name, value in scored.components.items()},
            },
        }

    def _record(self, item: Any, extra_info: dict[str, Any]) -> Record:
        responses = item.batch["responses"]
        length = int(item.batch["attention_mask"][-responses.shape[-1] :].sum())
        rollout = item.non_tensor_batch["tool_extra_fields"]
        choices = extra_info.get("choices")
        return Record(
            # without special tokens: no placeholder and no end of message, and none of them is the policy's own text
            text=self._decode(responses[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False),
            ground_truth=item.non_tensor_batch["reward_model"]["ground_truth"],
            choices=() if choices is None else tuple(choices),
            duration_seconds=rollout["duration_seconds"],
            attempts=tuple(rollout["attempts"]),
            stop_reason=StopReason(rollout["stop_reason"]),
            answer_logprobs=rollout.get("answer_logprobs"),
        )
