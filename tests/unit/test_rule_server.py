"""The models that recipes/cogito-tiny plays by rules: what their judge finds is what the reasoning says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from eval.judge import Case, criteria_of, read_verdict, request

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes" / "cogito-tiny"))

import make_inputs
import rule_server

CLIP = {"id": "one", "audio": "audio/one.wav", "duration": 3.0}
EVENTS = [{"label": "bell", "start": 0.5, "end": 1.0}, {"label": "hum", "start": 1.5, "end": 2.0}]


@pytest.mark.parametrize(
    ("thinking", "met"),
    [
        ("I hear a bell, then I go back to it.", (True, True, False, False, False)),
        ("Nothing.", (False, False, False, False, False)),
        ("I listen again: the bell or the hum? The others are elsewhere, so the bell.", (True,) * 5),
    ],
)
def test_the_judge_counts_what_the_reasoning_has(thinking: str, met: tuple[bool, ...]) -> None:
    (row, _) = make_inputs.benchmark_rows([CLIP | {"events": EVENTS}], 2)
    criteria = criteria_of(row["rubric"])
    case = Case(row["question"], row["answer"], row["thinking"], criteria, thinking, row["answer"])
    content, _ = rule_server.answer(request(case, "rules", {}))
    assert read_verdict(content, case) == met


def test_reasoning_ends_in_the_guess_and_meets_every_criterion() -> None:
    prompt = "Listen to the clip and answer the question.\n(A) bell\n(B) hum\n(C) rain\n(D) hiss\n"
    guesses = set()
    for seed in range(8):
        content, reasoning = rule_server.answer({"messages": [{"role": "user", "content": prompt}], "seed": seed})
        guess = content.removeprefix("<answer>").removesuffix("</answer>")
        assert reasoning is not None and reasoning.endswith(f"the {guess} fits best.")
        (row, _) = make_inputs.benchmark_rows([CLIP | {"events": EVENTS}], 2)
        case = Case("?", guess, "", criteria_of(row["rubric"]), reasoning, guess)
        assert all(read_verdict(rule_server.answer(request(case, "rules", {}))[0], case))
        guesses.add(guess)
    assert guesses == {"bell", "hum"}, "it hears nothing"


def test_items_ask_for_each_place_of_each_clip_and_their_answers_stand_anywhere() -> None:
    rows = make_inputs.benchmark_rows([{**CLIP, "id": str(number), "events": EVENTS} for number in range(4)], 8)
    assert [row["answer"] for row in rows] == ["bell", "hum"] * 4
    assert {row["choices"].index(row["answer"]) for row in rows} == {0, 1, 2, 3}
    assert len({row["id"] for row in rows}) == 8


def test_a_prompt_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule for this prompt: Sing"):
        rule_server.answer({"messages": [{"role": "user", "content": "Sing"}]})
