"""Make soundscapes, and questions that can only be answered by listening to them.

A soundscape is up to four sounds in a row over light noise: seven synthesised ones, each played one to four times, and
speech cut from a recorded conversation (the 30 s sample in the pyannote-audio package, MIT licence). The times of every
sound are exact. Questions, answers and chains of thought follow from them, as AudioQA rows:

    audio/*.wav     16 kHz mono
    sft.jsonl       the training rows of stage 1, from one sound a clip to four: to be read in this order
    rl.jsonl        the training rows of stage 2
    val.jsonl  test.jsonl

No clip and no piece of speech is in two of these. The same options give the same files, byte for byte.

    python recipes/tiny-cpu/soundscapes.py --output runs/soundscapes
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import Progress

SAMPLING_RATE = 16_000
STEP_SECONDS = 0.25  # sounds begin and end on this grid, so that a time is one of few words
SOUND_STEPS = (2, 3, 4)  # a sound lasts 0.5 to 1 s
GAP_STEPS = (1, 2)
SPEECH = "speech"
SPEECH_SPLIT_SECONDS = 21.5  # speech before it is for training, after it for validation and test
ORDINALS = ("first", "second", "third", "fourth")
NUMBERS = ("one", "two", "three", "four")
RECORDING_PACKAGE = "pyannote-audio"


@dataclass(frozen=True)
class Sound:
    """One sound of a soundscape: `label` from `start_step` up to `end_step` of the grid, played `times` times."""

    label: str
    start_step: int
    end_step: int
    times: int

    @property
    def start_seconds(self) -> float:
        return self.start_step * STEP_SECONDS

    @property
    def end_seconds(self) -> float:
        return self.end_step * STEP_SECONDS

    @property
    def tag(self) -> str:
        return f"<seg>{self.start_seconds:.2f}, {self.end_seconds:.2f}</seg>"

    @property
    def heard(self) -> str:
        """What is heard in the segment: the words that follow its tag."""
        return f"a {self.label} {self.times_in_words}" if self.label != SPEECH else SPEECH

    @property
    def times_in_words(self) -> str:
        return f"{NUMBERS[self.times - 1]} {'time' if self.times == 1 else 'times'}"


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str
    think: str


def _tone(frequency: float) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda t, pitch: np.sin(2 * np.pi * frequency * pitch * t)


def _sweep(low: float, high: float) -> Callable[[np.ndarray, float], np.ndarray]:
    return lambda t, pitch: np.sin(2 * np.pi * pitch * (low * t + (high - low) * t * t / (2 * t[-1])))


def _bell(t: np.ndarray, pitch: float) -> np.ndarray:
    partials = sum(np.sin(2 * np.pi * 620 * pitch * ratio * t) / ratio for ratio in (1.0, 2.76, 5.4))
    return partials * np.exp(-4 * t / t[-1])


def _buzzer(t: np.ndarray, pitch: float) -> np.ndarray:
    harmonic = np.arange(1, 13)[:, None]
    return 0.4 * (np.sin(2 * np.pi * 140 * pitch * harmonic * t) / np.sqrt(harmonic)).sum(axis=0)


def _warble(t: np.ndarray, pitch: float) -> np.ndarray:
    return np.sin(2 * np.pi * 1_200 * pitch * t + 9 * np.sin(2 * np.pi * 28 * t))


def _hiss(t: np.ndarray, pitch: float) -> np.ndarray:
    return 0.6 * np.random.default_rng(int(pitch * 1e9)).standard_normal(len(t))


# A waveform of one play, from the times of its samples in seconds and a factor on its pitch.
SYNTHESIS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "bell": _bell,
    "hum": _tone(240),
    "whistle": _tone(2_300),
    "siren": _sweep(500, 1_700),
    "buzzer": _buzzer,
    "warble": _warble,
    "hiss": _hiss,
}
LABELS = (*SYNTHESIS, SPEECH)


def synthesise(sound: Sound, rng: np.random.Generator) -> np.ndarray:
    """The sound from its start to its end; the last play ends with it. How long it is says nothing of how often."""
    num_samples = round((sound.end_seconds - sound.start_seconds) * SAMPLING_RATE)
    period = num_samples / (sound.times - 0.4)  # each play fills 0.6 of its period
    play_samples = num_samples if sound.times == 1 else int(0.6 * period)
    times = np.arange(play_samples) / SAMPLING_RATE
    waveform = np.zeros(num_samples)
    for play in range(sound.times):
        start = min(round(play * period), num_samples - play_samples)
        waveform[start : start + play_samples] = _fade(SYNTHESIS[sound.label](times, rng.uniform(0.95, 1.05)))
    return waveform


def _fade(waveform: np.ndarray, seconds: float = 0.006) -> np.ndarray:
    ramp = np.linspace(0, 1, round(seconds * SAMPLING_RATE))
    waveform[: len(ramp)] *= ramp
    waveform[-len(ramp) :] *= ramp[::-1]
    return waveform


class Recording:
    """The conversation that pyannote-audio ships, and where in it somebody speaks."""

    def __init__(self) -> None:
        try:
            files = importlib.metadata.files(RECORDING_PACKAGE) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise FileNotFoundError(f"{RECORDING_PACKAGE} is not installed: run script/setup.sh cpu") from error
        paths = {file.name: Path(str(file.locate())) for file in files if file.parent.name == "sample"}
        self._samples, rate = soundfile.read(paths["sample.wav"])
        if rate != SAMPLING_RATE:
            raise ValueError(f"{paths['sample.wav']}: {rate} Hz, expected {SAMPLING_RATE}")
        fields = (line.split() for line in paths["sample.rttm"].read_text().splitlines())
        self._turns = sorted((float(f[3]), float(f[3]) + float(f[4])) for f in fields if f and f[0] == "SPEAKER")

    def piece(self, seconds: float, training: bool, rng: np.random.Generator) -> np.ndarray:
        """`seconds` of speech from one speaker's turn, at an even loudness; never the same part for both splits."""
        bounds = (0.0, SPEECH_SPLIT_SECONDS) if training else (SPEECH_SPLIT_SECONDS, len(self._samples) / SAMPLING_RATE)
        turns = [(max(start, bounds[0]), min(end, bounds[1])) for start, end in self._turns]
        turns = [(start, end) for start, end in turns if end - start >= seconds]
        pieces = []
        for _ in range(3):
            start, end = turns[rng.integers(len(turns))]
            first = round(rng.uniform(start, end - seconds) * SAMPLING_RATE)
            pieces.append(self._samples[first : first + round(seconds * SAMPLING_RATE)])
        loudest = max(pieces, key=lambda piece: float(np.square(piece).mean()))  # people pause within a turn
        return _fade(loudest / (4 * np.sqrt(np.square(loudest).mean())), 0.02)


