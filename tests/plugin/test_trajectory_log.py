"""The trajectory log: which rows, how many bytes, whole or not at all; what the trainer refuses at its start, and which
checkpoints it keeps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transfer_queue
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.v1 import replay_buffer

import echo_plugins.for_verl.trainer as trainer
from echo_plugins.for_verl.merge import BEST, LATEST
from echo_plugins.for_verl.shown_rows import show_rows
from echo_plugins.for_verl.trainer import (
    EchoSyncTrainer,
    EchoTrainer,
    LogSettings,
    choose,
    failure_reason,
    group_metrics,
    group_of,
    hit_metrics,
    note_best,
    prune_checkpoints,
    refuse_what_omni_models_cannot_take,
    trainable_keys,
    useless_terms,
    write_jsonl,
)
from echo_plugins.rewards import PresetError


def rows(*ids: str, rollouts: int = 2) -> list[dict[str, Any]]:
    return [{"id": row_id, "key": f"{row_id}_{n}_0"} for row_id in ids for n in range(rollouts)]


def test_the_same_questions_are_kept_whatever_their_order_and_company() -> None:
    some, more = rows("a", "b", "c", "d"), rows("d", "x", "c", "b", "a")
    kept = [row["key"] for row in choose(some, 4)]
    assert len(kept) == 4 and len({key[0] for key in kept}) == 2  # two questions, each with both rollouts
    assert [row["key"] for row in choose(more[::-1], 8) if row["id"] != "x"][:4] == kept
    assert len(choose(some, 0)) == len(some)


def test_a_file_is_cut_at_the_limit_by_whole_rows_and_says_how_many_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log" / "1.jsonl"
    short = [{"n": n} for n in range(10)]
    size = len(json.dumps(short[0])) + 1
    assert write_jsonl(path, [short[0], {"text": "ü" * 100}, *short[1:]], most_bytes=4 * size) == 7
    assert [json.loads(line) for line in path.read_text().splitlines()] == short[:4]
    assert write_jsonl(path, short, most_bytes=10**6) == 0 and path.read_text().count("\n") == 10


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    write_jsonl(path, [{"n": 1}], 10**6)
    with pytest.raises(TypeError):
        write_jsonl(path, [{"n": 2}, {"n": object()}], 10**6)
    assert path.read_text() == '{"n": 1}\n' and [file.name for file in tmp_path.iterdir()] == ["1.jsonl"]


@pytest.mark.parametrize("section", [{"row": 5}, {"rows": -1}, {"megabytes": 0}, {"ids": "yes"}])
def test_settings_that_mean_nothing_are_refused(section: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="echo_log wants"):
        LogSettings.from_config(OmegaConf.create({"echo_log": section}))


def test_a_wrong_preset_or_log_setting_stops_the_trainer_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer.PPOTrainer, "__init__", lambda *_: pytest.fail("started"))
    rollout = {"rollout": {"calculate_log_probs": False}}
    for preset, complaint in (("papers", "no reward preset"), ("quota-3", "calculate_log_probs=True")):
        config = {"reward": {"reward_kwargs": {"preset": preset}}, "actor_rollout_ref": rollout}
        with pytest.raises(PresetError, match=complaint):
            EchoSyncTrainer(OmegaConf.create(config))
    with pytest.raises(ValueError, match="echo_log"):
        EchoSyncTrainer(OmegaConf.create({"reward": {}, "actor_rollout_ref": rollout, "echo_log": {"rows": -1}}))


def rollout(problems: dict[str, str], error: str | None = None) -> dict[str, Any]:
    return {"error": error, "reward_extra_info": {"problems": json.dumps(problems)}}


def test_a_term_without_a_value_in_any_rollout_of_the_first_step_ends_the_run() -> None:
    broken = [
        rollout({"a": "KeyError: 'x'", "b": "no"}),
        rollout({"a": "KeyError: 'y'"}),
        rollout({}, error="bad audio"),
    ]
    assert useless_terms(broken) == {"a": "KeyError: 'y'"}
    batch: Any = None
    step: Any = SimpleNamespace(global_steps=1, max_failed_share=0.5, _extra_fields=lambda _batch: broken)
    with pytest.raises(RuntimeError, match=r"no value in any of the first step's 3 rollouts.*KeyError: 'y'"):
        EchoTrainer._balance_batch(step, batch, {})
    assert useless_terms([*broken, rollout({"b": "no"})]) == {}
    assert useless_terms([rollout({}, error="bad audio")]) == {}


def advantages(scores: dict[str, float]) -> dict[str, float]:
    """As verl computes them for GRPO, a token a rollout."""
    rewards, index = torch.tensor(list(scores.values())).unsqueeze(-1), np.array([group_of(key) for key in scores])
    mask = torch.ones_like(rewards)
    values, _ = compute_grpo_outcome_advantage(rewards.clone(), mask, index)
    return dict(zip(scores, values.squeeze(-1).tolist(), strict=True))


def test_a_rollout_that_failed_moves_no_other() -> None:
    scores = {f"q_{n}_0": 1.5 for n in range(7)} | {"q_7_0": 0.0}
    assert min(value for key, value in advantages(scores).items() if key != "q_7_0") > 0.3, "what verl would do with it"
    kept = trainable_keys(list(scores), {"q_7_0"})
    assert list(advantages({key: scores[key] for key in kept}).values()) == pytest.approx([0.0] * 7, abs=1e-5)


def test_of_a_question_with_one_rollout_left_nothing_is_trained() -> None:
    keys = ["a_0_0", "a_1_0", "a_2_0", "b_0_0", "b_1_0", "c_0_0"]
    assert trainable_keys(keys, {"a_0_0", "a_1_0", "b_0_0"}) == ["c_0_0"], "c never had more than one"
    assert trainable_keys(keys, set()) == keys and trainable_keys(keys, set(keys)) == []


def test_more_failures_than_allowed_end_the_run_with_their_reasons() -> None:
    errors = ["AudioError: no such file", "the rollout was not done after 5 s", None, None]
    fields = [{"error": error, "reward_extra_info": {}} for error in errors]
    step: Any = SimpleNamespace(global_steps=3, max_failed_share=0.4, _extra_fields=lambda _batch: fields)
    batch: Any = None
    with pytest.raises(RuntimeError, match=r"2 of its 4 rollouts failed.*'audio': 1.*RL_MAX_FAILED.*after 5 s"):
        EchoTrainer._balance_batch(step, batch, {})
    assert failure_reason("PromptTooLongError: 9 tokens") == "prompt" and failure_reason("RayActorError: x") == "engine"


def test_rollouts_that_never_came_back_are_failures_too() -> None:
    """verl gives a step the rollouts that came back: a rollout whose worker raised is not among them."""
    fields = [{"error": None, "reward_extra_info": {}}] * 3
    config = OmegaConf.create({"data": {"train_batch_size": 4}, "actor_rollout_ref": {"rollout": {"n": 2}}})
    step: Any = SimpleNamespace(
        global_steps=3, max_failed_share=0.5, verl_mode="sync", config=config, _extra_fields=lambda _batch: fields
    )
    batch: Any = None
    with pytest.raises(RuntimeError, match=r"5 of its 8 rollouts did not come back.*RL_MAX_FAILED"):
        EchoTrainer._balance_batch(step, batch, {})


def test_filtered_questions_are_not_replaced_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.PPOTrainer, "_add_prompts_to_generate", lambda _self, number: number)
    config = OmegaConf.create({"data": {"train_batch_size": 4}})
    buffer = SimpleNamespace(filter_groups_metric="filter")
    step: Any = object.__new__(EchoSyncTrainer)
    step.config, step.replay_buffer, step.global_steps = config, buffer, 5
    step.max_gen_batches, step.refilled = 2, Counter()
    assert [step._add_prompts_to_generate(4) for _ in range(2)] == [4, 4]
    with pytest.raises(RuntimeError, match=r"step 5: after 2 batches.*RL_MAX_GEN_BATCHES.*RL_FILTER_GROUPS"):
        step._add_prompts_to_generate(1)
    step.global_steps = 6
    assert step._add_prompts_to_generate(4) == 4


def test_the_filter_takes_equal_groups_out_and_leaves_failures_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's own filter, given what the reward manager writes for each rollout."""
    groups = {"equal": ["1.5", "1.5"], "differs": ["1.5", "0.0"], "failed": ["nan", "nan"]}
    rows = {f"{uid}_{n}_0": value for uid, values in groups.items() for n, value in enumerate(values)}

    def kv_batch_get(keys: list[str], **_: Any) -> dict[str, Any]:
        return {"extra_fields": [{"reward_extra_info": {"filter": rows[key]}} for key in keys]}

    monkeypatch.setattr(transfer_queue, "kv_batch_get", kv_batch_get)
    none: Any = None
    buffer = replay_buffer.ReplayBuffer("sync", none, None, "drop", none, refill_fn=len, filter_groups_metric="filter")
    buffer.partitions["train"] = {key: {} for key in rows}
    buffer.finished_keys["train"] = set(groups)
    assert buffer._dapo_filtered_keys("train")[0] == {"equal"}


