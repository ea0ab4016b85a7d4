"""What a chat request may say to eval.serve: OpenAI's chat completions with one audio clip, and how they are read.

The clip is an `input_audio` part (base64) or an `audio_url` part (a data: URL, or a file: URL under the audio root).
What cannot be done as asked is refused by name and never ignored: a harness that asks for `n=4` or a `stop` string must
not take an answer for one that obeyed.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import soundfile
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from echo_plugins import audio
from echo_plugins.relisten.prompt import Mode

MAX_TEXT_CHARS = 100_000
# A few kilobytes of FLAC can hold hours of silence. 256 MiB are 5 minutes of 96 kHz stereo.
MAX_DECODED_BYTES = 256 * 2**20


class ApiError(Exception):
    """Why a request is not answered, and the HTTP status to say it with."""

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class TextPart(_Part):
    type: Literal["text"]
    text: str


class InputAudio(_Part):
    data: str
    format: str | None = None  # the bytes themselves say what they are


class InputAudioPart(_Part):
    type: Literal["input_audio"]
    input_audio: InputAudio


class AudioUrl(_Part):
    url: str


class AudioUrlPart(_Part):
    type: Literal["audio_url"]
    audio_url: AudioUrl


Part = Annotated[TextPart | InputAudioPart | AudioUrlPart, Field(discriminator="type")]


class Message(_Part):
    role: Literal["system", "developer", "user"]
    content: str | list[Part]


class StreamOptions(_Part):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that are obeyed; those after `stream_options` are Echo's own. Of the rest see `_NOT_DONE`."""

    model_config = ConfigDict(extra="ignore")

    model: str
    messages: list[Message]
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    mode: Mode | None = None
    max_segments: int | None = Field(None, ge=0)
    min_segment_seconds: float | None = Field(None, gt=0)


# Fields of OpenAI's that would change the answer, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([], ""),
    "logprobs": (False,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "modalities": (["text"],),
}


@dataclass(frozen=True)
class Clip:
    """A decoded clip, mono at 16 kHz, and the name of its content."""

    waveform: np.ndarray
    name: str


def read_request(content: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError."""
    try:
        fields = json.loads(content)
    except ValueError as error:  # bytes that are no UTF-8 too
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(f"the body is not a JSON object but {type(fields).__name__}")
    for name, harmless in _NOT_DONE.items():
        if fields.get(name) is not None and fields[name] not in harmless:
            raise ApiError(f"{name!r} is not supported: leave it out")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        # Where and why; never the value, which may be megabytes of audio.
        told = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise ApiError("; ".join(told)) from error


def question_and_audio(request: ChatRequest) -> tuple[str, InputAudioPart | AudioUrlPart]:
    """The text to answer, a system message before it, and its one clip. Raises ApiError."""
    users = [message for message in request.messages if message.role == "user"]
    if len(users) != 1:
        raise ApiError(f"one message of the user is needed, and there are {len(users)}: this is no conversation")
    parts = [part for message in request.messages for part in _parts(message)]
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart)).strip()
    clips = [part for part in parts if not isinstance(part, TextPart)]
    if len(clips) != 1:
        raise ApiError(f"one clip is needed, as an input_audio or an audio_url part, and there are {len(clips)}")
    if not text:
        raise ApiError("there is no text to answer")
    if len(text) > MAX_TEXT_CHARS:
        raise ApiError(f"the text has {len(text):,} characters, and {MAX_TEXT_CHARS:,} are allowed", 413)
    return text, clips[0]


def _parts(message: Message) -> list[TextPart | InputAudioPart | AudioUrlPart]:
    if isinstance(message.content, str):
        return [TextPart(type="text", text=message.content)]
    return message.content


def read_clip(part: InputAudioPart | AudioUrlPart, audio_root: Path | None, max_seconds: float) -> Clip:
    """Fetch and decode the clip of a request. Raises ApiError."""
    if isinstance(part, InputAudioPart):
        data = part.input_audio.data
        # Some clients put a whole data: URL where OpenAI's take bare base64.
        content = _of_data_url(data) if data.startswith("data:") else _base64(data)
    elif part.audio_url.url.startswith("data:"):
        content = _of_data_url(part.audio_url.url)
    else:
        content = _of_file_url(part.audio_url.url, audio_root)
    try:
        _refuse_long(content, max_seconds)
        waveform = audio.load(content)
    except audio.AudioError as error:
        raise ApiError(f"the clip cannot be used: {error}") from error
    return Clip(waveform, hashlib.blake2b(waveform.data, digest_size=16).hexdigest())


def _refuse_long(content: bytes, max_seconds: float) -> None:
    """By its header, before anything is decoded. What has no readable header is left to the decoder to refuse."""
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            seconds, size = file.frames / file.samplerate, 4 * file.frames * file.channels
    except soundfile.LibsndfileError:
        return
    if seconds > max_seconds:
        raise ApiError(
            f"the clip has {seconds:,.1f} s, and the model hears no more than {max_seconds:g} s: cut it", 413
        )
    if size > MAX_DECODED_BYTES:
        raise ApiError(f"the clip has {size:,} bytes when decoded, and {MAX_DECODED_BYTES:,} are allowed", 413)


def _of_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ApiError("a data: URL of a clip is data:audio/wav;base64,....")
    return _base64(data)


def _base64(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"the clip is not base64: {error}") from error


def _of_file_url(url: str, audio_root: Path | None) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ApiError(f"audio_url: {error}") from error
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ApiError("audio_url takes data: and file: URLs; nothing is fetched from elsewhere")
    if audio_root is None:
        raise ApiError("file: URLs are off: this server was started without --audio-root")
    try:
        return audio.resolve_path(audio_root, urllib.parse.unquote(parts.path)).read_bytes()
    except audio.OutsideRootError as error:
        raise ApiError("the file: URL is not under this server's --audio-root", 403) from error
    except (audio.AudioError, OSError) as error:
        raise ApiError("the file: URL names no file that can be read", 404) from error