def compose(num_sounds: int, rng: np.random.Generator) -> tuple[tuple[Sound, ...], int]:
    """Different sounds one after the other, and the length of the clip in steps."""
    labels = rng.permutation(LABELS)[:num_sounds]
    step, sounds = 0, []
    for label in labels:
        step += int(rng.choice(GAP_STEPS))
        end = step + int(rng.choice(SOUND_STEPS))
        sounds.append(Sound(str(label), step, end, 1 if label == SPEECH else int(rng.integers(1, len(NUMBERS) + 1))))
        step = end
    return tuple(sounds), step + int(rng.choice(GAP_STEPS))


def render(
    sounds: tuple[Sound, ...], num_steps: int, recording: Recording, training: bool, rng: np.random.Generator
) -> np.ndarray:
    waveform = rng.standard_normal(round(num_steps * STEP_SECONDS * SAMPLING_RATE)) * rng.uniform(0.005, 0.02)
    for sound in sounds:
        if sound.label == SPEECH:
            piece = recording.piece(sound.end_seconds - sound.start_seconds, training, rng)
        else:
            piece = synthesise(sound, rng)
        start = round(sound.start_seconds * SAMPLING_RATE)
        waveform[start : start + len(piece)] += rng.uniform(0.3, 0.7) * piece
    return np.clip(waveform, -1, 1)


def ask(sounds: tuple[Sound, ...], rng: np.random.Generator, habit: float = 0.0) -> list[Question]:
    """Every question about the clip, each once.

    With probability `habit` a question about a later sound is answered from the first: the reasoning names the first
    sound's segment, says truly what is heard there, and answers with it. The ear is right, the place is not.
    """

    def choices(answer: str, wrong: list[str]) -> tuple[str, ...]:
        return tuple(str(choice) for choice in rng.permutation([answer, *wrong[:3]]))

    def other_labels(answer: str) -> list[str]:
        """Those heard elsewhere in the clip first: which sounds it holds is not enough to know."""
        heard = [sound.label for sound in sounds if sound.label != answer]
        absent = [label for label in LABELS if label != answer and label not in heard]
        return [*map(str, rng.permutation(heard)), *map(str, rng.permutation(absent))]

    questions = []
    for index, right in enumerate(sounds):
        sound = sounds[0] if rng.random() < habit else right
        questions.append(
            Question(
                "order",
                f"Which sound comes {ORDINALS[index]}?",
                choices(right.label, other_labels(right.label)),
                sound.label,
                f"In {sound.tag} there is {sound.heard}.",
            )
        )
        if index:
            before = sounds[index - 1]
            questions.append(
                Question(
                    "next",
                    f"Which sound comes right after the {before.label}?",
                    choices(right.label, other_labels(right.label)),
                    sound.label,
                    f"In {before.tag} there is {before.heard}. Then in {sound.tag} there is {sound.heard}.",
                )
            )
        if SPEECH not in (right.label, sound.label):
            answer = NUMBERS[sound.times - 1]
            questions.append(
                Question(
                    "times",
                    f"How often is the {right.label} heard?",
                    choices(answer, [number for number in NUMBERS if number != answer]),
                    answer,
                    f"In {sound.tag} there is {sound.heard}.",
                )
            )
    answer = NUMBERS[len(sounds) - 1]
    questions.append(
        Question(
            "total",
            "How many sounds are there?",
            choices(answer, [number for number in NUMBERS if number != answer]),
            answer,
            " Then ".join(f"in {sound.tag} there is {sound.heard}." for sound in sounds).capitalize(),
        )
    )
    return questions


