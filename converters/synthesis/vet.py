"""Questions that a set has already, AVQA's for one -> those that are worth a policy's time, for RL.

    python -m converters.synthesis.vet CONFIG.yaml [--stage NAME ...] [--dry-run]

rows (AudioQA, from an importer) -> screen (what a benchmark holds, sounds that are there twice) -> check -> vet (a
model that hears the clip: can the question be answered from the sound alone, is the key the only choice that can be
defended, does it take listening) -> silence, difficulty (where the config has models for them) -> select. A chain of
thought that a row brings along is left behind: what goes out is RL's. Source: Echo's filter of AVQA; the prompt is
our own.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from converters.synthesis.asker import Asker, json_object
from converters.synthesis.runner import Context, Stage, command
from converters.synthesis.sample import Sample
from converters.synthesis.selection import SELECT
from converters.synthesis.stages import CHECK, DIFFICULTY, SCREEN, SILENCE, take_questions, with_provenance

YesNo = Literal["yes", "no"]


class Vetting(BaseModel):
    """What the model replies; a row must have three times yes."""

    audible: YesNo
    unambiguous: YesNo
    nontrivial: YesNo
    why: str = ""


async def vet(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """The reason of a row that goes is the first of the three that it fails."""
    shown = {name: getattr(sample, name) for name in ("question", "choices", "answer")}
    answered = await asker.ask(sample, "vet/question", shown, lambda c: json_object(c, Vetting), sound=True)
    sample = with_provenance(sample, answered.provenance)
    for name in ("audible", "unambiguous", "nontrivial"):
        if getattr(answered.value, name) == "no":
            return [sample.drop("vet", f"not_{name}", answered.value.why)]
    return [sample]


STAGES = (
    Stage("rows", source=take_questions),
    SCREEN,
    CHECK,
    Stage("vet", rows=vet, prompts=("vet/question",), asks=True),
    SILENCE,
    DIFFICULTY,
    SELECT,
)

app = command("converters.synthesis.vet", "Keep of questions that are there already those that RL can learn from.")

if __name__ == "__main__":
    app(prog_name="python -m converters.synthesis.vet")
