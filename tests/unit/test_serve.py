"""The server over real HTTP, with a scripted engine behind it: what it takes, what it refuses, and who may leave."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from echo_plugins.model import QWEN2_5_OMNI
from echo_plugins.relisten.trajectory import SpecialIds, Trajectory
from eval import serve
from eval.chat_api import _NOT_DONE, ApiError, ChatRequest, Clip, question_and_audio, read_clip, read_request
from eval.engine import EngineDied, EngineSettings, Question, Sampling
from eval.serve import Completion, EventStream, Server, ServerSettings, Ticket, make_app

AUDIO, BOS, EOS, END = 256, 257, 258, 259  # after the bytes
CLIPS = "<think>Here <seg>0.50, 1.50</seg> and <seg>9, 10</seg> there.</think><answer>one</answer>"
SCRIPTS = {"clips": CLIPS, "text": "<think>no</think><answer>four</answer>", "endless": "x" * 5000}


def decode(ids: list[int]) -> str:
    return bytes(token for token in ids if token < 256).decode("utf-8", "replace")


class ScriptedListener:
    """Answers `script NAME` with SCRIPTS[NAME], a byte a token. What it does to each turn can be held up or break."""

    def __init__(self) -> None:
        self.turn_seconds = 0.0
        self.held = False
        self.death: Exception | None = None
        self.sampled: list[tuple[str, Sampling]] = []
        self.running = self.most_at_once = self.cancelled = 0

    def trajectory(self, question: Question, num_samples: int, sampling: Sampling) -> Trajectory:
        prompt = [BOS, AUDIO, EOS, *question.question.encode()]
        if len(prompt) > 4000:
            raise ValueError(f"the prompt has {len(prompt)} tokens and the engine takes 4000")
        settings = sampling.turn_settings(sampling.max_tokens)
        ids = SpecialIds(AUDIO, BOS, EOS, frozenset({END}))
        encode = lambda text: list(text.encode())  # noqa: E731
        return Trajectory(prompt, num_samples, 16_000, ids, settings, decode, encode, self.count_audio_tokens)

    def count_audio_tokens(self, num_samples: int) -> int:
        return QWEN2_5_OMNI.num_audio_tokens(num_samples)

    async def run(
        self,
        trajectory: Trajectory,
        waveform: np.ndarray,
        name: str,
        row_id: str,
        sampling: Sampling,
        on_turn: Callable[[], None],
    ) -> None:
        assert waveform.dtype == np.float32 and waveform.ndim == 1 and name
        self.sampled.append((row_id, sampling))
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        try:
            while (turn := trajectory.next_turn()) is not None:
                await asyncio.sleep(self.turn_seconds)
                while self.held:
                    await asyncio.sleep(0.01)
                if self.death:
                    raise self.death
                asked = decode(turn.engine_ids)
                if "script broken" in asked:
                    trajectory.fail("the engine hiccuped")
                    continue
                script = SCRIPTS[re.findall(r"script (\w+)", asked)[-1]]
                rest = script[len(trajectory.text()) :]
                stop = next((rest.index(tag) + len(tag) for tag in turn.stop if tag in rest), None)
                ids = [*rest[:stop].encode(), *([] if stop else [END])]
                trajectory.absorb(ids[: turn.max_tokens], None)
                on_turn()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class Served:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, listener: ScriptedListener, server: Server, url: str) -> None:
        self.listener, self.server, self.url = listener, server, url
        self.http = httpx.Client(base_url=url, timeout=30)

    def post(self, body: Any, **options: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=body, **options)

    def wait_until(self, condition: Any) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Served]:
    listener = ScriptedListener()
    server = Server(listener, ServerSettings("echo", Sampling(max_tokens=1000), **options))
    web = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.005)
    served = Served(listener, server, f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}")
    try:
        yield served
    finally:
        listener.held = False
        served.http.close()
        web.should_exit = True
        thread.join(timeout=10)


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving() as served:
        yield served


def sound(format: str = "WAV", seconds: float = 3.0, rate: int = 16_000, subtype: str | None = None) -> bytes:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, noise, rate, format=format, subtype=subtype)
    return stream.getvalue()


WAV = sound()


def as_input(content: bytes, format: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": format}}


def as_url(url: str) -> dict[str, Any]:
    return {"type": "audio_url", "audio_url": {"url": url}}


def asking(clip: dict[str, Any] | None, text: str = "script clips", **more: Any) -> dict[str, Any]:
    parts = ([clip] if clip else []) + [{"type": "text", "text": text}]
    return {"model": "echo", "messages": [{"role": "user", "content": parts}], **more}


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refusal(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["code"] == response.status_code and error["type"]
    return response.status_code, error["message"]


def test_a_clip_is_heard_again_on_the_servers_side_and_the_response_says_so(shared: Served) -> None:
    answer = shared.post(asking(as_input(WAV), seed=7)).json()
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": CLIPS} and choice["finish_reason"] == "stop"
    assert answer["segments"] == [
        {"start": 0.5, "end": 1.5, "inserted": True},
        {"start": 9.0, "end": 10.0, "inserted": False, "refusal": "past_end", "text": "<seg>9, 10</seg>"},
    ]
    heard, again = QWEN2_5_OMNI.num_audio_tokens(48_000), QWEN2_5_OMNI.num_audio_tokens(16_000) + 2
    assert answer["usage"] == {
        "prompt_tokens": 2 + heard + len("script clips"),
        "completion_tokens": len(CLIPS) + 1 + again,
        "total_tokens": 2 + heard + len("script clips") + len(CLIPS) + 1 + again,
        "prompt_tokens_details": {"audio_tokens": heard},
        "completion_tokens_details": {"audio_tokens": again},
    }
    assert answer["object"] == "chat.completion" and answer["model"] == "echo" and answer["id"].startswith("chatcmpl-")


def test_the_stream_sends_each_turn_and_adds_up_to_the_same(shared: Served) -> None:
    body = asking(as_input(WAV), stream=True, stream_options={"include_usage": True})
    shared.listener.turn_seconds = 0.15
    with shared.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [(time.monotonic(), line.removeprefix("data: ")) for line in response.iter_lines() if line]
    shared.listener.turn_seconds = 0.0
    assert lines[-1][1] == "[DONE]"
    chunks = [json.loads(line) for _, line in lines[:-1]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    texts = [delta["content"] for delta in deltas if delta.get("content")]
    assert "".join(texts) == CLIPS and len(texts) == 3 and texts[0].endswith("1.50</seg>")
    arrived = [when for when, line in lines if "content" in line]
    assert arrived[-1] - arrived[1] > 0.2, "turns came when they were over and not all at the end"
    assert [len(chunk["segments"]) for chunk in chunks if "segments" in chunk] == [1, 2, 2]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    whole = shared.post(asking(as_input(WAV))).json()
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_that_begins_when_all_is_said_holds_all_of_it() -> None:
    """As for a client that is slow to take the first event."""

    async def tell() -> str:
        listener, settings = ScriptedListener(), ServerSettings("echo", Sampling())
        clip = Clip(np.zeros(48_000, np.float32), "zeros")
        trajectory = listener.trajectory(Question("", "", "", "script clips", ()), 48_000, Sampling())
        completion = Completion("row", clip, Sampling(), trajectory, 75, settings)
        answering = asyncio.create_task(Server(listener, settings).answer(completion))
        await answering
        stream = EventStream(completion, answering, Ticket(), contextlib.ExitStack())
        return "".join([str(event) async for event in stream.body_iterator])

    events = asyncio.run(tell()).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if "delta" in event]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == CLIPS


def test_a_stream_without_the_option_has_no_usage(shared: Served) -> None:
    lines = shared.post(asking(as_input(WAV), stream=True)).text.split("\n\n")
    assert lines[-2] == "data: [DONE]" and not any('"usage"' in line for line in lines)


def test_the_answer_alone_can_be_the_content_and_the_thinking_beside_it() -> None:
    with serving(split_thinking=True) as served:
        message = served.post(asking(as_input(WAV), "script text")).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "four", "reasoning_content": "no"}
        text = served.post(asking(as_input(WAV), "script text", stream=True)).text
        assert '{"content": "four", "reasoning_content": "no"}' in text


@pytest.mark.parametrize(("format", "subtype"), [("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None)])
def test_any_format_is_taken_in_both_ways(shared: Served, format: str, subtype: str | None) -> None:
    content = sound(format, rate=44_100, subtype=subtype)
    encoded = base64.b64encode(content).decode()
    for clip in (as_input(content, format.lower()), as_url(f"data:audio/{format.lower()};base64,{encoded}")):
        assert said(shared.post(asking(clip))) == CLIPS


def test_a_file_is_taken_from_under_the_audio_root_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "a folder").mkdir(parents=True)
    (root / "a folder" / "clip.wav").write_bytes(WAV)
    (tmp_path / "secret.wav").write_bytes(WAV)
    (root / "link.wav").symlink_to(tmp_path / "secret.wav")
    with serving(audio_root=root) as served:
        assert said(served.post(asking(as_url((root / "a folder" / "clip.wav").as_uri())))) == CLIPS
        for url, status in (
            ((tmp_path / "secret.wav").as_uri(), 403),
            (f"file://{root}/../secret.wav", 403),
            (f"file://{root}/%2e%2e/secret.wav", 403),
            (f"file://{root}/link.wav", 403),
            ("file:///etc/passwd", 403),
            (f"file://{root}/none.wav", 404),
            (f"file://{root}", 404),
            (f"file://elsewhere{root}/a%20folder/clip.wav", 400),
            ("http://127.0.0.1:1/clip.wav", 400),
            ("ftp://x/clip.wav", 400),
            ("clip.wav", 400),
            ("file://[", 400),
        ):
            answered, message = refusal(served.post(asking(as_url(url))))
            assert answered == status and str(tmp_path) not in message, (url, message)
    with serving() as served:
        assert refusal(served.post(asking(as_url("file:///etc/passwd"))))[1].startswith("file: URLs are off")


def bad_clips() -> list[tuple[bytes, int, str]]:
    """Clips, the status that each is refused with, and what is said of it."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32_000).astype(np.float32)
    stream = io.BytesIO()
    soundfile.write(stream, np.where(noise > 0.49, np.nan, noise), 16_000, format="WAV", subtype="FLOAT")
    return [
        (WAV[: len(WAV) // 2], 400, "cut off"),
        (stream.getvalue(), 400, "holds NaN"),
        (sound("FLAC", seconds=301, rate=8000), 413, "hears no more than 300 s"),
        (sound(seconds=0.01), 400, "160 samples at 16 kHz, too few"),
        (sound(seconds=0.0), 400, "no samples"),
        (b"no sound", 400, "not readable as audio"),
        (b"", 400, "not readable as audio"),
    ]


@pytest.mark.parametrize(("content", "status", "message"), bad_clips(), ids=[message for _, _, message in bad_clips()])
def test_a_clip_that_cannot_be_heard_is_refused_with_the_reason(
    shared: Served, content: bytes, status: int, message: str
) -> None:
    answered, told = refusal(shared.post(asking(as_input(content))))
    assert answered == status and message in told, told
    streamed = shared.post(asking(as_input(content), stream=True))
    assert refusal(streamed) == (status, told), "a stream that cannot start is a status, not an event"


def test_hours_of_silence_in_a_small_file_are_never_decoded(shared: Served) -> None:
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(8000 * 60, np.int16))
    before = psutil.Process().memory_info().rss
    status, told = refusal(shared.post(asking(as_input(stream.getvalue()))))
    assert status == 413 and "3,600.0 s" in told and len(stream.getvalue()) < 2**20
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "no model 'other' here but 'echo'"),
        ({"model": None}, 400, "model: "),
        ({"messages": []}, 400, "one message of the user"),
        ({"messages": [{"role": "user", "content": "only text"}]}, 400, "one clip is needed"),
        ({"messages": asking(None)["messages"]}, 400, "there are 0"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": asking(as_input(WAV))["messages"] * 2}, 400, "there are 2"),
        ({"messages": [{"role": "user", "content": [as_input(WAV), as_input(WAV)]}]}, 400, "one clip is needed"),
        ({"messages": asking(as_input(WAV), " ")["messages"]}, 400, "no text to answer"),
        ({"messages": asking(as_input(WAV), "x" * 5000)["messages"]}, 400, "the engine takes 4000"),
        ({"messages": asking(as_input(WAV), "x" * 100_001)["messages"]}, 413, "100,000 are allowed"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "image_url"),
        ({"messages": asking(as_input(b""))["messages"][0]}, 400, "messages: "),
        ({"messages": asking(as_url("data:audio/wav,xx"))["messages"]}, 400, "data:audio/wav;base64"),
        ({"messages": asking({"type": "input_audio", "input_audio": {"data": "&"}})["messages"]}, 400, "not base64"),
        ({"n": 2}, 400, "'n' is not supported"),
        ({"stop": ["."]}, 400, "'stop' is not supported"),
        ({"tools": [{}]}, 400, "'tools' is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "'response_format' is not supported"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_segments": 9}, 400, "8 are allowed"),
        ({"mode": "loud"}, 400, "mode: "),
        ({"max_segment": 1}, 400, "'max_segment' is no parameter here: is 'max_segments' meant?"),
        ({"temprature": 0}, 400, "is 'temperature' meant?"),
        ({"x" * 90_000: 1}, 400, "is no parameter here; what is not known is not ignored"),
        ({"ignore_eos": True}, 400, "'ignore_eos' is not supported"),
        ({"stop_token_ids": [1]}, 400, "'stop_token_ids' is not supported"),
        ({"top_logprobs": 3}, 400, "'top_logprobs' is not supported"),
        ({"reasoning_effort": "high"}, 400, "'reasoning_effort' is not supported"),
        ({"stream_options": {"include_usages": True}}, 400, "stream_options.include_usages"),
        ({"messages": asking(as_input(WAV) | {"sampling_rate": 8000})["messages"]}, 400, "sampling_rate"),
    ],
)
def test_what_cannot_be_answered_as_asked_is_refused_by_name(
    shared: Served, change: dict[str, Any], status: int, message: str
) -> None:
    answered, told = refusal(shared.post(asking(as_input(WAV)) | change))
    assert answered == status and message in told, told
    assert len(told) < 500, "a message never repeats the audio"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"model": NaN}',
        b"[" * 100_000,
        b'{"a":' * 9000,
        b'{"x": "\\ud800"}',
        b'["\\udc00"]',
    ],
)
def test_a_body_that_is_no_request_is_refused(shared: Served, content: bytes) -> None:
    assert refusal(shared.http.post("/v1/chat/completions", content=content))[0] == 400