def test_rows_of_another_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.PPOTrainer, "_init_dataloader", lambda _self: None)
    step: Any = object.__new__(EchoSyncTrainer)
    step.config = OmegaConf.create({"echo": {"mode": "interleaved"}})

    def rows(*modes: str | None) -> Any:
        return SimpleNamespace(dataframe={"extra_info": [{"mode": mode} for mode in modes]}, data_files=["a.parquet"])

    step.train_dataset, step.val_dataset = rows("interleaved", None), rows("interleaved")
    step._init_dataloader()
    step.val_dataset = rows("interleaved", "plain")
    with pytest.raises(ValueError, match=r"a\.parquet.*plain.*echo.mode is 'interleaved'.*RL_MODE"):
        step._init_dataloader()


def test_trackers_play_rows_of_a_validation(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.full(8_000, 0.25, np.float32), 16_000)
    row = {"id": "r1", "question": "Which?", "text": "<think>a</think>", "ground_truth": "B", "score": 1.5}
    row |= {"components": {"acc": 1.0}, "audio": str(tmp_path / "a.wav")}
    gone = {**row, "id": "r2", "audio": str(tmp_path / "none.wav")}
    sent: list[Any] = []
    wandb: Any = SimpleNamespace(
        Audio=lambda sound, sample_rate: (len(sound), sample_rate),
        Table=lambda columns, data: (columns, data),
        log=lambda content, step: sent.append((content["validation/rows"], step)),
    )
    with SummaryWriter(str(tmp_path / "tb")) as writer:
        show_rows({"tensorboard": SimpleNamespace(writer=writer), "wandb": wandb}, [row, gone], 7)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    (audio,) = events.Audio("validation/r1")
    assert (audio.sample_rate, audio.step) == (16_000.0, 7) and events.Tags()["audio"] == ["validation/r1"]
    ((columns, data), step) = sent[0]
    assert step == 7 and columns[1] == "audio" and data[0][1] == (8_000, 16_000) and data[1][1] is None


