"""What the terminal shows of a running stage, and the cause that is named when one fails. The logs are recordings."""

import ast
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
WATCH = ROOT / "script" / "watch.py"
SITE = "/opt/venv/lib/python3.11/site-packages"


@pytest.fixture(scope="module")
def watch() -> ModuleType:
    spec = importlib.util.spec_from_file_location("watch", WATCH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["watch"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Screen:
    """A watch of one stage whose clock and terminal the test holds."""

    def __init__(self, watch: ModuleType, folder: Path, stage: str, terminal: bool = False) -> None:
        self.log, self.output, self.printed = folder / "stage.log", folder / "out", io.StringIO()
        self.output.mkdir(exist_ok=True)
        self.log.touch()
        console = Console(file=self.printed, force_terminal=terminal, width=100)
        self.watch = watch.Watch(stage, self.log, 0, self.output, console, 0.0)

    def at(self, seconds: float, *lines: str, ending: str = "\n") -> str:
        """What the live line says after `lines` were written to the log."""
        with self.log.open("a") as log:
            log.write("".join(line + ending for line in lines))
        self.watch.poll(seconds)
        return self.watch.line(seconds).plain.strip()

    def row(self, name: str, row: dict[str, Any]) -> None:
        path = self.output / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def screen(watch: ModuleType, tmp_path: Path) -> Callable[..., Screen]:
    return lambda stage, terminal=False: Screen(watch, tmp_path, stage, terminal)


# --- which lines are ours


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("== the trained model is runs/x/sft/last", "== the trained model is runs/x/sft/last"),
        (
            "\x1b[36m(AgentLoopWorkerTQ pid=7301, ip=10.0.0.2)\x1b[0m "
            "WARNING:2026-01-31 23:47:08,632:== rollout of row 3 failed: late",
            "== rollout of row 3 failed: late",
        ),
        (
            "\x1b[36m(RewardLoopWorker pid=6046)\x1b[0m WARNING:2026-01-31 23:47:08,632:"
            "== reward term loud of preset paper"
            "\x1b[32m [repeated 4x across cluster] (Ray deduplicates logs by default.)\x1b[0m",
            "== reward term loud of preset paper",
        ),
        ("(vLLMHttpServer pid=1) (EngineCore pid=2) WARNING 11-26 23:48:27 [x.py:114] == seen", "== seen"),
        ("WARNING:echo_plugins.rewards.compose:== reward term loud", "== reward term loud"),
        ("Train: 100%|####| 20/20 [00:12<00:00]\r== after a bar", "== after a bar"),
        ("(WorkerDict pid=5840) WARNING:2026-01-31 23:47:08,632:IPC is not supported on your devices.", None),
        ('[WARNING:swift] Please install the package: `pip install "decord" -U`.', None),
        ("env \\\n  PYTHONPATH=/x \\\n  /x/python -m echo_plugins.for_swift.dataset \\\n  --max-length 2048", None),
        ("step:1 - actor/loss:0.5 == not at the start", None),
    ],
)
def test_lines_of_ours_are_passed_on_and_no_others(screen: Callable[..., Screen], line: str, shown: str | None) -> None:
    one = screen("rl")
    one.at(1, line)
    assert one.printed.getvalue() == ("" if shown is None else shown + "\n")


def test_a_repeated_line_is_shown_once_and_of_lines_that_differ_in_numbers_only_the_first_three(
    screen: Callable[..., Screen],
) -> None:
    one = screen("rl")
    one.at(1, *["== a.jsonl: 3 rows are left out"] * 5, *(f"== rollout of row {row} failed: late" for row in range(9)))
    shown = one.printed.getvalue().splitlines()
    assert shown[0] == "== a.jsonl: 3 rows are left out" and len(shown) == 4
    assert shown[3] == "== rollout of row 2 failed: late (more like it are in the log only)"


