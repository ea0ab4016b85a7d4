"""A client of any OpenAI-compatible chat server, for long paid jobs: judges, data synthesis.

    async with ChatClient("http://host:8000/v1", journal=Path("judge.jsonl"), limits=Limits(concurrency=32)) as client:
        reply = await client.ask({"model": "m", "messages": [...], "temperature": 0.0, "seed": 42}, check=json.loads)
        if reply.status is Status.OK: ...
    print(client.spent, client.retries)

What a server may do is data: every request ends in a Reply, whatever came back. What would spoil every request alike (a
wrong key, a wrong address, an empty account) is a ChatError, which ends the job. What was paid for is in the journal
before `ask` returns, so that the same job given again after a kill asks only for what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import fcntl
import hashlib
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

KEY_VARIABLE = "OPENAI_API_KEY"

FSYNC_SECONDS = 5.0  # what a crash of the machine, not of the program, may have to be paid for again
LONGEST_RETRY_AFTER_SECONDS = 600.0  # a server that asks for more has its request fail instead
MAX_EXCERPT_CHARS = 200  # of a body in an error message

# Gateways answer 200 with an error of any words. One such answer may pass; nothing else in so many attempts on end, for
# so long, will not.
ERRORS_ON_END = 5
ERRORS_FOR_SECONDS = 4.0

# One of these spoils every request: no such key, an empty account, no such address or model, a method that is no POST.
_HOPELESS = {401, 402, 404, 405}
_PASSING = {408, 409, 425, 429}  # and every 5xx
_NO_MONEY = "insufficient_quota"  # a 429 by which OpenAI means an empty account


class ChatError(RuntimeError):
    """No request can succeed like this; the message says what the server said and what to change."""


class Status(StrEnum):
    """What a request ended in.

    `ok`: content, and the caller's check took it. `empty`: no content. `refused`: the model or a filter declined.
    `malformed`: content that the check did not take. `failed`: no answer at all, nothing paid; see `Reply.error`.
    """

    OK = "ok"
    EMPTY = "empty"
    REFUSED = "refused"
    MALFORMED = "malformed"
    FAILED = "failed"


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counts them; `reasoning_tokens` are part of `completion_tokens`."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )


@dataclass(frozen=True)
class Reply:
    """What became of a request.

    `reasoning` is the server's `reasoning_content`. `usage` counts every attempt that was answered. `model` is the name
    the server gave. `replayed`: it came from the journal, and cost nothing now.
    """

    status: Status
    content: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Usage = Usage()
    model: str | None = None
    attempts: int = 1
    error: str | None = None
    replayed: bool = False


@dataclass(frozen=True)
class Limits:
    """How hard a server may be pressed. A wait is doubled at each attempt up to the longest, and shortened at random by
    up to a half so that clients do not come back together. `max_unusable`: paid answers that are empty or malformed.
    `max_failed_in_a_row`: after so many requests that nothing came of, the server is given up."""

    concurrency: int = 16
    requests_per_minute: float | None = None
    timeout_seconds: float = 120.0  # of one attempt, from connecting to the last byte
    max_attempts: int = 8
    max_unusable: int = 3
    max_failed_in_a_row: int = 50
    first_wait_seconds: float = 1.0
    longest_wait_seconds: float = 60.0

    def __post_init__(self) -> None:
        if min(self.concurrency, self.max_attempts, self.max_unusable) < 1:
            raise ValueError(f"concurrency, max_attempts and max_unusable must be 1 or more: {self}")
        if self.timeout_seconds <= 0 or (self.requests_per_minute is not None and self.requests_per_minute <= 0):
            raise ValueError(f"timeout_seconds and requests_per_minute must be above 0: {self}")


class Journal:
    """Replies by the hash of their request, one JSON line each, appended and flushed. Only offsets are kept in memory.

    A last line without its end is what a kill left; it is cut off. Raises ChatError when another process writes to the
    file or when it is no journal.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._stream = file.open("a+b")
        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._offsets = self._scan()
        except BlockingIOError as error:
            self._stream.close()
            raise ChatError(f"{file}: another process is writing to it") from error
        except ChatError:
            self._stream.close()
            raise
        self._synced = time.monotonic()

    def get(self, key: str) -> dict[str, Any] | None:
        """The last entry of a request, None when there is none."""
        if key not in self._offsets:
            return None
        self._stream.seek(self._offsets[key])
        return json.loads(self._stream.readline())

    def append(self, key: str, entry: Mapping[str, Any]) -> None:
        """Write one entry and flush it."""
        self._offsets[key] = self._stream.seek(0, os.SEEK_END)
        self._stream.write(json.dumps({"key": key, **entry}, ensure_ascii=False).encode() + b"\n")
        self._stream.flush()
        if time.monotonic() - self._synced > FSYNC_SECONDS:
            os.fsync(self._stream.fileno())
            self._synced = time.monotonic()

    def close(self) -> None:
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _scan(self) -> dict[str, int]:
        offsets: dict[str, int] = {}
        self._stream.seek(0)
        place = 0
        for key, _, size in journal_entries(self._stream, self._file):
            offsets[key] = place
            place += size
        self._stream.truncate(place)
        return offsets


