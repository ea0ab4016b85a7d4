"""RL and inference are one: the same sampled tokens become the same clips, ids and masks through verl's agent loop and
through eval's engine, on one real vLLM. verl's own server code stands between its agent loop and vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import verl.utils.tokenizer
from verl_rollout import MAX_RESPONSE_TOKENS, messages_of, roll_out

from echo_plugins.audio import load, resolve_path
from echo_plugins.relisten.trajectory import Trajectory, expand_placeholders
from eval.engine import Question, Sampling


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


@pytest.fixture(scope="module")
def processor(tiny_model: Path) -> Any:
    return verl.utils.tokenizer.hf_processor(str(tiny_model))  # by this name our adapter has replaced it


def through_verl(session: Any, model: Path, processor: Any, question: Question, straddle: str) -> tuple[Any, Recorded]:
    llm = Recorded(session.engine.llm)
    messages = messages_of(question.question, question.choices, str(resolve_path(question.audio_root, question.audio)))
    sampling = {"temperature": 1.0, "logprobs": True}
    return session.run(roll_out(llm, model, processor, messages, sampling, straddle=straddle)), llm


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
@pytest.mark.parametrize("script", ["clips", "refusals", "many", "text", "special"])
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
    assert len(output.multi_modal_data["audios"]["audio_num_frames"]) == 1 + len(trajectory.clips)

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
    assert ">," in tokens["clips"] and ">." in tokens["refusals"]
    assert ("></" in tokens["refusals"]) != ("</think>" in tokens["refusals"]), "which is one token in Qwen3"
    assert SCRIPTS["clips"].count("</seg>") == 2 and SCRIPTS["refusals"].count("</seg>") == 5
