"""What the model is asked. SFT rows, RL rows and inference all build their question here.

The audio placeholder is the text `<audio>`, which ms-swift and verl both turn into the model's own tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from .transcript import choice_letter

AUDIO_TAG = "<audio>"

Mode = Literal["interleaved", "grounded", "plain"]
"""interleaved: tags, and the clip inserted after each. grounded: tags as text only. plain: no tags."""
MODES: tuple[Mode, ...] = get_args(Mode)

_TAGS = (
    "Think first, naming each part of the audio you rely on as <seg>start, end</seg> in seconds, inside "
    "<think></think>."
)
_NO_TAGS = "Think first inside <think></think>."

# Special tokens of the Qwen families, and the placeholders that ms-swift and verl split prompts at. In a data set's own
# text they would shift the clips: converters refuse them, the prompt builder breaks them up.
_RESERVED = re.compile(r"<\|[A-Za-z_]{1,40}\|>|<(?:audio|image|video)>", re.IGNORECASE)


def contains_reserved(text: str) -> str | None:
    """The first reserved token in `text`, None when it is free of them."""
    match = _RESERVED.search(text)
    return match[0] if match else None


def escape_reserved(text: str) -> str:
    """`text` with a blank after the `<` of every reserved token, which then is plain text to every tokenizer."""
    return _RESERVED.sub(lambda match: "< " + match[0][1:], text) if "<" in text else text


def question_text(question: str, choices: Sequence[str], mode: Mode) -> str:
    """Question, lettered choices where there are any, and the instruction of `mode`, without the audio placeholder.

    Interleaved and grounded share one instruction: they differ in what is inserted, not in what is asked.
    """
    lines = [escape_reserved(question.strip())]
    lines += [f"({choice_letter(index)}) {escape_reserved(choice.strip())}" for index, choice in enumerate(choices)]
    asked_for = "choice" if choices else "answer"
    lines.append(f"{_NO_TAGS if mode == 'plain' else _TAGS} Then give your {asked_for} inside <answer></answer>.")
    return "\n".join(lines)


def user_message(question: str, choices: Sequence[str], mode: Mode) -> dict[str, str]:
    """The user's turn: the clip first, then the question."""
    return {"role": "user", "content": AUDIO_TAG + question_text(question, choices, mode)}