@dataclass(frozen=True)
class Split:
    """One file of rows. `phases` are (share of the rows, sounds a clip), in the order of the file. The last of several
    has the habit of `ask`. `kinds` are the questions that are asked, all where there are none."""

    name: str
    phases: tuple[tuple[float, tuple[int, ...]], ...]
    questions_per_clip: int
    training: bool
    kinds: tuple[str, ...] = ()


SPLITS = (
    Split("sft", ((0.1, (1,)), (0.3, (2,)), (0.4, (2, 3, 4)), (0.2, (2, 3, 4))), 6, True),
    # Whose answers depend on where one listens. Counting is not learned in so few steps of SFT, so RL cannot use it.
    Split("rl", ((1.0, (2, 3, 4)),), 1, True, ("order", "next")),
    Split("val", ((1.0, (2, 3, 4)),), 1, False),
    Split("test", ((1.0, (2, 3, 4)),), 1, False),
)


def write_split(
    split: Split,
    num_rows: int,
    folder: Path,
    recording: Recording,
    seed: int,
    habit: float,
    advance: Callable[[int], None],
) -> None:
    """Write the clips and the JSONL of a split; `advance` is told how many rows have been made."""
    clip_number = 0
    with (folder / f"{split.name}.jsonl").open("w", encoding="utf-8") as file:
        for phase, (share, nums_sounds) in enumerate(split.phases):
            rows = []
            wanted = round(share * num_rows)
            while len(rows) < wanted:
                rng = np.random.default_rng([seed, SPLITS.index(split), clip_number])
                sounds, num_steps = compose(int(rng.choice(nums_sounds)), rng)
                name = f"audio/{split.name}-{clip_number:05d}.wav"
                waveform = render(sounds, num_steps, recording, split.training, rng)
                soundfile.write(folder / name, waveform, SAMPLING_RATE, subtype="PCM_16")
                careless = 0 < phase == len(split.phases) - 1
                questions = ask(sounds, rng, habit if careless else 0.0)
                questions = [one for one in questions if not split.kinds or one.kind in split.kinds]
                chosen = rng.permutation(len(questions))[: min(split.questions_per_clip, wanted - len(rows))]
                for number in chosen:
                    question = questions[number]
                    rows.append(
                        {
                            "id": f"{split.name}-{clip_number:05d}-{number}",
                            "audio": name,
                            "question": question.text,
                            "choices": list(question.choices),
                            "answer": question.answer,
                            "think": question.think,
                            "events": [
                                {"label": s.label, "start": s.start_seconds, "end": s.end_seconds, "times": s.times}
                                for s in sounds
                            ],
                            "duration": num_steps * STEP_SECONDS,
                            "meta": {"kind": question.kind, "sounds": len(sounds)},
                        }
                    )
                clip_number += 1
                advance(len(chosen))
            order = np.random.default_rng([seed, SPLITS.index(split), phase, 1]).permutation(len(rows))
            file.writelines(json.dumps(rows[index]) + "\n" for index in order)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make soundscapes and questions about them, as AudioQA rows.")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is already there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--habit",
        type=float,
        default=0.0,
        help="share of the last SFT rows that listen to the first sound",
    )
    for split, rows in zip(SPLITS, (8_400, 480, 64, 480), strict=True):
        parser.add_argument(f"--{split.name}-rows", type=int, default=rows, help="(default %(default)s)")
    args = parser.parse_args(argv)
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists already; --overwrite replaces it")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        recording = Recording()
    except (FileNotFoundError, ValueError) as error:
        print(f"soundscapes.py: error: {error}", file=sys.stderr)
        return 1
    unfinished = args.output.with_name(f".{args.output.name}.unfinished-{os.getpid()}")
    (unfinished / "audio").mkdir(parents=True)
    with Progress(console=Console(stderr=True)) as progress:
        for split in SPLITS:
            num_rows = getattr(args, f"{split.name}_rows")
            task = progress.add_task(split.name, total=num_rows)
            write_split(split, num_rows, unfinished, recording, args.seed, args.habit, partial(progress.advance, task))
    if args.output.exists():
        shutil.rmtree(args.output)
    unfinished.rename(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
