"""The server with real vLLM behind it: the engine's own answers over HTTP, leaving clients, and another harness."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import uvicorn

from eval.engine import Engine, Question, Sampling
from eval.serve import Server, ServerSettings, make_app

GREEDY = Sampling(temperature=0.0, max_tokens=300)
AT_ONCE = 64


@contextlib.asynccontextmanager
async def serving(engine: Engine, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server on a free port, in the event loop that the engine lives in."""
    config = uvicorn.Config(
        make_app(Server(engine, ServerSettings("echo", GREEDY, **options))), port=0, log_level="warning"
    )
    web = uvicorn.Server(config)
    running = asyncio.create_task(web.serve())
    while not web.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}/v1"
    try:
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=AT_ONCE)) as http:
            yield http
    finally:
        web.should_exit = True
        await running


@pytest.fixture(scope="module")
def clip(soundscapes: Path) -> Path:
    """A clip that the scripted segments lie in."""
    rows = [json.loads(line) for line in (soundscapes / "test.jsonl").read_text().splitlines()]
    return soundscapes / next(row["audio"] for row in rows if 2.5 < row["duration"] < 9.0)


def asking(content: bytes, text: str, **more: Any) -> dict[str, Any]:
    data = base64.b64encode(content).decode()
    parts = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, {"type": "text", "text": text}]
    return {"model": "echo", "messages": [{"role": "user", "content": parts}], **more}


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = await http.post("/chat/completions", json=body)
    return response.status_code, response.json()


def test_over_http_the_engine_says_and_hears_what_it_does_otherwise(engine_session: Any, clip: Path) -> None:
    text = "Answer by script clips"
    question = Question("row", str(clip.parent), clip.name, text, ())
    (outcome,) = engine_session.answer(question, sampling=GREEDY)

    async def over_http() -> tuple[int, dict[str, Any]]:
        async with serving(engine_session.engine) as http:
            return await ask(http, asking(clip.read_bytes(), text))

    status, answer = engine_session.run(over_http())
    assert status == 200 and answer["choices"][0]["message"]["content"] == outcome.response
    assert [(one["start"], one["end"], one["inserted"]) for one in answer["segments"]] == [
        (0.5, 1.5, True),
        (2.0, 2.5, True),
    ]
    usage = answer["usage"]
    assert usage["completion_tokens"] == outcome.num_sampled_tokens + outcome.num_inserted_tokens
    assert usage["completion_tokens_details"]["audio_tokens"] == outcome.num_inserted_tokens > 0
    num_samples = soundfile.info(clip).frames
    prompt = engine_session.engine.prompt_ids(question, "interleaved")
    assert usage["prompt_tokens"] == len(prompt) - 1 + engine_session.engine.count_audio_tokens(num_samples)


def test_good_and_bad_audio_at_once_each_have_their_own_answer(engine_session: Any, clip: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    long, tiny, flac = io.BytesIO(), io.BytesIO(), io.BytesIO()
    soundfile.write(long, np.zeros(8000 * 301, np.int16), 8000, format="FLAC")
    soundfile.write(tiny, noise[:100], 16_000, format="WAV")
    soundfile.write(flac, noise, 16_000, format="FLAC")
    good = clip.read_bytes()
    kinds = [
        (good, "script clips", 200, "<answer>one</answer>"),
        (flac.getvalue(), "script text", 200, "<answer>four</answer>"),
        (good, "what?", 200, ""),
        (good[: len(good) // 2], "script text", 400, "cut off"),
        (long.getvalue(), "script text", 413, "hears no more"),
        (tiny.getvalue(), "script text", 400, "too few"),
        (b"no sound", "script text", 400, "not readable as audio"),
        (good, "why " * 5000, 400, "the engine takes"),
    ]

    async def burst(http: httpx.AsyncClient) -> None:
        wanted = [kinds[number % len(kinds)] for number in range(AT_ONCE)]
        answers = await asyncio.gather(
            *(ask(http, asking(content, f"Answer by {text}")) for content, text, _, _ in wanted)
        )
        for (_, _, expected, said), (status, answer) in zip(wanted, answers, strict=True):
            assert status == expected and said in json.dumps(answer), answer

    async def serve_a_burst() -> int:
        """The files that are open after it."""
        async with serving(engine_session.engine) as http:
            await burst(http)
            metrics = (await http.get(str(http.base_url.join("/metrics")))).text
        assert 'echo_requests_total{status="200"} 24.0' in metrics and "echo_requests_open 0.0" in metrics
        await asyncio.sleep(0.2)  # for sockets that are closing
        return psutil.Process().num_fds()

    files = engine_session.run(serve_a_burst())
    assert engine_session.run(serve_a_burst()) <= files


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_works_no_longer_for_a_client_that_is_gone(engine_session: Any, clip: Path, stream: bool) -> None:
    processor = engine_session.engine.llm.output_processor

    async def wait_for(unfinished: bool) -> None:
        async with asyncio.timeout(10):
            while processor.has_unfinished_requests() != unfinished:
                await asyncio.sleep(0.01)

    async def leave() -> str:
        async with serving(engine_session.engine) as http:
            body = asking(clip.read_bytes(), "what?", temperature=1.0, max_tokens=3500, max_segments=0, stream=stream)
            waiting = asyncio.create_task(http.post("/chat/completions", json=body))
            await wait_for(unfinished=True)
            waiting.cancel()
            await wait_for(unfinished=False)
            return (await http.get(str(http.base_url.join("/metrics")))).text

    assert 'echo_requests_total{status="499"} 1.0' in engine_session.run(leave())


def test_another_harness_runs_against_the_server_unchanged(engine_session: Any, clip: Path, tmp_path: Path) -> None:
    """evalscope's own MMAU on eight rows, of which six have the letter that the script says."""
    rows = [
        {
            **{"question": f"How often is the bell heard, {number}? Answer by script letter", "task": "sound"},
            **{"choices": json.dumps(["one", "two", "three"]), "answer": "two" if number % 4 else "one"},
            **{"audio_id": f"{number}.wav", "audio": {"bytes": clip.read_bytes(), "path": f"{number}.wav"}},
        }
        for number in range(8)
    ]
    (tmp_path / "mmau" / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mmau" / "data" / "test_mini-00000-of-00001.parquet")

    async def evaluate() -> str:
        async with serving(engine_session.engine) as http:
            words = [
                *("-m", "evalscope.cli.cli", "eval", "--model", "echo", "--eval-type", "openai_api"),
                *("--api-url", str(http.base_url), "--api-key", "EMPTY", "--datasets", "mmau", "--no-timestamp"),
                *("--dataset-args", json.dumps({"mmau": {"local_path": str(tmp_path / "mmau")}})),
                *("--work-dir", str(tmp_path / "out"), "--eval-batch-size", "4"),
            ]
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                cwd=tmp_path,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await process.communicate()
            return said.decode(errors="replace")

    said = engine_session.run(evaluate())
    reports = list((tmp_path / "out").rglob("mmau.json"))
    assert reports, said
    report = json.loads(reports[0].read_text())
    assert (report["metrics"][0]["num"], report["metrics"][0]["score"]) == (8, 0.75), said
    [predictions] = (tmp_path / "out").rglob("predictions/**/*.jsonl")
    assert predictions.read_text().count("<seg>0.50, 1.50</seg>") >= 8