def journal_entries(stream: Iterable[bytes], file: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Key, entry and size in bytes of each line of a journal, up to one that a kill left half written. `file` is for
    messages. Raises ChatError when it is no journal."""
    for number, line in enumerate(stream, 1):
        if not line.endswith(b"\n"):
            return
        try:
            entry = json.loads(line)
            key = entry.pop("key")
            if not isinstance(key, str):
                raise TypeError(f"its key is {key!r}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ChatError(f"{file}, line {number}: no entry of a journal ({error!r})") from error
        yield key, entry, len(line)


def request_key(body: Mapping[str, Any], repeat: int = 0) -> str:
    """The hash that a reply is found by: the request whole, and which of several asked alike it is. Not the server's
    address, which changes from one start of a server to the next."""
    canonical = json.dumps([body, repeat], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class ChatClient:
    """Asks one server, many requests at once. Use it in `async with`.

    Args:
        url: the base that ends in /v1, or the whole address of chat/completions.
        key_variable: the environment variable with the key; where it is unset no key is sent.
        journal: the file of what was paid for; without it nothing is kept.
        retry_unusable: ask again what the journal holds as empty, refused or malformed.

    Read: `spent` (Usage of this run), `retries` (why attempts were repeated), `statuses` (of the replies).
    """

    def __init__(
        self,
        url: str,
        *,
        key_variable: str = KEY_VARIABLE,
        limits: Limits | None = None,
        journal: Path | None = None,
        retry_unusable: bool = False,
    ) -> None:
        base = url.rstrip("/")
        self.url = base if base.endswith("/chat/completions") else f"{base}/chat/completions"
        if not self.url.startswith(("http://", "https://")):
            raise ChatError(f"{url!r} is no http:// or https:// address, such as http://localhost:8000/v1")
        self.limits = limits or Limits()
        self.spent = Usage()
        self.retries: Counter[str] = Counter()
        self.statuses: Counter[Status] = Counter()
        self._key = os.environ.get(key_variable, "")
        self._key_variable = key_variable
        self._retry_unusable = retry_unusable
        self._journal = Journal(journal) if journal else None
        self._places = asyncio.Semaphore(self.limits.concurrency)
        self._failed_in_a_row = 0
        self._errors_on_end = 0  # answers with status 200 that were errors
        self._first_error = 0.0  # when their first came, by the clock of the event loop
        self._next_start = 0.0  # on the clock of the event loop; when the next request may leave
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            limits=httpx.Limits(max_connections=self.limits.concurrency),
            timeout=None,  # of each attempt as a whole, in _attempt: httpx would count from byte to byte
        )

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()
        if self._journal:
            self._journal.close()

    async def ask(
        self,
        body: Mapping[str, Any],
        *,
        repeat: int = 0,
        check: Callable[[str], object] | None = None,
        label: str | None = None,
    ) -> Reply:
        """Send one request of the chat API, sampling parameters and all, and try until it is answered.

        `repeat` tells apart requests that are alike. `check` raises ValueError for content that is of no use, which is
        asked for again. `label` goes into the journal, for its readers. Raises ChatError.
        """
        key = request_key(body, repeat)
        reply = self._recall(key, check)
        if reply is None:
            async with self._places:
                reply = await self._try(body, check)
            if self._journal and reply.status is not Status.FAILED:
                self._journal.append(key, ({"label": label} if label else {}) | asdict(reply))
            self._failed_in_a_row = self._failed_in_a_row + 1 if reply.status is Status.FAILED else 0
            if self._failed_in_a_row >= self.limits.max_failed_in_a_row:
                raise ChatError(
                    f"{self.url}: {self._failed_in_a_row} requests in a row failed. The last: {reply.error}"
                )
        self.statuses[reply.status] += 1
        return reply

    def _recall(self, key: str, check: Callable[[str], object] | None) -> Reply | None:
        entry = self._journal.get(key) if self._journal else None
        if entry is None:
            return None
        said = {field.name: entry[field.name] for field in fields(Reply)}
        reply = replace(Reply(**said), status=Status(entry["status"]), usage=Usage(**entry["usage"]), replayed=True)
        if reply.status is not Status.OK:
            return None if self._retry_unusable else reply
        return reply if _complaint(check, reply.content) is None else None

    async def _try(self, body: Mapping[str, Any], check: Callable[[str], object] | None) -> Reply:
        usage, unusable, reply = Usage(), 0, Reply(Status.FAILED)
        for attempt in range(1, self.limits.max_attempts + 1):
            wait = min(self.limits.longest_wait_seconds, self.limits.first_wait_seconds * 2 ** (attempt - 1))
            wait *= random.uniform(0.5, 1.0)
            answer = await self._attempt(body)
            if isinstance(answer, _Trouble):
                reply = Reply(Status.FAILED, usage=usage, attempts=attempt, error=answer.what)
                if not answer.passing or (answer.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS:
                    return reply
                reason = answer.kind
                if answer.retry_after is not None:
                    wait = answer.retry_after + random.uniform(0, self.limits.first_wait_seconds)
                    self._pause(answer.retry_after)
            else:
                reply = _read(answer, check, attempt)
                usage += reply.usage
                self.spent += reply.usage
                reply = replace(reply, usage=usage)
                unusable += 1
                if reply.status not in (Status.EMPTY, Status.MALFORMED) or unusable >= self.limits.max_unusable:
                    return reply
                reason = reply.status.value
            if attempt < self.limits.max_attempts:
                self.retries[reason] += 1
                await asyncio.sleep(wait)
        return reply

    async def _attempt(self, body: Mapping[str, Any]) -> dict[str, Any] | _Trouble:
        """The body of one answer, or what was wrong. Raises ChatError."""
        await self._start()
        try:
            async with asyncio.timeout(self.limits.timeout_seconds):
                response = await self._http.post(self.url, json=body)
        except TimeoutError:
            return _Trouble("timeout", f"no whole answer within {self.limits.timeout_seconds:g} s")
        except httpx.TransportError as error:
            return _Trouble("connection", f"{type(error).__name__}: {error}")
        except httpx.InvalidURL as error:
            raise ChatError(f"{self.url}: {error}") from error
        status = response.status_code
        if status in _HOPELESS or (status == 429 and _NO_MONEY in response.text):
            raise ChatError(f"{self.url} answers {status}: {self._excerpt(response)}. {self._advice(status)}")
        if status != 200:
            passing = status in _PASSING or status >= 500
            return _Trouble(str(status), f"status {status}: {self._excerpt(response)}", passing, _retry_after(response))
        try:
            answer = response.json()
        except ValueError:  # HTML of a proxy, or JSON that was cut
            return self._not_an_answer("no JSON", None, response)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            return self._not_an_answer("no message", answer, response)
        self._errors_on_end = 0
        return answer

    def _not_an_answer(self, kind: str, answer: object, response: httpx.Response) -> _Trouble:
        """What is wrong with a body of status 200 that has no message. Raises ChatError when it says that no request
        can succeed, and when nothing else has come for a while."""
        error = answer.get("error") if isinstance(answer, dict) else None
        code = error.get("code") if isinstance(error, dict) else None
        status = int(code) if isinstance(code, (int, str)) and str(code).isdecimal() and len(str(code)) == 3 else 0
        what = f"status 200 with {kind}: {self._excerpt(response)}"
        if status in _HOPELESS or _NO_MONEY in response.text:
            advice = self._advice(status or 402)
            raise ChatError(f"{self.url} answers 200 with an error: {self._excerpt(response)}. {advice}")
        if status in _PASSING or status >= 500:
            return _Trouble(str(status), what, retry_after=_retry_after(response))
        now = asyncio.get_running_loop().time()
        self._first_error = self._first_error if self._errors_on_end else now
        self._errors_on_end += 1
        lasted = now - self._first_error
        if self._errors_on_end >= ERRORS_ON_END and lasted >= ERRORS_FOR_SECONDS:
            raise ChatError(
                f"{self.url}: the last {self._errors_on_end} answers, for {lasted:.0f} s, had status 200 and {kind}. "
                f"The last says: {self._excerpt(response)}"
            )
        return _Trouble(kind, what)

    async def _start(self) -> None:
        """Wait for this request's turn under the rate limit."""
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        if self.limits.requests_per_minute:
            self._next_start = start + 60.0 / self.limits.requests_per_minute
        if start > now:
            await asyncio.sleep(start - now)

    def _pause(self, seconds: float) -> None:
        """Let nothing leave for so long: what the server asked of one request it means for all."""
        self._next_start = max(self._next_start, asyncio.get_running_loop().time() + seconds)

    def _excerpt(self, response: httpx.Response) -> str:
        text = " ".join(response.text[: 4 * MAX_EXCERPT_CHARS].split())
        if self._key:
            text = text.replace(self._key, "***")
        return text if len(text) <= MAX_EXCERPT_CHARS else text[:MAX_EXCERPT_CHARS] + " ..."

    def _advice(self, status: int) -> str:
        if status in (401, 402, 429):
            return f"The key is read from the environment variable {self._key_variable}"
        return "Is the model's name right, and the URL the base that ends in /v1?"


@dataclass(frozen=True)
class _Trouble:
    """An attempt without an answer. `passing`: another may have one."""

    kind: str
    what: str
    passing: bool = True
    retry_after: float | None = None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds from a Retry-After header, which gives seconds or a date."""
    value = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        until = email.utils.parsedate_to_datetime(value)
        return max(0.0, (until - datetime.datetime.now(until.tzinfo or datetime.UTC)).total_seconds())
    return None


def _read(answer: Mapping[str, Any], check: Callable[[str], object] | None, attempt: int) -> Reply:
    choice = answer["choices"][0]
    message = choice["message"]
    content = _text(message.get("content"))
    refusal = message.get("refusal")
    finish_reason = choice.get("finish_reason")
    status, error = Status.OK, None
    if refusal or finish_reason == "content_filter":
        status, error = Status.REFUSED, _text(refusal) or "stopped by a content filter"
    elif not content.strip():
        status, error = Status.EMPTY, f"no content (finish_reason {finish_reason!r})"
    elif (error := _complaint(check, content)) is not None:
        status = Status.MALFORMED
    reasoning = _text(message.get("reasoning_content") or message.get("reasoning"))
    model = answer.get("model")
    return Reply(status, content, reasoning, finish_reason, _usage(answer.get("usage")), model, attempt, error)


def _text(value: object) -> str:
    """The text of a message's content, which is a string, a list of parts, or null."""
    if isinstance(value, list):
        return "".join(str(part.get("text") or "") for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def _complaint(check: Callable[[str], object] | None, content: str) -> str | None:
    if check is not None:
        try:
            check(content)
        except ValueError as error:
            return str(error)
    return None


def _usage(value: object) -> Usage:
    if not isinstance(value, dict):
        return Usage()
    details = value.get("completion_tokens_details")
    counts = (value.get("prompt_tokens"), value.get("completion_tokens"))
    reasoning = details.get("reasoning_tokens") if isinstance(details, dict) else 0
    return Usage(*(count if isinstance(count, int) else 0 for count in (*counts, reasoning)))
