"""verl's synchronous trainer, and in its log what re-listening did: `trainer.v1.trainer_mode=echo_sync`.

verl 0.9.1 logs the parts of a reward only in validation (trainer_base.py:1126), and of `extra_fields` nothing. Here
each step also logs, as means over its trajectories (padding left out):

    reward/NAME                          each component, weighted; reward/acc, reward/failed
    reward/{term_errors,term_missing}    terms that raised, or that a row lacks something for, a trajectory
    segments/{named,inserted,straddled}  tags a trajectory; segments/refused/REASON
    segments/{seconds,overlap}           length of an inserted clip; share of inserted seconds heard before
    tokens/{sampled,observation,cached}  a trajectory
    stop/{answered,length,error}         share of trajectories
    training/rollout_probs_diff_{mean,max}   verl's own: |rollout - actor| probability of the sampled tokens

The trajectory log: STEP.jsonl in trainer.rollout_data_dir, and for each validation in trainer.validation_data_dir; a
line a trajectory, as `trajectory_row` makes it. `python -m echo_plugins.rewards.explain` reads it.

    +echo_log.rows=64 +echo_log.megabytes=64 +echo_log.ids=False
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
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
from .reward_manager import preset_from_config

_log = logging.getLogger(__name__)

CHECKPOINT = "global_step_"
POLL_SECONDS = 0.2  # verl's 2 s between looks at the rollouts is half of a step of the tiny model


@dataclass(frozen=True)
class LogSettings:
    """The `echo_log` section of verl's configuration.

    Args:
        rows: trajectories of a step or validation that are kept, 0 for all; `choose` says which.
        megabytes: no file grows beyond; what does not fit is left out, with a warning.
        ids: also the token ids (`prompts`, `responses`) and the `response_mask`.
    """

    rows: int = 0
    megabytes: float = 64.0
    ids: bool = False

    @classmethod
    def from_config(cls, config: Any) -> LogSettings:
        """Raises ValueError for a key or value that means nothing."""
        section = dict(config.get("echo_log") or {})
        unknown = sorted(section.keys() - {setting.name for setting in fields(cls)})
        settings = cls() if unknown else cls(**section)
        if unknown or settings.rows < 0 or settings.megabytes <= 0 or not isinstance(settings.ids, bool):
            raise ValueError(f"echo_log wants rows >= 0, megabytes > 0 and ids True or False, not {section}")
        return settings


@register_trainer("echo_sync")
class EchoTrainer(PPOTrainerSync):
    """PPOTrainerSync, and the log."""

    def __init__(self, config: Any) -> None:
        """Raises PresetError and ValueError, for what is wrong with the reward or the log, before anything starts."""
        preset_from_config(config)
        self.log_settings = LogSettings.from_config(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        # The base class compares this with the literal "sync" in six places (trainer_base.py:153, 731, 902, ...), and
        # takes any other name for an asynchronous trainer.
        self.trainer_mode = "sync"
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        return buffer

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._prune_checkpoints(torn=True)

    def _save_checkpoint(self) -> None:
        super()._save_checkpoint()
        self._prune_checkpoints()

    def _prune_checkpoints(self, torn: bool = False) -> None:
        keep = self.config.trainer.get("max_actor_ckpt_to_keep", None)
        prune_checkpoints(Path(self.config.trainer.default_local_dir), keep, torn)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> KVBatchMeta:
        """The first that verl does with a step's rollouts. Raises RuntimeError when none of them can be trained on, or
        when a term of the reward could not be had for a single one of the first step."""
        trajectories = self._extra_fields(batch)
        errors = [trajectory["error"] for trajectory in trajectories]
        if all(error is not None for error in errors):
            raise RuntimeError(
                f"step {self.global_steps}: each of its {len(errors)} rollouts failed, there is nothing to train on. "
                f"The last one: {errors[-1] if errors else 'none came back'}"
            )
        if self.global_steps == 1:
            useless = useless_terms(trajectories)
            if useless:
                raise RuntimeError(
                    f"no value in any of the first step's {len(errors)} rollouts: reward terms {useless}"
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
            self._write_trajectories(rollout_data_dir, self._trajectory_rows(batch))

    def _validate(self) -> dict[str, float]:
        """verl's. Its rollouts go into the log as they come, since verl has cleared them when it returns."""
        folder = self.config.trainer.get("validation_data_dir", None)
        rows: list[dict[str, Any]] = []
        sample = self.replay_buffer.sample

        def sample_and_keep(*args: Any, **kwargs: Any) -> Any:
            batch, *others = sample(*args, **kwargs)
            rows.extend(self._trajectory_rows(batch))
            return batch, *others

        if folder:
            self.replay_buffer.sample = sample_and_keep
        try:
            metrics = super()._validate()
        finally:
            self.replay_buffer.sample = sample
        if folder:
            self._write_trajectories(folder, rows)
        return metrics

    def _dump_generations(self, *args: Any, **kwargs: Any) -> None:
        """verl's form of the validation log, which would be written over ours."""

    def _trajectory_rows(self, batch: KVBatchMeta) -> list[dict[str, Any]]:
        keys = sorted(real_keys(batch))
        if not keys:
            return []
        columns = ["extra_fields", "extra_info", "reward_model", "data_source"]
        ids = ["prompts", "responses", "response_mask"] if self.log_settings.ids else []
        data = fetch(batch, keys, ["rm_scores", *columns, *ids])
        rows = [
            trajectory_row(key, self.global_steps, score, *values)
            for key, score, *values in zip(
                keys, data["rm_scores"].sum(dim=1).tolist(), *(list(data[name]) for name in columns), strict=True
            )
        ]
        for name in ids:
            for row, tensor in zip(rows, data[name], strict=True):
                row[name] = tensor.tolist()
        return rows

    def _write_trajectories(self, folder: str, rows: Iterable[Mapping[str, Any]]) -> None:
        path = Path(folder) / f"{self.global_steps}.jsonl"
        left_out = write_jsonl(path, choose(rows, self.log_settings.rows), int(self.log_settings.megabytes * 1e6))
        if left_out:
            _log.warning("== %s: %d trajectories are left out (echo_log.megabytes)", path, left_out)


