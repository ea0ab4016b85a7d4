"""An OpenAI-compatible server of a model that listens again: other people's harnesses run against it unchanged.

    python -m eval.serve --model DIR [--port 8000] [--audio-root DIR]

POST /v1/chat/completions takes one clip and a question; naming segments and hearing them again happens here, and the
response says so under `segments`. GET /v1/models, /health, /metrics (Prometheus). With a key in the environment
(ECHO_API_KEY) the /v1 addresses want it as a bearer token. Streams send each turn's text when the turn is over.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import typer
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from rich.console import Console
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from echo_plugins.audio import SAMPLING_RATE
from echo_plugins.model import MAX_AUDIO_SECONDS
from echo_plugins.relisten.prompt import Mode
from echo_plugins.relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS
from echo_plugins.relisten.trajectory import StopReason, Trajectory
from echo_plugins.relisten.transcript import parse

from .chat_api import ApiError, ChatRequest, Clip, question_and_audio, read_clip, read_request
from .engine import EngineDied, EngineSettings, Question, Sampling, running_engine
from .options import (
    CpuKvCacheOption,
    DeviceOption,
    DtypeOption,
    EngineArgOption,
    GpuMemoryOption,
    MaxModelLenOption,
    MaxNumSeqsOption,
    TensorParallelOption,
    engine_settings,
    visible_gpus,
)
from .predictions import segment_row

KEY_VARIABLE = "ECHO_API_KEY"
BODY_SECONDS = 60.0  # for a request's body to arrive
BODY_COPIES = 3  # of a body in memory while it is read: its bytes, the text in them, the encoded clip
DECODERS = 4  # threads; each may hold MAX_DECODED_BYTES
CLIENT_GONE = 499  # nginx's number for it; only metrics see it
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

_console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Listener(Protocol):
    """What the server needs of eval.engine.Engine."""

    def trajectory(self, question: Question, num_samples: int, sampling: Sampling) -> Trajectory: ...

    async def run(
        self,
        trajectory: Trajectory,
        waveform: np.ndarray,
        name: str,
        row_id: str,
        sampling: Sampling,
        on_turn: Callable[[], None],
    ) -> None: ...

    def count_audio_tokens(self, num_samples: int) -> int: ...


@dataclass(frozen=True)
class ServerSettings:
    """What a server allows. `sampling` holds where a request does not say."""

    model_name: str
    sampling: Sampling
    audio_root: Path | None = None
    api_key: str = ""
    concurrency: int = 32
    max_waiting: int = 256
    max_body_bytes: int = 64 * 2**20
    max_held_bytes: int = 4 * 2**30
    max_seconds: float = MAX_AUDIO_SECONDS
    split_thinking: bool = False


class Metrics:
    """What /metrics shows; a registry of its own, so that two servers of one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter("echo_requests", "Finished chat requests.", ["status"], registry=self.registry)
        self.seconds = Histogram("echo_request_seconds", "From the request to its last byte.", registry=self.registry)
        self.running = Gauge("echo_requests_running", "Requests that the engine works on.", registry=self.registry)
        self.open = Gauge("echo_requests_open", "Requests taken and not finished.", registry=self.registry)
        self.tokens = Counter("echo_tokens", "Tokens of finished trajectories.", ["kind"], registry=self.registry)
        self.segments = Counter("echo_segments", "Tags, by what became of them.", ["outcome"], registry=self.registry)


@dataclass
class Ticket:
    """A request that was taken. `status` is what became of it; 499 is a client that went away. `held`: the bytes of
    memory that are set aside for it."""

    status: int = 500
    held: int = 0


class Memory:
    """The bytes that all requests together may take. What does not fit waits, before anything of its body is read."""

    def __init__(self, total: int) -> None:
        self.total, self.taken = total, 0
        self._changed = asyncio.Event()

    async def set_aside(self, ticket: Ticket, size: int) -> None:
        """Wait until there is room for `size` bytes; a request for more than all of it gets all of it."""
        size = min(size, self.total)
        while self.taken + size > self.total:
            await self._changed.wait()
        ticket.held = size
        self.taken += size

    def keep(self, ticket: Ticket, size: int) -> None:
        """Give back what a request has more than `size`."""
        given = max(0, ticket.held - size)
        ticket.held -= given
        self.taken -= given
        self._changed.set()
        self._changed = asyncio.Event()


