"""Echo's pipeline: a clip and its labels -> a question whose reasoning names the segments that it rests on.

    python -m converters.synthesis.eaqa CONFIG.yaml [--stage NAME ...] [--dry-run]

clips -> screen (what a benchmark holds, sounds that are there twice) -> caption (an audio model: description, speech,
music) -> question (a text model: question, choices, answer, chain of thought with tags) -> check -> judge (question and
chain of thought apart) -> silence, difficulty (where the config has models for them) -> select. Both good goes to SFT,
only the question good to RL. Source: the paper's section on EAQA; the prompts are our own.
"""

from __future__ import annotations

from converters.synthesis.asker import Asker, json_object, together
from converters.synthesis.filters import tags_needed
from converters.synthesis.runner import Context, Stage, command
from converters.synthesis.sample import Sample
from converters.synthesis.selection import SELECT
from converters.synthesis.stages import (
    CHECK,
    CLIPS,
    DIFFICULTY,
    JUDGE,
    SCREEN,
    SILENCE,
    Draft,
    domain_of,
    evidence,
    is_music,
    with_provenance,
)

_NOTHING = "NONE"  # what the captioning prompts ask for where there is no speech, no music
_LEVELS = ("basic", "expert")


async def caption(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """What the audio model hears. Of a clip with beats and chords only the description is asked for."""
    if not sample.events and not is_music(sample):
        return [sample.drop("caption", "no_labelled_times", "segments can only be named where something has a time")]
    names = ["description"] if is_music(sample) else ["description", "speech", "music"]
    answered = await together(asker.ask(sample, f"eaqa/{name}", {}, _caption, sound=True) for name in names)
    said = {name: answer.value for name, answer in zip(names, answered, strict=True) if answer.value}
    sample = sample.model_copy(update={"caption": said})
    sample = sample.model_copy(update={"domain": domain_of(sample)})
    return [with_provenance(sample, [step for answer in answered for step in answer.provenance])]


def _caption(content: str) -> str:
    text = " ".join(content.split())
    return "" if text.strip(" .*\"'").upper() == _NOTHING else text


async def question(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """One question of a clip, two of a piece of music: for every listener, and for trained ones."""
    if not is_music(sample):
        values = evidence(sample) | {"tags_needed": tags_needed(sample)}
        answered = await asker.ask(sample, "eaqa/question_sound", values, _draft)
        return [with_provenance(sample.model_copy(update=answered.value), answered.provenance)]
    made = []
    for level in _LEVELS:
        values = evidence(sample) | {"level": level}
        answered = await asker.ask(sample, "eaqa/question_music", values, _draft, salt=level)
        own = {"id": f"{sample.id}-{level}", "level": level}
        made.append(with_provenance(sample.model_copy(update=answered.value | own), answered.provenance))
    return made


def _draft(content: str) -> dict[str, object]:
    draft = json_object(content, Draft)
    if not draft.think:
        raise ValueError("the reasoning ('think') is missing")
    return draft.fields()


STAGES = (
    CLIPS,
    SCREEN,
    Stage("caption", rows=caption, prompts=("eaqa/description", "eaqa/speech", "eaqa/music"), asks=True),
    Stage("question", rows=question, prompts=("eaqa/question_sound", "eaqa/question_music"), asks=True),
    CHECK,
    JUDGE,
    SILENCE,
    DIFFICULTY,
    SELECT,
)

app = command(
    "converters.synthesis.eaqa", "Make questions with grounded reasoning from labelled audio, as Echo's EAQA."
)

if __name__ == "__main__":
    app(prog_name="python -m converters.synthesis.eaqa")
