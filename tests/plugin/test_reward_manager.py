"""The reward manager as verl loads it by its configuration, given what verl's agent loop worker sends."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.reward import load_reward_manager

from echo_plugins.relisten.segment import Refusal, Segment
from echo_plugins.relisten.trajectory import Attempt
from echo_plugins.rewards import PresetError

CHOICES = ["a dog barks", "a bell rings"]
HEARD = Attempt("<seg>1.00, 2.00</seg>", Segment(1.0, 2.0), None, straddled=False, inserted=True)
REFUSED = Attempt("<seg>9.00, 9.50</seg>", None, Refusal.PAST_END, straddled=False, inserted=False)
GOOD = "<think>at <seg>1.00, 2.00</seg> there is a bell</think><answer>a bell rings</answer>"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def manager(tokenizer: Any, preset: str = "paper", log_probs: bool = True) -> Any:
    config = OmegaConf.create(
        {
            "reward": {
                "reward_manager": {
                    "source": "importlib",
                    "name": "EchoRewardManager",
                    "module": {"path": "pkg://echo_plugins.for_verl.reward_manager"},
                },
                "reward_kwargs": {"preset": preset},
            },
            "actor_rollout_ref": {"rollout": {"calculate_log_probs": log_probs}},
        }
    )
    return load_reward_manager(config, tokenizer, reward_router_address=None, reward_model_tokenizer=None)


def scored(
    tokenizer: Any, text: str, *, preset: str = "paper", row: dict[str, Any] | None = None, **rollout: Any
) -> Any:
    """The rollout `text` through verl's own AgentLoopWorker._compute_score; the worker and Ray are stood in for."""
    reward_manager = manager(tokenizer, preset)
    worker = SimpleNamespace(
        reward_loop_worker_handles=[SimpleNamespace(compute_score=SimpleNamespace(remote=reward_manager.run_single))],
        _compute_multi_modal_inputs=lambda output, input_ids: {},
        _compute_position_ids=lambda input_ids, mask, inputs, kwargs: torch.arange(input_ids.shape[-1])[None],
        _get_mm_processor_kwargs=lambda audios: {},
    )
    output = AgentLoopOutput(
        prompt_ids=tokenizer.encode("What is heard?"),
        response_ids=tokenizer.encode(text),
        response_mask=[1] * len(tokenizer.encode(text)),
        metrics=AgentLoopMetrics(),
        extra_fields={
            "text": text,
            "attempts": [HEARD],
            "stop_reason": "answered",
            "duration_seconds": 8.0,
            "answer_logprobs": None,
            **rollout,
        },
    )
    sample = {
        "data_source": "echo",
        "raw_prompt": [{"role": "user", "content": [{"type": "audio", "audio": "/data/a.wav"}, {"type": "text"}]}],
        "reward_model": {"style": "rule", "ground_truth": "a bell rings"},
        "extra_info": {"id": "r1", "choices": CHOICES},
    } | (row or {})
    asyncio.run(AgentLoopWorker._compute_score(worker, [output], sample))  # type: ignore[arg-type]
    assert output.reward_score is not None
    return output.reward_score, output.extra_fields["reward_extra_info"]


def test_a_right_rollout_gets_the_papers_reward_with_every_component(tokenizer: Any) -> None:
    score, info = scored(tokenizer, GOOD)
    assert score == pytest.approx(1.5)
    assert info == {
        "acc": 1.0,
        "failed": 0.0,
        "term_errors": 0.0,
        "term_missing": 0.0,
        "reward_format": 0.5,
        "reward_accuracy": 0.5,
        "reward_segment": 0.5,
        "reward_consistency": 0.0,
        "problems": "{}",
        "audio": "/data/a.wav",
        "filter": "1.5",
    }


def test_confidence_is_that_of_the_whole_sampled_answer(tokenizer: Any) -> None:
    halves = [math.log(0.5), math.log(0.8)]
    info = scored(tokenizer, GOOD, preset="confidence-linear", answer_logprobs=halves)[1]
    assert info["reward_accuracy"] == pytest.approx(0.5 * 0.4)


