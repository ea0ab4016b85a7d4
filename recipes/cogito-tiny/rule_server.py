"""The models of recipes/cogito-tiny, played by rules: an OpenAI-compatible server on this machine, no GPU, no download.

It answers the prompts of `converters.synthesis.cogito` (questions, reasoning, judgement, checks) from the words of the
prompt, and the prompt of `eval.rubric`, whose criteria say themselves which words they want. It hears nothing.

    python recipes/cogito-tiny/rule_server.py --url-file FILE    # writes the server's URL into FILE, then serves
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LABELS = ("bell", "hum", "whistle", "siren", "buzzer", "warble", "hiss", "speech", "knock", "rain")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
_EVENT = re.compile(r"^- (.+): ([0-9.]+), ([0-9.]+)$", re.MULTILINE)
_CRITERION = re.compile(r"^\d+\. .*: The reasoning has one of the words: (.*)$", re.MULTILINE)
Event = tuple[str, float, float]


def digest(*parts: object) -> int:
    """A number that depends on the parts alone."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def events_in(prompt: str) -> list[Event]:
    """The labelled stretches (label, start and end in seconds) that a prompt lists."""
    return [(label, float(start), float(end)) for label, start, end in _EVENT.findall(prompt)]


def question_about(events: Sequence[Event], index: int) -> dict[str, Any]:
    """Which sound comes at a place of the order, with the labels that the clip has as distractors."""
    label = events[index][0]
    heard = [name for name, _, _ in events if name != label]
    others = list(dict.fromkeys([*heard, *(name for name in LABELS if name != label)]))[:3]
    asked = f"Which sound comes {ORDINALS[index % len(ORDINALS)]}, if each is taken in the order of its start?"
    return {"question": asked, "choices": [label, *others], "answer": label, "skill": "order"}


def draft(prompt: str, turn: int = 0) -> dict[str, Any]:
    """A question about the order of the events in a prompt, reasoned with their times in tags."""
    events = events_in(prompt) or [("bell", 0.0, 0.5)]
    index = (digest(prompt) + turn) % len(events)
    question = question_about(events, index)
    parts = [
        f"in <seg>{start:.2f}, {end:.2f}</seg> there is the sound of a {name}, clear over the noise"
        for name, start, end in events[: index + 1]
    ]
    said = ", then ".join(parts)
    return {
        **question,
        "think": f"Going through it in order, {said}; so the sound asked for is the {question['answer']}.",
    }


def reason(prompt: str, mark: int) -> tuple[str, str]:
    """A guess between the first two choices, and free-form reasoning that leads to it. The pipeline keeps it where the
    guess is the key."""
    choices = re.findall(r"^\([A-D]\) (.*)$", prompt, re.MULTILINE)
    guess = choices[mark % 2]
    reasoning = (
        f"I listen to the sounds one after the other. The one that is asked for could be the {choices[0]} or the "
        f"{choices[1]}. I go back to that place and hear the {guess} there, clear over the noise. The others come at "
        f"another place of the order, so the {guess} fits best."
    )
    return guess, reasoning


def judge_by_rubric(prompt: str) -> str:
    """A verdict for `eval.rubric`: a criterion is met where the candidate's reasoning has one of its words."""
    mark = re.findall(r'\{"mark": "([0-9a-f]{16})", "verdicts"', prompt)[-1]
    thinking = prompt.split(f"<candidate {mark}>")[-1].split("\nAnswer: ")[0].lower()
    criteria = prompt.split("# Criteria\n")[1].split("\n# The candidate")[0]
    verdicts = [
        {"criterion": number, "met": int(any(word in thinking for word in words.split(", "))), "why": "by rule"}
        for number, words in enumerate(_CRITERION.findall(criteria), 1)
    ]
    return json.dumps({"mark": mark, "verdicts": verdicts})


def answer(body: dict[str, Any]) -> tuple[str, str | None]:
    """The content of a request's answer, and its reasoning if the model of that stage is one that reasons.

    Raises ValueError for a prompt that is none of those above.
    """
    content = body["messages"][-1]["content"]
    prompt = content if isinstance(content, str) else content[-1]["text"]
    mark = digest(prompt, body.get("seed"))
    if '"verdicts"' in prompt:
        return judge_by_rubric(prompt), None
    if "Here are examples of the kind of questions" in prompt:
        events = events_in(prompt)
        questions = [question_about(events, place) for place in range(len(events))]
        return json.dumps({"questions": questions}), None
    if prompt.startswith("You check material"):
        reasoning = {"reasoning": "yes"} if "The reasoning shown" in prompt else {}
        return json.dumps({"question": "yes", **reasoning, "why": "by rule"}), None
    if prompt.startswith("Listen to the clip and answer"):
        guess, reasoning = reason(prompt, mark)
        return f"<answer>{guess}</answer>", reasoning
    if "Reply with the letter of one choice" in prompt:
        return "ABCD"[mark % 4], None
    raise ValueError(f"no rule for this prompt: {prompt[:200]}")


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait to be accepted; with the default of 5 some are refused


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            content, reasoning = answer(body)
        except ValueError as error:
            self._send(400, {"error": {"message": str(error)}})
            return
        message = {"role": "assistant", "content": content}
        if reasoning is not None:
            message["reasoning_content"] = reasoning
        words = len(content.split()) + len((reasoning or "").split())
        usage = {"prompt_tokens": len(str(body["messages"])) // 4, "completion_tokens": words}
        if reasoning is not None:
            usage |= {"completion_tokens_details": {"reasoning_tokens": len(reasoning.split())}}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        head = {"id": f"chatcmpl-{time.time_ns()}", "object": "chat.completion", "model": body.get("model")}
        self._send(200, {**head, "choices": [choice], "usage": usage})

    def _send(self, status: int, payload: dict[str, Any]) -> None:
        data = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request a line would hide all else in the log."""


def end_with_parent() -> None:
    """The recipe that started it may be killed."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the models of recipes/cogito-tiny, played by rules.")
    parser.add_argument("--url-file", type=Path, required=True, help="the URL is written here, ending in /v1")
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    args = parser.parse_args()
    server = Server(("127.0.0.1", args.port), Handler)
    threading.Thread(target=end_with_parent, daemon=True).start()
    unfinished = args.url_file.with_suffix(".unfinished")
    unfinished.write_text(f"http://127.0.0.1:{server.server_port}/v1")
    unfinished.rename(args.url_file)
    server.serve_forever()


if __name__ == "__main__":
    main()
