"""What the terminal shows of a stage that writes everything to a log, and why a stage failed.

    python script/watch.py follow STAGE --log LOG --offset BYTES --output DIR --parent PID   beside it, until SIGTERM
    python script/watch.py cause --log LOG --offset BYTES --output DIR                       after it failed

`follow` shows one live line (a plain line a minute where there is no terminal) and passes on the lines of the log that
are ours. The rule: a line is ours if its text begins with "== ". `note` of common.sh and our Python code write such
lines, for results and warnings that the user has to see. Before the comparison, colours, Ray's "(Name pid=1) ", the
head of a logging record ("WARNING:2026-01-31 12:00:00,000:") and all up to a carriage return are taken off.

`cause` prints a few lines: what went wrong, the line of the log that says so, the cure where it is known, and the log.

Both read the log from BYTES on, where this start of the stage began: an earlier one may have failed for other reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 1.0
PLAIN_SECONDS = 60.0  # between lines where there is no terminal; a shorter stage prints none
ALIKE = 3  # lines that differ in their numbers only; a failing term may say the same of each row
READ_BYTES = 1 << 20
LINE_BYTES = 1 << 16  # a longer unfinished line keeps its end only
CAUSE_BYTES = 4 << 20  # of the end of the log, in which a cause is looked for
LOW_BYTES = 200e6  # less free space than this is worth a word
CUT = 300  # characters of a line of the log

OURS = "== "
LEVEL = "(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)"
COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
# Ray's "(WorkerDict pid=1, ip=1.2.3.4) ", "(pid=1) " and "(raylet) "; vLLM's "(EngineCore pid=1) "; torch's "[rank0]: "
PROCESS = re.compile(r"\((?:(?:[^()\s]+ )?pid=\d+|raylet)(?:, ip=[^)]+)?\) ?|\[rank\d+\]:(?: |(?=[WEI]\d{4}))")
# verl's head of a record, vLLM's, and that of Python's own basicConfig.
RECORD = re.compile(
    rf"{LEVEL}:\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d+:"
    rf"|{LEVEL} \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*:\d+\] ?"
    rf"|{LEVEL}:[\w.]+:(?=\S)"
)
REPEATED = re.compile(r" \[repeated \d+x across cluster\].*$")
BAR = re.compile(r"Train(?:ing Progress)?:\s+\d+%\|[^|]*\|\s*(\d+)/(\d+) \[")


def split_line(line: str) -> tuple[str, str]:
    """The processes that `line` says it comes from, and its text; blanks at the start of the text are kept."""
    line = REPEATED.sub("", COLOURS.sub("", line)).rstrip()
    start = 0
    while found := PROCESS.match(line, start):
        start = found.end()
    head = RECORD.match(line, start)
    return line[:start].strip(), line[head.end() if head else start :]


def spoken(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


class GrowingFile:
    """The lines that were added to a file since the last look. A file that was replaced is read from its start."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path, self.offset = path, offset
        self.identity = self._identity()
        self.rest = b""

    def _identity(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    def lines(self, last: bool = False) -> Iterator[str]:
        """`last`: the unfinished line too."""
        identity = self._identity()
        if identity is not None:
            if self.identity not in (None, identity):
                self.offset, self.rest = 0, b""
            self.identity = identity
            with self.path.open("rb") as file:
                file.seek(self.offset)
                while block := file.read(READ_BYTES):
                    self.offset += len(block)
                    *whole, rest = re.split(rb"[\r\n]", self.rest + block)
                    self.rest = rest[-LINE_BYTES:]
                    yield from (line.decode(errors="replace") for line in whole if line)
        if last and self.rest:
            yield self.rest.decode(errors="replace")
            self.rest = b""


class Pace:
    """Seconds left, from the steps since the first one that was seen."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def note(self, now: float, done: int) -> None:
        if not self.marks or done < self.marks[0][1]:
            self.marks = [(now, done)]
        elif done > self.marks[-1][1]:
            self.marks = [self.marks[0], (now, done)]

    def left(self, now: float, total: int) -> float | None:
        if len(self.marks) < 2:
            return None
        (began, first), (then, done) = self.marks
        return (then - began) / (done - first) * (total - done) - (now - then)


class Stage:
    """What a stage is doing: its seconds only, unless a subclass knows more."""

    opening = ""
    phases: tuple[tuple[str, str], ...] = ()  # (a text of the log, what goes on from there)

    def __init__(self, output: Path) -> None:
        self.output = output
        self.doing = self.opening
        self.done: int | None = None
        self.total: int | None = None
        self.measure = ""
        self.pace = Pace()

    def read_line(self, text: str, now: float) -> None:
        if bar := BAR.search(text):
            self.reached(int(bar[1]), int(bar[2]), now)
        for sign, doing in self.phases:
            if sign in text:
                self.doing = doing

    def read_output(self, now: float) -> None:
        """Look at the files that the stage writes."""

    def reached(self, done: int, total: int | None, now: float) -> None:
        self.done = max(done, self.done or 0)
        self.total = total or self.total
        self.pace.note(now, self.done)

    def moved(self) -> str:
        """What changes when something has moved, and not by the clock alone."""
        if self.done is None:
            return self.doing
        steps = f"step {self.done}" + (f" of {self.total}" if self.total else "")
        return ", ".join(filter(None, (steps, self.measure)))

    def text(self, now: float) -> str:
        unfinished = self.done is not None and self.total is not None and self.done < self.total
        left = self.pace.left(now, self.total or 0) if unfinished else None
        return ", ".join(filter(None, (self.moved(), "" if left is None else f"{spoken(left)} left")))


class StepsInFile(Stage):
    """A stage whose framework appends a JSON object a step to a file of its output."""

    file_name = ""

    def __init__(self, output: Path) -> None:
        super().__init__(output)
        path = output / self.file_name
        self.file = GrowingFile(path, path.stat().st_size if path.exists() else 0)  # not what an earlier start wrote

    def read_output(self, now: float) -> None:
        for line in self.file.lines():
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                self.read_row(json.loads(line), now)

    def read_row(self, row: dict, now: float) -> None:
        raise NotImplementedError


class Sft(StepsInFile):
    file_name = "logging.jsonl"
    opening = "looking at the rows"
    loss = held = ""
    phases = (("[INFO:swift] args:", "loading the model"), ("swift.__version__", "reading the rows"))

    def read_row(self, row: dict, now: float) -> None:
        done, _, total = row["global_step/max_steps"].partition("/")
        self.reached(int(done), int(total), now)
        if "loss" in row:
            self.loss = f"loss {row['loss']:.3f}"
        if "eval_loss" in row:
            self.held = f"on held rows {row['eval_loss']:.3f}"
        self.measure = ", ".join(filter(None, (self.loss, self.held)))


class Rl(StepsInFile):
    file_name = "metrics.jsonl"
    opening = "starting Ray"
    phases = (
        ("Started a local Ray instance", "starting the workers"),
        ("create worker group", "loading the model"),
        ("reward loop manager initialized", "starting the engines"),
        ("ready to fit", "first rollouts"),
    )

    def read_line(self, text: str, now: float) -> None:
        super().read_line(text, now)
        if total := re.search(r"Total training steps: (\d+)", text):
            self.total = int(total[1])

    def read_row(self, row: dict, now: float) -> None:
        reward = row["data"].get("critic/score/mean")
        if reward is not None:  # a validation has a row too
            self.measure = f"reward {reward:.3f}"
            self.reached(int(row["step"]), None, now)


class Infer(Stage):
    opening = "looking at the questions"
    planned = re.compile(r", (\w+): (\d+) rows, of which (\d+) are done")  # eval/infer.py says so for each mode
    mode = ""

    def read_line(self, text: str, now: float) -> None:
        if plan := self.planned.search(text):
            self.mode, self.total, self.done = plan[1], int(plan[2]), int(plan[3])
            self.pace = Pace()
            self.counts: dict[Path, int] = {}
            self.files: dict[Path, GrowingFile] = {}
            self.doing = "starting the engines"
        elif re.match(r"engine \d+ is ready", text):
            self.doing = "answering"
            self.pace.note(now, self.done or 0)

    def read_output(self, now: float) -> None:
        files = [path for path in self.output.glob(f"*/{self.mode}*.jsonl") if "verdicts" not in path.name]
        if not self.mode or not files:
            return
        folder = max(files, key=lambda path: path.stat().st_mtime).parent
        for path in files:
            if path.parent == folder:
                file = self.files.setdefault(path, GrowingFile(path, 0))
                self.counts[path] = self.counts.get(path, 0) + sum(1 for _ in file.lines())
        self.done = min(sum(self.counts.values()), self.total or 0)
        if self.doing == "answering":
            self.pace.note(now, self.done)

    def moved(self) -> str:
        if not self.mode:
            return self.doing
        if self.doing != "answering":
            return f"{self.mode}: {self.doing}"
        return f"{self.mode}: {self.done} of {self.total} rows"


STAGES = {"sft": Sft, "rl": Rl, "gate": Infer, "infer": Infer}


class Watch:
    """One stage, its log and the terminal. `poll` looks once at everything."""

    def __init__(self, name: str, log: Path, offset: int, output: Path, console: Console, now: float) -> None:
        self.name, self.log, self.console = name, GrowingFile(log, offset), console
        self.stage = STAGES.get(name, Stage)(output)
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self.began = self.said_at = now
        self.said = ""
        self.passed: dict[str, set[str]] = {}

    def poll(self, now: float, last: bool = False) -> None:
        for line in self.log.lines(last):
            text = split_line(line)[1]
            if text.startswith(OURS):
                self.pass_on(text)
            else:
                self.stage.read_line(text, now)
        self.stage.read_output(now)
        if self.live is not None and not last:
            self.live.update(self.line(now), refresh=True)
        elif self.live is None and not last and now - self.said_at >= PLAIN_SECONDS and self.stage.moved() != self.said:
            self.said_at, self.said = now, self.stage.moved()
            self.console.print(self.line(now), soft_wrap=True)

    def line(self, now: float) -> Text:
        head = f"{self.name}, {spoken(now - self.began)}"
        text = self.stage.text(now)
        return Text(f"   {head}: {text}" if text else f"   {head}", no_wrap=True, overflow="ellipsis")

    def pass_on(self, text: str) -> None:
        alike = self.passed.setdefault(re.sub(r"\d+", "0", text), set())
        if text in alike or len(alike) >= ALIKE:
            return
        alike.add(text)
        more = " (more like it are in the log only)" if len(alike) == ALIKE else ""
        self.console.print(Text(text + more), soft_wrap=True)


def follow(name: str, log: Path, offset: int, output: Path, parent: int) -> None:
    """Until SIGTERM, or until the shell that started this process is gone; it may be gone already."""
    stop = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # sigtimedwait takes them, so none can cut a line in half
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    console = Console(stderr=True, highlight=False)
    watch = Watch(name, log, offset, output, console, time.monotonic())
    with watch.live or contextlib.nullcontext():
        while os.getppid() == parent:
            watch.poll(time.monotonic())
            if signal.sigtimedwait(stop, POLL_SECONDS):
                watch.poll(time.monotonic(), last=True)
                return


@dataclass(frozen=True)
class Known:
    """A cause that logs name in known words, and what can be done about it."""

    pattern: str
    what: str
    cure: str
    cures: tuple[tuple[str, str], ...] = ()  # (stage, its own cure)


KNOWN = (
    Known(
        r"No space left on device|\[Errno 28\]|ENOSPC|os error 28|Disk quota exceeded|\[Errno 122\]"
        r"|PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+",
        "the disk is full, or its quota is used up",
        "Make room, then give the same command again: the stage goes on from its last whole checkpoint.",
        (("sft", "SFT_SAVE_LIMIT keeps fewer checkpoints."), ("rl", "RL_KEEP_CHECKPOINTS keeps fewer checkpoints.")),
    ),
    Known(
        r"insufficient shared memory|out of shared memory|\bBus error\b|SIGBUS",
        "the shared memory, /dev/shm, is too small",
        "Give the container more: --shm-size=16g, or --ipc=host.",
        (("sft", "Or read rows without processes: SFT_WORKERS=0."),),
    ),
    Known(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "the engine found less free GPU memory than it was told to take",
        "See with nvidia-smi who else uses the GPU.",
        (("rl", "Or lower RL_GPU_MEMORY."),),
    ),
    Known(
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "the engine's share of the GPU is too small for its cache",
        "Use a GPU with more memory, or more of them.",
        (
            ("rl", "Raise RL_GPU_MEMORY, or lower RL_MAX_PROMPT and RL_MAX_RESPONSE. RL_TP=2 spreads an engine."),
            ("infer", "EVAL_TP=2 spreads an engine over two GPUs."),
        ),
    ),
    Known(
        r"CUDA out of memory|CUDA error: out of memory|CUDA driver error: out of memory|Cuda failure 'out of memory'"
        r"|Cuda failure 2 'out of memory'|CUBLAS_STATUS_ALLOC_FAILED|OutOfMemoryError: (?:CUDA|HIP)",
        "the GPU's memory is too small for these settings",
        "Use a GPU with more memory, or see with nvidia-smi who else uses this one.",
        (
            ("sft", "Lower SFT_MICRO_BATCH, then SFT_MAX_LENGTH; SFT_DEEPSPEED=zero2 spreads the optimizer over GPUs."),
            ("rl", "Lower RL_GPU_MEMORY, then RL_TOKENS_PER_GPU; RL_OFFLOAD=True moves the optimizer to host memory."),
            ("infer", "EVAL_TP=2 spreads an engine over two GPUs."),
        ),
    ),
    Known(
        r"due to the node running low on memory|killed due to memory pressure|ray\.exceptions\.OutOfMemoryError"
        r"|line \d+: +\d+ Killed\b|died with <Signals\.SIGKILL|exitcode\s*: -9\b|exitcode=-9\b|Signal 9 \(SIGKILL\)"
        r"|DataLoader worker \(pid[^)]*\) is killed by signal: Killed|Cannot allocate memory"
        r"|DefaultCPUAllocator: can't allocate",
        "the machine's memory ran out, and a process was killed for it (or somebody ended it with kill -9)",
        "See with free -g and dmesg | tail; run less beside it.",
        (
            ("sft", "Lower SFT_MICRO_BATCH or SFT_WORKERS."),
            ("rl", "Lower RL_AGENT_WORKERS, RL_REWARD_WORKERS and RL_WORKERS; RL_OFFLOAD=False needs less of it."),
        ),
    ),
    Known(
        r"[Aa]ddress already in use|EADDRINUSE|\[Errno 98\]",
        "a network port is in use: another run has it, or one that is left over",
        "End that run (ss -ltnp names it), then give the same command again.",
        (("sft", "Or take another port: MASTER_PORT=29501."),),
    ),
)
WORKER_DIED = Known(
    r"worker process has died|[Ww]orker unexpectedly exits|The actor died unexpectedly",
    "a Ray worker ended without a Python error: it was killed, mostly for memory, or it crashed",
    "See with dmesg | tail whether the kernel killed it; then give the same command again.",
    (("rl", "If it was for memory, lower RL_AGENT_WORKERS, RL_REWARD_WORKERS or RL_WORKERS."),),
)
NCCL_TIMEOUT = Known(
    r"Watchdog caught collective operation timeout|Timed out waiting \d+ms for (?:recv|send) operation",
    "the GPUs waited in vain for one of them, which stopped or hangs",
    "Look in the log for the rank that said something else; NCCL_DEBUG=INFO tells more.",
)

# Exceptions that only report another one, which the log has too.
WRAPPER = re.compile(
    r"RayTaskError|ChildFailedError|ProcessRaisedException|CalledProcessError|EngineDeadError|SystemExit"
    r"|Engine core initialization failed|Engine process failed to start|error raised in its creation task"
    r"|WorkerProc initialization failed|CancelledError|remote process exited|Connection (?:reset|closed) by peer"
)
EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*(?=\w*[a-z])_?[A-Z]\w*(?:\([\w.]+\))?(?::\s.*|:?$)")
GOES_ON = re.compile(r":$|validation errors? for|^hydra\.|NCCL error in")  # the next lines say what is wrong
LOOSE_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): \S")
FRAME = re.compile(r'File "([^"]+)", line (\d+)|│ (/\S+\.py):(\d+) in ')
FRAME_TITLE = re.compile(r"[╭┌]─+ (.*?) ─+[╮┐]$")
OWN_ERROR = re.compile(r"(?:[\w./-]+(?: -m)?(?: [\w.]+)?: )?error: \S|\S+\.sh: line \d+: (?! *\d+ )\S")
SHELL_SAYS = re.compile(r"\S+\.sh: ")
TRACEBACK = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Raised:
    number: int  # of the line
    process: str
    text: str
    place: str  # file:line of the deepest frame that is ours, or ""

    @property
    def wrapper(self) -> bool:
        return bool(WRAPPER.search(self.text))


def raised(lines: list[tuple[str, str]]) -> list[Raised]:
    """Every exception that a traceback ends with, in the order of the log; Ray adds the inner ones after the outer."""
    by_process: dict[str, list[int]] = {}
    for number, (process, _) in enumerate(lines):
        by_process.setdefault(process, []).append(number)
    found: list[Raised] = []
    for process, numbers in by_process.items():
        inside = seen = False
        place, before = "", ""
        for position, number in enumerate(numbers):
            text = lines[number][1]
            if TRACEBACK in text:
                inside, seen, place = not before.startswith("Exception ignored in"), False, ""
            elif inside and (frame := FRAME.search(text)):
                place = place_of_ours(frame[1] or frame[3], frame[2] or frame[4]) or place
            elif not inside or not text or text[0] in " \t│╭╰┌└" or text.startswith("ray::"):
                pass
            elif EXCEPTION.match(text):
                rest = [lines[later][1].strip() for later in numbers[position + 1 : position + 3]]
                more = f" {' '.join(rest)}" if GOES_ON.search(text) else ""
                found.append(Raised(number, process, text + more, place))
                seen, place = True, ""
            elif seen:
                inside = text.startswith(("The above exception", "During handling"))
            before = text
    return sorted(found, key=lambda each: each.number)


def place_of_ours(path: str, line: str) -> str:
    """`path` as the user knows it, or "" for a file of Python or of a package."""
    if re.search(r"/(?:site|dist)-packages/|/lib/python3|^<", path):
        return ""
    return f"{os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else path}:{line}"


def boxed_errors(lines: list[tuple[str, str]]) -> list[tuple[int, str]]:
    """The texts in boxes titled Error, in which Typer says what is wrong with a command line."""
    found: list[tuple[int, str]] = []
    words: list[str] | None = None
    for number, (_, text) in enumerate(lines):
        if title := FRAME_TITLE.match(text):
            words = [] if title[1] == "Error" else None
        elif words is not None and text.startswith("│"):
            words.append(text.strip("│ "))
        elif words:
            found.append((number, f"error: {' '.join(words)}"))
            words = None
    return found


def cause(log: Path, offset: int, output: Path, stage: str) -> list[str]:
    """Lines to print: what went wrong, the evidence, the cure."""
    lines = [split_line(line) for line in end_of(log, offset)]
    texts = [text for _, text in lines]
    errors = raised(lines)
    advice: list[str] = []
    if hit := known(texts[last_advance(texts) :], KNOWN):
        advice = explained(*hit, stage)
    elif own := own_errors(lines, errors):
        advice = own
    elif origin := original(errors):
        advice = [cut(origin.text), *([f"in {origin.place}"] if origin.place else [])]
        if (hit := known(texts, (NCCL_TIMEOUT,))) and "NCCL" in origin.text:
            advice = explained(*hit, stage)
    elif hit := known(texts, (WORKER_DIED, NCCL_TIMEOUT)):
        advice = explained(*hit, stage)
    elif loose := [text for text in texts if LOOSE_EXCEPTION.match(text)]:
        advice = [cut(loose[-1])]
    elif errors:
        advice = [cut(errors[-1].text)]
    else:
        last = [text for text in texts if text.strip() and not text.endswith("\\") and not text.startswith("  --")]
        advice = ["it gave no reason that is known here. Its last lines:", *map(cut, last[-5:])]
    if "disk" not in advice[0] and (free := free_bytes(output)) is not None and free < LOW_BYTES:
        advice.append(f"Only {free / 1e6:.0f} MB are free for {output}: that may be the cause.")
    return [f"{stage}: error: {advice[0]}", *(f"  {line}" for line in advice[1:]), f"  All of its output: {log}"]


def end_of(log: Path, offset: int) -> list[str]:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(min(offset, size), size - CAUSE_BYTES))
        return re.split(r"[\r\n]+", file.read().decode(errors="replace"))


def last_advance(texts: list[str]) -> int:
    """Where the last step was done: what was overcome before is no cause."""
    where = best = -1
    for number, text in enumerate(texts):
        if (bar := BAR.search(text)) and int(bar[1]) > best:
            where, best = number, int(bar[1])
    return max(0, where)


def known(texts: list[str], causes: tuple[Known, ...]) -> tuple[Known, str] | None:
    """The first of `causes` that the log names, and the last line that does."""
    for each in causes:
        pattern = re.compile(each.pattern)
        if found := next((text for text in reversed(texts) if pattern.search(text)), None):
            return each, found
    return None


def explained(each: Known, evidence: str, stage: str) -> list[str]:
    own = [cure for name, cure in each.cures if name == stage]
    return [f"{each.what}.", cut(evidence), " ".join([each.cure, *own] if "disk" in each.what else [*own, each.cure])]


def own_errors(lines: list[tuple[str, str]], errors: list[Raised]) -> list[str]:
    """Our own last words, if no exception came first and they do not point at other messages."""
    plain = [(number, text) for number, (_, text) in enumerate(lines) if OWN_ERROR.match(text)]
    found = sorted(plain + boxed_errors(lines))
    if not found:
        return []
    last, text = found[-1]
    of_shell = SHELL_SAYS.match(text)
    before = [other for number, other in found[:-1] if last - number <= 30 and not SHELL_SAYS.match(other)]
    if of_shell and before:
        return [cut(before[-1]), cut(text)]
    if (of_shell and original(errors)) or re.search(r"messages? above", text):
        return []
    return [cut(text)]


def original(errors: list[Raised]) -> Raised | None:
    """The last exception of the main process that is not a wrapper; else of any process."""
    candidates = [each for each in errors if not each.wrapper]
    main = [each for each in candidates if not each.process]
    return next(reversed(main or candidates), None)


def free_bytes(path: Path) -> int | None:
    try:
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free
    except (OSError, StopIteration):
        return None


def cut(text: str) -> str:
    text = re.sub(r"^(?:[\w./-]+(?: -m [\w.]+)?: )?error: ", "", text.strip())
    return text if len(text) <= CUT else f"{text[:CUT]} ..."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="watch.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    following = commands.add_parser("follow", help="show what the stage is doing, until SIGTERM")
    following.add_argument("stage")
    following.add_argument("--parent", type=int, help="process id of the shell; without it, the parent's at the start")
    for command in (following, commands.add_parser("cause", help="say why the stage failed")):
        command.add_argument("--log", type=Path, required=True, help="everything that the stage prints")
        command.add_argument("--offset", type=int, default=0, help="bytes of the log that are of earlier starts")
        command.add_argument("--output", type=Path, required=True, help="the folder that the stage writes to")
    args = parser.parse_args(argv)
    try:
        if args.command == "follow":
            follow(args.stage, args.log, args.offset, args.output, args.parent or os.getppid())
        else:
            lines = cause(args.log, args.offset, args.output, args.log.stem)
            Console(stderr=True, highlight=False).print(Text("\n".join(lines)), soft_wrap=True)
    except Exception as error:  # noqa: BLE001 - what is shown of a stage must never end it
        if args.command == "cause":
            print(f"the reason was not found ({error}). All of the output: {args.log}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
