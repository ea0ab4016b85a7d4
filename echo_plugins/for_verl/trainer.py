"""verl's synchronous trainer, and in its log what re-listening did: `trainer.v1.trainer_mode=echo_sync`.

verl 0.9.1 logs the parts of a reward only in validation (trainer_base.py:1126), and of `extra_fields` nothing. Here
each step also logs, as means over its trajectories (padding left out):

    reward/NAME                          each component, weighted; reward/acc, reward/failed, reward/term_errors
    segments/{named,inserted,straddled}  tags a trajectory; segments/refused/REASON
    segments/{seconds,overlap}           length of an inserted clip; share of inserted seconds heard before
    tokens/{sampled,observation,cached}  a trajectory
    stop/{answered,length,error}         share of trajectories
    training/rollout_probs_diff_{mean,max}   verl's own: |rollout - actor| probability of the sampled tokens

With trainer.rollout_data_dir, every trajectory of a step goes to STEP.jsonl there: text, segments, refusals, scores.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from ..relisten.segment import Refusal, Segment, overlap_ratio
from ..relisten.trajectory import Attempt, StopReason

POLL_SECONDS = 0.2  # verl's 2 s between looks at the rollouts is half of a step of the tiny model


@register_trainer("echo_sync")
class EchoTrainer(PPOTrainerSync):
    """PPOTrainerSync, and the log."""

    def _build_replay_buffer(self) -> ReplayBuffer:
        # The base class compares this with the literal "sync" in six places (trainer_base.py:153, 731, 902, ...), and
        # takes any other name for an asynchronous trainer.
        self.trainer_mode = "sync"
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        return buffer

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> KVBatchMeta:
        """The first that verl does with a step's rollouts. Raises RuntimeError when none of them can be trained on."""
        errors = [trajectory["error"] for trajectory in self._extra_fields(batch)]
        if all(error is not None for error in errors):
            raise RuntimeError(
                f"step {self.global_steps}: each of its {len(errors)} rollouts failed, there is nothing to train on. "
                f"The last one: {errors[-1] if errors else 'none came back'}"
            )
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        metrics.update(relisten_metrics(self._extra_fields(batch)))

    def _extra_fields(self, batch: KVBatchMeta) -> list[dict[str, Any]]:
        keys = real_keys(batch)
        return list(fetch(batch, keys, ["extra_fields"])["extra_fields"]) if keys else []

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict[str, float], rollout_data_dir: str) -> None:
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            keys = sorted(real_keys(batch))
            fields = ["extra_fields", "extra_info", "reward_model", "rm_scores", "data_source"]
            data = fetch(batch, keys, fields)
            rows = [
                trajectory_row(key, self.global_steps, score, extra_fields, extra_info, reward_model, data_source)
                for key, score, extra_fields, extra_info, reward_model, data_source in zip(
                    keys,
                    data["rm_scores"].sum(dim=1).tolist(),
                    *(list(data[field]) for field in ("extra_fields", "extra_info", "reward_model", "data_source")),
                    strict=True,
                )
            ]
            write_jsonl(Path(rollout_data_dir) / f"{self.global_steps}.jsonl", rows)


def real_keys(batch: KVBatchMeta) -> list[str]:
    """The trajectories of `batch` without those that fill it up to a multiple of the ranks."""
    return [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding", False)]


def fetch(batch: KVBatchMeta, keys: list[str], fields: list[str]) -> Any:
    """Columns of `batch`, a row a key, from the queue that the rollouts were put into."""
    return tq.kv_batch_get(keys=keys, partition_id=batch.partition_id or "train", select_fields=fields)


def relisten_metrics(trajectories: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What a step logs, from the `extra_fields` of its trajectories. The same names whatever happened in it."""
    if not trajectories:
        return {}

    def mean(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else 0.0

    attempts = [attempts_of(trajectory) for trajectory in trajectories]
    inserted = [[a.segment for a in named if a.inserted and a.segment is not None] for named in attempts]
    refusals = Counter(attempt.refusal for named in attempts for attempt in named if attempt.refusal is not None)
    stops = Counter(trajectory["stop_reason"] for trajectory in trajectories)
    rewards = [trajectory.get("reward_extra_info") or {} for trajectory in trajectories]
    names = sorted({name for reward in rewards for name in reward})
    return {
        **{
            f"reward/{name.removeprefix('reward_')}": mean([reward[name] for reward in rewards if name in reward])
            for name in names
        },
        "segments/named": mean([len(named) for named in attempts]),
        "segments/inserted": mean([len(segments) for segments in inserted]),
        "segments/straddled": mean([sum(attempt.straddled for attempt in named) for named in attempts]),
        **{f"segments/refused/{reason}": refusals[reason] / len(trajectories) for reason in Refusal},
        "segments/seconds": mean([segment.duration_seconds for segments in inserted for segment in segments]),
        "segments/overlap": mean([overlap_ratio(segments) for segments in inserted if segments]),
        "tokens/sampled": mean([trajectory["sampled_tokens"] for trajectory in trajectories]),
        "tokens/observation": mean([trajectory["observation_tokens"] for trajectory in trajectories]),
        "tokens/cached": mean([trajectory["num_cached_tokens"] for trajectory in trajectories]),
        **{f"stop/{reason}": stops[reason] / len(trajectories) for reason in StopReason},
    }


def attempts_of(extra_fields: Mapping[str, Any]) -> list[Attempt]:
    """The tags of a trajectory. AgentLoopOutput.as_dict has made plain dictionaries of them."""
    return [
        Attempt(
            **{
                **dumped,
                "segment": None if dumped["segment"] is None else Segment(**dumped["segment"]),
                "refusal": None if dumped["refusal"] is None else Refusal(dumped["refusal"]),
            }
        )
        for dumped in extra_fields["attempts"]
    ]


def trajectory_row(
    key: str,
    step: int,
    score: float,
    extra_fields: Mapping[str, Any],
    extra_info: Mapping[str, Any],
    reward_model: Mapping[str, Any],
    data_source: str,
) -> dict[str, Any]:
    """One line of the trajectory log."""
    logprobs = extra_fields["answer_logprobs"]
    return {
        "step": step,
        "key": key,
        "id": extra_info.get("id"),
        "data_source": data_source,
        "question": extra_info.get("question"),
        "ground_truth": reward_model.get("ground_truth"),
        "text": extra_fields["text"],
        "segments": [segment_row(attempt) for attempt in attempts_of(extra_fields)],
        "stop_reason": extra_fields["stop_reason"],
        "error": extra_fields["error"],
        "score": score,
        "components": dict(extra_fields.get("reward_extra_info") or {}),
        "answer_logprob": None if logprobs is None else sum(logprobs),
        "answer_logprobs": logprobs,
        "duration": extra_fields["duration_seconds"],
        "sampled_tokens": extra_fields["sampled_tokens"],
        "observation_tokens": extra_fields["observation_tokens"],
    }


def segment_row(attempt: Attempt) -> dict[str, Any]:
    """A tag in the trajectory log: its text, and its seconds or why it was refused."""
    segment = attempt.segment
    return {
        "text": attempt.text,
        "start": None if segment is None else segment.start_seconds,
        "end": None if segment is None else segment.end_seconds,
        "refusal": attempt.refusal,
        "inserted": attempt.inserted,
        "straddled": attempt.straddled,
    }


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(path)
