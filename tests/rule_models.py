"""Models played by rules: they answer the prompts of converters.synthesis from what stands in the prompt.

With `misbehaving_server`: `misbehaving_server(RuleModels())`. A request is told by words of our prompt files.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from misbehaving_server import (
    Answer,
    Behaviour,
    Dropped,
    Failure,
    HalfJson,
    Hang,
    Request,
    html,
    rate_limited,
    refusal,
    thinking,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "cogito-tiny"))

from rule_server import digest, draft

_USAGE = {"prompt_tokens": 200, "completion_tokens": 60}

TROUBLES: tuple[Behaviour, ...] = (
    rate_limited(0),
    Failure(500),
    HalfJson(),
    html(200),
    html(502),
    Dropped(),
    Dropped(after_bytes=20),
    Hang(30),
)


def text_of(request: Request) -> str:
    content = request.body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def sound_of(request: Request) -> str | None:
    """A short name for the sound in the request, None where there is none."""
    content = request.body["messages"][0]["content"]
    if isinstance(content, str):
        return None
    return hashlib.sha256(json.dumps(content[0]).encode()).hexdigest()[:8]


@dataclass
class RuleModels:
    """A script for misbehaving_server. Of all requests one in `trouble_each` fails at its first attempt, each kind of
    trouble in turn; one in `half_each` is answered with half an object, one in `refuse_each` is refused.

    `paid` counts answers by request, `kinds` by the prompt that was answered."""

    trouble_each: int = 0
    half_each: int = 0
    refuse_each: int = 0
    delay_seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)

    def __call__(self, request: Request) -> Behaviour:
        text = text_of(request)
        mark = digest(text, sound_of(request), request.body["seed"])
        if self.trouble_each and mark % self.trouble_each == 0 and request.attempt == 1:
            return TROUBLES[mark // self.trouble_each % len(TROUBLES)]
        time.sleep(self.delay_seconds)
        self.paid[json.dumps(request.body)] += 1
        if self.refuse_each and digest(text, sound_of(request)) % self.refuse_each == 0:
            return refusal()
        kind, behaviour = self.answer(request, text, mark)
        self.kinds[kind] += 1
        if self.half_each and mark % self.half_each == 1 and kind in ("question", "questions", "judge"):
            content = json.loads(behaviour.payload(request))["choices"][0]["message"]["content"]
            return Answer(content[: len(content) // 2], _USAGE)
        return behaviour

    def answer(self, request: Request, text: str, mark: int) -> tuple[str, Answer]:
        if "reply with exactly: NONE" in text:
            return "caption", Answer("NONE", _USAGE)
        if text.startswith("Listen to the clip and describe"):
            return "caption", Answer(
                f"Several sounds follow one another over light noise ({sound_of(request)}).", _USAGE
            )
        if text.startswith("You have just listened"):
            return "question", Answer(json.dumps(draft(text)), _USAGE)
        if "Here are examples of the kind of questions" in text:
            drafts = [{**draft(text, turn), "think": None} for turn in range(1 + mark % 3)]
            return "questions", Answer(f"Here they are:\n```json\n{json.dumps({'questions': drafts})}\n```", _USAGE)
        if text.startswith("You check material"):
            return "judge", Answer(json.dumps(self.verdict(text)), _USAGE)
        if text.startswith("Listen to the clip, then judge"):
            names = ("audible", "unambiguous", "nontrivial")
            verdict = {name: "no" if digest(text) % 11 == place else "yes" for place, name in enumerate(names)}
            return "vet", Answer(json.dumps({**verdict, "why": "by rule"}), _USAGE)
        if text.startswith("Listen to the clip and answer"):
            letter = "ABCD"[mark % 2]
            choice = re.findall(rf"^\({letter}\) (.*)$", text, re.MULTILINE)[0]
            reasoning = f"What I hear first is faint, then it grows, and in the end {choice} fits best. " * 3
            return "think", thinking(f"<answer>{choice}</answer>", reasoning)
        if "Reply with the letter of one choice" in text:
            return "answer", Answer("ABCD"[mark % 4], {"prompt_tokens": 80, "completion_tokens": 1})
        raise AssertionError(f"no rule for this prompt: {text[:200]}")

    def verdict(self, text: str) -> dict[str, Any]:
        mark = digest(text)
        reasoning = {"reasoning": "no" if mark % 5 == 0 else "yes"} if "The reasoning shown" in text else {}
        return {"question": "no" if mark % 7 == 0 else "yes", **reasoning, "why": "by rule"}
