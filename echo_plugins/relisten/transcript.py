"""What a response says: the `<think>`/`<answer>` grammar, and whether its answer is the right choice.

Rewards and scoring both read responses with this module, so that the two cannot drift.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

_LETTERED = re.compile(r"\(?([A-Za-z])\s*[).:\u3001\u3002]\s*(.*)", re.DOTALL)
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:\u3001\u3002]?")

# Full-width forms (U+FF01 to U+FF5E) and the half-width full stop, as Chinese and Japanese text has them. Not all of
# NFKC: it would make "m2" of "m\u00b2", and two choices one.
_WIDTHS = {0xFF01 + place: 0x21 + place for place in range(94)} | {0xFF61: "\u3002"}
_FULL_STOPS = ".\u3002 "


@dataclass(frozen=True)
class Transcript:
    """`think` and `answer`: the stripped contents of the one block of that name, None where there is none or several.

    `well_formed`: exactly one think block, then exactly one answer block, neither nested nor left open.
    """

    think: str | None
    answer: str | None
    well_formed: bool


def parse(text: str) -> Transcript:
    """Read a response. Never raises: malformed model output is data."""
    think, think_span = _only_block(text, "think")
    answer, answer_span = _only_block(text, "answer")
    ordered = think_span is not None and answer_span is not None and think_span[1] <= answer_span[0]
    return Transcript(think, answer, ordered)


def _only_block(text: str, name: str) -> tuple[str | None, tuple[int, int] | None]:
    opening, closing = f"<{name}>", f"</{name}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None, None
    start, end = text.index(opening), text.index(closing)
    if start > end:
        return None, None
    return text[start + len(opening) : end].strip(), (start, end + len(closing))


def choice_letter(index: int) -> str:
    """A, B, C ... as the prompt letters the choices."""
    return chr(ord("A") + index)


def match_choice(answer: str | None, choices: Sequence[str]) -> int | None:
    """The index of the one choice that `answer` names, None when it names none or more than one. Strict: no guessing.

    Taken are the choice's text, its letter, and letter with text (`B`, `(B)`, `B. a dog`), whatever the case, blanks
    and a final full stop. Chinese and full-width letters, brackets and stops count as their ASCII forms. A letter whose
    text is another choice's names none.
    """
    if answer is None:
        return None
    said = normal_text(answer)
    if not said:
        return None
    normal = [normal_text(choice) for choice in choices]
    by_text = [index for index, choice in enumerate(normal) if choice == said]
    if by_text:
        return by_text[0] if len(by_text) == 1 else None
    lettered = _LETTERED.fullmatch(said)
    if lettered and lettered[2].strip():
        index = ord(lettered[1].lower()) - ord("a")
        return index if index < len(choices) and normal[index] == normal_text(lettered[2]) else None
    letter = _LETTER.fullmatch(said)
    if letter:
        index = ord(letter[1].lower()) - ord("a")
        return index if index < len(choices) else None
    return None


def named_choice(answer: str | None, choices: Sequence[str]) -> str | None:
    """The text of the one choice that `answer` names by the strict match, None when it names none or more than one.

    A choice that is listed twice, as benchmarks do, is one choice: its text names it, and so does either letter.
    """
    once = [choice if choice not in choices[:place] else "" for place, choice in enumerate(choices)]
    named = match_choice(answer, once)
    return None if named is None else choices[named]


def is_right(answer: str | None, ground_truth: str, choices: Sequence[str] = ()) -> bool:
    """Whether `answer` names the right choice by the strict match; without choices, whether it is the ground truth
    itself, blanks, case and a final full stop aside.

    Raises ValueError when the ground truth is not one of the choices: such a row could never be answered.
    """
    if not choices:
        return answer is not None and normal_text(answer) == normal_text(ground_truth) != ""
    right = named_choice(ground_truth, choices)
    if right is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not one of the choices {list(choices)}")
    return named_choice(answer, choices) == right


def normal_text(text: str) -> str:
    """`text` as the strict match compares it: NFC, without widths, case, surplus blanks and a final full stop."""
    folded = unicodedata.normalize("NFC", text.translate(_WIDTHS))
    return unicodedata.normalize("NFC", " ".join(folded.split()).rstrip(_FULL_STOPS).casefold())


def official_match(prediction: str | None, answer: str, choices: Sequence[str]) -> bool:
    """The rule of the official MMAU and MMAR scripts (`string_match`), on every row; None counts as wrong.

    With tok(s) the set of lower-case words of s: correct if tok(answer) is a subset of tok(prediction), and the
    prediction holds none of the words that the other choices have and the answer has not.
    """
    if prediction is None:
        return False
    said, right = _words(prediction), _words(answer)
    if not said:
        return False
    wrong: set[str] = set()
    for choice in choices:
        words = _words(choice)
        if words != right:
            wrong |= words - right
    return right <= said and not said & wrong


def _words(text: str) -> set[str]:
    return set(re.findall(r"\b\w+\b", text.lower()))