def test_fields_that_ask_for_nothing_do_no_harm(shared: Served) -> None:
    idle = {"n": 1, "stop": None, "frequency_penalty": 0.0, "logprobs": False, "tools": [], "user": "me", "store": True}
    idle |= {"stream_options": None, "tool_choice": "none", "ignore_eos": False, "reasoning_effort": None}
    assert said(shared.post(asking(as_input(WAV), **idle))) == CLIPS


def test_sampling_is_the_requests_and_where_it_says_nothing_the_servers(shared: Served) -> None:
    shared.post(asking(as_input(WAV), temperature=0, top_p=0.5, max_completion_tokens=99, seed=5, max_segments=1))
    _, sampling = shared.listener.sampled[-1]
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.seed) == (0, 0.5, 99, 5)
    assert sampling.max_segments == 1 and sampling.mode == "interleaved"
    shared.post(asking(as_input(WAV), mode="grounded"))
    _, sampling = shared.listener.sampled[-1]
    assert (sampling.temperature, sampling.max_tokens, sampling.mode) == (0.7, 1000, "grounded")


def test_the_same_request_with_the_same_seed_has_the_same_turn_seeds(shared: Served) -> None:
    before = len(shared.listener.sampled)
    for seed in (1, 1, 2, None, None):
        shared.post(asking(as_input(WAV), seed=seed))
    seeds = [sampling.turn_seed(row, 0) for row, sampling in shared.listener.sampled[before:]]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 4


