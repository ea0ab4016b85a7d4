"""A hosted model in the place of an engine: any OpenAI-compatible endpoint that takes audio, for eval.infer.

It is asked the plain question, and hears the same 16 kHz sound as a model of ours, as `input_audio` in WAV. Its rows go
into the same files. Every reply is in a journal (OUT.api.jsonl) before its row is: nothing is paid for twice.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import time
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import soundfile

from echo_plugins import audio
from echo_plugins.chat_client import KEY_VARIABLE, ChatClient, Limits, Reply, Status
from echo_plugins.relisten.prompt import question_text
from echo_plugins.relisten.trajectory import StopReason

from .engine import Outcome, Question, Sampling, check_text, load_sound

SEEDS = 2**31  # of a request: some endpoints take no larger ones


@dataclass(frozen=True)
class ApiSettings:
    """Which model is asked, where and how hard. `arguments` are more fields of a request, or others; None takes one
    out."""

    url: str
    model: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key_variable: str = KEY_VARIABLE
    limits: Limits = field(default_factory=Limits)
    retry_unusable: bool = False

    def identity(self) -> dict[str, Any]:
        """What makes its rows; nothing secret."""
        parts = urllib.parse.urlsplit(self.url)
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        return {"api": {"url": place, "model": self.model, "arguments": dict(self.arguments)}}


class ApiAnswerer:
    """Answers questions through a chat client."""

    def __init__(self, client: ChatClient, settings: ApiSettings) -> None:
        self._client, self._settings = client, settings

    async def answer(self, question: Question, sampling: Sampling) -> Outcome:
        """Ask one question. Raises ChatError when no question can be answered, and for nothing that one row did."""
        started = time.monotonic()
        try:
            body = await asyncio.to_thread(self._body, question, sampling)
        except ValueError as error:  # AudioError, or text that no JSON can hold
            return Outcome("", (), StopReason.ERROR, str(error), 0, 0, time.monotonic() - started)
        reply = await self._client.ask(body, repeat=sampling.seed, label=question.id)
        return _outcome(reply, time.monotonic() - started)

    def _body(self, question: Question, sampling: Sampling) -> dict[str, Any]:
        check_text(question)
        waveform, _ = load_sound(question)
        stream = io.BytesIO()
        soundfile.write(stream, waveform, audio.SAMPLING_RATE, format="WAV", subtype="PCM_16")
        text = question_text(question.question, question.choices, "plain")
        clip = {"data": base64.b64encode(stream.getvalue()).decode(), "format": "wav"}
        parts = [{"type": "input_audio", "input_audio": clip}, {"type": "text", "text": text}]
        fields = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": parts}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": sampling.turn_seed(question.id, 0) % SEEDS,
            **self._settings.arguments,
        }
        return {name: value for name, value in fields.items() if value is not None}


def _outcome(reply: Reply, seconds: float) -> Outcome:
    thinking = f"<think>{reply.reasoning}</think>" if reply.reasoning and "<think>" not in reply.content else ""
    stop_reason, error = StopReason.ANSWERED, None
    if reply.status is Status.FAILED:
        stop_reason, error = StopReason.ERROR, reply.error
    elif reply.status is Status.REFUSED:
        error = f"refused: {reply.error}"
    elif reply.finish_reason == "length" or reply.status is Status.EMPTY:
        stop_reason = StopReason.LENGTH
    answer = None
    if reply.content.strip() and "<answer>" not in reply.content:
        # Nobody trained it to write our blocks: all that it said after thinking is its answer.
        answer = reply.content.rpartition("</think>")[2].strip()
    return Outcome(
        thinking + reply.content, (), stop_reason, error, reply.usage.completion_tokens, 0, seconds, bare_answer=answer
    )


@contextlib.asynccontextmanager
async def running_api(settings: ApiSettings, journal: Path) -> AsyncIterator[ApiAnswerer]:
    """Yield the answerer. Raises ChatError."""
    async with ChatClient(
        settings.url,
        key_variable=settings.key_variable,
        limits=settings.limits,
        journal=journal,
        retry_unusable=settings.retry_unusable,
    ) as client:
        yield ApiAnswerer(client, settings)
