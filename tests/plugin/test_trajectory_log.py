"""The trajectory log: which rows, how many bytes, whole or not at all; what the trainer refuses at its start, and which
checkpoints it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

import echo_plugins.for_verl.trainer as trainer
from echo_plugins.for_verl.trainer import (
    EchoTrainer,
    LogSettings,
    choose,
    prune_checkpoints,
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
    monkeypatch.setattr(trainer.PPOTrainerSync, "__init__", lambda *_: pytest.fail("started"))
    rollout = {"rollout": {"calculate_log_probs": False}}
    for preset, complaint in (("papers", "no reward preset"), ("quota-3", "calculate_log_probs=True")):
        config = {"reward": {"reward_kwargs": {"preset": preset}}, "actor_rollout_ref": rollout}
        with pytest.raises(PresetError, match=complaint):
            EchoTrainer(OmegaConf.create(config))
    with pytest.raises(ValueError, match="echo_log"):
        EchoTrainer(OmegaConf.create({"reward": {}, "actor_rollout_ref": rollout, "echo_log": {"rows": -1}}))


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
    step: Any = SimpleNamespace(global_steps=1, _extra_fields=lambda _batch: broken)
    with pytest.raises(RuntimeError, match=r"no value in any of the first step's 3 rollouts.*KeyError: 'y'"):
        EchoTrainer._balance_batch(step, batch, {})
    assert useless_terms([*broken, rollout({"b": "no"})]) == {}
    assert useless_terms([rollout({}, error="bad audio")]) == {}


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
