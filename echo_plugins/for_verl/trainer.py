"""verl's trainers, and in their log what re-listening did: `trainer.v1.trainer_mode=echo_sync`, or `echo_async`, which
generates the next step's rollouts while it updates on this one's (verl's colocate_async).

verl 0.9.1 logs the parts of a reward only in validation (trainer_base.py:1126), and of `extra_fields` nothing. Here
each step also logs, as means over its trajectories (padding left out):

    reward/NAME                          each component, weighted; reward/acc, reward/failed
    reward/{term_errors,term_missing}    terms that raised, or that a row lacks something for, a trajectory
    segments/{named,inserted,straddled}  tags a trajectory; segments/refused/REASON
    segments/{seconds,overlap}           length of an inserted clip; share of inserted seconds heard before
    tokens/{sampled,observation,cached}  a trajectory
    stop/{answered,length,error}         share of trajectories
    failed/{share,timeout,audio,prompt,engine}   share of trajectories that failed, and by what
    failed/lost                          share that never came back: an error outside the rollout, in verl's own log
    groups/{equal,dropped}               share of questions whose rollouts score the same; whose rollouts failed
    segments/hit                         share of inserted clips that meet an event (intersection over union > 0.5)
    training/rollout_probs_diff_{mean,max}   verl's own: |rollout - actor| probability of the sampled tokens

The trajectory log: STEP.jsonl in trainer.rollout_data_dir, and for each validation in trainer.validation_data_dir; a
line a trajectory, as `trajectory_row` makes it. `python -m echo_plugins.rewards.explain` reads it.

    +echo_log.rows=64 +echo_log.megabytes=64 +echo_log.ids=False +echo_log.shown=8
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import transfer_queue as tq
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.debug import marked_timer

from ..relisten.segment import HIT_IOU, Refusal, Segment, iou, overlap_ratio
from ..relisten.trajectory import Attempt, StopReason
from .engine_watch import EngineWatch, end_the_process, note_failure, one_line
from .merge import BEST, LATEST
from .reward_manager import preset_from_config
from .shown_rows import show_rows

_log = logging.getLogger(__name__)

CHECKPOINT = "global_step_"
MAX_FAILED_SHARE = 0.5
MAX_GEN_BATCHES = 10
FLAT_STEPS = 3  # in a row without any difference within a group: nothing is learned, and a warning says so
POLL_SECONDS = 0.2  # verl's 2 s between looks at the rollouts is half of a step of the tiny model


@dataclass(frozen=True)
class LogSettings:
    """The `echo_log` section of verl's configuration.

    Args:
        rows: trajectories of a step or validation that are kept, 0 for all; `choose` says which.
        megabytes: no file grows beyond; what does not fit is left out, with a warning.
        ids: also the token ids (`prompts`, `responses`) and the `response_mask`.
        shown: rows of a validation that trackers with sound get too (shown_rows.py).
    """

    rows: int = 0
    megabytes: float = 64.0
    ids: bool = False
    shown: int = 0

    @classmethod
    def from_config(cls, config: Any) -> LogSettings:
        """Raises ValueError for a key or value that means nothing."""
        section = dict(config.get("echo_log") or {})
        unknown = sorted(section.keys() - {setting.name for setting in fields(cls)})
        settings = cls() if unknown else cls(**section)
        in_range = min(settings.rows, settings.shown) >= 0 and settings.megabytes > 0
        if unknown or not in_range or not isinstance(settings.ids, bool):
            raise ValueError(f"echo_log wants rows and shown >= 0, megabytes > 0, ids True or False, not {section}")
        return settings


class EchoTrainer(PPOTrainer):
    """What Echo adds to verl's trainers: the log, failed rollouts left out, checkpoints kept within their number."""

    verl_mode: str  # the name of verl's own trainer, which its base class compares the mode with

    def __init__(self, config: Any) -> None:
        """Raises PresetError and ValueError, for what is wrong with the reward or the log, before anything starts."""
        preset_from_config(config)
        refuse_what_omni_models_cannot_take(config)
        echo = config.get("echo") or {}
        self.max_failed_share = float(echo.get("max_failed_share", MAX_FAILED_SHARE))
        self.max_gen_batches = int(echo.get("max_gen_batches", MAX_GEN_BATCHES))
        self.keep_best = bool(echo.get("keep_best", 0))
        self.refilled: Counter[int] = Counter()  # questions that replace filtered ones, a step
        self.failed_rows: list[dict[str, Any]] = []  # of this step, for its log
        self.failed_fields: list[dict[str, Any]] = []
        self.dropped_groups = self.flat_steps = 0
        self.log_settings = LogSettings.from_config(config)
        super().__init__(config)

    def _build_replay_buffer(self) -> ReplayBuffer:
        # The base class compares this with the literal "sync" in six places (trainer_base.py:153, 731, 902, ...), and
        # reads the settings of the mode under this name.
        self.trainer_mode = self.verl_mode
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_SECONDS
        return buffer

    def _init_dataloader(self) -> None:
        super()._init_dataloader()
        mode = (self.config.get("echo") or {}).get("mode", "interleaved")
        datasets: tuple[Any, ...] = (self.train_dataset, self.val_dataset)
        for dataset in datasets:
            made_for = {(info or {}).get("mode") or mode for info in dataset.dataframe["extra_info"]} - {mode}
            if made_for:
                raise ValueError(
                    f"the prompts of {list(dataset.data_files)} are of mode {sorted(made_for)}, and echo.mode is "
                    f"{mode!r}: give the RL_MODE that the rows were made for, or make them anew with "
                    "converters.rl_parquet --mode"
                )

    def _add_prompts_to_generate(self, num_prompts: int) -> int:
        """verl's, which replaces filtered questions for as long as there are any. Raises RuntimeError where a step
        wants more than `echo.max_gen_batches` batches of them."""
        if self.replay_buffer.filter_groups_metric is not None and self.global_steps:
            self.refilled[self.global_steps] += num_prompts
            if self.refilled[self.global_steps] > self.max_gen_batches * self.config.data.train_batch_size:
                raise RuntimeError(
                    f"step {self.global_steps}: after {self.max_gen_batches} batches of questions "
                    "(RL_MAX_GEN_BATCHES) too few have rollouts that score differently. Use other questions (not "
                    "always right or wrong), more rollouts (RL_GROUP), or leave RL_FILTER_GROUPS out"
                )
        return super()._add_prompts_to_generate(num_prompts)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """verl's, watched: a rollout server that dies ends the run with its cause."""
        watch = EngineWatch(self.llm_server_manager.server_handles, self._end_for_a_dead_server)
        watch.start()
        try:
            return super().fit(*args, **kwargs)
        except Exception as error:
            note_failure(f"step {self.global_steps}: {one_line(error)}")
            raise
        finally:
            watch.stop.set()

    def _end_for_a_dead_server(self, place: int, error: Exception) -> None:
        note_failure(f"step {self.global_steps}: the vLLM server of replica {place} has died: {one_line(error)}")
        end_the_process()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        self._prune_checkpoints(torn=True)

    def _save_checkpoint(self) -> None:
        self._prune_checkpoints(room_for=1)
        super()._save_checkpoint()
        self._prune_checkpoints()

    def _prune_checkpoints(self, torn: bool = False, room_for: int = 0) -> None:
        """`room_for`: so many more are about to be written. One whole checkpoint is always left."""
        keep = self.config.trainer.get("max_actor_ckpt_to_keep", None)
        if keep:
            folder = Path(self.config.trainer.default_local_dir)
            spared = {read_step(folder / BEST)} if self.keep_best else set()
            prune_checkpoints(folder, max(1, keep - room_for), torn, spared)

    def _balance_batch(self, batch: KVBatchMeta, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> KVBatchMeta:
        """verl calls this first with a step's rollouts. Those that failed leave their groups here: a score of 0 that no
        answer earned would lift the advantage of every other rollout of the question.

        Raises RuntimeError where more than `echo.max_failed_share` of the rollouts failed, or where a term of the
        reward has no value for any rollout of the first step.
        """
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
        if sum(error is not None for error in errors) > self.max_failed_share * len(errors):
            causes = Counter(failure_reason(error) for error in errors if error is not None)
            raise RuntimeError(
                f"step {self.global_steps}: {causes.total()} of its {len(errors)} rollouts failed ({dict(causes)}), "
                f"more than echo.max_failed_share={self.max_failed_share:g} (RL_MAX_FAILED). The last one: "
                f"{[error for error in errors if error is not None][-1]}"
            )
        lost = self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n - len(errors)
        if self.verl_mode == "sync" and lost > self.max_failed_share * (lost + len(errors)):
            raise RuntimeError(
                f"step {self.global_steps}: {lost} of its {lost + len(errors)} rollouts did not come back, more than "
                f"echo.max_failed_share={self.max_failed_share:g} (RL_MAX_FAILED). The log says `Error in _run_prompt`"
            )
        metrics["failed/lost"] = max(0, lost) / (lost + len(errors)) if self.verl_mode == "sync" else 0.0
        batch = self._without_failures(batch, trajectories)
        return super()._balance_batch(batch, metrics, *args, **kwargs)

    def _without_failures(self, batch: KVBatchMeta, trajectories: Sequence[Mapping[str, Any]]) -> KVBatchMeta:
        """`batch` without the rollouts that failed, which only the log still gets."""
        keys = real_keys(batch)
        failed = [key for key, fields in zip(keys, trajectories, strict=True) if fields["error"] is not None]
        kept = trainable_keys(keys, set(failed))
        unwanted = [key for key in keys if key not in set(kept)]
        self.failed_fields = [dict(fields) for fields in trajectories if fields["error"] is not None]
        self.failed_rows = self._trajectory_rows(batch.select_keys(failed)) if failed else []
        self.dropped_groups = len(set(map(group_of, keys)) - set(map(group_of, kept)))
        if not kept:
            raise RuntimeError(
                f"step {self.global_steps}: {len(failed)} of {len(keys)} rollouts failed, no question has two left. "
                f"The last one: {self.failed_fields[-1]['error']}"
            )
        if not unwanted:
            return batch
        batch = batch.select_keys([key for key in batch.keys if key not in set(unwanted)])
        tq.kv_clear(keys=unwanted, partition_id=batch.partition_id or "train")
        return batch

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict[str, float], global_steps: int, epoch: int
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        keys = real_keys(batch)
        data = fetch(batch, keys, ["extra_fields", "rm_scores", "extra_info"])
        scores = data["rm_scores"].sum(dim=1).tolist()
        events = [info.get("events") for info in data["extra_info"]]
        metrics.update(relisten_metrics([*data["extra_fields"], *self.failed_fields]))
        metrics.update(group_metrics(keys, scores, self.dropped_groups))
        metrics.update(hit_metrics(list(data["extra_fields"]), events))
        self.flat_steps = self.flat_steps + 1 if metrics["groups/equal"] == 1.0 else 0
        if self.flat_steps == FLAT_STEPS:
            _log.warning(
                "== nothing is learned: in %d steps in a row all rollouts of each question had the same reward. Use "
                "other questions (not always right or wrong), more rollouts (RL_GROUP), a higher RL_TEMPERATURE, "
                "a longer RL_MAX_RESPONSE, or a reward that tells answers apart (REWARD_PRESET)",
                FLAT_STEPS,
            )

    def _extra_fields(self, batch: KVBatchMeta) -> list[dict[str, Any]]:
        keys = real_keys(batch)
        return list(fetch(batch, keys, ["extra_fields"])["extra_fields"]) if keys else []

    def _log_rollout_data(self, batch: KVBatchMeta, timing_raw: dict[str, float], rollout_data_dir: str) -> None:
        with marked_timer("dump_rollout_generations", timing_raw, color="green"):
            self._write_trajectories(rollout_data_dir, [*self._trajectory_rows(batch), *self.failed_rows])

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
        if self.log_settings.shown:
            show_rows(self.logger.logger, choose(rows, self.log_settings.shown), self.global_steps)
        if self.keep_best:
            note_best(Path(self.config.trainer.default_local_dir), self.global_steps, metrics)
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


@register_trainer("echo_sync")
class EchoSyncTrainer(EchoTrainer, PPOTrainerSync):
    """A step is generated, and then learned."""

    verl_mode = "sync"


@register_trainer("echo_async")
class EchoAsyncTrainer(EchoTrainer, PPOTrainerColocateAsync):
    """The next step is begun before this one is learned. A rollout that a new version of the weights interrupts goes on
    with them from where it was."""

    verl_mode = "colocate_async"


def read_step(file: Path) -> int | None:
    """The step that a file such as latest_checkpointed_iteration.txt names."""
    text = file.read_text() if file.is_file() else ""
    return int(text) if text.isdecimal() else None


def note_best(folder: Path, step: int, metrics: Mapping[str, float]) -> None:
    """Name `step` in `folder`/best_checkpointed_iteration.txt where it has a checkpoint and its validation is the best
    so far: the mean over data sets of `val-core/NAME/acc/...`. best_validation.json holds step and value."""
    values = [value for name, value in metrics.items() if name.startswith("val-core/") and "/acc/" in name]
    if not values or not (folder / f"{CHECKPOINT}{step}").is_dir():
        return
    value, record = float(np.mean(values)), folder / "best_validation.json"
    if record.is_file() and json.loads(record.read_text())["acc"] >= value:
        return
    for path, text in ((record, json.dumps({"step": step, "acc": value})), (folder / BEST, str(step))):
        with written_whole(path) as file:
            file.write(text.encode())


def prune_checkpoints(
    folder: Path, keep: int | None, torn: bool = False, spared: Collection[int | None] = frozenset()
) -> list[int]:
    """Delete the checkpoints in `folder` that are older than the newest `keep`, but for `spared`. Returns their steps.

    verl knows only those that it has written since it started (checkpoint_manager.py: previous_saved_paths), so each
    start would leave some for ever. `torn`: also delete what is newer than the last whole checkpoint, which a kill left
    half-written. Nothing is deleted where `keep` is None or 0, or where no whole checkpoint is named.
    """
    last = read_step(folder / LATEST)  # verl writes it after all ranks have saved
    found = {int(path.name.removeprefix(CHECKPOINT)): path for path in folder.glob(f"{CHECKPOINT}[0-9]*")}
    if not keep or keep < 0 or last not in found:
        return []
    whole = sorted(step for step in found if step <= last)
    unwanted = [step for step in whole[:-keep] if step not in spared]
    unwanted += sorted(found.keys() - set(whole)) if torn else []
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
    failures = Counter(
        failure_reason(trajectory["error"]) for trajectory in trajectories if trajectory["error"] is not None
    )
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
        "failed/share": failures.total() / len(trajectories),
        **{f"failed/{reason}": failures[reason] / len(trajectories) for reason in FAILURES},
    }


