"""RL and inference are one: the same sampled tokens become the same clips, ids and masks through verl's agent loop and
through eval's engine, on one real vLLM. verl's own server code stands between its agent loop and vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.utils.tokenizer import hf_processor

import echo_plugins.for_verl.agent_loop as agent_loop
import echo_plugins.for_verl.cpu_platform
import echo_plugins.for_verl.dataset as dataset
import echo_plugins.for_verl.omni  # noqa: F401 - verl's processor for Omni
import echo_plugins.for_verl.vllm_features  # noqa: F401 - as in verl's own server
from echo_plugins.audio import load, resolve_path
from echo_plugins.relisten.prompt import question_text
from echo_plugins.relisten.trajectory import Trajectory, expand_placeholders
from eval.engine import Question, Sampling

MAX_RESPONSE_TOKENS = 400
MAX_MODEL_LEN = 4096


class Recorded:
    """vLLM, with what it took and gave written down."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.outputs = llm, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        last = None
        async for output in self.llm.generate(*args, **kwargs):
            last = output
            yield output
        self.outputs.append(last)

    def streams(self) -> list[list[int]]:
        """Of each turn: the prompt as vLLM expanded it, and what it sampled."""
        return [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in self.outputs]


def verl_server(llm: Any, processor: Any) -> Any:
    """verl's server around a vLLM that runs already: what its `generate` reads, and no HTTP, Ray or workers."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    server = object.__new__(vLLMHttpServer)
    members = {
        "engine": llm,
        "config": OmegaConf.create(
            {
                "max_model_len": MAX_MODEL_LEN,
                "response_length": MAX_RESPONSE_TOKENS,
                "prompt_length": 1024,
                "full_determinism": False,
                "enable_rollout_routing_replay": False,
                "mtp": None,
            }
        ),
        "model_config": SimpleNamespace(processor=processor, lora_rank=0, lora={}),
        "replica_rank": 0,
        "global_steps": 1,
        "_disaggregation_role": "null",
        "_pd_decode_peers": [],
        "_submission_paused": False,
        "_rejecting": False,
        "_admitting": 0,
    }
    vars(server).update(members)
    return server


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return hf_processor(str(tiny_model))


def through_verl(session: Any, model: Path, processor: Any, question: Question, straddle: str) -> tuple[Any, Recorded]:
    llm = Recorded(session.engine.llm)
    config = OmegaConf.create(
        {
            "actor_rollout_ref": {
                "model": {"path": str(model)},
                "rollout": {"prompt_length": 1024, "response_length": MAX_RESPONSE_TOKENS},
            },
            "data": {},
            "echo": {"straddle": straddle},
        }
    )
    text = question_text(question.question, question.choices, "interleaved")
    audio = str(resolve_path(question.audio_root, question.audio))
    messages = [{"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": text}]}]

    server = verl_server(llm, processor)

    async def roll_out() -> AgentLoopOutput:
        loop = agent_loop.RelistenAgentLoop(
            trainer_config=DictConfigWrap(config),
            server_manager=server,
            tokenizer=processor.tokenizer,
            processor=processor,
            dataset_cls=dataset.RelistenDataset,
            data_config=DictConfigWrap(config.data),
            hf_model_type="qwen2_5_omni",
        )
        return await loop.run({"temperature": 1.0, "logprobs": True}, raw_prompt=messages, index=0, global_steps=1)

    return session.run(roll_out()), llm


def through_eval(
    session: Any, question: Question, straddle: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trajectory, Recorded]:
    llm = Recorded(session.engine.llm)
    monkeypatch.setattr(session.engine, "llm", llm)
    sampling = Sampling(temperature=1.0, max_tokens=MAX_RESPONSE_TOKENS, straddle=straddle)
    waveform = load(resolve_path(question.audio_root, question.audio))
    trajectory = session.engine.trajectory(question, len(waveform), sampling)
    session.run(session.engine.run(trajectory, waveform, "content", question.id, sampling))
    monkeypatch.undo()
    return trajectory, llm


@pytest.mark.parametrize("straddle", ["cut", "keep"])
@pytest.mark.parametrize("script", ["clips", "refusals", "many", "text"])
def test_the_agent_loop_and_the_engine_make_the_same_trajectory(
    engine_session: Any,
    tiny_model: Path,
    processor: Any,
    soundscapes: Path,
    script: str,
    straddle: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    audio = next(path for path in sorted((soundscapes / "audio").glob("*.wav")) if 2.5 < len(load(path)) / 16_000 < 9.0)
    question = engine_session.scripted(script, f"audio/{audio.name}")
    output, verl_llm = through_verl(engine_session, tiny_model, processor, question, straddle)
    trajectory, eval_llm = through_eval(engine_session, question, straddle, monkeypatch)

    assert output.extra_fields["error"] is None and trajectory.error is None
    assert output.response_ids == trajectory.response_ids
    assert output.response_mask == trajectory.response_mask
    assert output.response_logprobs is not None and trajectory.response_logprobs is not None
    np.testing.assert_allclose(output.response_logprobs, trajectory.response_logprobs, atol=1e-4)
    assert output.extra_fields["attempts"] == trajectory.attempts
    assert output.extra_fields["stop_reason"] == trajectory.stop_reason == "answered"

    # vLLM took the same prompts and the same sound in both, turn by turn
    assert verl_llm.streams() == eval_llm.streams()
    assert output.multi_modal_data is not None
    assert len(output.multi_modal_data["audios"]["feature_attention_mask"]) == 1 + len(trajectory.clips)

    # What the trainer trains on is what vLLM saw: the last turn's prompt with its sound expanded, and its answer.
    session, ids = engine_session, engine_session.engine.ids
    waveform = load(audio)
    prompt = session.engine.prompt_ids(question, "interleaved")
    expanded = expand_placeholders(prompt, ids.audio, [session.engine.count_audio_tokens(len(waveform))])
    assert output.prompt_ids == expanded
    assert eval_llm.streams()[-1] == expanded + trajectory.response_ids

    # As many runs of placeholders as clips, each as long as its clip.
    runs = "".join("A" if token == ids.audio else " " for token in output.response_ids).split()
    assert [len(run) for run in runs] == [clip.num_tokens for clip in trajectory.clips]


def test_the_scripts_hold_what_the_comparison_is_about(tiny_tokenizer: Any) -> None:
    """Two clips, a refused tag of each kind, and tags whose last token holds more than the tag."""
    from conftest import SCRIPTS

    tokens = {name: tiny_tokenizer.tokenize(text) for name, text in SCRIPTS.items()}
    assert ">," in tokens["clips"] and "></" in tokens["refusals"] and ">." in tokens["refusals"]
    assert SCRIPTS["clips"].count("</seg>") == 2 and SCRIPTS["refusals"].count("</seg>") == 5


def test_features_are_the_same_with_and_without_padding_to_the_window(engine_session: Any, soundscapes: Path) -> None:
    """The engine extracts features of the clip alone, verl's server of the padded window: the model hears the same."""
    llm = engine_session.engine.llm
    waveform = load(sorted((soundscapes / "audio").glob("*.wav"))[0])[:30_000]  # unheard: vLLM keeps what it has heard
    prompt = engine_session.engine.prompt_ids(engine_session.scripted("text", "x"), "plain")

    async def features(**options: Any) -> Any:
        request = {"prompt_token_ids": prompt, "multi_modal_data": {"audio": [waveform]}, **options}
        (rendered,) = await llm.renderer.render_cmpl_async([request])
        (item,) = rendered["mm_kwargs"]["audio"]
        return None if item is None else item["input_audio_features"].data

    async def both() -> list[Any]:
        stock = await features(mm_processor_kwargs={"sampling_rate": 16_000})
        return [await features(), stock]

    trimmed, stock = engine_session.run(both())
    assert trimmed is not None and stock is not None
    assert np.array_equal(trimmed.numpy(), stock.numpy())
