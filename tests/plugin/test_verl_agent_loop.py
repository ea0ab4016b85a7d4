"""The rollout as verl runs it, with a scripted engine in the place of vLLM."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
import soundfile
import torch
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker
from verl.utils.tokenizer import hf_processor
from verl.workers.rollout.replica import TokenOutput
from verl_rollout import relisten_loop

import echo_plugins.for_verl.dataset as dataset
from echo_plugins.for_verl.trainer import EchoTrainer, relisten_metrics, trajectory_row
from echo_plugins.model import QWEN2_5_OMNI, QWEN3_OMNI, family_of, max_audio_seconds
from echo_plugins.relisten.trajectory import StopReason

SECONDS = 4.0
LISTEN = "<think>there <seg>0.50, 1.50</seg>"
ANSWER = " it is</think><answer>B</answer><|im_end|>"
# Audio tokens of the whole sound, of the clip in LISTEN and of half a second
TOKENS = {QWEN2_5_OMNI: (50, 12, 6), QWEN3_OMNI: (52, 13, 7)}


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return hf_processor(str(tiny_model))


@pytest.fixture(scope="module")
def audio_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audio") / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, int(SECONDS * 16_000)), 16_000)
    return path


class ScriptedServer:
    """Answers each call with the next text of a script; log-probs are -1, -2, -3 ... over the whole trajectory."""

    def __init__(self, tokenizer: Any, script: list[str | Exception | float]) -> None:
        self.tokenizer, self.script, self.calls, self.sampled = tokenizer, iter(script), [], 0

    async def generate(self, request_id: str, **call: Any) -> TokenOutput:
        self.calls.append({"request_id": request_id, **call})
        answer = next(self.script)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            answer = ANSWER
        ids = self.tokenizer.encode(answer, add_special_tokens=False)
        logprobs = [-float(self.sampled + position + 1) for position in range(len(ids))]
        self.sampled += len(ids)
        with_logprobs = call["sampling_params"]["logprobs"]
        fields = {"global_steps": 7, "num_cached_tokens": 3}
        return TokenOutput(
            token_ids=ids, log_probs=logprobs if with_logprobs else None, stop_reason="completed", extra_fields=fields
        )


class Rollout:
    """One trajectory through RelistenAgentLoop, the server it talked to, and what it returned."""

    def __init__(
        self, model: Path, processor: Any, audio: Any, script: list[Any], logprobs: bool = True, **echo: Any
    ) -> None:
        self.tokenizer, self.family = processor.tokenizer, family_of(model)
        self.server = ScriptedServer(self.tokenizer, script)
        lengths = {"prompt_length": echo.pop("prompt_length", 400), "response_length": 300}
        loop = relisten_loop(model, processor, self.server, lengths, echo)
        question = {"type": "text", "text": "Which sound?"}
        content = [question] if audio is None else [{"type": "audio", "audio": audio}, question]
        self.row = {"raw_prompt": [{"role": "user", "content": content}], "global_steps": 8, "index": 5}
        self.audio_id = self.family.special_ids(self.tokenizer, model).audio
        self.output: AgentLoopOutput = asyncio.run(loop.run({"temperature": 1.0, "logprobs": logprobs}, **self.row))
        self.fields = self.output.extra_fields

    def runs(self, ids: list[int]) -> list[int]:
        """Lengths of the runs of audio placeholders."""
        marks = "".join("A" if token == self.audio_id else " " for token in ids)
        return [len(run) for run in marks.split()]


@pytest.fixture
def roll_out(tiny_model: Path, processor: Any, audio_file: Path) -> Any:
    def run(script: list[Any], audio: Any = str(audio_file), **settings: Any) -> Rollout:
        return Rollout(tiny_model, processor, audio, script, **settings)

    return run


def test_a_named_segment_is_heard_and_the_engine_goes_on_in_the_same_session(roll_out: Any) -> None:
    rollout = roll_out([LISTEN, ANSWER])
    first, second = rollout.server.calls
    assert first["sampling_params"]["stop"] == ["</seg>"] and first["sampling_params"]["include_stop_str_in_output"]
    assert first["request_id"] == second["request_id"]
    assert [len(audio) for audio in second["audio_data"]] == [64_000, 16_000]
    source, clip = second["audio_data"]
    assert np.shares_memory(source, clip) and np.array_equal(clip, source[8_000:24_000])
    # the engine gets one placeholder a clip, the trainer as many as the clip has tokens
    assert rollout.runs(second["prompt_ids"]) == [1, 1]
    source_tokens, clip_tokens, _ = TOKENS[rollout.family]
    assert rollout.runs(rollout.output.prompt_ids) == [source_tokens]
    assert rollout.runs(rollout.output.response_ids) == [clip_tokens]
    assert first["sampling_params"]["max_tokens"] == 300
    assert second["sampling_params"]["max_tokens"] == 300 - len(rollout.output.response_ids) + len(
        rollout.tokenizer.encode(ANSWER)
    )


def test_no_placeholder_of_media_can_be_sampled(roll_out: Any) -> None:
    rollout = roll_out([ANSWER])
    bias = rollout.server.calls[0]["sampling_params"]["logit_bias"]
    assert set(bias) == {rollout.tokenizer.convert_tokens_to_ids(token) for token in rollout.family.banned_tokens}
    assert set(bias.values()) == {-100.0}


def test_ids_mask_and_log_probs_are_the_engines_own_around_the_observation(roll_out: Any) -> None:
    rollout = roll_out([LISTEN, ANSWER])
    output = rollout.output
    assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)
    sampled = [value for value, mask in zip(output.response_logprobs, output.response_mask, strict=True) if mask]
    observed = [value for value, mask in zip(output.response_logprobs, output.response_mask, strict=True) if not mask]
    assert sampled == [-float(position + 1) for position in range(len(sampled))]
    assert observed == [0.0] * (1 + TOKENS[rollout.family][1] + 1)  # audio_bos, audio, audio_eos


def test_features_are_those_of_every_clip_and_reach_the_actor_through_verls_worker(
    roll_out: Any, processor: Any
) -> None:
    rollout = roll_out([LISTEN, " and <seg>2.00, 2.50</seg>", ANSWER])
    output = rollout.output
    worker: Any = SimpleNamespace(
        processor=processor,
        tokenizer=processor.tokenizer,
        _get_mm_processor_kwargs=lambda audios: {"sampling_rate": 16_000},
    )
    ids = torch.tensor(output.prompt_ids + output.response_ids)
    inputs = AgentLoopWorker._compute_multi_modal_inputs(worker, output, ids)
    assert set(inputs) == {"audio_frames", "audio_num_frames"}
    frames = inputs["audio_num_frames"].tolist()
    assert [rollout.family.tokens_of_frames(count) for count in frames] == list(TOKENS[rollout.family])
    assert len(inputs["audio_frames"]) == sum(frames), "no padding"
    positions = AgentLoopWorker._compute_position_ids(worker, ids[None], torch.ones_like(ids)[None], inputs)
    assert positions.shape == (1, 4, len(ids)) and bool((positions == torch.arange(len(ids))).all())


def test_after_the_last_allowed_segment_the_engine_is_not_stopped(roll_out: Any) -> None:
    rollout = roll_out([LISTEN, " <seg>1.00, 2.00</seg>" + ANSWER], max_segments=1)
    assert "stop" not in rollout.server.calls[1]["sampling_params"]
    assert [(a.inserted, a.refusal) for a in rollout.fields["attempts"]] == [(True, None), (False, "too_many")]


def test_grounded_mode_never_pauses(roll_out: Any) -> None:
    rollout = roll_out([LISTEN + ANSWER], mode="grounded")
    assert "stop" not in rollout.server.calls[0]["sampling_params"]
    assert rollout.runs(rollout.output.response_ids) == []


def test_a_row_without_audio_is_rolled_out_as_text(roll_out: Any) -> None:
    rollout = roll_out([ANSWER], audio=None)
    assert rollout.server.calls[0]["audio_data"] is None
    assert rollout.fields["stop_reason"] == StopReason.ANSWERED and rollout.output.multi_modal_data == {}


def test_embedded_bytes_are_heard_like_a_path(roll_out: Any, audio_file: Path) -> None:
    rollout = roll_out([ANSWER], audio={"bytes": audio_file.read_bytes(), "path": "noise.wav"})
    assert len(rollout.server.calls[0]["audio_data"][0]) == 64_000


def test_without_log_probs_from_the_engine_there_are_none(roll_out: Any) -> None:
    rollout = roll_out([LISTEN, ANSWER], logprobs=False)
    assert rollout.output.response_logprobs is None and rollout.fields["answer_logprobs"] is None


def test_the_answers_log_probabilities_are_those_of_its_tokens(roll_out: Any, processor: Any) -> None:
    rollout = roll_out([LISTEN, ANSWER])
    before = len(processor.tokenizer.encode(LISTEN)) + len(processor.tokenizer.encode(" it is</think><answer>"))
    assert rollout.fields["answer_logprobs"] == [-float(before + 1)]


def unreadable(folder: Path) -> str:
    path = folder / "cut.wav"
    path.write_bytes(b"RIFF\x24\x00\x00\x00WAVE")
    return str(path)


@pytest.mark.parametrize(
    ("script", "settings", "reason"),
    [
        ([], {"audio": "/nowhere.wav"}, "AudioError: /nowhere.wav: No such file"),
        ([], {"audio": "CUT"}, "AudioError"),
        ([], {"prompt_length": 30}, "over data.max_prompt_length=30"),
        ([], {"audio": "ENDLESS", "prompt_length": 40_000}, "s of audio: the model hears"),
        ([LISTEN, ray.exceptions.RayActorError()], {}, "RayActorError"),
        ([LISTEN, 60.0], {"rollout_timeout_seconds": 0.5}, "not done after 0.5 s"),
    ],
    ids=["missing", "cut", "long prompt", "long audio", "engine", "time"],
)
def test_a_failed_rollout_comes_back_as_data_outside_the_loss(
    roll_out: Any, tiny_model: Path, tmp_path: Path, script: list[Any], settings: dict[str, Any], reason: str
) -> None:
    if settings.get("audio") == "CUT":
        settings = {**settings, "audio": unreadable(tmp_path)}
    if settings.get("audio") == "ENDLESS":
        settings = {**settings, "audio": str(tmp_path / "endless.wav")}
        seconds = int(max_audio_seconds(tiny_model)) + 1
        soundfile.write(settings["audio"], np.zeros(seconds * 16_000, np.int16), 16_000)
        reason = f"{seconds}.0 {reason} {seconds - 1} s at most"
    rollout = roll_out(script, **settings)
    assert rollout.fields["stop_reason"] == StopReason.ERROR and reason in rollout.fields["error"]
    output = rollout.output
    assert output.response_ids and set(output.response_mask) == {0} and set(output.response_logprobs) == {0.0}
    assert len(output.response_ids) == len(output.response_mask) == len(output.response_logprobs)
    # no placeholder without features, in the prompt neither
    assert output.multi_modal_data == {} and rollout.runs(output.prompt_ids + output.response_ids) == []
    assert len(output.prompt_ids) <= settings.get("prompt_length", 400)
    assert isinstance(rollout.fields["min_global_steps"], int), "verl puts these into an array"
    good = roll_out([LISTEN, ANSWER]).output
    output.reward_score = good.reward_score = 0.0
    assert set(output.as_dict()) == set(good.as_dict())
    assert set(output.extra_fields) == set(good.extra_fields)


def test_a_bug_is_not_taken_for_a_failed_rollout(roll_out: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        roll_out([ZeroDivisionError()])


def test_decoding_does_not_hold_up_the_other_rollouts(roll_out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []

    def slow_load(path: str) -> np.ndarray:
        loads.append(threading.get_ident())
        return np.zeros(64_000, dtype=np.float32)

    monkeypatch.setattr(dataset, "load", slow_load)
    roll_out([ANSWER])
    assert loads and threading.get_ident() not in loads


def test_settings_that_mean_nothing_are_refused(roll_out: Any) -> None:
    with pytest.raises(ValueError, match="max_segmets"):
        roll_out([ANSWER], max_segmets=3)
    with pytest.raises(ValueError, match="telepathic"):
        roll_out([ANSWER], mode="telepathic")


@pytest.fixture
def dumped(roll_out: Any) -> Iterator[list[dict[str, Any]]]:
    """`extra_fields` of three rollouts as the trainer gets them: through AgentLoopOutput.as_dict."""
    scripts: list[list[Any]] = [
        [LISTEN, " <seg>1.00, 2.00</seg>", ANSWER],
        ["<think><seg>9.00, 9.50</seg>", " <seg>3.00, 1.00</seg>", ANSWER],
        [ray.exceptions.RayActorError()],
    ]
    rewards = [
        {"acc": 1.0, "reward_format": 0.5},
        {"acc": 0.0, "reward_format": 0.25},
        {"acc": 0.0, "reward_format": 0.0},
    ]
    rows = []
    for script, reward in zip(scripts, rewards, strict=True):
        output = roll_out(script).output
        output.extra_fields["reward_extra_info"] = reward
        rows.append(output.as_dict()["extra_fields"])
    yield rows


def test_a_steps_log_holds_rewards_segments_refusals_tokens_and_stop_reasons(
    dumped: list[dict[str, Any]], tiny_model: Path
) -> None:
    metrics = relisten_metrics(dumped)
    assert metrics["reward/format"] == pytest.approx(0.25) and metrics["reward/acc"] == pytest.approx(1 / 3)
    assert metrics["segments/named"] == pytest.approx(4 / 3) and metrics["segments/inserted"] == pytest.approx(2 / 3)
    assert metrics["segments/refused/past_end"] == metrics["segments/refused/reversed"] == pytest.approx(1 / 3)
    assert metrics["segments/refused/malformed"] == 0.0
    assert metrics["segments/seconds"] == pytest.approx(1.0) and metrics["segments/overlap"] == pytest.approx(0.25)
    observed = 2 * (1 + TOKENS[family_of(tiny_model)][1] + 1)
    assert metrics["tokens/observation"] == pytest.approx(observed / 3)
    assert metrics["stop/answered"] == pytest.approx(2 / 3) and metrics["stop/error"] == pytest.approx(1 / 3)
    assert metrics["stop/length"] == 0.0
    assert set(relisten_metrics(dumped[:1])) == set(metrics), "a curve needs its points in every step"


@pytest.mark.parametrize("errors", [["no such file", "no such file"], []])
def test_a_step_without_any_rollout_to_train_on_ends_the_run_with_the_reason(
    errors: list[str],
) -> None:
    batch: Any = None
    step: Any = SimpleNamespace(
        global_steps=3, max_failed_share=0.5, _extra_fields=lambda _batch: [{"error": error} for error in errors]
    )
    with pytest.raises(RuntimeError, match=r"step 3: each of its \d rollouts failed.*(no such file|none came back)"):
        EchoTrainer._balance_batch(step, batch, {})


def test_a_trajectory_is_logged_as_one_line_of_json(dumped: list[dict[str, Any]]) -> None:
    row = trajectory_row(
        "uid_0_0", 3, 1.5, dumped[0], {"id": "a7", "question": "Which?"}, {"ground_truth": "B"}, "scenes"
    )
    logged = json.loads(json.dumps(row))
    assert logged["id"] == "a7" and logged["score"] == 1.5 and logged["components"]["reward_format"] == 0.5
    assert not re.search(r"<\|(AUDIO|audio_pad)\|>", logged["text"]) and logged["text"].startswith("<think>there")
    assert [(segment["start"], segment["inserted"]) for segment in logged["segments"]] == [(0.5, True), (1.0, True)]
    refused = trajectory_row("uid_1_0", 3, 0.0, dumped[1], {}, {}, "scenes")["segments"]
    assert [segment["refusal"] for segment in refused] == ["past_end", "reversed"]