FAILURES = ("timeout", "audio", "prompt", "engine")


def failure_reason(error: str) -> str:
    """One of FAILURES, from the error of a trajectory (agent_loop.py writes it)."""
    kinds = {"the rollout was not done": "timeout", "AudioError": "audio", "PromptTooLongError": "prompt"}
    return next((reason for start, reason in kinds.items() if error.startswith(start)), "engine")


def group_of(key: str) -> str:
    """The question of a trajectory's key, `{question}_{rollout}_{index}` (verl, replay_buffer.py)."""
    return key.rsplit("_", 2)[0]


def trainable_keys(keys: Sequence[str], failed: Collection[str]) -> list[str]:
    """The rollouts to train on: those that did not fail, of questions that have at least two of them. The advantage of
    a lone one would be its score (verl, core_algos.py: the mean of a group of one is 0)."""
    left = [key for key in keys if key not in failed]
    sizes = Counter(map(group_of, left))
    whole = Counter(map(group_of, keys))
    return [key for key in left if sizes[group_of(key)] > 1 or whole[group_of(key)] == 1]


def group_metrics(keys: Sequence[str], scores: Sequence[float], num_dropped: int) -> dict[str, float]:
    """Where GRPO learns nothing: questions whose rollouts all have one score, and questions that were dropped."""
    groups: dict[str, set[float]] = {}
    for key, score in zip(keys, scores, strict=True):
        groups.setdefault(group_of(key), set()).add(round(score, 6))
    total = len(groups) + num_dropped
    equal = sum(len(values) == 1 for values in groups.values())
    return {"groups/equal": equal / len(groups) if groups else 1.0, "groups/dropped": num_dropped / total}