def test_grounding_reads_the_events_of_the_row(tokenizer: Any) -> None:
    events = [{"label": "bell", "start": 1.0, "end": 3.0}, {"label": "dog", "start": 4.0, "end": 5.0}]
    row = {"extra_info": {"choices": CHOICES, "question": "What rings?", "events": np.array(events)}}
    assert scored(tokenizer, GOOD, preset="grounding", row=row)[1]["reward_grounding"] == pytest.approx(0.25)


def test_a_row_without_events_is_0_in_grounding_and_counted(tokenizer: Any) -> None:
    score, info = scored(tokenizer, GOOD, preset="grounding", row={"extra_info": {"choices": CHOICES, "events": None}})
    assert (score, info["term_missing"], info["term_errors"]) == (1.0, 1.0, 0.0)
    assert json.loads(info["problems"]) == {"grounding": "the row has no events"}


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ([{"type": "audio", "audio": {"bytes": b"RIFF", "path": "clips/a.flac"}}], "clips/a.flac"),
        ([{"type": "audio", "audio": {"bytes": b"RIFF", "path": None}}], ""),
        ("no audio here", ""),
    ],
)
def test_the_rows_audio_is_named_for_the_log(tokenizer: Any, content: Any, path: str) -> None:
    row = {"raw_prompt": [{"role": "user", "content": content}]}
    assert scored(tokenizer, GOOD, row=row)[1]["audio"] == path


def test_a_tag_that_inserted_nothing_earns_no_segment_reward(tokenizer: Any) -> None:
    assert scored(tokenizer, GOOD, attempts=[REFUSED])[0] == pytest.approx(1.0)


def test_a_failed_rollout_scores_zero_and_is_counted(tokenizer: Any) -> None:
    score, info = scored(tokenizer, GOOD, stop_reason="error")
    assert score == 0.0
    assert info == dict.fromkeys(info, 0.0) | {
        **{"failed": 1.0, "problems": "{}", "audio": "/data/a.wav", "filter": "nan"}
    }


def test_a_row_that_no_answer_satisfies_scores_zero_and_is_named(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    score, info = scored(tokenizer, GOOD, row={"reward_model": {"ground_truth": "thunder"}})
    assert (score, info["acc"], info["failed"]) == (0.0, 0.0, 1.0)
    assert "row r1" in caplog.text and "thunder" in caplog.text


def test_a_broken_term_of_a_users_preset_is_counted_and_the_rest_still_pays(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def broken(record): raise RuntimeError('no')\n")
    (tmp_path / "mine.yaml").write_text("terms: {accuracy: 1, 'mine.py:broken': 1}\n")
    score, info = scored(tokenizer, GOOD, preset=str(tmp_path / "mine.yaml"))
    assert (score, info["term_errors"], info["reward_broken"]) == (1.0, 1.0, 0.0)
    assert json.loads(info["problems"]) == {"broken": "RuntimeError: no"}


def test_choices_may_come_as_an_array_or_not_at_all(tokenizer: Any) -> None:
    assert scored(tokenizer, GOOD, row={"extra_info": {"choices": np.array(CHOICES)}})[1]["acc"] == 1.0
    assert scored(tokenizer, GOOD, row={"extra_info": {"id": "open"}})[1]["acc"] == 1.0


def test_an_unknown_preset_stops_the_start(tokenizer: Any) -> None:
    with pytest.raises(PresetError, match="outcome, paper"):
        manager(tokenizer, "papers")


def test_a_preset_that_needs_log_probs_stops_the_start_of_a_rollout_without_them(tokenizer: Any) -> None:
    with pytest.raises(PresetError, match=r"quota-2 needs .*calculate_log_probs=True"):
        manager(tokenizer, "quota-2", log_probs=False)
    assert manager(tokenizer, "paper", log_probs=False).preset.name == "paper"


def test_verls_validation_averages_every_component_and_counts_failures(tokenizer: Any) -> None:
    rows = [scored(tokenizer, GOOD)[1], scored(tokenizer, GOOD, stop_reason="error")[1]]
    assert rows[0].keys() == rows[1].keys()
    metrics = process_validation_metrics(["echo"] * 2, ["a", "b"], {key: [row[key] for row in rows] for key in rows[0]})
    assert {key: value["mean@1"] for key, value in metrics["echo"].items()} == {
        key: pytest.approx((value + rows[1][key]) / 2) for key, value in rows[0].items() if not isinstance(value, str)
    }