class Server:
    """The requests under way. `died` is set when the engine is gone: nothing more can be answered."""

    def __init__(self, engine: Listener, settings: ServerSettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.died = asyncio.Event()
        self._engine = engine
        self._places = asyncio.Semaphore(settings.concurrency)
        self._open = 0
        self.memory = Memory(settings.max_held_bytes)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode-audio")

    @contextlib.contextmanager
    def admitted(self) -> Iterator[Ticket]:
        """A place among the open requests, before anything of the body is read. Raises ApiError."""
        if self.died.is_set():
            raise ApiError("the engine is gone; this server has to be started again", 503)
        if self._open >= self.settings.concurrency + self.settings.max_waiting:
            self.metrics.requests.labels("429").inc()
            raise ApiError(f"{self._open} requests are open and no more are taken", 429, {"Retry-After": "1"})
        started, ticket = time.monotonic(), Ticket()
        self._open += 1
        try:
            with self.metrics.open.track_inprogress():
                yield ticket
        except ApiError as error:
            ticket.status = error.status
            raise
        finally:
            self._open -= 1
            self.memory.keep(ticket, 0)
            self.metrics.requests.labels(str(ticket.status)).inc()
            self.metrics.seconds.observe(time.monotonic() - started)

    async def read(self, request: Request, ticket: Ticket) -> Completion:
        """A request, checked and decoded, as the completion that is to become of it. Raises ApiError.

        Of its bytes only the decoded clip is held from then on.
        """
        await self._set_aside(request, ticket)
        loop = asyncio.get_running_loop()
        chat = await loop.run_in_executor(self._decoders, read_request, await self._body(request))
        if chat.model != self.settings.model_name:
            raise ApiError(f"there is no model {chat.model[:80]!r} here but {self.settings.model_name!r}", 404)
        text, part = question_and_audio(chat)
        limits = (self.settings.audio_root, self.settings.max_seconds, self.settings.max_body_bytes)
        clip = await loop.run_in_executor(self._decoders, read_clip, part, *limits)
        num_audio_tokens = self._engine.count_audio_tokens(len(clip.waveform))
        if num_audio_tokens < 1:
            raise ApiError(f"the clip has {len(clip.waveform)} samples at 16 kHz, too few for the model to hear")
        # Seeds are made of this name: the same request with the same seed has the same answer.
        name = hashlib.sha256(f"{clip.name} {text}".encode()).hexdigest()[:24]
        sampling = self._sampling(chat)
        try:
            trajectory = self._engine.trajectory(Question(name, "", "", text, ()), len(clip.waveform), sampling)
        except ValueError as error:  # it does not fit
            raise ApiError(str(error)) from error
        self.memory.keep(ticket, clip.waveform.nbytes)
        include_usage = chat.stream_options is not None and chat.stream_options.include_usage
        told = Told(chat.stream, include_usage)
        return Completion(name, clip, sampling, trajectory, num_audio_tokens, self.settings, told)

    async def _set_aside(self, request: Request, ticket: Ticket) -> None:
        """Memory for the body, its text and the clip in it. What does not say its length may have the most. Raises
        ApiError."""
        said = request.headers.get("content-length", "")
        length = int(said) if said.isascii() and said.isdigit() else self.settings.max_body_bytes
        if length > self.settings.max_body_bytes:
            raise self._too_much()
        waveform = round(self.settings.max_seconds * SAMPLING_RATE) * np.dtype(np.float32).itemsize
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self.memory.set_aside(ticket, max(waveform, BODY_COPIES * length))
        except TimeoutError:
            raise ApiError("other requests take all the memory that there is", 429, {"Retry-After": "1"}) from None

    def _too_much(self) -> ApiError:
        return ApiError(f"a request may have {self.settings.max_body_bytes:,} bytes, and this one has more", 413)

    async def _body(self, request: Request) -> bytearray:
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.settings.max_body_bytes:
                        raise self._too_much()
        except TimeoutError:
            raise ApiError(f"the request was not whole after {BODY_SECONDS:g} s", 408) from None
        return body

    def _sampling(self, chat: ChatRequest) -> Sampling:
        base = self.settings.sampling
        if chat.max_segments is not None and chat.max_segments > base.max_segments:
            raise ApiError(f"max_segments is {chat.max_segments}, and {base.max_segments} are allowed")
        wanted = {
            "mode": chat.mode,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "max_tokens": chat.max_completion_tokens or chat.max_tokens,
            "max_segments": chat.max_segments,
            "min_segment_seconds": chat.min_segment_seconds,
        }
        seed = secrets.randbits(63) if chat.seed is None else chat.seed
        return replace(base, seed=seed, **{name: value for name, value in wanted.items() if value is not None})

    async def answer(self, completion: Completion) -> None:
        """Drive a completion's trajectory to its end, as soon as there is a place. Raises ApiError."""
        async with self._places:
            with self.metrics.running.track_inprogress():
                try:
                    await self._engine.run(
                        completion.trajectory,
                        completion.clip.waveform,
                        completion.clip.name,
                        completion.name,
                        completion.sampling,
                        completion.turned.set,
                    )
                except EngineDied as error:
                    self.died.set()
                    raise ApiError(f"the engine is gone: {error}", 503) from error
        if completion.trajectory.stop_reason is StopReason.ERROR:
            raise ApiError(completion.trajectory.error or "the engine gave no answer", 500)
        self._count(completion)

    def _count(self, completion: Completion) -> None:
        usage = completion.usage()
        inserted = usage["completion_tokens_details"]["audio_tokens"]
        self.metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self.metrics.tokens.labels("sampled").inc(usage["completion_tokens"] - inserted)
        self.metrics.tokens.labels("inserted").inc(inserted)
        for segment in completion.segments():
            outcome = "inserted" if segment["inserted"] else segment.get("refusal", "named")
            self.metrics.segments.labels(outcome).inc()

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Told:
    """How a client wants to be told: as a stream, and with the usage at its end."""

    stream: bool = False
    include_usage: bool = False


class Completion:
    """One trajectory about one clip, and how a client is told of it."""

    def __init__(
        self,
        name: str,
        clip: Clip,
        sampling: Sampling,
        trajectory: Trajectory,
        num_audio_tokens: int,
        settings: ServerSettings,
        told: Told = Told(),
    ) -> None:
        self.told = told
        self.name, self.clip, self.sampling, self.trajectory = name, clip, sampling, trajectory
        self.turned = asyncio.Event()  # set after each turn
        turn = trajectory.next_turn()
        self._num_audio_tokens = num_audio_tokens
        self._num_prompt_tokens = len(turn.engine_ids if turn else ()) - 1 + num_audio_tokens
        self._split_thinking = settings.split_thinking
        self._turns_told = self._chars_told = 0
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": settings.model_name,
        }

    def segments(self) -> list[dict[str, Any]]:
        """The tags so far, as eval.infer writes them."""
        return [segment_row(attempt) for attempt in self.trajectory.attempts]

    def usage(self) -> dict[str, Any]:
        """Inserted audio counts as completion, as it does for max_tokens."""
        mask = self.trajectory.response_mask
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": len(mask),
            "total_tokens": self._num_prompt_tokens + len(mask),
            "prompt_tokens_details": {"audio_tokens": self._num_audio_tokens},
            "completion_tokens_details": {"audio_tokens": len(mask) - sum(mask)},
        }

    def whole(self) -> dict[str, Any]:
        """The completion, once its trajectory has ended."""
        message = {"role": "assistant", **self._said(self.trajectory.text())}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason(), "logprobs": None}
        return self._envelope("chat.completion", [choice]) | {"usage": self.usage(), "segments": self.segments()}

    def first_chunk(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def next_chunk(self) -> dict[str, Any] | None:
        """What was said in the turns since the last chunk, None when there is none."""
        ended = self.trajectory.stop_reason is not None
        if self.trajectory.num_turns == self._turns_told or (self._split_thinking and not ended):
            return None  # thinking can be told from the answer when both are there
        self._turns_told = self.trajectory.num_turns
        text = self.trajectory.text()
        new, self._chars_told = text[self._chars_told :], len(text)
        return self._chunk(self._said(new)) | {"segments": self.segments()}

    def last_chunks(self, include_usage: bool) -> list[dict[str, Any]]:
        last = [self._chunk({}, self._finish_reason())]
        return [*last, self._envelope("chat.completion.chunk", []) | {"usage": self.usage()}] if include_usage else last

    def _said(self, text: str) -> dict[str, Any]:
        if self._split_thinking and (transcript := parse(text)).well_formed:
            return {"content": transcript.answer, "reasoning_content": transcript.think}
        return {"content": text}

    def _finish_reason(self) -> str:
        return "stop" if self.trajectory.stop_reason is StopReason.ANSWERED else "length"

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", [{"index": 0, "delta": delta, "finish_reason": finish_reason}])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": kind, "choices": choices}