def test_a_line_is_shown_when_it_is_whole(screen: Callable[..., Screen]) -> None:
    one = screen("sft")
    one.at(1, "== half", ending="")
    assert one.printed.getvalue() == ""
    one.at(2, " and half")
    assert one.printed.getvalue() == "== half and half\n"


def logged() -> Iterator[tuple[str, str]]:
    for path in [*(ROOT / "echo_plugins").rglob("*.py"), *(ROOT / "eval").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("_log.warning", "_log.error"):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.literal_eval(node.args[0])


def test_every_warning_that_our_python_logs_reaches_the_terminal(watch: ModuleType) -> None:
    messages = dict(logged())
    assert len(messages) >= 5
    assert [place for place, text in messages.items() if not text.startswith(watch.OURS)] == []


# --- how far a stage is


def test_sft_shows_the_step_the_loss_and_the_seconds_left(screen: Callable[..., Screen]) -> None:
    one = screen("sft")
    assert one.at(2) == "sft, 2 s: looking at the rows"
    assert one.at(9, "[INFO:swift] args: SftArguments(") == "sft, 9 s: loading the model"
    bar = "Train:   0%|          | 0/20 [00:00<?, ?it/s][INFO:swift] use_logits_to_keep: False"
    assert one.at(20, bar) == "sft, 20 s: step 0 of 20"
    one.row("logging.jsonl", {"loss": 4.86421882, "global_step/max_steps": "10/20", "elapsed_time": "6s"})
    assert one.at(30) == "sft, 30 s: step 10 of 20, loss 4.864, 10 s left"
    assert one.at(34) == "sft, 34 s: step 10 of 20, loss 4.864, 6 s left"
    assert one.at(35, "\rTrain:  75%|#######   | 15/20 [00:08<00:03,  1.53it/s]", ending="\r").startswith(
        "sft, 35 s: step 15 of 20, loss 4.864, 5 s"
    )
    one.row("logging.jsonl", {"train_loss": 3.7, "global_step/max_steps": "20/20"})
    assert one.at(95) == "sft, 1 min 35 s: step 20 of 20, loss 4.864"


def test_what_an_earlier_start_wrote_is_no_progress(watch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "logging.jsonl"
    file.write_text(json.dumps({"loss": 1.0, "global_step/max_steps": "15/20"}) + "\n")
    one = Screen(watch, tmp_path, "sft")
    assert one.at(1) == "sft, 1 s: looking at the rows"
    one.row("logging.jsonl", {"loss": 0.5, "global_step/max_steps": "16/20"})
    assert one.at(2) == "sft, 2 s: step 16 of 20, loss 0.500"


def test_rl_shows_the_step_the_reward_and_the_seconds_left(watch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text(
        '{"step":9,"data":{"critic/score/mean":0.9}}\n'
    )  # of an earlier try
    one = Screen(watch, tmp_path, "rl")
    runner = "\x1b[36m(TaskRunnerV1 pid=5669)\x1b[0m "
    assert one.at(1, "2026-01-31 23:45:51,531\tINFO worker.py:2038 -- Started a local Ray instance.").endswith(
        "workers"
    )
    one.at(2, runner + "INFO:2026-01-31 23:46:33,993:Total training steps: 40")
    line = one.at(90, runner + "INFO:2026-01-31 23:48:36,397:all initialize finished, ready to fit")
    assert line == "rl, 1 min 30 s: first rollouts"
    (tmp_path / "out" / "metrics.jsonl").rename(tmp_path / "out" / "metrics.1.jsonl")
    one.row("metrics.jsonl", {"step": 0, "data": {"val-core/val/acc/mean@1": 0.0}})
    assert (
        one.at(95, runner, "Training Progress:   0%|          | 0/40 [00:00<?, ?it/s]")
        == "rl, 1 min 35 s: step 0 of 40"
    )
    one.row("metrics.jsonl", {"step": 1, "data": {"critic/score/mean": -0.00625, "training/global_step": 1}})
    assert one.at(103) == "rl, 1 min 43 s: step 1 of 40, reward -0.006, 5 min 12 s left"


def test_inference_shows_the_rows_of_the_mode_it_is_in(screen: Callable[..., Screen]) -> None:
    one = screen("infer")
    for _ in range(12):
        one.row("test/interleaved.jsonl", {})
    one.row("test/interleaved.verdicts.jsonl", {})
    line = one.at(30, "audio-qa, plain: 12 rows, of which 2 are done", "starting 1 engines on cpu with /tmp/merged")
    assert line == "infer, 30 s: plain: starting the engines"
    for _ in range(2):
        one.row("test/plain.jsonl", {})
    assert one.at(50, "engine 0 is ready after 20 s") == "infer, 50 s: plain: 2 of 12 rows"
    for _ in range(5):
        one.row("test/plain.jsonl", {})
    assert one.at(55) == "infer, 55 s: plain: 7 of 12 rows, 5 s left"


def test_another_stage_shows_its_seconds(screen: Callable[..., Screen]) -> None:
    assert screen("data").at(3700) == "data, 1 h 01 min"


def test_a_broken_row_of_the_framework_is_passed_over(screen: Callable[..., Screen]) -> None:
    one = screen("sft")
    (one.output / "logging.jsonl").write_text('[1]\n{"loss": \n{"loss": "x"}\n')
    assert one.at(1) == "sft, 1 s: looking at the rows"


# --- where it is shown


def test_without_a_terminal_there_is_a_line_a_minute_and_only_when_something_moved(
    screen: Callable[..., Screen],
) -> None:
    one = screen("sft")
    for second in range(1, 601):
        one.at(second, *([f"Train: 1%|# | {second // 10}/60 ["] if second <= 300 else []))
    lines = one.printed.getvalue().splitlines()
    assert lines[0] == "   sft, 1 min 00 s: step 6 of 60, 8 min 51 s left"
    assert len(lines) == 5, "five minutes moved, five did not"


def test_a_stage_of_under_a_minute_prints_nothing_without_a_terminal(screen: Callable[..., Screen]) -> None:
    one = screen("rl")
    for second in range(1, 60):
        one.at(second, f"Training Progress: 1%|# | {second}/60 [")
    assert one.printed.getvalue() == ""


def test_on_a_terminal_the_live_line_is_erased_and_our_lines_stay(screen: Callable[..., Screen]) -> None:
    one = screen("sft", terminal=True)
    with one.watch.live:
        one.at(1, "Train:   5%|# | 1/20 [00:00<00:17,  1.10it/s]")
        one.at(2, "== 3 of 20 rows are left out")
        one.watch.poll(3, last=True)
    printed = one.printed.getvalue()
    assert "sft, 1 s: step 1 of 20" in printed and "== 3 of 20 rows are left out\n" in printed
    assert printed.endswith("\x1b[2K"), "the line is cleared in the end"
    assert printed.count("\n") == 2, "one of our line, one of the live line when it ends"


def started(folder: Path, *words: str) -> list[str]:
    (folder / "out").mkdir(exist_ok=True)
    paths = ["--log", str(folder / "rl.log"), "--output", str(folder / "out")]
    return [sys.executable, str(WATCH), *words, *paths]


def until(happened: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_ends_on_sigterm_with_what_was_written_last(tmp_path: Path) -> None:
    log, printed = tmp_path / "rl.log", tmp_path / "err"
    log.write_text("== of an earlier start\n")
    offset = log.stat().st_size
    with printed.open("w") as stderr:
        process = subprocess.Popen(started(tmp_path, "follow", "rl", "--offset", str(offset)), stderr=stderr)
    with log.open("a") as file:
        file.write("== first\n")
        file.flush()
        until(printed.read_text)
        file.write("== last")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 0
    assert printed.read_text() == "== first\n== last\n"


def test_it_ends_when_the_shell_that_started_it_is_killed(tmp_path: Path) -> None:
    follow = " ".join(started(tmp_path, "follow", "rl"))
    script = f"{follow} & echo $! > {tmp_path}/pid; wait"
    (tmp_path / "rl.log").write_text("== it looks\n")
    printed = tmp_path / "err"
    with printed.open("w") as stderr:
        shell = subprocess.Popen(["bash", "-c", script], stderr=stderr)
    until(printed.read_text)
    process = int((tmp_path / "pid").read_text())
    shell.kill()
    shell.wait()

    def gone() -> bool:
        stat = Path(f"/proc/{process}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    until(gone)


def test_an_error_in_it_is_silent(tmp_path: Path) -> None:
    (tmp_path / "rl.log").mkdir()  # cannot be read as a file
    done = subprocess.run(started(tmp_path, "follow", "rl"), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- why it failed

RAY_WRAPPED = f"""\
\x1b[36m(TaskRunnerV1 pid=5669)\x1b[0m INFO:2026-01-31 23:46:33,993:Total training steps: 2
Error executing job with overrides: ['data.max_prompt_length=20']
Traceback (most recent call last):
  File "{SITE}/verl/trainer/main_ppo.py", line 50, in main
    run_ppo(config)
  File "{SITE}/ray/_private/worker.py", line 2967, in get_objects
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(ValueError): \x1b[36mray::TaskRunnerV1.run()\x1b[39m (pid=5669, ip=192.0.2.2, actor_id=7f)
  File "{SITE}/verl/trainer/main_ppo.py", line 97, in run
    self.trainer.fit()
  File "{ROOT}/echo_plugins/for_verl/dataset.py", line 61, in maybe_filter_out_long_prompts
    raise ValueError("no row is left")
ValueError: no row is left: every prompt is over data.max_prompt_length=20
"""
ENGINE_DIED = f"""\
(EngineCore pid=7804) ERROR 01-31 23:50:22 [core.py:1100] EngineCore failed to start.
(EngineCore pid=7804) ERROR 01-31 23:50:22 [core.py:1100] Traceback (most recent call last):
(EngineCore pid=7804) ERROR 01-31 23:50:22 [core.py:1100]   File "{SITE}/vllm/v1/engine/core.py", line 1074, in run
(EngineCore pid=7804) ERROR 01-31 23:50:22 [core.py:1100]     engine_core = EngineCoreProc(*args, **kwargs)
(EngineCore pid=7804) ERROR 01-31 23:50:22 [core.py:1100] KeyError: 'audio_tower'
(APIServer pid=7700) Traceback (most recent call last):
(APIServer pid=7700)   File "{SITE}/vllm/v1/engine/utils.py", line 700, in wait
(APIServer pid=7700) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""
CUDA_MEMORY = f"""\
[rank0]: Traceback (most recent call last):
[rank0]:   File "{SITE}/torch/nn/modules/linear.py", line 134, in forward
[rank0]:     return F.linear(input, self.weight, self.bias)
[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.32 GiB. GPU 0 has a total capacity of 79.11 GiB
E0131 12:00:00.000000 123 torch/distributed/elastic/multiprocessing/api.py:984] failed (exitcode: 1) local_rank: 0
"""
WORKER_DIED = """\
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
\tclass_name: create_colocated_worker_cls.<locals>.WorkerDict
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly.
"""
CHAINED = f"""\
Traceback (most recent call last):
  File "{ROOT}/echo_plugins/audio.py", line 50, in load
    samples = decode(path)
soundfile.LibsndfileError: Error opening 'a.wav': System error.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "{ROOT}/eval/infer.py", line 300, in main
    run()
  File "{SITE}/rich/x.py", line 1, in run
    pass
echo_plugins.audio.AudioError: a.wav cannot be decoded
Exception ignored in: <function Pool.__del__ at 0x7f>
Traceback (most recent call last):
  File "/usr/lib/python3.11/multiprocessing/pool.py", line 268, in __del__
AttributeError: 'NoneType' object has no attribute 'put'
"""
RICH_FRAMES = f"""\
╭───────────────────── Traceback (most recent call last) ──────────────────────╮
│ {ROOT}/eval/score.py:321 in main │
│                                                                              │
│   318 │   try:                                                               │
│ ❱ 321 │   │   predicted = load(predictions)                                  │
│                                                                              │
│ {SITE}/orjson/x.py:9 in loads │
╰──────────────────────────────────────────────────────────────────────────────╯
TypeError: unsupported operand
"""
TYPER = """\
Usage: python -m echo_plugins.rewards.explain [OPTIONS] [[FILE.jsonl]...]...
╭─ Error ──────────────────────────────────────────────────────────────────────╮
│ Invalid value for --preset: no reward preset is called 'nonsense': there are │
│ outcome and paper                                                            │
╰──────────────────────────────────────────────────────────────────────────────╯
stage2_multiturn_rl.sh: error: REWARD_PRESET=nonsense cannot be used.
"""
NCCL = f"""\
[rank1]: Traceback (most recent call last):
[rank1]:   File "{SITE}/torch/distributed/distributed_c10d.py", line 2810, in all_reduce
[rank1]: torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled \
system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5
[rank1]: ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
[rank1]: Last error:
"""
SWIFT_SAYS_NOTHING = """\
env \\
  --model x
one
two

stage1_ground_reason.sh: error: ms-swift left no checkpoint in out; its own messages above say why.
"""


@pytest.mark.parametrize(
    ("stage", "log", "expected"),
    [
        (
            "sft",
            "OSError: [Errno 28] No space left on device: 'out/x'\n",
            ["disk is full", "[Errno 28]", "SFT_SAVE_LIMIT"],
        ),
        (
            "rl",
            "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 1664 vs 1558\n",
            ["disk is full", "unexpected pos 1664 vs 1558", "RL_KEEP_CHECKPOINTS"],
        ),
        (
            "sft",
            CUDA_MEMORY,
            ["GPU's memory", "Tried to allocate 2.32 GiB", "Lower SFT_MICRO_BATCH, then SFT_MAX_LENGTH"],
        ),
        ("rl", CUDA_MEMORY, ["GPU's memory", "Lower RL_GPU_MEMORY, then RL_TOKENS_PER_GPU; RL_OFFLOAD=True"]),
        (
            "rl",
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`.\n",
            ["share of the GPU is too small", "Raise RL_GPU_MEMORY"],
        ),
        (
            "infer",
            "ValueError: Free memory on device cuda:0 (9.1/79.1 GiB) on startup is less than desired GPU memory "
            "utilization (0.6, 47.47 GiB).\n",
            ["less free GPU memory", "nvidia-smi"],
        ),
        (
            "sft",
            "script/stage1_ground_reason.sh: line 150: 4242 Killed                  env X=1\n",
            ["memory ran out", "SFT_MICRO_BATCH"],
        ),
        ("sft", "failed (exitcode: -9) local_rank: 0 (pid: 7)\n", ["memory ran out"]),
        (
            "rl",
            "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n",
            ["memory ran out", "RL_AGENT_WORKERS"],
        ),
        (
            "sft",
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's\n",
            ["/dev/shm", "SFT_WORKERS=0"],
        ),
        (
            "sft",
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address. "
            "port: 29500, useIPv6: false, code: -98, name: EADDRINUSE, message: address already in use\n",
            ["port is in use", "29500", "MASTER_PORT"],
        ),
        ("rl", WORKER_DIED, ["a Ray worker ended", "worker process has died", "RL_WORKERS"]),
        (
            "rl",
            RAY_WRAPPED,
            ["ValueError: no row is left: every prompt is over", "in echo_plugins/for_verl/dataset.py:61"],
        ),
        ("infer", ENGINE_DIED, ["infer: error: KeyError: 'audio_tower'"]),
        ("infer", CHAINED, ["echo_plugins.audio.AudioError: a.wav cannot be decoded", "in eval/infer.py:300"]),
        ("score", RICH_FRAMES, ["score: error: TypeError: unsupported operand", "in eval/score.py:321"]),
        ("rl", TYPER, ["no reward preset is called 'nonsense': there are outcome and paper", "cannot be used"]),
        ("rl", NCCL, ["NCCL error in", "ncclSystemError"]),
        (
            "rl",
            "[rank3]:[E131 10:00:00.0 ProcessGroupNCCL.cpp:683] [Rank 3] Watchdog caught collective operation timeout: "
            "WorkNCCL(SeqNum=9, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600011 milliseconds before timing out.\n",
            ["waited in vain", "OpType=ALLREDUCE"],
        ),
        (
            "sft",
            "stage1_ground_reason.sh: error: SFT_TUNER is 'x'; it is full or lora\n",
            ["sft: error: SFT_TUNER is 'x'"],
        ),
        ("sft", "script/stage1_ground_reason.sh: line 43: MODEL: is not set: the directory\n", ["MODEL: is not set"]),
        ("data", "error: none of the 108 rows has `think`\n", ["data: error: none of the 108 rows has `think`"]),
        ("sft", f"{CHAINED}{SWIFT_SAYS_NOTHING}", ["AudioError: a.wav cannot be decoded"]),
        ("sft", SWIFT_SAYS_NOTHING, ["no reason that is known", "  one", "  two", "its own messages above"]),
        ("sft", "", ["no reason that is known"]),
    ],
)
def test_the_cause_is_named_with_its_cure(
    watch: ModuleType, tmp_path: Path, stage: str, log: str, expected: list[str]
) -> None:
    path = tmp_path / f"{stage}.log"
    earlier = "torch.OutOfMemoryError: CUDA out of memory.\nOSError: [Errno 28] No space left on device\n"
    path.write_text(earlier + log)
    lines = watch.cause(path, len(earlier), tmp_path, stage)
    said = "\n".join(lines)
    assert [text for text in expected if text not in said] == [], said
    assert lines[0].startswith(f"{stage}: error: ") and len(lines) <= 8
    assert lines[-1] == f"  All of its output: {path}"
    assert ("disk" in said, "GPU's memory" in said) == ("disk" in expected[0], "GPU's memory" in expected[0])


def test_what_a_later_step_overcame_is_no_cause(watch: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "rl.log"
    log.write_text(
        "OSError: [Errno 98] Address already in use\nTraining Progress:  50%|#  | 1/2 [00:08<00:08,  8.48s/it]\n"
        "Traceback (most recent call last):\nKeyError: 'x'\nTraining Progress:  50%|#  | 1/2 [00:09<00:09,  9.48s/it]\n"
    )
    assert watch.cause(log, 0, tmp_path, "rl")[0] == "rl: error: KeyError: 'x'"


def test_a_nearly_full_disk_is_mentioned(watch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sft.log").write_text("Traceback (most recent call last):\nOSError: sorry\n")
    monkeypatch.setattr(watch, "free_bytes", lambda path: 3e6)
    assert f"  Only 3 MB are free for {tmp_path}: that may be the cause." in watch.cause(
        tmp_path / "sft.log", 0, tmp_path, "sft"
    )


def test_the_cause_is_found_at_the_end_of_a_large_log(watch: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "sft.log"
    with log.open("wb") as file:
        file.truncate(100_000_000)
        file.seek(0, os.SEEK_END)
        file.write(b"\nTraceback (most recent call last):\nKeyError: 'x'\n")
    began = time.monotonic()
    assert watch.cause(log, 0, tmp_path, "sft")[0] == "sft: error: KeyError: 'x'"
    assert time.monotonic() - began < 10


def test_cause_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rl.log").write_text(RAY_WRAPPED)
    done = subprocess.run(started(tmp_path, "cause"), capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr.startswith("rl: error: ValueError: no row is left") and done.returncode == 0
    assert not re.search("\x1b", done.stderr)