def hit_metrics(
    trajectories: Sequence[Mapping[str, Any]], events: Sequence[Sequence[Mapping[str, Any]] | None]
) -> dict[str, float]:
    """`segments/hit`, where rows have events: the share of inserted clips whose intersection over union with one of
    their row's events is over HIT_IOU."""
    hits = [
        any(iou([attempt.segment], [Segment(event["start"], event["end"])]) > HIT_IOU for event in labelled)
        for trajectory, labelled in zip(trajectories, events, strict=True)
        if labelled is not None and len(labelled)
        for attempt in attempts_of(trajectory)
        if attempt.inserted and attempt.segment is not None
    ]
    has_events = any(labelled is not None and len(labelled) for labelled in events)
    return {"segments/hit": sum(hits) / len(hits) if hits else 0.0} if has_events else {}


def refuse_what_omni_models_cannot_take(config: Any) -> None:
    """Raises ValueError. Each of these settings of verl would change or break the model's forward pass in silence."""
    roles = config.actor_rollout_ref
    actor = roles.get("actor") or {}
    if (roles.get("model") or {}).get("use_fused_kernels", False):
        raise ValueError(
            "actor_rollout_ref.model.use_fused_kernels=True replaces the forward pass of the model, and with it the "
            "ban on placeholder tokens: leave it out"
        )
    for section in (actor, actor.get("fsdp_config") or {}, roles.get("ref") or {}):
        if int(section.get("ulysses_sequence_parallel_size", 1) or 1) > 1:
            raise ValueError("ulysses_sequence_parallel_size > 1: verl has no Ulysses for Omni models; leave it out")


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
    written = left_out = 0
    with written_whole(path) as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
            if written + len(line) > most_bytes:
                left_out += 1
                continue
            written += file.write(line)
    return left_out


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well, and else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