class EventStream(StreamingResponse):
    """Server-sent events of a completion under way. Whoever leaves the stream, early or not, ends the work on it."""

    def __init__(
        self,
        completion: Completion,
        answering: asyncio.Task[None],
        ticket: Ticket,
        place: contextlib.ExitStack,
    ) -> None:
        super().__init__(self._events(completion), media_type="text/event-stream")
        self._answering, self._ticket, self._place = answering, ticket, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._ticket.status = CLIENT_GONE
        try:
            await super().__call__(scope, receive, send)
        finally:  # nothing here may wait: a client that is gone has cancelled us
            self._answering.cancel()
            self._place.close()

    async def _events(self, completion: Completion) -> AsyncIterator[str]:
        self._answering.add_done_callback(lambda _: completion.turned.set())
        yield _event(completion.first_chunk())
        ended = False
        while not ended:
            await completion.turned.wait()
            completion.turned.clear()
            ended = self._answering.done()
            if (chunk := completion.next_chunk()) is not None:
                yield _event(chunk)
        try:
            self._answering.result()
        except ApiError as error:
            self._ticket.status = error.status
            yield _event(error_body(error))
        else:
            self._ticket.status = 200
            for chunk in completion.last_chunks(completion.told.include_usage):
                yield _event(chunk)
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def error_body(error: ApiError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = _KINDS.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.status}}


