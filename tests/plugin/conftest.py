"""One vLLM engine for the whole session: a process takes only one, and its start is slow."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest

from eval.engine import Engine, EngineSettings, Outcome, Question, Sampling, running_engine

T = TypeVar("T")

# What a prompt that says `script NAME` is answered with, in the tiny tokenizer's own tokens: `>,` `>.` `></` straddle.
SCRIPTS = {
    "clips": "<think>First <seg>0.50, 1.50</seg>, then <seg>2.00, 2.50</seg> again.</think><answer>one</answer>",
    "refusals": (
        "<think><seg>9.00, 9.50</seg>, <seg>1.00, 1.05</seg> <seg>2.00, 1.00</seg>. <seg>one</seg> "
        "<seg>1.00, 2.00</seg></think><answer>two</answer>"
    ),
    "many": "<think>" + "<seg>0.50, 1.00</seg> " * 10 + "</think><answer>three</answer>",
    "once": "<think>There <seg>0.50, 1.00</seg> it is.</think><answer>one</answer>",
    "four": "<think><seg>0.50, 1.00</seg>, <seg>1.00, 1.30</seg> or <seg>0.00, 0.70</seg> <seg>1.00, 1.50</seg>.",
    "special": "<think></se<|im_start|>g> is no tag, <seg>1.00, 2.00</seg> is one</think><answer>one</answer>",
    "text": "<think>nothing</think><answer>four</answer>",
    "letter": "<think>In <seg>0.50, 1.50</seg> a bell.</think><answer>two</answer>\nANSWER: B",
}


class EngineSession:
    """The engine, and the event loop that it lives in."""

    def __init__(self, engine: Engine, runner: asyncio.Runner, audio_root: Path) -> None:
        self.engine, self._runner, self.audio_root = engine, runner, audio_root

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    def scripted(self, name: str, audio: str) -> Question:
        """A question that is answered with one of SCRIPTS."""
        return Question(f"{name}-{audio}", str(self.audio_root), audio, f"Answer by script {name}", ("one", "two"))

    def answer(self, *questions: Question, sampling: Sampling) -> list[Outcome]:
        """All of them at once."""

        async def answers() -> list[Outcome]:
            return await asyncio.gather(*(self.engine.answer(question, sampling) for question in questions))

        return self.run(answers())


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="session")
def engine_session(
    tiny_model: Path, tiny_tokenizer: Any, soundscapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineSession]:
    """vLLM with the tiny model; prompts that name a script are answered with it."""
    from scripted_policy import scripts_in_force

    scripts = {name: tiny_tokenizer.encode(text, add_special_tokens=False) for name, text in SCRIPTS.items()}
    settings = EngineSettings(
        str(tiny_model), "cpu", max_num_seqs=16, extra={"logits_processors": ["scripted_policy:ScriptedPolicy"]}
    )
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        session = contextlib.AsyncExitStack()
        stack.callback(lambda: runner.run(session.aclose()))
        with (
            # What vLLM sets is not for the processes that other tests start.
            mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
            scripts_in_force(tmp_path_factory.mktemp("scripts"), tiny_tokenizer, scripts),
        ):
            engine = runner.run(session.enter_async_context(running_engine(settings)))
        yield EngineSession(engine, runner, soundscapes)