def test_a_system_message_is_read_before_the_question(shared: Served) -> None:
    body = asking(as_input(WAV), "script text")
    body["messages"].insert(0, {"role": "system", "content": "script clips"})
    assert said(shared.post(body)) == SCRIPTS["text"]


def test_the_length_ends_an_answer_as_it_does_everywhere(shared: Served) -> None:
    choice = shared.post(asking(as_input(WAV), "script endless", max_tokens=50)).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == "x" * 50


def test_a_failure_of_the_engine_is_a_server_error_with_the_reason(shared: Served) -> None:
    assert refusal(shared.post(asking(as_input(WAV), "script broken"))) == (500, "the engine hiccuped")
    assert "the engine hiccuped" in shared.post(asking(as_input(WAV), "script broken", stream=True)).text


def test_with_a_key_only_its_holders_are_served() -> None:
    with serving(api_key="secret") as served:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert refusal(served.post(asking(as_input(WAV)), headers=headers))[0] == 401
            assert served.http.get("/v1/models", headers=headers).status_code == 401
        for given in ("bearer secret", "BEARER secret", "Bearer  secret"):
            assert served.http.get("/v1/models", headers={"Authorization": given}).is_success
        good = {"Authorization": "Bearer secret"}
        assert said(served.post(asking(as_input(WAV)), headers=good)) == CLIPS
        assert served.http.get("/v1/models", headers=good).json()["data"][0]["id"] == "echo"
        assert served.http.get("/health").json() == {"status": "ok"} and served.http.get("/metrics").is_success


