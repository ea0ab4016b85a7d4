"""What padding costs in SFT: a row in ms-swift's own template and in ours, in the same run.

    python tests/benchmark/sft_cost.py [--family qwen2_5_omni] [--clips 1 3 8] [--repeats 9]

Each row has a source sound and some clips of it. For each number of clips there are two processes with the same tiny
random model, one an arm:

    stock   the template that ms-swift registers
    ours    the template of echo_plugins.for_swift

Both read the same files. After one warm-up they take turns, a step each. `step, s` is the batch and then the model, one
after the other; ms-swift's loader makes batches in processes of its own, beside the model.

The tiny model has the feature extractor of the public checkpoints (128 bands, 10 ms, a window of 300 s), so making a
batch costs here what it costs for a large model. Forward and backward are those of a tiny model, so the ratio of a step
is larger here than for a large model.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

# No framework is imported here: a process that is started counts its parent's memory as its own peak.

ARMS = ("stock", "ours")
TEMPLATES = {"qwen2_5_omni": "qwen2_5_omni", "qwen3_omni_moe": "qwen3_omni"}  # model_type -> ms-swift's name
TINY_OMNI = Path(__file__).resolve().parents[2] / "recipes" / "tiny-cpu" / "tiny_omni.py"
PUBLIC_EXTRACTOR = ("--mel-bins", "128", "--hop-length", "160", "--chunk-seconds", "300")
SAMPLING_RATE = 16_000
WARM_UPS = 1
MB = 1e6


@dataclass(frozen=True)
class Batch:
    """What an arm gives the model, and what the model answers. `frames`: (frames, bands), without the padding;
    `silent_logits`: with zeros in the place of all features."""

    input_ids: np.ndarray
    labels: np.ndarray
    frames: np.ndarray
    logits: np.ndarray
    silent_logits: np.ndarray
    feature_bytes: int


@dataclass(frozen=True)
class Difference:
    """Between the arms, on the same tokens. `logits`: the largest absolute difference; `heard`: how much the logits of
    stock change at most when the model hears nothing. `frames` of `all_frames` differ, by `features` at most."""

    logits: float
    heard: float
    features: float
    frames: int
    all_frames: int

    @classmethod
    def of(cls, stock: Batch, ours: Batch) -> Difference:
        """Exits if the arms do not have the same tokens, or if the model does not hear at all."""
        for name in ("input_ids", "labels"):
            if not np.array_equal(getattr(stock, name), getattr(ours, name)):
                raise SystemExit(f"sft_cost.py: the arms differ in {name}, so their costs cannot be compared")
        frames = np.abs(stock.frames - ours.frames).max(-1)
        logits, heard = (float(np.abs(stock.logits - other).max()) for other in (ours.logits, stock.silent_logits))
        if not heard:
            raise SystemExit("sft_cost.py: the logits do not depend on the sound, so their difference says nothing")
        return cls(logits, heard, float(frames.max()), int((frames > 0).sum()), len(frames))


@dataclass(frozen=True)
class Step:
    """`batch_seconds`: read, encode and collate the row. `model_seconds`: forward and backward."""

    batch_seconds: float
    model_seconds: float


@dataclass(frozen=True)
class Memory:
    """Of a process, in bytes: with the model loaded and nothing done yet, and at its peak."""

    loaded: int
    peak: int


@dataclass(frozen=True)
class Arm:
    """Medians over the repeats."""

    batch_seconds: float
    model_seconds: float
    step_seconds: float
    feature_bytes: int
    memory: Memory


def work(connection: Any, arm: str, family: str, model_dir: str, row: dict[str, Any]) -> None:
    """A process of one arm: answers "batch", "step" and "memory" until it hears anything else."""
    import librosa  # ms-swift reads sound with these two; here they count as part of what is loaded, in both arms
    import qwen_omni_utils
    import torch
    from swift.model import get_model_processor
    from swift.template import get_template
    from swift.template.templates.qwen import Qwen2_5OmniTemplate, Qwen3OmniTemplate

    librosa.load(row["audios"][0], sr=SAMPLING_RATE)
    assert qwen_omni_utils.fetch_image
    if arm == "ours":
        from echo_plugins.for_swift import template as ours

        ours.register()
    loaded: Any = get_model_processor(model_dir, torch_dtype=torch.float32, device_map="cpu")
    model, processor = loaded
    template: Any = get_template(processor, template_type=TEMPLATES[family])
    is_stock = type(template) in (Qwen2_5OmniTemplate, Qwen3OmniTemplate)
    assert is_stock == (arm == "stock"), f"{arm} has the template {type(template)}"
    template.set_mode("train")
    template.model = model
    template.register_post_encode_hook([model])  # as ms-swift's trainer does
    model.train()
    # As in stage 1: the text model learns, the towers do not.
    model.thinker.audio_tower.requires_grad_(False)
    model.thinker.visual.requires_grad_(False)

    def make_batch() -> Any:
        # ms-swift changes the row that it is given.
        return template.data_collator([template.encode({**row, "audios": list(row["audios"])})])

    def batch_and_logits() -> Batch:
        batch = make_batch()
        features = batch["input_features"]
        frames = features.permute(0, 2, 1)[batch["feature_attention_mask"].bool()]  # a copy
        with torch.no_grad():
            logits = model(**batch).logits
            features.zero_()  # in place: a second batch would count in the peak
            silent_logits = model(**batch).logits
        return Batch(
            batch["input_ids"].numpy(),
            batch["labels"].numpy(),
            frames.numpy(),
            logits.numpy(),
            silent_logits.numpy(),
            features.nbytes,
        )

    def step() -> Step:
        model.zero_grad(set_to_none=True)
        started = time.perf_counter()
        batch = make_batch()
        made = time.perf_counter()
        model(**batch).loss.backward()
        return Step(made - started, time.perf_counter() - made)

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def memory() -> Memory:
        return Memory(resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    answers = {"batch": batch_and_logits, "step": step, "memory": memory}
    connection.send("ready")
    while (question := connection.recv()) in answers:
        connection.send(answers[question]())


class ArmProcess:
    """The other end of `work`."""

    def __init__(self, name: str, *words: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, name, *words), daemon=True)
        self._process.start()
        theirs.close()
        self._name = name
        self._answer()

    def ask(self, question: str) -> Any:
        self._connection.send(question)
        return self._answer()

    def end(self) -> None:
        if self._process.is_alive():
            self._connection.send("end")
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise SystemExit(f"sft_cost.py: the process of '{self._name}' failed; its error is above") from None


@contextmanager
def both_arms(family: str, model_dir: str, row: dict[str, Any]) -> Iterator[dict[str, ArmProcess]]:
    processes: dict[str, ArmProcess] = {}
    try:
        for name in ARMS:
            processes[name] = ArmProcess(name, family, model_dir, row)
        yield processes
    finally:
        for process in processes.values():
            process.end()


def make_row(folder: Path, clips: int, clip_seconds: float, source_seconds: float) -> dict[str, Any]:
    """An interleaved row as converters.sft_jsonl writes it, but with each clip in its own file: ms-swift alone reads
    whole files only."""
    folder.mkdir()
    random = np.random.default_rng(clips)
    source = random.uniform(-0.5, 0.5, round(source_seconds * SAMPLING_RATE)).astype(np.float32)
    waveforms, think = [source], []
    for number in range(clips):
        start = round(number * (source_seconds - clip_seconds) / max(1, clips - 1), 2)
        begin = round(start * SAMPLING_RATE)
        waveforms.append(source[begin : begin + round(clip_seconds * SAMPLING_RATE)])
        think.append(f"in <seg>{start:.2f}, {start + clip_seconds:.2f}</seg><audio> there is a bell")
    paths = []
    for number, waveform in enumerate(waveforms):
        paths.append(str(folder / f"{number}.wav"))
        soundfile.write(paths[-1], waveform, SAMPLING_RATE, subtype="FLOAT")
    answer = f"<think>{', '.join(think)}.</think><answer>one</answer>"
    messages = [
        {"role": "user", "content": "<audio>How often is the bell heard?\n(A) one\n(B) two"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "audios": paths}


def measure(family: str, model_dir: str, row: dict[str, Any], repeats: int) -> tuple[dict[str, Arm], Difference]:
    """Both arms on one row, and how far what they compute differs."""
    with both_arms(family, model_dir, row) as processes:
        batches: dict[str, Batch] = {name: process.ask("batch") for name, process in processes.items()}
        difference = Difference.of(*(batches[name] for name in ARMS))
        steps: dict[str, list[Step]] = {name: [] for name in ARMS}
        for number in range(WARM_UPS + repeats):
            for name, process in processes.items():
                step = process.ask("step")
                if number >= WARM_UPS:
                    steps[name].append(step)
        memory = {name: process.ask("memory") for name, process in processes.items()}
    arms = {
        name: Arm(
            statistics.median(step.batch_seconds for step in steps[name]),
            statistics.median(step.model_seconds for step in steps[name]),
            statistics.median(step.batch_seconds + step.model_seconds for step in steps[name]),
            batches[name].feature_bytes,
            memory[name],
        )
        for name in ARMS
    }
    return arms, difference


COLUMNS = {
    **{"family": "---", "clips": "---:", "": "---", "batch, s": "---:", "forward and backward, s": "---:"},
    **{"step, s": "---:", "features, MB": "---:", "peak, MB": "---:", "above the loaded model, MB": "---:"},
    "logits differ by": "---:",
}
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'|'.join(COLUMNS.values())}|"


def lines(family: str, clips: int, arms: dict[str, Arm], difference: Difference) -> Iterator[str]:
    """Of the table: one an arm, and stock divided by ours."""
    columns = {
        name: (
            arm.batch_seconds,
            arm.model_seconds,
            arm.step_seconds,
            arm.feature_bytes / MB,
            arm.memory.peak / MB,
            (arm.memory.peak - arm.memory.loaded) / MB,
        )
        for name, arm in arms.items()
    }
    for name, values in columns.items():
        seconds, sizes = (f"{value:.3f}" for value in values[:3]), (f"{value:,.1f}" for value in values[3:])
        yield f"| {family} | {clips} | {name} | {' | '.join((*seconds, *sizes))} | |"
    pairs = zip(*(columns[name] for name in ARMS), strict=True)
    ratios = (f"{stock / ours if ours else math.inf:.1f}x" for stock, ours in pairs)
    yield f"| {family} | {clips} | **ratio** | {' | '.join(ratios)} | {difference.logits:.2g} |"


def make_model(family: str, folder: Path) -> str:
    output = folder / family
    command = [sys.executable, str(TINY_OMNI), "--output", str(output), "--family", family, *PUBLIC_EXTRACTOR]
    if family == "qwen2_5_omni":
        command += ["--audio-window-frames", "200"]  # as in the public checkpoint
    subprocess.run(command, check=True, stdout=sys.stderr)
    return str(output)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stock ms-swift against our template: seconds and memory of SFT.")
    parser.add_argument(
        "--family", choices=tuple(TEMPLATES), nargs="+", default=list(TEMPLATES), help="(default: both)"
    )
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 3, 8], help="of a row, a table line each (1 3 8)")
    parser.add_argument("--clip-seconds", type=float, default=3.0, help="(default %(default)s)")
    parser.add_argument("--source-seconds", type=float, default=10.0, help="of the row's own sound (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="steps of each arm after one warm-up (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.clips) < 0 or args.repeats < 1:
        parser.error("--clips takes 0 or more, --repeats 1 or more")
    if not 0 < args.clip_seconds <= args.source_seconds:
        parser.error("--clip-seconds must be more than 0 and no more than --source-seconds")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # For the processes that are started: one framework each, as quiet as it can be.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"LOG_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    print(HEADER, flush=True)
    notes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for family in args.family:
            model_dir = make_model(family, folder)
            for clips in args.clips:
                row = make_row(folder / f"{family}-{clips}", clips, args.clip_seconds, args.source_seconds)
                arms, difference = measure(family, model_dir, row, args.repeats)
                print(*lines(family, clips, arms, difference), sep="\n", flush=True)
                notes.append(
                    f"{family}, {clips} clips: {difference.frames} of {difference.all_frames} frames differ, "
                    f"by {difference.features:.2g} at most; logits by {difference.logits:.2g}. "
                    f"Without any sound the logits change by {difference.heard:.2g}."
                )
    print("", *notes, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
