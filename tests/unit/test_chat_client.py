"""The chat client against a real server that misbehaves in every way that servers do."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import (
    Answer,
    Behaviour,
    Dropped,
    Failure,
    HalfJson,
    Hang,
    Request,
    Script,
    html,
    misbehaving_server,
    rate_limited,
    refusal,
    thinking,
)

from echo_plugins.chat_client import ChatClient, ChatError, Journal, Limits, Reply, Status, Usage, request_key

QUICK = Limits(timeout_seconds=0.6, max_attempts=3, first_wait_seconds=0.01, longest_wait_seconds=0.02)


def question(text: str = "what?", **more: Any) -> dict[str, Any]:
    return {"model": "judge", "messages": [{"role": "user", "content": text}], **more}


def ask(url: str, *bodies: dict[str, Any], repeat: int = 0, check: Any = None, **options: Any) -> list[Reply]:
    async def run() -> list[Reply]:
        options.setdefault("limits", QUICK)
        async with ChatClient(url, **options) as client:
            return await asyncio.gather(*(client.ask(body, repeat=repeat, check=check) for body in bodies))

    return asyncio.run(run())


def first_then(*behaviours: Behaviour) -> Script:
    """The behaviours one after the other for each request; the last for all that follow."""
    return lambda request: behaviours[min(request.attempt, len(behaviours)) - 1]


@pytest.mark.parametrize(
    "trouble",
    [
        rate_limited(),
        rate_limited(0),
        Failure(500),
        Failure(503),
        Failure(408),
        html(502),
        html(200),
        HalfJson(),
        Dropped(),
        Dropped(after_bytes=40),
        Hang(5),
        Failure(200, '{"error": {"message": "upstream"}}'),
        Failure(200, '{"choices": []}'),
        Failure(200, '{"choices": [{"text": "old interface"}]}'),
        Failure(200, "null"),
        Failure(200, "\xff\xfe"),
        Answer(""),
        Answer(None),
        Answer(" \n"),
    ],
    ids=repr,
)
def test_what_passes_is_asked_again_until_it_is_answered(trouble: Behaviour) -> None:
    with misbehaving_server(first_then(trouble, trouble, Answer("yes"))) as server:
        (reply,) = ask(server.url, question())
    assert (reply.status, reply.content, reply.attempts) == (Status.OK, "yes", 3)
    assert [request.attempt for request in server.requests] == [1, 2, 3]


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        (Failure(500), "status 500"),
        (html(502), "Bad Gateway"),
        (html(200), "no JSON"),
        (HalfJson(), "no JSON"),
        (Dropped(), "Error"),
        (Hang(5), "within 0.6 s"),
        (rate_limited(), "status 429"),
    ],
    ids=repr,
)
def test_what_does_not_pass_ends_in_a_failed_reply_that_says_why(trouble: Behaviour, said: str) -> None:
    with misbehaving_server(lambda request: trouble) as server:
        (reply,) = ask(server.url, question())
    assert reply.status is Status.FAILED and reply.content == "" and reply.attempts == 3 == len(server.requests)
    assert said in (reply.error or "")


@pytest.mark.parametrize(
    "trouble",
    [Failure(200, '{"error": {"message": "Insufficient balance, top up", "code": 1113}}'), html(200)],
    ids=["error", "html"],
)
def test_a_gateway_that_answers_200_with_an_error_ends_the_job_in_seconds_and_in_its_words(trouble: Failure) -> None:
    started = time.monotonic()
    with (
        misbehaving_server(lambda request: trouble) as server,
        pytest.raises(ChatError, match=r"had status 200 and no .*(Insufficient balance, top up|Bad Gateway)"),
    ):
        ask(server.url, *(question(str(number)) for number in range(100)), limits=Limits())
    assert time.monotonic() - started < 15 and len(server.requests) < 100


def test_an_error_with_status_200_that_passes_ends_no_job() -> None:
    """A burst of them at once is no longer than one: time counts, and any answer in between."""
    trouble = Failure(200, '{"error": {"message": "busy"}}')
    with misbehaving_server(first_then(trouble, trouble, Answer("yes"))) as server:
        replies = ask(
            server.url, *(question(str(number)) for number in range(8)), limits=replace(QUICK, timeout_seconds=9)
        )
    assert [reply.content for reply in replies] == ["yes"] * 8


@pytest.mark.parametrize("code", [402, "401"])
def test_the_status_in_an_error_with_status_200_counts_as_one(code: Any) -> None:
    answer = Failure(200, json.dumps({"error": {"message": "no credits", "code": code}}))
    with misbehaving_server(lambda request: answer) as server, pytest.raises(ChatError, match=r"no credits.*MY_KEY"):
        ask(server.url, question(), key_variable="MY_KEY")
    assert len(server.requests) == 1
    passing = Failure(200, '{"error": {"message": "slow down", "code": 429}}')
    with misbehaving_server(first_then(passing, Answer("yes"))) as server:
        assert ask(server.url, question())[0].content == "yes"


def test_a_server_that_answers_nothing_is_given_up() -> None:
    limits = Limits(max_attempts=1, concurrency=1, max_failed_in_a_row=4)
    with (
        misbehaving_server(lambda request: Answer("yes") if request.number == 3 else Failure(500)) as server,
        pytest.raises(ChatError, match=r"4 requests in a row failed.*status 500"),
    ):
        ask(server.url, *(question(str(number)) for number in range(20)), limits=limits)
    assert len(server.requests) == 3 + 4


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_request_that_the_server_will_never_take_is_sent_once_and_its_neighbours_are_answered(status: int) -> None:
    with misbehaving_server(lambda request: Failure(status) if "bad" in request.text else Answer("yes")) as server:
        bad, good = ask(server.url, question("bad"), question("good"))
    assert bad.status is Status.FAILED and f"status {status}: " in (bad.error or "") and bad.attempts == 1
    assert good.status is Status.OK and len(server.requests) == 2


@pytest.mark.parametrize(
    ("trouble", "advice"),
    [
        (Failure(401, '{"error": {"message": "Incorrect API key provided: sk-secret"}}'), "MY_KEY"),
        (Failure(402, "{}"), "MY_KEY"),
        (Failure(404, '{"error": {"message": "no such model"}}'), "ends in /v1"),
        (Failure(429, '{"error": {"code": "insufficient_quota"}}'), "MY_KEY"),
    ],
)
def test_what_would_spoil_every_request_ends_the_job_and_never_shows_the_key(
    trouble: Failure, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with misbehaving_server(lambda request: trouble) as server, pytest.raises(ChatError, match=advice) as caught:
        ask(server.url, question(), key_variable="MY_KEY")
    assert "sk-secret" not in str(caught.value) and len(server.requests) == 1


def test_the_request_goes_out_as_it_was_given_with_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    body = question(temperature=0.0, seed=42, top_p=0.9, extra={"anything": [1, None]})
    with misbehaving_server(lambda request: Answer("yes")) as server:
        ask(server.url, body, key_variable="MY_KEY")
        ask(f"{server.url}/chat/completions", body, key_variable="UNSET_KEY")
    with_key, without = server.requests
    assert with_key.body == without.body == body
    assert with_key.path == without.path == "/v1/chat/completions"
    assert with_key.headers["Authorization"] == "Bearer sk-secret" and "Authorization" not in without.headers


def test_refusals_reasoning_and_usage_are_kept_as_they_are() -> None:
    answers = {
        "r": refusal("No."),
        "f": Answer("", finish_reason="content_filter"),
        "t": thinking("yes", "because"),
        "l": Answer("cut", finish_reason="length"),
        "p": Answer(
            "", usage=None, message={"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ),
    }
    with misbehaving_server(lambda request: answers[request.text]) as server:
        refused, filtered, thought, cut, parts = ask(server.url, *map(question, answers))
    assert (refused.status, refused.error) == (Status.REFUSED, "No.") and filtered.status is Status.REFUSED
    assert (thought.content, thought.reasoning, thought.usage) == ("yes", "because", Usage(10, 25, 20))
    assert (cut.status, cut.content, cut.finish_reason) == (Status.OK, "cut", "length")
    assert (parts.content, parts.usage) == ("ab", Usage()) and len(server.requests) == 5


def test_content_that_the_check_does_not_take_is_asked_for_again_and_every_answer_is_counted() -> None:
    with misbehaving_server(first_then(Answer("{"), Answer("[]"))) as server:
        (reply,) = ask(server.url, question(), check=json.loads)
    assert (reply.status, reply.content, reply.attempts, reply.usage) == (Status.OK, "[]", 2, Usage(20, 10))
    with misbehaving_server(lambda request: Answer("{")) as server:
        (reply,) = ask(server.url, question(), check=json.loads, limits=Limits(max_unusable=2, first_wait_seconds=0.01))
    assert reply.status is Status.MALFORMED and len(server.requests) == 2 and "line 1" in (reply.error or "")


def test_no_more_requests_are_open_at_once_than_allowed() -> None:
    with misbehaving_server(lambda request: Hang(0.05)) as server:
        replies = ask(server.url, *(question(str(number)) for number in range(12)), limits=Limits(concurrency=3))
    assert len(replies) == 12 and server.most_at_once == 3


def test_requests_leave_no_faster_than_the_rate_allows() -> None:
    with misbehaving_server(lambda request: Answer("yes")) as server:
        began = time.monotonic()
        ask(server.url, *(question(str(number)) for number in range(11)), limits=Limits(requests_per_minute=60 / 0.05))
    assert 0.5 <= time.monotonic() - began < 2.0


@pytest.mark.parametrize("as_date", [False, True])
def test_everything_waits_as_long_as_the_server_asked_one_request_to(as_date: bool) -> None:
    arrived: list[float] = []

    def script(request: Request) -> Behaviour:
        arrived.append(time.monotonic())
        # A date has whole seconds: what is left of the current one is lost.
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1.5)
        return (
            rate_limited(email.utils.format_datetime(until, usegmt=True) if as_date else 0.5)
            if (request.number == 1)
            else Answer("yes")
        )

    limits = Limits(concurrency=1, first_wait_seconds=0.01)
    with misbehaving_server(script) as server:
        ask(server.url, question("a"), question("b"), limits=limits)
    assert min(arrived[1:]) - arrived[0] >= 0.49


def test_a_server_that_asks_for_hours_is_not_waited_for() -> None:
    with misbehaving_server(lambda request: rate_limited(7200)) as server:
        (reply,) = ask(server.url, question())
    assert reply.status is Status.FAILED and len(server.requests) == 1


def test_what_was_paid_for_is_not_asked_again(tmp_path: Path) -> None:
    journal = tmp_path / "deep" / "journal.jsonl"
    answers = {"a": thinking("yes", "because"), "r": refusal(), "m": Answer("{"), "x": Failure(400)}

    def check(content: str) -> None:
        if content == "{":
            raise ValueError("half")

    bodies = [question(text) for text in answers]
    with misbehaving_server(lambda request: answers[request.text]) as server:
        first = ask(server.url, *bodies, journal=journal, check=check)
        paid = len(server.requests)
        with journal.open("a") as stream:
            stream.write('{"key": "torn')
        again = ask(server.url, *bodies, journal=journal, check=check)
        assert [request.text for request in server.requests[paid:]] == ["x"], "only what failed unpaid is asked again"
        assert [reply.replayed for reply in again] == [True, True, True, False]
        for one, other in zip(first, again, strict=True):
            assert replace(other, replayed=False) == one
        paid = len(server.requests)
        ask(server.url, *bodies[:3], journal=journal, check=check, retry_unusable=True)
        assert {request.text for request in server.requests[paid:]} == {"r", "m"}
        paid = len(server.requests)
        ask(server.url, bodies[0], journal=journal, repeat=1)
        ask(server.url, bodies[0] | {"seed": 1}, journal=journal)
        assert len(server.requests) == paid + 2, "another repeat and another seed are other requests"


def test_a_job_counts_what_it_spent_and_what_went_wrong(tmp_path: Path) -> None:
    async def run(url: str) -> ChatClient:
        async with ChatClient(url, limits=QUICK, journal=tmp_path / "journal.jsonl") as client:
            await asyncio.gather(*(client.ask(question(text)) for text in "ab"))
        return client

    with misbehaving_server(first_then(rate_limited(0), Failure(500), Answer("yes"))) as server:
        first, again = asyncio.run(run(server.url)), asyncio.run(run(server.url))
    assert first.spent == Usage(20, 10) and first.retries == {"429": 2, "500": 2} and first.statuses == {Status.OK: 2}
    assert again.spent == Usage() and again.statuses == {Status.OK: 2}


def test_a_journal_belongs_to_one_process_and_is_never_something_else(tmp_path: Path) -> None:
    other = tmp_path / "rows.jsonl"
    other.write_text('{"id": 1}\n')
    with pytest.raises(ChatError, match=r"rows\.jsonl, line 1: no entry of a journal"):
        Journal(other)
    assert other.read_text() == '{"id": 1}\n'


def test_the_journal_gives_the_last_entry_of_a_request(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for number in range(3):
        journal.append("a", {"number": number, "text": "é\u2028"})
        journal.append(f"b{number}", {})
    journal.close()
    journal = Journal(tmp_path / "journal.jsonl")
    assert journal.get("a") == {"key": "a", "number": 2, "text": "é\u2028"} and journal.get("c") is None
    assert journal.get("b1") == {"key": "b1"}
    journal.close()


def test_a_request_is_known_by_all_it_says_whatever_its_order() -> None:
    assert request_key({"a": 1, "b": 2}) == request_key({"b": 2, "a": 1})
    assert len({request_key(body, repeat) for body in ({"a": 1}, {"a": 2}, {}) for repeat in (0, 1)}) == 6


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://host/v1"])
def test_an_address_that_is_none_is_said_at_once(url: str) -> None:
    with pytest.raises(ChatError, match="no http:// or https:// address"):
        ChatClient(url)