def test_a_key_beyond_ascii_is_taken_as_clients_send_it() -> None:
    with serving(api_key="schl\u00fcssel") as served:
        for coding, status in (("utf-8", 200), ("latin-1", 200), ("utf-16", 401)):
            headers = [(b"authorization", b"Bearer " + "schl\u00fcssel".encode(coding).replace(b"\0", b"."))]
            assert served.http.get("/v1/models", headers=headers).status_code == status


def test_base64_is_taken_in_the_forms_that_clients_write(shared: Served) -> None:
    content = sound("FLAC")
    plain = base64.b64encode(content).decode()
    wrapped = "\r\n".join(plain[place : place + 76] for place in range(0, len(plain), 76)) + "\n"
    url_safe = base64.urlsafe_b64encode(content).decode().rstrip("=")
    assert "+" in plain and "-" in url_safe
    for data in (plain, wrapped, url_safe, f"DATA:audio/flac;BASE64,{wrapped}"):
        assert said(shared.post(asking({"type": "input_audio", "input_audio": {"data": data}}))) == CLIPS
        if not data.startswith("DATA"):
            assert said(shared.post(asking(as_url(f"Data:audio/flac;base64,{data}")))) == CLIPS
    for data in (plain[:-5] + "!", "\u00e9", "A"):
        assert "not base64" in refusal(shared.post(asking({"type": "input_audio", "input_audio": {"data": data}})))[1]


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "big.wav").open("wb") as file:
        file.truncate(3 * 2**30)
    before = psutil.Process().memory_info().rss
    with serving(audio_root=tmp_path, max_body_bytes=2**20) as served:
        status, told = refusal(
            served.post(asking(as_url((tmp_path / "big.wav").as_uri().replace("file:", "FILE:", 1))))
        )
    assert status == 413 and "1,048,576 bytes that are allowed" in told
    assert psutil.Process().memory_info().rss - before < 100 * 2**20


