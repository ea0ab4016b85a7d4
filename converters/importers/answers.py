"""How a data set says which choice is right: in words, by letter, by number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from echo_plugins.audio_qa import Reason, RowError
from echo_plugins.relisten.transcript import match_choice

_WHOLE = re.compile(r"([0-9]{1,9})(?:\.0+)?")  # a table that lacks some answers has 1.0 for 1
_LETTER = re.compile(r"\(?[A-Za-z]\)?[.:]?")


class AnswerForm(StrEnum):
    """How the source says which choice is right."""

    AUTO = "auto"
    TEXT = "text"
    LETTER = "letter"
    INDEX0 = "index0"
    INDEX1 = "index1"


def answer_text(answer: Any, choices: Sequence[Any], form: AnswerForm) -> Any:
    """The text of the right choice; what names none is handed back for the record to refuse.

    Raises RowError when text and letter name different choices, and for a number without `--answer index0|index1`.
    """
    texts = [choice.strip() if isinstance(choice, str) else "" for choice in choices]
    said = answer.strip() if isinstance(answer, str) else answer
    if form in (AnswerForm.INDEX0, AnswerForm.INDEX1):
        digits = isinstance(said, str) and _WHOLE.fullmatch(said)
        if not digits and (isinstance(said, bool) or not isinstance(said, int)):
            raise RowError(Reason.WRONG_TYPE, f"--answer {form} takes whole numbers, this is {said!r}"[:200])
        index = int(digits[1] if digits else said) - (form is AnswerForm.INDEX1)
        if not 0 <= index < len(texts):
            raise RowError(Reason.ANSWER_NOT_A_CHOICE, f"there is no choice {said} ({form}) among {len(texts)}")
        return texts[index]
    if form is AnswerForm.TEXT and type(said) in (int, float):
        said = str(said)  # as the choices' numbers are
    if not isinstance(said, str):
        if isinstance(said, int):
            raise RowError(Reason.AMBIGUOUS_ANSWER, f"the answer is the number {said}: say --answer index0 or index1")
        return said
    readings: set[int] = set()
    if form is not AnswerForm.LETTER and said in texts:
        readings.add(texts.index(said))
    if form is not AnswerForm.TEXT:
        # Without the texts `match_choice` can only read a letter.
        named = match_choice(said, [""] * len(texts) if _LETTER.fullmatch(said) else texts)
        if named is not None:
            readings.add(named)
    if len(readings) > 1:
        raise RowError(Reason.AMBIGUOUS_ANSWER, f"{said!r} is a choice's text and another's letter: say --answer")
    return texts[readings.pop()] if readings else said
