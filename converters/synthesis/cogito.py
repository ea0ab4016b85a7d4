"""Audio-Cogito's pipeline: a clip -> hard questions -> a model's own reasoning, kept where it finds the key by itself.

    python -m converters.synthesis.cogito CONFIG.yaml [--stage NAME ...] [--dry-run]

clips -> screen (what a benchmark holds, sounds that are there twice) -> question (an audio model, shown seed questions:
one to three with hard distractors) -> check -> think (an audio model answers without the key; its `reasoning_content`
is the chain of thought, kept where it found the key) -> judge -> silence, difficulty (where the config has models for
them) -> select.

The chains of thought are free-form, without tags: give `filters: {min_segments: 0}`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from converters.synthesis import filters
from converters.synthesis.asker import Asker, json_object
from converters.synthesis.config import ConfigError
from converters.synthesis.runner import Context, Stage, command
from converters.synthesis.sample import Sample, seed_of
from converters.synthesis.selection import SELECT
from converters.synthesis.stages import (
    CHECK,
    CLIPS,
    DIFFICULTY,
    JUDGE,
    SCREEN,
    SILENCE,
    Draft,
    chosen,
    evidence,
    with_provenance,
)
from echo_plugins.relisten.prompt import question_text
from echo_plugins.relisten.transcript import parse

MAX_QUESTIONS = 3


class Seed(BaseModel):
    """An example of the kind of question that is wanted."""

    question: str
    skill: str
    difficulty: str
    domain: str = ""


class Drafts(BaseModel):
    questions: list[Draft] = Field(min_length=1)


@lru_cache(4)
def read_seeds(file: Path) -> tuple[Seed, ...]:
    """The pool, by domain. Raises ConfigError."""
    try:
        pools = TypeAdapter(dict[str, list[Seed]]).validate_python(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"seeds: {file}: {error}") from error
    return tuple(seed.model_copy(update={"domain": domain}) for domain, pool in pools.items() for seed in pool)


def draw_seeds(pool: tuple[Seed, ...], count: int, seed: int) -> list[Seed]:
    """`count` of the pool in a random order, or all of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(pool))[:count]
    return [pool[index] for index in order]


async def question(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """One to three questions; more are left out."""
    config = context.config
    seeds = draw_seeds(read_seeds(config.seeds), config.seeds_per_request, seed_of(config.seed, "seeds", sample.id))
    known = evidence(sample)
    values = known | {
        "seeds": [seed.model_dump() for seed in seeds],
        "known": bool(known["events"] or known["music"] or any(known["caption"].values())),
    }
    answered = await asker.ask(sample, "cogito/question", values, lambda c: json_object(c, Drafts), sound=True)
    sample = with_provenance(sample, answered.provenance)
    return [
        sample.model_copy(update=draft.fields() | {"id": f"{sample.id}-{number}", "think": None})
        for number, draft in enumerate(answered.value.questions[:MAX_QUESTIONS], start=1)
    ]


async def think(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """The model's reasoning on its way to an answer, the key withheld; and whether it found the key."""
    values = {"question": question_text(sample.question or "", sample.choices, "plain").rpartition("\n")[0]}
    answered = await asker.ask(sample, "cogito/think", values, _content, sound=True)
    sample = with_provenance(sample, answered.provenance)
    reasoning = answered.reasoning.strip() or parse(answered.value).think
    if not reasoning:
        return [sample.without_think("think", "no_reasoning", "neither reasoning_content nor a think block")]
    found = chosen(answered.value, sample.choices)
    if found is None or sample.choices[found] != sample.answer:
        said = "no choice" if found is None else sample.choices[found]
        return [
            sample.without_think("think", "answer_consistency", f"it came to {said!r}, the key is {sample.answer!r}")
        ]
    sample = sample.model_copy(update={"think": reasoning})
    for rule in filters.THINK_FILTERS:
        if (wrong := rule(sample, context.limits)) is not None:
            return [sample.without_think("think", rule.__name__, wrong)]
    return [sample]


def _content(content: str) -> str:
    """Any answer will do: a model that does not find the key is data."""
    return content


STAGES = (
    CLIPS,
    SCREEN,
    Stage(
        "question",
        rows=question,
        prompts=("cogito/question",),
        settings=("seeds", "seeds_per_request"),
        asks=True,
    ),
    CHECK,
    Stage("think", rows=think, prompts=("cogito/think",), settings=("filters",), asks=True),
    JUDGE,
    SILENCE,
    DIFFICULTY,
    SELECT,
)

app = command("converters.synthesis.cogito", "Make questions and free-form reasoning from audio, as Audio-Cogito.")

if __name__ == "__main__":
    app(prog_name="python -m converters.synthesis.cogito")