def test_requests_that_have_no_room_in_memory_wait_and_all_are_answered() -> None:
    """Twenty-four bodies of 12 MB each, where two have room. Only a clip's samples are held until it is answered."""
    body = json.dumps(asking(as_input(sound(seconds=280, rate=16_000)))).encode()
    limits = {"max_held_bytes": 75_000_000, "max_body_bytes": 16_000_000, "concurrency": 1, "max_waiting": 60}
    with serving(**limits) as served, ThreadPoolExecutor(24) as pool:
        memory, before = served.server.memory, psutil.Process().memory_info().rss
        most = [0, 0]

        def post(_: int) -> str:
            return said(served.http.post("/v1/chat/completions", content=body, timeout=120))

        answers = [pool.submit(post, number) for number in range(24)]
        while not all(answer.done() for answer in answers):
            most = [max(most[0], memory.taken), max(most[1], psutil.Process().memory_info().rss - before)]
            time.sleep(0.01)
        assert [answer.result() for answer in answers] == [CLIPS] * 24
        assert memory.taken == 0 and 0 < most[0] <= 75_000_000
        assert most[1] < 400 * 2**20, "of 24 x 12 MB of bodies and 24 x 18 MB of samples"


def test_a_request_that_finds_no_room_in_time_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.2)
    with serving(max_held_bytes=20_000_000, concurrency=1) as served, ThreadPoolExecutor(1) as pool:
        served.server.memory.taken = 20_000_000
        response = pool.submit(served.post, asking(as_input(WAV))).result()
        assert refusal(response)[0] == 429 and response.headers["retry-after"] == "1"
        served.server.memory.taken = 0
        assert said(served.post(asking(as_input(WAV)))) == CLIPS


