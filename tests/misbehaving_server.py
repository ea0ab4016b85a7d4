"""A real HTTP server on this machine that answers chat requests as a script says, and misbehaves as servers do.

    with misbehaving_server(lambda request: rate_limited(0.1) if request.attempt == 1 else Answer("yes")) as server:
        client(server.url)
    assert len(server.requests) == 2

The script is given each request and says what becomes of it. `request.attempt` counts equal bodies from 1.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    path: str
    headers: Mapping[str, str]
    body: Any
    attempt: int
    number: int

    @property
    def text(self) -> str:
        """The contents of all messages, one after the other."""
        return "\n".join(str(message["content"]) for message in self.body["messages"])


@dataclass(frozen=True)
class Answer:
    """A well-formed answer; `message` and `choice` add to it or put something else in its place."""

    content: str | None
    usage: Mapping[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 5})
    finish_reason: str = "stop"
    message: Mapping[str, Any] = field(default_factory=dict)

    def payload(self, request: Request) -> bytes:
        message = {"role": "assistant", "content": self.content, **self.message}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        answer = {"id": f"chatcmpl-{request.number}", "object": "chat.completion", "choices": [choice]}
        return json.dumps(answer | {"model": request.body.get("model"), "usage": self.usage}).encode()


def thinking(content: str, reasoning: str) -> Answer:
    """The answer of a reasoning model."""
    usage = {"prompt_tokens": 10, "completion_tokens": 25, "completion_tokens_details": {"reasoning_tokens": 20}}
    return Answer(content, usage, message={"reasoning_content": reasoning})


def refusal(text: str = "I cannot help with that.") -> Answer:
    return Answer(None, message={"refusal": text})


@dataclass(frozen=True)
class Failure:
    """A status with a JSON error, or with any body."""

    status: int
    body: str = '{"error": {"message": "not now", "type": "server_error"}}'
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


def rate_limited(retry_after: float | str | None = None) -> Failure:
    return Failure(429, headers={} if retry_after is None else {"Retry-After": str(retry_after)})


def html(status: int = 502) -> Failure:
    """What a proxy in front of the server says, for all that it is asked; some say it with status 200."""
    return Failure(status, "<html><body><h1>502 Bad Gateway</h1></body></html>", content_type="text/html")


@dataclass(frozen=True)
class HalfJson:
    """A good answer that is cut in the middle, with a matching Content-Length."""


@dataclass(frozen=True)
class Dropped:
    """The connection is reset instead of an answer, or with `after_bytes` in the middle of one."""

    after_bytes: int = 0


@dataclass(frozen=True)
class Hang:
    """Nothing for so long, then an answer that nobody waits for."""

    seconds: float


Behaviour = Answer | Failure | HalfJson | Dropped | Hang
Script = Callable[[Request], Behaviour]


class MisbehavingServer:
    """`url` ends in /v1. `requests` holds what came, in the order it came in; `most_at_once` how many were open."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._open = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)

    def stop(self) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def sleep(self, seconds: float) -> None:
        self._stopped.wait(seconds)

    def take(self, path: str, headers: Mapping[str, str], content: bytes) -> Request:
        body = json.loads(content) if content else None
        with self._lock:
            self._seen[content.decode()] += 1
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            request = Request(path, headers, body, self._seen[content.decode()], len(self.requests) + 1)
            self.requests.append(request)
        return request

    def done(self) -> None:
        with self._lock:
            self._open -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # of five, the default, connections of a busy client are lost


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: MisbehavingServer

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.owner.take(self.path, dict(self.headers), content)
        try:
            # A client that has given up is what some of the scripts are for.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._behave(self.owner.script(request), request)
        finally:
            self.owner.done()

    do_GET = do_POST

    def _behave(self, behaviour: Behaviour, request: Request) -> None:
        if isinstance(behaviour, Hang):
            self.owner.sleep(behaviour.seconds)
            behaviour = Answer("too late")
        if isinstance(behaviour, Answer):
            self._send(200, behaviour.payload(request))
        elif isinstance(behaviour, Failure):
            self._send(behaviour.status, behaviour.body.encode(), behaviour.content_type, behaviour.headers)
        elif isinstance(behaviour, HalfJson):
            whole = Answer("half of this is lost").payload(request)
            self._send(200, whole[: len(whole) // 2])
        else:
            if behaviour.after_bytes:
                self._send(200, Answer("x" * 2 * behaviour.after_bytes).payload(request), length=behaviour.after_bytes)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    def _send(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:length])

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is not a server's log."""


@contextlib.contextmanager
def misbehaving_server(script: Script) -> Iterator[MisbehavingServer]:
    """The server on a free port of this machine, until the block is left."""
    server = MisbehavingServer(script)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
