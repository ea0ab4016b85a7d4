"""What the pipelines do alike: take clips or rows in and screen them, check rows, judge them, ask with silence, sample
for difficulty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel

from converters.conversion import AudioRoot
from converters.synthesis import filters, soundprint
from converters.synthesis.asker import Asker, Unusable, json_object, together
from converters.synthesis.runner import Context, Stage
from converters.synthesis.sample import Provenance, Sample
from echo_plugins.audio import AudioError, load
from echo_plugins.audio_qa import (
    AudioQA,
    LabelledAudio,
    Reason,
    Record,
    RowError,
    read_rows,
    recording_of,
    without_letters,
)
from echo_plugins.relisten.prompt import question_text
from echo_plugins.relisten.transcript import match_choice, parse

_CHORD = "chord"
_DOMAINS = ("sound", "speech", "music", "mixed")
_Answer = tuple[bool, list[Provenance]]  # right or not, and the requests it took
_MAX_BEATS = 64  # in a prompt: half a minute of music


def take_clips(context: Context, rank: int, tasks: int) -> Iterator[Sample]:
    """Every `tasks`-th row of the input, judged with its sound. A clip that several rows name is taken once."""
    return _take(context, rank, tasks, LabelledAudio, "clips")


def take_questions(context: Context, rank: int, tasks: int) -> Iterator[Sample]:
    """Every `tasks`-th row of an AudioQA manifest, judged with its sound."""
    return _take(context, rank, tasks, AudioQA, "rows")


def _take(context: Context, rank: int, tasks: int, kind: type[Record], stage: str) -> Iterator[Sample]:
    config = context.config
    audio = AudioRoot(config.audio_root)
    seen_ids: set[str] = set()
    seen_clips: set[str] = set()
    for number, (line, row) in enumerate(read_rows(config.input, lambda _: None)):
        row_id, path = _id_and_audio(row)
        repeated_id, repeated_clip = row_id in seen_ids, kind is LabelledAudio and path in seen_clips
        seen_ids |= {row_id} - {""}
        seen_clips |= {path} - {""}
        if number % tasks != rank:
            continue
        blank = Sample(
            id=row_id or f"line-{line}",
            clip=row_id,
            audio=path,
            audio_sha256="",
            recording=path,
            duration=0.0,
            domain="sound",
        )
        try:
            if isinstance(row, RowError):
                raise row
            if repeated_id:
                blank = blank.model_copy(update={"id": f"{row_id}#line-{line}"})
                raise RowError(Reason.DUPLICATE_ID, f"id {row_id!r} stands in an earlier row too")
            if repeated_clip:
                yield blank.drop(stage, "repeated_clip", f"{path} was in an earlier row")
                continue
            yield _sample(kind.from_json(row), audio)
        except RowError as error:
            yield blank.drop(stage, str(error.reason), f"{config.input.name}, line {line}: {error.detail}")


def _id_and_audio(row: object) -> tuple[str, str]:
    if not isinstance(row, Mapping):
        return "", ""
    return str(row.get("id") or ""), str(row.get("audio") or "")


def _sample(record: Record, root: AudioRoot) -> Sample:
    checked = root.check(record)
    try:
        waveform = load(checked.audio.path)
    except AudioError as error:
        raise RowError(Reason.AUDIO_UNREADABLE, str(error)) from error
    record = replace(record, duration_seconds=checked.audio.duration_seconds)
    sample = Sample(
        id=record.id,
        clip=record.id,
        audio=record.audio,
        audio_sha256=filters.sound_hash(waveform),
        sound_print=soundprint.sparse(waveform),
        recording=recording_of(record),
        duration=checked.audio.duration_seconds,
        domain="",
        events=[event.to_json() for event in record.events],
        meta=record.meta,
    )
    if isinstance(record, AudioQA):
        asked = {"question": record.question, "choices": list(record.choices), "answer": record.answer}
        sample = sample.model_copy(update=asked)
    return sample.model_copy(update={"domain": domain_of(sample)})


def screen_clips(context: Context) -> Callable[[Sample], Sample]:
    """What a clip alone is enough for, before anything is asked about it: a benchmark holds it, or an earlier clip is
    the same sound under another name."""
    held = filters.HeldClips(context.config.benchmarks)
    heard: dict[str, str] = {}

    def judge(sample: Sample) -> Sample:
        sample = sample.model_copy(update={"compared_by": held.compared(sample)})
        if (where := held.find(sample)) is not None:
            return sample.drop("screen", "contamination", where)
        first = heard.setdefault(sample.audio_sha256, sample.audio)
        return sample if first == sample.audio else sample.drop("screen", "repeated_sound", f"of {first}")

    return judge


def domain_of(sample: Sample) -> str:
    """What the set says; else what its labels or the captions show."""
    if sample.meta.get("domain") in _DOMAINS:
        return str(sample.meta["domain"])
    kinds = {str(event.get("kind", "sound")) for event in sample.events}
    if is_music(sample):
        return "music"
    found = {
        "speech": "speech" in kinds or bool(sample.caption.get("speech")) or "transcript" in sample.meta,
        "music": "music" in kinds or bool(sample.caption.get("music")),
        "sound": "sound" in kinds,
    }
    names = [name for name, there in found.items() if there]
    return names[0] if len(names) == 1 else "mixed" if names else "sound"


def is_music(sample: Sample) -> bool:
    """A clip of a music set: its beats, tempo, key or chords are known."""
    return any(sample.meta.get(key) for key in ("beats", "tempo", "key")) or _chords(sample) != []


def _chords(sample: Sample) -> list[dict[str, Any]]:
    return [event for event in sample.events if event.get("kind") == _CHORD]


def evidence(sample: Sample) -> dict[str, Any]:
    """What `shared/evidence` shows of a clip: to the models that write and judge, never to those that answer."""
    music: dict[str, str] = {}
    if sample.meta.get("tempo"):
        music["tempo"] = f"{sample.meta['tempo']} beats a minute"
    if sample.meta.get("key"):
        music["key"] = str(sample.meta["key"])
    if chords := _chords(sample):
        music["chords, each from the second given"] = ", ".join(f"{e['label']} {e['start']:.2f}" for e in chords)
    beats = sample.meta.get("beats")
    if isinstance(beats, list) and beats and all(isinstance(beat, int | float) for beat in beats):
        music["beats, in seconds"] = " ".join(f"{beat:.2f}" for beat in beats[:_MAX_BEATS])
    caption = {name: sample.caption.get(name, "") for name in ("description", "speech", "music")}
    if not caption["description"]:
        said = [str(text) for text in sample.meta.get("captions") or []]
        caption["description"] = " ".join(said) or ", ".join(map(str, sample.meta.get("labels") or []))
    if not caption["speech"] and sample.meta.get("transcript"):
        caption["speech"] = f"says: {sample.meta['transcript']}"
    events = [event for event in sample.events if event.get("kind") != _CHORD]
    return {"duration": sample.duration, "caption": caption, "music": music, "events": events}


async def check(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """The filters of a row, before anything more is paid for it; then its choices in an order of ours."""
    for rule in filters.QUESTION_FILTERS:
        if (wrong := rule(sample, context.limits)) is not None:
            return [sample.drop("check", rule.__name__, wrong)]
    held = filters.held_questions(tuple(context.config.benchmarks), context.limits.contamination_jaccard)
    if (where := held.find(sample.question or "")) is not None:
        return [sample.drop("check", "contamination", where)]
    for rule in filters.DRAFT_FILTERS:
        if sample.think is not None and (wrong := rule(sample, context.limits)) is not None:
            sample = sample.without_think("check", rule.__name__, wrong)
    place = {"drafted_place": sample.choices.index(sample.answer or "")}
    return [filters.shuffled(sample, context.config.seed).model_copy(update=place)]


class Verdict(BaseModel):
    """What the judge replies."""

    question: Literal["yes", "no"]
    reasoning: Literal["yes", "no"] | None = None
    why: str = ""


async def judge(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """Question and chain of thought apart: both good to SFT, only the question to RL, else out."""

    def read(content: str) -> Verdict:
        verdict = json_object(content, Verdict)
        if sample.think is not None and verdict.reasoning is None:
            raise ValueError("the verdict on the reasoning is missing")
        return verdict

    shown = {name: getattr(sample, name) for name in ("question", "choices", "answer", "think")}
    answered = await asker.ask(sample, "shared/judge", shown | evidence(sample), read)
    sample = with_provenance(sample, answered.provenance)
    if answered.value.question == "no":
        return [sample.drop("judge", "question_not_valid", answered.value.why)]
    if sample.think is not None and answered.value.reasoning == "no":
        sample = sample.without_think("judge", "reasoning_not_valid", answered.value.why)
    return [sample]


async def silence(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """Can it be answered from silence? Each model is asked twice, with the choices turned round the second time."""
    orders = (sample.choices, sample.choices[::-1])
    tries = [(model, order) for model in range(asker.num_models) for order in range(len(orders))]
    answers = await together(
        answer(sample, asker, orders[order], silent=True, model=model, salt=order) for model, order in tries
    )
    sample = with_provenance(sample, [step for _, steps in answers for step in steps])
    accuracy = sum(right for right, _ in answers) / len(answers)
    sample = sample.model_copy(update={"silence_accuracy": accuracy})
    return [_dropped_by(filters.audio_contribution, "silence", sample, context)]


async def difficulty(sample: Sample, asker: Asker, context: Context) -> list[Sample]:
    """pass@k of the rows for RL, by the policy that is to be trained."""
    if sample.think is not None:
        return [sample]
    count = context.config.samples_per_question
    answers = await together(answer(sample, asker, sample.choices, sound=True, salt=number) for number in range(count))
    sample = with_provenance(sample, [step for _, steps in answers for step in steps])
    sample = sample.model_copy(update={"pass_rate": sum(right for right, _ in answers) / count})
    return [_dropped_by(filters.difficulty, "difficulty", sample, context)]


async def answer(sample: Sample, asker: Asker, choices: list[str], **how: Any) -> _Answer:
    """Whether one answer is right; what names no choice is wrong, and so is a refusal."""
    values = {"question": question_text(sample.question or "", choices, "plain").rpartition("\n")[0]}
    try:
        answered = await asker.ask(sample, "shared/answer", values, lambda content: chosen(content, choices), **how)
    except Unusable as error:
        return False, error.provenance
    return answered.value is not None and choices[answered.value] == sample.answer, answered.provenance


def chosen(content: str, choices: list[str]) -> int | None:
    """The choice that an answer names, in an answer block or bare."""
    return match_choice(parse(content).answer or content, choices)


def _dropped_by(judge: filters.RowFilter, stage: str, sample: Sample, context: Context) -> Sample:
    wrong = judge(sample, context.limits)
    return sample if wrong is None else sample.drop(stage, judge.__name__, wrong)


def with_provenance(sample: Sample, steps: list[Provenance]) -> Sample:
    return sample.model_copy(update={"provenance": [*sample.provenance, *steps]})


class Draft(BaseModel):
    """A question as a model writes it. The answer may be the choice's text or its letter."""

    question: str
    choices: list[str]
    answer: str
    think: str | None = None
    skill: str | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of a sample; an answer that names no choice is kept for the filter to see."""
        choices = [choice.strip() for choice in self.choices]
        with suppress(RowError):  # equal choices are for the filter to see
            choices = list(without_letters(tuple(choices), "")[0])
        index = match_choice(self.answer, choices)
        return {
            "question": self.question.strip(),
            "choices": choices,
            "answer": self.answer.strip() if index is None else choices[index],
            "think": self.think.strip() if self.think else None,
            "skill": self.skill,
        }


CLIPS = Stage("clips", source=take_clips)
SCREEN = Stage("screen", screen=screen_clips, settings=("benchmarks",))
CHECK = Stage("check", rows=check, settings=("filters", "benchmarks"))
JUDGE = Stage("judge", rows=judge, prompts=("shared/judge",), asks=True)
SILENCE = Stage(
    "silence",
    rows=silence,
    prompts=("shared/answer",),
    settings=("filters", "silence_seconds"),
    asks=True,
    optional=True,
    several_models=True,
)
DIFFICULTY = Stage(
    "difficulty",
    rows=difficulty,
    prompts=("shared/answer",),
    settings=("filters", "samples_per_question"),
    asks=True,
    optional=True,
)