def test_a_mistake_of_the_server_is_said_in_openais_form() -> None:
    with serving() as served:
        served.listener.death = TypeError("a mistake")
        assert refusal(served.post(asking(as_input(WAV)))) == (500, "the server failed: TypeError")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
URLS = st.from_regex(r"(data|file|http)?:?/{0,3}[a-z,;%.\[]{0,9}")
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "input_audio", "audio_url"])},
    optional={
        "text": st.text(max_size=9) | ANYTHING,
        "input_audio": st.fixed_dictionaries({"data": st.text("ABab+/=-_ \n&", max_size=9) | ANYTHING}) | ANYTHING,
        "audio_url": st.fixed_dictionaries({"url": st.from_regex(r"(data|file|http)?:?/{0,3}[a-z,;%.\[]{0,9}")})
        | ANYTHING,
    },
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "tool"]), "content": st.lists(PARTS) | ANYTHING}
)
BODIES = st.dictionaries(
    st.sampled_from(sorted({*ChatRequest.model_fields, *_NOT_DONE, "user", "max_segment"})), ANYTHING, max_size=5
).flatmap(lambda more: st.builds(lambda messages: {"model": "echo", "messages": messages} | more, st.lists(MESSAGES)))


@given(BODIES | ANYTHING)
@settings(max_examples=100)
def test_whatever_a_body_holds_it_is_a_request_or_refused(body: Any) -> None:
    with contextlib.suppress(ApiError):
        _, part = question_and_audio(read_request(json.dumps(body).encode("utf-8", "surrogatepass")))
        read_clip(part, Path(__file__).parent, 300, 2**20)