def _as_sent(key: str) -> set[bytes]:
    """The bytes that clients make of a key: of one that is not ASCII some send UTF-8 and some Latin-1."""
    with contextlib.suppress(UnicodeEncodeError):
        return {key.encode(), key.encode("latin-1")}
    return {key.encode()}


def make_app(server: Server) -> FastAPI:
    """The HTTP interface of a server."""
    settings = server.settings
    keys = _as_sent(settings.api_key)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    api = FastAPI(title="Echo", openapi_url=None, lifespan=lifespan)

    async def authorized(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").strip().partition(" ")
        raw = given.strip().encode("latin-1")  # as which a header's bytes are read
        known = scheme.lower() == "bearer" and any(hmac.compare_digest(raw, key) for key in keys)
        if settings.api_key and not known:
            raise ApiError("this server wants its key: Authorization: Bearer KEY", 401)

    @api.get("/health")
    async def health() -> dict[str, str]:
        if server.died.is_set():
            raise ApiError("the engine is gone", 503)
        return {"status": "ok"}

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @api.get("/v1/models", dependencies=[Depends(authorized)])
    async def models() -> dict[str, Any]:
        model = {"id": settings.model_name, "object": "model", "created": 0, "owned_by": "echo"}
        return {"object": "list", "data": [model]}

    @api.post("/v1/chat/completions", dependencies=[Depends(authorized)])
    async def chat_completions(request: Request) -> Response:
        with contextlib.ExitStack() as place:
            ticket = place.enter_context(server.admitted())
            try:
                completion = await server.read(request, ticket)
            except ClientDisconnect:
                ticket.status = CLIENT_GONE
                return Response(status_code=CLIENT_GONE)  # which nobody reads
            answering = asyncio.create_task(server.answer(completion))
            if completion.told.stream:
                return EventStream(completion, answering, ticket, place.pop_all())
            leaving = asyncio.ensure_future(request.receive())  # after the body, nothing else can come
            try:
                await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    ticket.status = CLIENT_GONE
                    return Response(status_code=CLIENT_GONE)
                answering.result()
            finally:
                answering.cancel()
                leaving.cancel()
            ticket.status = 200
            return JSONResponse(completion.whole())

    @api.exception_handler(ApiError)
    async def told(_: Request, error: ApiError) -> Response:
        return JSONResponse(error_body(error), status_code=error.status, headers=error.headers)

    @api.exception_handler(Exception)
    async def ours(_: Request, error: Exception) -> Response:
        """A mistake of this server: said in OpenAI's form, and in full in the log."""
        return JSONResponse(error_body(ApiError(f"the server failed: {type(error).__name__}", 500)), status_code=500)

    @api.exception_handler(HTTPException)
    async def no_such_address(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(ApiError(error.detail, error.status_code)), status_code=error.status_code)

    return api


@app.command()
def main(
    model: Annotated[Path, typer.Option(help="Model directory, Hugging Face layout.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines too; set a key then.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, help="0 takes a free one and says which.")] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="What requests call it. Default: the directory's name.")
    ] = None,
    audio_root: Annotated[
        Path | None, typer.Option(help="Take file: URLs under this folder. Default: none are taken.")
    ] = None,
    split_thinking: Annotated[
        bool,
        typer.Option("--split-thinking", help="Content is the answer alone, reasoning_content what came before it."),
    ] = False,
    mode: Annotated[
        Mode, typer.Option(help="interleaved listens again, grounded only names segments, plain does neither.")
    ] = "interleaved",
    temperature: Annotated[float, typer.Option(min=0.0, help="Where a request does not say.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where a request does not say.")] = 1.0,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Where a request does not say; inserted audio counted.")
    ] = 2048,
    max_segments: Annotated[int, typer.Option(min=0, help="Clips inserted in a response, at most.")] = MAX_SEGMENTS,
    min_segment_seconds: Annotated[float, typer.Option(min=0.001)] = MIN_SEGMENT_SECONDS,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests that the engine works on at once. Default: what it takes.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="More that may wait; others are told 429.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Of one request; larger ones are told 413.")] = 64.0,
    max_memory_gib: Annotated[
        float, typer.Option(min=0.001, help="For the bodies and clips of all open requests; what has no room waits.")
    ] = 4.0,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Of a clip.")] = MAX_AUDIO_SECONDS,
    device: DeviceOption = "auto",
    tensor_parallel: TensorParallelOption = 1,
    dtype: DtypeOption = "auto",
    max_model_len: MaxModelLenOption = None,
    max_num_seqs: MaxNumSeqsOption = None,
    gpu_memory_utilization: GpuMemoryOption = 0.9,
    cpu_kv_cache_gib: CpuKvCacheOption = 1.0,
    engine_arg: EngineArgOption = None,
) -> None:
    """Serve a model that listens again over OpenAI's chat completions, for other people's harnesses.

    A request has one clip, as input_audio (base64) or audio_url (a data: URL, or a file: URL under --audio-root), and a
    question. Beside OpenAI's own fields it may have `mode`, `max_segments` and `min_segment_seconds`. Set ECHO_API_KEY
    and clients have to send it as their key. /health and /metrics (Prometheus) need none.
    """
    try:
        engine = engine_settings(
            model,
            visible_gpus(device),
            max_segments,
            tensor_parallel,
            engine_arg,
            dtype=dtype,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            gpu_memory_utilization=gpu_memory_utilization,
            cpu_kv_cache_gib=cpu_kv_cache_gib,
        )
        allowed = ServerSettings(
            model_name=model_name or model.resolve().name,
            sampling=Sampling(
                mode,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                max_segments=max_segments,
                min_segment_seconds=min_segment_seconds,
            ),
            audio_root=audio_root,
            api_key=os.environ.get(KEY_VARIABLE, ""),
            concurrency=concurrency or engine.concurrency,
            max_waiting=max_waiting,
            max_body_bytes=round(max_body_mib * 2**20),
            max_held_bytes=round(max_memory_gib * 2**30),
            max_seconds=max_seconds,
            split_thinking=split_thinking,
        )
        asyncio.run(serve(engine, allowed, host, port))
    except (ValueError, EngineDied, OSError) as error:
        _say(f"error: {error}")
        raise typer.Exit(1) from None


async def serve(engine_settings: EngineSettings, settings: ServerSettings, host: str, port: int) -> None:
    """Serve until a signal ends it. Raises EngineDied when the engine does not start, or is gone."""
    _say(f"starting the engine on {engine_settings.device} with {engine_settings.model}")
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        async with running_engine(engine_settings) as engine:
            server = Server(engine, settings)
            config = uvicorn.Config(make_app(server), log_level="warning", timeout_graceful_shutdown=30)
            web = uvicorn.Server(config)
            address, bound = listening.getsockname()[:2]
            _say(f"{settings.model_name} at http://{address}:{bound}/v1" + (", with a key" if settings.api_key else ""))

            async def end_with_engine() -> None:
                await server.died.wait()
                web.should_exit = True

            watching = asyncio.create_task(end_with_engine())
            await web.serve(sockets=[listening])
            watching.cancel()
            if server.died.is_set():
                raise EngineDied("the engine is gone; its own messages are above")


def _say(message: str) -> None:
    _console.print(message, markup=False)


if __name__ == "__main__":
    app()
