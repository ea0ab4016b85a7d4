"""verl's reward manager: a finished rollout becomes a `Record`, a preset scores it, every component goes into the log.

    reward.reward_manager.source=importlib reward.reward_manager.name=EchoRewardManager
    reward.reward_manager.module.path=pkg://echo_plugins.for_verl.reward_manager
    +reward.reward_kwargs.preset=paper

Training and validation go through the same preset, so their scores are on the same scale. Of the agent loop's
`extra_fields` it reads `text`, `attempts` (list of Attempt), `stop_reason`, `duration_seconds` and `answer_logprobs`;
of a row `reward_model`, and in `extra_info` the question, choices and events.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig
from verl import DataProto
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from ..relisten.trajectory import StopReason
from ..rewards import Event, Preset, PresetError, Record, load_preset

_log = logging.getLogger(__name__)


def preset_from_config(config: DictConfig) -> Preset:
    """The preset that `reward.reward_kwargs.preset` names, the paper's by default.

    Raises PresetError, also for one that needs log-probabilities which the rollout is told not to keep.
    """
    preset = load_preset(config.reward.get("reward_kwargs", {}).get("preset", "paper"))
    if preset.needs_logprobs() and not config.actor_rollout_ref.rollout.calculate_log_probs:
        raise PresetError(
            f"the reward preset {preset.name} needs log-probabilities of the answer: set "
            "actor_rollout_ref.rollout.calculate_log_probs=True"
        )
    return preset


class EchoRewardManager(RewardManagerBase):
    """Scores one rollout. `reward_extra_info` has the same keys in every row: `acc`, `failed`, `term_errors`,
    `term_missing` and `reward_NAME` for each term of the preset, weighted; and texts, which verl's averages pass
    over: `problems`, what was wrong with which term as JSON, `audio`, the path of the row's clip, and `filter`."""

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any, **_unused: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.preset = preset_from_config(config)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        return await asyncio.to_thread(self.score, data[len(data) - 1])  # of several outputs the last, as verl's own do

    def score(self, item: Any) -> dict[str, Any]:
        """A failed rollout, and a row that no answer could satisfy, score 0 and are counted as failed."""
        row = item.non_tensor_batch
        extra_info = row.get("extra_info") or {}
        try:
            record = record_of(row["tool_extra_fields"], extra_info, row["reward_model"]["ground_truth"])
        except ValueError as error:
            _log.error("== row %s scored 0: %s", extra_info.get("id"), error)
            record = Record(text="", ground_truth="", stop_reason=StopReason.ERROR)
        scored = self.preset.score(record)
        return {
            "reward_score": scored.score,
            "reward_extra_info": {
                "acc": float(record.correct and not record.failed),
                "failed": float(record.failed),
                "term_errors": float(len(scored.errors)),
                "term_missing": float(len(scored.missing)),
                **{f"reward_{name}": value for name, value in scored.components.items()},
                "problems": json.dumps(scored.errors | scored.missing, ensure_ascii=False),
                "audio": audio_path(row.get("raw_prompt", ())),
                # What the filter of groups compares (RL_FILTER_GROUPS). A failed rollout is unlike all others, so that
                # a group of failures is counted as such, and not replaced for ever.
                "filter": "nan" if record.failed else str(scored.score),
            },
        }


def record_of(rollout: Mapping[str, Any], extra_info: Mapping[str, Any], ground_truth: str) -> Record:
    """Raises ValueError when the ground truth is not one of the choices."""
    choices, events = extra_info.get("choices"), extra_info.get("events")
    return Record(
        text=rollout["text"],
        ground_truth=ground_truth,
        choices=() if choices is None else tuple(choices),
        duration_seconds=rollout["duration_seconds"],
        attempts=tuple(rollout["attempts"]),
        stop_reason=StopReason(rollout["stop_reason"]),
        answer_logprobs=rollout["answer_logprobs"],
        question=extra_info.get("question") or "",
        events=None if events is None else tuple(Event(e["start"], e["end"], e["label"]) for e in events),
    )


def audio_path(messages: Iterable[Mapping[str, Any]]) -> str:
    """The path of the prompt's clip as it stands in the Parquet, "" for a prompt without one."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    audio = next((part["audio"] for part in parts if part["type"] == "audio"), "")
    return audio["path"] or "" if isinstance(audio, Mapping) else str(audio)