def test_a_good_body_that_is_damaged_anywhere_is_answered_or_refused(shared: Served) -> None:
    whole = json.dumps(asking(as_input(sound("FLAC", seconds=0.2)), temperature=0.5, stream=False)).encode()
    chance = random.Random(20261127)
    statuses: Counter[int] = Counter()
    for _ in range(400):
        place, length = chance.randrange(len(whole)), chance.choice([1, 1, 2, 9])
        put = chance.choice(
            [b"", b"0", b'"', b"\\", b"\xff", b"\\ud800", b"[[", b"null", bytes([chance.randrange(256)])]
        )
        damaged = whole[:place] + put + whole[place + length :]
        response = shared.http.post("/v1/chat/completions", content=damaged)
        statuses[response.status_code] += 1
        assert response.status_code < 500, damaged
        if response.status_code != 200:
            refusal(response)
    assert statuses[200] and statuses[400]


def test_a_body_over_the_limit_is_refused_whether_or_not_it_says_its_length() -> None:
    with serving(max_body_bytes=100_000) as served:
        body = json.dumps(asking(as_input(sound(seconds=10)))).encode()

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), 10_000):
                yield body[start : start + 10_000]

        for content in (body, pieces()):
            status, told = refusal(served.http.post("/v1/chat/completions", content=content))
            assert status == 413 and "100,000 bytes" in told
        assert said(served.post(asking(as_input(sound(seconds=1)), "script text"))) == SCRIPTS["text"]


def test_no_more_run_at_once_than_allowed_and_no_more_wait_than_allowed() -> None:
    with serving(concurrency=2, max_waiting=3) as served, ThreadPoolExecutor(9) as pool:
        served.listener.held = True
        waiting = [pool.submit(served.post, asking(as_input(WAV))) for _ in range(5)]
        served.wait_until(lambda: served.metric("echo_requests_open") == 5)
        served.wait_until(lambda: served.listener.running == 2)
        turned_away = served.post(asking(as_input(WAV)))
        assert refusal(turned_away)[0] == 429 and turned_away.headers["retry-after"] == "1"
        served.listener.held = False
        assert [said(one.result()) for one in waiting] == [CLIPS] * 5
        assert served.listener.most_at_once == 2
        assert said(served.post(asking(as_input(WAV)))) == CLIPS


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_trajectory(stream: bool) -> None:
    with serving(concurrency=1) as served:
        served.listener.held = True
        with pytest.raises(httpx.ReadTimeout):
            served.post(asking(as_input(WAV), stream=stream), timeout=0.3)
        served.wait_until(lambda: served.listener.cancelled == 1)
        served.wait_until(lambda: served.metric("echo_requests_open") == 0)
        served.listener.held = False
        assert served.metric('echo_requests_total{status="499"}') == 1
        assert said(served.post(asking(as_input(WAV)))) == CLIPS


def test_a_client_that_goes_away_while_it_waits_gives_up_its_place() -> None:
    with serving(concurrency=1, max_waiting=1) as served, ThreadPoolExecutor(1) as pool:
        served.listener.held = True
        first = pool.submit(served.post, asking(as_input(WAV)))
        served.wait_until(lambda: served.listener.running == 1)
        with pytest.raises(httpx.ReadTimeout):
            served.post(asking(as_input(WAV)), timeout=0.3)
        served.wait_until(lambda: served.metric("echo_requests_open") == 1)
        served.listener.held = False
        assert said(first.result()) == CLIPS and served.listener.cancelled == 0


def test_a_dead_engine_is_said_to_everyone() -> None:
    with serving() as served:
        served.listener.death = EngineDied("killed")
        assert refusal(served.post(asking(as_input(WAV)))) == (503, "the engine is gone: killed")
        assert refusal(served.post(asking(as_input(WAV))))[0] == 503
        assert served.http.get("/health").status_code == 503 and served.server.died.is_set()