def prune_checkpoints(folder: Path, keep: int | None, torn: bool = False) -> list[int]:
    """Delete the checkpoints in `folder` that are older than the newest `keep`, and return their steps.

    verl knows only those that it has written since it started (checkpoint_manager.py: previous_saved_paths), so each
    start would leave some for ever. `torn`: also delete what is newer than the last whole checkpoint, which a kill left
    half-written. Nothing is deleted where `keep` is None or 0, or where no whole checkpoint is named.
    """
    tracker = folder / "latest_checkpointed_iteration.txt"  # verl writes it after all ranks have saved
    last = int(tracker.read_text()) if tracker.is_file() else None
    found = {int(path.name.removeprefix(CHECKPOINT)): path for path in folder.glob(f"{CHECKPOINT}[0-9]*")}
    if not keep or keep < 0 or last not in found:
        return []
    whole = sorted(step for step in found if step <= last)
    unwanted = whole[:-keep] + (sorted(found.keys() - set(whole)) if torn else [])
    freed = sum(file.stat().st_size for step in unwanted for file in found[step].rglob("*") if file.is_file())
    for step in unwanted:
        found[step].rename(folder / f".deleted_{step}")  # a half-deleted folder must not look like a checkpoint
    for dead in folder.glob(".deleted_*"):
        shutil.rmtree(dead, ignore_errors=True)
    if unwanted:
        _log.warning("== checkpoints of steps %s are deleted, %.1f GB: RL_KEEP_CHECKPOINTS", unwanted, freed / 1e9)
    return unwanted


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
    names = sorted({name for reward in rewards for name, value in reward.items() if not isinstance(value, str)})
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


def useless_terms(trajectories: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The terms that not one of the trajectories has a value for, failed ones aside, and the last reason."""
    problems = [
        json.loads((trajectory.get("reward_extra_info") or {}).get("problems", "{}"))
        for trajectory in trajectories
        if trajectory["error"] is None
    ]
    return {name: problems[-1][name] for name in set.intersection(*map(set, problems))} if problems else {}


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
    reward = extra_fields.get("reward_extra_info") or {}
    choices, events = extra_info.get("choices"), extra_info.get("events")
    return {
        "step": step,
        "key": key,
        "id": extra_info.get("id"),
        "data_source": data_source,
        "audio": reward.get("audio") or None,
        "question": extra_info.get("question"),
        "choices": None if choices is None else list(choices),
        "ground_truth": reward_model.get("ground_truth"),
        "events": None if events is None else list(events),
        "text": extra_fields["text"],
        "segments": [segment_row(attempt) for attempt in attempts_of(extra_fields)],
        "stop_reason": extra_fields["stop_reason"],
        "error": extra_fields["error"],
        "score": score,
        "components": {name: value for name, value in reward.items() if not isinstance(value, str)},
        "problems": json.loads(reward.get("problems", "{}")),
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


def choose(rows: Iterable[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """`number` of `rows` (0: all), the same questions whatever their order: by the hash of their id, group by group."""

    def place(row: Mapping[str, Any]) -> tuple[str, str]:
        return hashlib.sha256(str(row["id"]).encode()).hexdigest(), row["key"]

    return sorted(rows, key=place)[: number or None]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]], most_bytes: int) -> int:
    """Write `rows` whole or not at all, up to `most_bytes`. Returns how many did not fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = left_out = 0
    try:
        with unfinished.open("wb") as file:
            for row in rows:
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                if written + len(line) > most_bytes:
                    left_out += 1
                    continue
                written += file.write(line)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return left_out
