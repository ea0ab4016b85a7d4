"""Asking the models of one stage about one row: prompt, sound, seed, provenance; again with another seed if need be."""

from __future__ import annotations

import asyncio
import base64
import datetime
import io
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import soundfile
from pydantic import BaseModel, ValidationError

from converters.synthesis.config import Endpoint
from converters.synthesis.sample import Provenance, Sample, seed_of
from converters.synthesis.templates import Prompts
from echo_plugins.audio import SAMPLING_RATE, load
from echo_plugins.chat_client import ChatClient, Reply, Status
from echo_plugins.relisten.prompt import escape_reserved

Parsed = TypeVar("Parsed")
Model = TypeVar("Model", bound=BaseModel)


class Unusable(Exception):
    """The model answered, but not with anything that can be used: the row is dropped. Holds what was asked for it."""

    def __init__(self, status: Status, detail: str, provenance: list[Provenance]) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.provenance = provenance


class Unanswered(Exception):
    """No answer, nothing paid: the row waits for the next run."""


class Answered(Generic[Parsed]):
    """What was asked for, the model's reasoning beside it, and the requests it took."""

    def __init__(self, value: Parsed, reply: Reply, provenance: list[Provenance]) -> None:
        self.value = value
        self.reasoning = reply.reasoning
        self.provenance = provenance


class Asker:
    """The models of one stage. `audio_root` and `silence` are where sound is read from."""

    def __init__(
        self,
        stage: str,
        endpoints: list[tuple[Endpoint, ChatClient]],
        prompts: Prompts,
        seed: int,
        audio_root: Path,
        silence: Path,
    ) -> None:
        self._stage = stage
        self._endpoints = endpoints
        self._prompts = prompts
        self._seed = seed
        self._audio_root = audio_root
        self._silence = silence

    @property
    def num_models(self) -> int:
        return len(self._endpoints)

    async def ask(
        self,
        sample: Sample,
        prompt: str,
        values: Mapping[str, Any],
        parse: Callable[[str], Parsed],
        *,
        sound: bool = False,
        silent: bool = False,
        model: int = 0,
        salt: object = "",
    ) -> Answered[Parsed]:
        """Fill in `prompt` and ask, with the clip (`sound`) or silence in its place, until `parse` takes the answer.

        `parse` raises ValueError for what it cannot read. `salt` tells requests apart that are alike. Raises Unusable,
        Unanswered, ChatError.
        """
        endpoint, client = self._endpoints[model]
        text = escape_reserved(self._prompts.render(prompt, **values))
        content: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if sound or silent:
            content.insert(0, _sound(self._silence if silent else self._audio_root / sample.audio, endpoint.audio))
        provenance: list[Provenance] = []
        for repeat in range(endpoint.max_unusable):
            seed = seed_of(self._seed, self._stage, sample.id, prompt, model, salt, repeat)
            body = {
                "model": endpoint.model,
                "messages": [{"role": "user", "content": content if len(content) > 1 else text}],
                **endpoint.sampling,
                "seed": seed,
            }
            reply = await client.ask(body, check=parse, label=sample.id)
            if reply.status is Status.FAILED:
                raise Unanswered(reply.error)
            provenance.append(self._provenance(prompt, endpoint, seed, reply))
            if reply.status is Status.OK:
                return Answered(parse(reply.content), reply, provenance)
            if reply.status is Status.REFUSED:
                break
        raise Unusable(reply.status, reply.error or "", provenance)

    def _provenance(self, prompt: str, endpoint: Endpoint, seed: int, reply: Reply) -> Provenance:
        return Provenance(
            stage=self._stage,
            model=reply.model or endpoint.model,
            prompt=f"{prompt}@{self._prompts.version(prompt)}",
            seed=seed,
            time=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            reasoning_tokens=reply.usage.reasoning_tokens,
            attempts=reply.attempts,
            status=str(reply.status),
        )


async def together(calls: Iterable[Awaitable[Parsed]]) -> list[Parsed]:
    """The results in order. All are waited for before the first error is raised: what is under way will be paid for."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]


def write_silence(path: Path, seconds: float) -> None:
    """What is played in a clip's place to see whether a question needs it."""
    nothing = np.zeros(round(seconds * SAMPLING_RATE), np.float32)
    soundfile.write(path, nothing, SAMPLING_RATE, format="WAV", subtype="PCM_16")


def _sound(path: Path, form: str) -> dict[str, Any]:
    if form == "file":
        return {"type": "audio_url", "audio_url": {"url": path.resolve().as_uri()}}
    return {"type": "input_audio", "input_audio": {"data": _base64_wav(path), "format": "wav"}}


@lru_cache(64)
def _base64_wav(path: Path) -> str:
    """The clip as training will hear it: mono, 16 kHz."""
    encoded = io.BytesIO()
    soundfile.write(encoded, load(path), SAMPLING_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(encoded.getvalue()).decode()


def json_object(content: str, model: type[Model]) -> Model:
    """The last JSON object in an answer, whatever stands around it, as `model`. Raises ValueError."""
    decoder = json.JSONDecoder()
    found, place = None, content.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(content, place)
        except (ValueError, RecursionError):
            end = place + 1
        place = content.find("{", end)
    if found is None:
        raise ValueError(f"no JSON object in {content[:80]!r}")
    try:
        return model.model_validate(found)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"the JSON object is not as asked for: {wrong}") from error
