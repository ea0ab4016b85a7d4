"""What a chat request may say to eval.serve: OpenAI's chat completions with one audio clip, and how they are read.

The clip is an `input_audio` part (base64) or an `audio_url` part (a data: URL, or a file: URL under the audio root).
What cannot be done as asked is refused by name and never ignored: a harness that asks for `n=4` or a `stop` string must
not take an answer for one that obeyed.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import io
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic_core
import soundfile
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from echo_plugins import audio
from echo_plugins.relisten.prompt import Mode

MAX_TEXT_CHARS = 100_000
# A few kilobytes of FLAC can hold hours of silence. 256 MiB are 5 minutes of 96 kHz stereo.
MAX_DECODED_BYTES = 256 * 2**20

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class ApiError(Exception):
    """Why a request is not answered, and the HTTP status to say it with."""

    def __init__(self, message: str, status: int = 400, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
    name: str | None = None  # of the participant: nothing hears it


class StreamOptions(_Part):
    include_usage: bool = False
    include_obfuscation: bool = False  # blanks that hide the length of a chunk: there are none


class ChatRequest(BaseModel):
    """The fields that are obeyed; those after `stream_options` are Echo's own. Every other one is refused, but for
    `_NO_MATTER` and the values in `_NOT_DONE`."""

    model_config = ConfigDict(extra="forbid")

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


# Fields that change no answer.
_NO_MATTER = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "parallel_tool_calls", "request_id", "priority", "cache_salt"),
    }
)

# Fields of OpenAI's and vLLM's that would change the answer, and the values that ask for nothing; null always does.
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
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": (),
    "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "structured_outputs": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}


@dataclass(frozen=True)
class Clip:
    """A decoded clip, mono at 16 kHz, and the name of its content."""

    waveform: np.ndarray
    name: str


def read_request(content: bytes | bytearray) -> ChatRequest:
    """The request in a body. Raises ApiError."""
    try:
        # Refuses what Python's own reader takes and others cannot handle: lone surrogates, deep nesting, NaN.
        fields = pydantic_core.from_json(content, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:  # bytes that are no UTF-8 too
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(f"the body is not a JSON object but {type(fields).__name__}")
    known = ChatRequest.model_fields.keys()
    for name in fields.keys() - known - _NO_MATTER:
        if name not in _NOT_DONE:
            raise ApiError(f"{name[:80]!r} is no parameter here{_meant(name)}; what is not known is not ignored")
        if fields[name] is not None and fields[name] not in _NOT_DONE[name]:
            raise ApiError(f"{name!r} is not supported: leave it out")
    try:
        return ChatRequest.model_validate(
            {name: fields[name] for name in fields.keys() & ChatRequest.model_fields.keys()}
        )
    except ValidationError as error:
        # Where and why; never the value, which may be megabytes of audio.
        told = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise ApiError("; ".join(told)) from error


def _meant(name: str) -> str:
    found = difflib.get_close_matches(name[:80], ChatRequest.model_fields, n=1)
    return f": is {found[0]!r} meant?" if found else ""


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


def read_clip(part: InputAudioPart | AudioUrlPart, audio_root: Path | None, max_seconds: float, max_bytes: int) -> Clip:
    """Fetch and decode the clip of a request; of a file at most `max_bytes`. Raises ApiError."""
    if isinstance(part, InputAudioPart):
        data = part.input_audio.data
        # Some clients put a whole data: URL where OpenAI's take bare base64.
        content = _of_data_url(data) if _is_data_url(data) else _base64(data)
    elif _is_data_url(part.audio_url.url):
        content = _of_data_url(part.audio_url.url)
    else:
        content = _of_file_url(part.audio_url.url, audio_root, max_bytes)
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


def _is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"


def _of_data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise ApiError("a data: URL of a clip is data:audio/wav;base64,....")
    return _base64(data)


def _base64(data: str) -> bytes:
    """The bytes of base64, plain or URL-safe, with or without line breaks and padding."""
    try:
        compact = data.encode("ascii").translate(_URL_SAFE, b" \t\r\n").rstrip(b"=")
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"the clip is not base64: {error}") from error


def _of_file_url(url: str, audio_root: Path | None, max_bytes: int) -> bytes:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError as error:
        raise ApiError(f"audio_url: {error}") from error
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise ApiError("audio_url takes data: and file: URLs; nothing is fetched from elsewhere")
    if audio_root is None:
        raise ApiError("file: URLs are off: this server was started without --audio-root")
    try:
        with audio.resolve_path(audio_root, urllib.parse.unquote(parts.path)).open("rb") as file:
            content = file.read(max_bytes + 1)
    except audio.OutsideRootError as error:
        raise ApiError("the file: URL is not under this server's --audio-root", 403) from error
    except (audio.AudioError, OSError) as error:
        raise ApiError("the file: URL names no file that can be read", 404) from error
    if len(content) > max_bytes:
        raise ApiError(f"the file of the file: URL has more than the {max_bytes:,} bytes that are allowed", 413)
    return content