def test_the_best_validation_keeps_its_checkpoint(tmp_path: Path) -> None:
    for step in (0, 2, 4, 6):
        (tmp_path / f"global_step_{step}").mkdir()
    for step, acc in ((2, 0.4), (4, 0.6), (6, 0.6), (8, 0.9)):  # 8 has no checkpoint
        note_best(tmp_path, step, {"val-core/a/acc/mean@1": acc, "val-core/b/acc/mean@1": acc, "val-aux/a/acc/x": 0})
    assert (tmp_path / BEST).read_text() == "4"
    (tmp_path / LATEST).write_text("6")
    assert prune_checkpoints(tmp_path, 1, spared={4}) == [0, 2]


def test_the_log_says_where_nothing_can_be_learned() -> None:
    keys = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    assert group_metrics(keys, [1.0, 1.0, 0.0, 1.0], 0) == {"groups/equal": 0.5, "groups/dropped": 0.0}
    assert group_metrics(keys, [1.0] * 4, 2) == {"groups/equal": 1.0, "groups/dropped": 0.5}


def test_a_hit_is_a_clip_that_meets_an_event() -> None:
    def clip(start: float, end: float, inserted: bool = True) -> dict[str, Any]:
        segment = {"start_seconds": start, "end_seconds": end}
        return {"text": "", "segment": segment, "refusal": None, "inserted": inserted, "straddled": False}

    trajectories = [{"attempts": [clip(0.0, 1.0), clip(3.0, 4.0)]}, {"attempts": [clip(0.5, 1.5, inserted=False)]}]
    events = [{"label": "bell", "start": 0.1, "end": 1.1}]
    assert hit_metrics(trajectories, [events, events]) == {"segments/hit": 0.5}
    assert hit_metrics(trajectories, [None, None]) == {}


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"model": {"use_fused_kernels": True}}, "use_fused_kernels"),
        ({"actor": {"ulysses_sequence_parallel_size": 2}}, "Ulysses"),
        ({"actor": {"fsdp_config": {"ulysses_sequence_parallel_size": 2}}}, "Ulysses"),
    ],
)
def test_options_that_omni_models_cannot_take_are_refused_by_name(section: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        refuse_what_omni_models_cannot_take(OmegaConf.create({"actor_rollout_ref": section}))
    harmless = {"model": {"use_fused_kernels": False}, "actor": {"ulysses_sequence_parallel_size": 1}}
    refuse_what_omni_models_cannot_take(OmegaConf.create({"actor_rollout_ref": harmless}))


@pytest.mark.parametrize(
    ("keep", "last", "torn", "left"),
    [
        (2, 8, False, [6, 8, 10]),
        (2, 8, True, [6, 8]),
        (1, 8, True, [8]),
        (9, 8, True, [2, 4, 6, 8]),
        (0, 8, True, [2, 4, 6, 8, 10]),
        (None, 8, True, [2, 4, 6, 8, 10]),
        (2, None, True, [2, 4, 6, 8, 10]),
        (2, 7, True, [2, 4, 6, 8, 10]),
    ],
)
def test_checkpoints_beyond_the_newest_are_deleted_and_never_the_last_whole_one(
    tmp_path: Path, keep: int | None, last: int | None, torn: bool, left: list[int]
) -> None:
    for step in (2, 4, 6, 8, 10):
        (tmp_path / f"global_step_{step}" / "actor").mkdir(parents=True)
        (tmp_path / f"global_step_{step}" / "actor" / "model.pt").write_bytes(b"weights")
    if last is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(last))
    (tmp_path / ".deleted_1").mkdir()
    prune_checkpoints(tmp_path, keep, torn)
    steps = sorted(int(path.name.rpartition("_")[2]) for path in tmp_path.glob("global_step_*"))
    assert steps == left
    if left != [2, 4, 6, 8, 10]:
        assert not list(tmp_path.glob(".deleted_*")) or keep == 9