def test_metrics_count_requests_tokens_and_segments() -> None:
    with serving() as served:
        served.post(asking(as_input(WAV)))
        served.post(asking(as_input(b"no sound")))
        assert served.metric('echo_requests_total{status="200"}') == 1
        assert served.metric('echo_requests_total{status="400"}') == 1
        assert served.metric('echo_tokens_total{kind="sampled"}') == len(CLIPS) + 1
        assert served.metric('echo_tokens_total{kind="inserted"}') == QWEN2_5_OMNI.num_audio_tokens(16_000) + 2
        assert served.metric('echo_segments_total{outcome="inserted"}') == 1
        assert served.metric('echo_segments_total{outcome="past_end"}') == 1
        assert served.metric("echo_requests_open") == served.metric("echo_requests_running") == 0
        assert served.metric("process_open_fds") > 0


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("GET", "/v1/chat/completions", 405)])
def test_an_address_that_is_none_is_told_in_the_same_form(shared: Served, method: str, path: str, status: int) -> None:
    assert refusal(shared.http.request(method, path))[0] == status


def test_good_and_bad_ones_at_once_each_get_their_own_answer_and_nothing_is_left_open(shared: Served) -> None:
    clips = [(WAV, 200), (sound("FLAC"), 200), *((content, status) for content, status, _ in bad_clips())]
    process = psutil.Process()

    def burst(number: int) -> None:
        wanted = [clips[index % len(clips)] for index in range(number)]
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda one: shared.post(asking(as_input(one[0]))), wanted))
        assert [answer.status_code for answer in answers] == [status for _, status in wanted]
        assert all(said(answer) == CLIPS for answer in answers if answer.status_code == 200)

    burst(64)
    files = process.num_fds()
    burst(64)
    shared.wait_until(lambda: process.num_fds() <= files)
    assert shared.metric("echo_requests_open") == 0


def test_the_command_serves_until_its_engine_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listener = ScriptedListener()

    @contextlib.asynccontextmanager
    async def scripted_engine(_: EngineSettings) -> AsyncIterator[ScriptedListener]:
        yield listener

    async def run() -> None:
        settings = ServerSettings("echo", Sampling())
        serving = asyncio.create_task(serve.serve(EngineSettings("tiny", "cpu"), settings, "127.0.0.1", 0))
        while not (found := re.search(r"echo at (http://127\.0\.0\.1:\d+/v1)", told := capsys.readouterr().err)):
            assert not serving.done() and (not told or "starting the engine" in told)
            await asyncio.sleep(0.01)
        async with httpx.AsyncClient(base_url=found[1]) as http:
            assert said(await http.post("/chat/completions", json=asking(as_input(WAV)))) == CLIPS
            listener.death = EngineDied("killed")
            assert refusal(await http.post("/chat/completions", json=asking(as_input(WAV))))[0] == 503
        with pytest.raises(EngineDied):
            await asyncio.wait_for(serving, 10)

    monkeypatch.setattr(serve, "running_engine", scripted_engine)
    asyncio.run(run())


def test_a_port_that_is_taken_is_said_before_an_engine_starts(tmp_path: Path) -> None:
    """And a cluster that is not there does not matter: a server has one engine, on its own machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["--model", str(tmp_path), "--port", str(taken.getsockname()[1])]
        result = CliRunner().invoke(serve.app, words, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert result.exit_code == 1 and "Address already in use" in result.output


def test_engine_arguments_are_json_or_words_and_what_is_neither_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[EngineSettings] = []

    async def start(settings: EngineSettings, *_: Any) -> None:
        started.append(settings)

    monkeypatch.setattr(serve, "serve", start)
    words = ["--model", str(tmp_path), "--device", "cpu", "--max-segments", "3"]
    given = ["--engine-arg", "swap_space=4", "--engine-arg", "load_format=dummy", "--engine-arg", 'a={"b": [1]}']
    assert CliRunner().invoke(serve.app, [*words, *given]).exit_code == 0
    assert started[0].extra == {"swap_space": 4, "load_format": "dummy", "a": {"b": [1]}} and started[0].max_clips == 4
    wrong = CliRunner().invoke(serve.app, [*words, "--engine-arg", "swap_space"])
    assert wrong.exit_code == 2 and "is not KEY=JSON" in wrong.output and len(started) == 1
