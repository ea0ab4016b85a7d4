"""The think/answer grammar, the strict match, and the official rule against a second writing of it."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echo_plugins.relisten.transcript import (
    Transcript,
    choice_letter,
    is_right,
    match_choice,
    normal_text,
    official_match,
    parse,
)

CHOICES = ["A dog", "a cat.", "Two  birds", "None of the above"]


def test_one_think_then_one_answer_is_well_formed() -> None:
    assert parse("<think> a\nb </think>\n<answer> B </answer>") == Transcript("a\nb", "B", True)


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("", None, None),
        ("B", None, None),
        ("<think>a</think>", "a", None),
        ("<answer>B</answer>", None, "B"),
        ("<answer>B</answer><think>a</think>", "a", "B"),
        ("<think>a<answer>B</answer></think>", "a<answer>B</answer>", "B"),
        ("<think>a</think><answer>A</answer><answer>B</answer>", "a", None),
        ("<think>a</think><think>b</think><answer>B</answer>", None, "B"),
        ("<think>a<answer>B</answer>", None, "B"),
        ("</think>a<think><answer>B</answer>", None, "B"),
        ("<think>a</think><answer>B", "a", None),
        ("<THINK>a</THINK><answer>B</answer>", None, "B"),
        ("<think>a</think><answer>B</answer></answer>", "a", None),
    ],
)
def test_anything_else_is_not_well_formed_and_says_what_is_there(
    text: str, think: str | None, answer: str | None
) -> None:
    assert parse(text) == Transcript(think, answer, False)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "x", " ", "<"]), max_size=12).map("".join)
)
def test_well_formed_is_exactly_the_grammar(text: str) -> None:
    only_once = all(text.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    in_order = re.fullmatch(r".*<think>.*</think>.*<answer>.*</answer>.*", text, re.DOTALL)
    assert parse(text).well_formed == bool(only_once and in_order)


def test_ten_megabytes_are_read_at_once() -> None:
    started = time.perf_counter()
    for text in ("<think>" * 1_400_000, "<think>" + "<answer" * 1_400_000, "<answer>" + " " * 10_000_000 + "</answer>"):
        match_choice(parse(text).answer or text, CHOICES)
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("A dog", 0),
        ("a dog", 0),
        ("A DOG.", 0),
        ("  a \n dog ", 0),
        ("a cat", 1),
        ("two birds", 2),
        ("A", 0),
        ("b", 1),
        ("(C)", 2),
        ("D.", 3),
        ("D:", 3),
        ("B. a cat", 1),
        ("(B) a cat.", 1),
        ("C) two birds", 2),
        ("(C): two birds", None),
        ("B. a dog", None),  # letter and text disagree
        ("E", None),
        ("Z. a dog", None),
        ("dog", None),  # part of a choice
        ("A dog and a cat.", None),
        ("The answer is A", None),
        ("A or B", None),
        ("", None),
        (".", None),
        (None, None),
    ],
)
def test_the_strict_match_takes_a_choice_or_nothing(answer: str | None, index: int | None) -> None:
    assert match_choice(answer, CHOICES) == index


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("\uff22", 1),  # a full-width B
        ("\uff42", 1),
        ("B\u3002", 1),  # the Chinese full stop
        ("B\uff0e", 1),
        ("B\uff61", 1),
        ("\uff08B\uff09", 1),  # full-width brackets
        ("\uff08\uff22\uff09\u732b\u53eb", 1),
        ("B\u3001\u732b\u53eb", 1),  # the Chinese comma of lists
        ("B\uff1a\u732b\u53eb\u3002", 1),
        ("\u732b\u53eb\u3002", 1),
        ("A\u3001\u732b\u53eb", None),  # letter and text disagree
        ("\u662f\u732b\u53eb", None),
        ("A\u3001B", None),
        ("cafe\u0301", 2),  # NFD, as macOS has it
        ("**B**", None),
    ],
)
def test_chinese_full_width_and_decomposed_answers_are_answers(answer: str, index: int | None) -> None:
    choices = ["\u72d7\u53eb", "\u732b\u53eb", "caf\u00e9"]
    assert match_choice(answer, choices) == index
    assert is_right(answer, choices[1], choices) is (index == 1)


def test_only_widths_are_folded_so_that_no_two_choices_become_one() -> None:
    assert match_choice("5 m\u00b2", ["5 m2", "5 m\u00b2"]) == 1
    assert match_choice("3.4", ["3\u30014", "3.4"]) == 1


def test_a_choice_that_reads_like_a_letter_wins_over_the_letter() -> None:
    assert match_choice("A", ["B", "A"]) == 1
    assert match_choice("C", ["vitamin C", "vitamin A", "C"]) == 2


def test_an_answer_that_names_two_equal_choices_names_none() -> None:
    assert match_choice("yes", ["Yes", "yes.", "no"]) is None


@given(st.lists(st.text(min_size=1, max_size=8).filter(lambda t: t.strip(" .\t\n")), min_size=2, max_size=6), st.data())
def test_the_strict_match_never_names_a_choice_whose_text_or_letter_was_not_said(
    choices: list[str], data: st.DataObject
) -> None:
    answer = data.draw(st.one_of(st.text(max_size=10), st.sampled_from(choices)))
    index = match_choice(answer, choices)
    if index is not None:
        said, text = normal_text(answer), normal_text(choices[index])
        assert text == said or choice_letter(index).casefold() in said


def official(prediction: str, answer: str, choices: list[str]) -> bool:
    """The rule as its authors word it: tokens of the answer all there, tokens of wrong choices none."""

    def tokens(text: str) -> set[str]:
        return set(re.findall(r"\b\w+\b", text.lower()))

    said, right = tokens(prediction), tokens(answer)
    if not said:
        return False
    wrong = set().union(*[tokens(choice) - right for choice in choices if tokens(choice) != right] or [set()])
    return right.issubset(said) and said.isdisjoint(wrong)


WORDS = st.lists(st.sampled_from(["a", "dog", "Cat", "two", "birds.", "é", "1", "_"]), max_size=4).map(" ".join)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=5), st.data())
def test_the_official_rule_agrees_with_a_second_writing_of_it(
    prediction: str, choices: list[str], data: st.DataObject
) -> None:
    answer = data.draw(st.sampled_from(choices))
    assert official_match(prediction, answer, choices) == official(prediction, answer, choices)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("a dog", True),
        ("The answer is a dog", True),
        ("a dog, not a cat", False),
        ("A", False),
        ("", False),
        ("?!", False),
        (None, False),
    ],
)
def test_the_official_rule_on_what_models_say(prediction: str | None, right: bool) -> None:
    assert official_match(prediction, "a dog", ["a dog", "a cat"]) is right


def test_letters_follow_the_alphabet() -> None:
    assert [choice_letter(index) for index in (0, 1, 25)] == ["A", "B", "Z"]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("a cat", True), ("B", True), ("(b) A cat", True), ("a dog", False), ("a cat or a dog", False), (None, False)],
)
def test_an_answer_is_right_when_it_names_the_right_choice(answer: str | None, right: bool) -> None:
    assert is_right(answer, "a cat.", CHOICES) is right is is_right(answer, "B", CHOICES)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("two  Bells.", True), ("two", False), ("two bells or three", False), ("", False), (None, False)],
)
def test_an_open_question_wants_the_words_of_the_ground_truth(answer: str | None, right: bool) -> None:
    assert is_right(answer, "Two bells") is right


def test_an_empty_answer_is_not_right_even_where_the_ground_truth_is_empty() -> None:
    assert not is_right("", "")


@pytest.mark.parametrize(("answer", "right"), [("rain", True), ("A", True), ("C", True), ("B", False), ("wind", False)])
def test_a_choice_that_is_listed_twice_is_one_choice(answer: str, right: bool) -> None:
    assert is_right(answer, "rain", ["rain", "wind", "rain"]) is right


def test_a_ground_truth_that_is_no_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="'snow' is not one of the choices"):
        is_right("A dog", "snow", CHOICES)
