"""A process of a run that dies, and an engine that refuses the actor's weights, end the run within a minute; the same
command then goes on. A killed engine in a generation is tried each time, every process in every phase of a step with

    ECHO_KILL_ALL=1 python -m pytest tests/plugin/test_verl_engine_death.py     # half an hour
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from converters.rl_parquet import main as rl_parquet
from echo_plugins.end_with_client import CLIENT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 400
LATEST_OF_RUN = "out/latest_checkpointed_iteration.txt"
MOST_SECONDS = 60  # from the kill to the end of the run

pytestmark = pytest.mark.timeout(900)


def start(tiny_model: Path, soundscapes: Path, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    rows = folder / "rl.parquet"
    rl_parquet(soundscapes / "rl.jsonl", rows, audio_root=soundscapes, model=tiny_model, workers=1)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "RAY_", "RL_"))},
        **{"MODEL": str(tiny_model), "TRAIN_FILE": str(rows), "VAL_FILE": str(rows), "OUTPUT_DIR": str(folder / "out")},
        **{"DEVICE": "cpu", "RL_STEPS": "50", "RL_BATCH_SIZE": "4", "RL_MINI_BATCH": "4", "RL_GROUP": "2"},
        **{"RL_MAX_PROMPT": "512", "RL_MAX_RESPONSE": "256", "RL_TEST_FREQ": "-1", "RL_SAVE_FREQ": "1"},
        **{"PYTHON": sys.executable},
    }
    command = ["bash", str(ROOT / "script" / "stage2_multiturn_rl.sh")]
    with log.open("w") as sink:
        return subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)


def title(process: psutil.Process) -> str:
    """Ray writes the actor's class there, and the method that it runs."""
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def process_of(run: subprocess.Popen[bytes], name: str) -> psutil.Process:
    return next(one for one in psutil.Process(run.pid).children(recursive=True) if name in title(one))


def wait_for(run: subprocess.Popen[bytes], log: Path, reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
        time.sleep(0.002)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for all: each start goes on from where the last was killed."""
    return tmp_path_factory.mktemp("killed")


PROCESSES = ("vLLMHttpServer", "VLLM::EngineCore", "WorkerDict", "AgentLoopWorker", "RewardLoopWorker")
# The method that the training process runs in each phase of a step; "" in a generation, when it waits.
PHASES = {"generation": "", "update": "update_actor", "sync": "update_weights"}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_killed_process_ends_the_run_and_the_same_command_goes_on(
    tiny_model: Path, soundscapes: Path, folder: Path, name: str, phase: str
) -> None:
    if (name, phase) != ("VLLM::EngineCore", "generation") and not os.environ.get("ECHO_KILL_ALL"):
        pytest.skip("one process in one phase, unless ECHO_KILL_ALL=1")
    log, metrics, tracker = (folder / part for part in ("log", "out/metrics.jsonl", LATEST_OF_RUN))
    before = int(tracker.read_text()) if tracker.is_file() else 0
    run = start(tiny_model, soundscapes, folder, log)
    try:
        # metrics.jsonl is put aside at the start. With a line in it a step is done, and the next on its way.
        wait_for(run, log, lambda: "Training Progress" in log.read_text(errors="replace"), STARTUP_SECONDS)
        wait_for(run, log, lambda: metrics.is_file() and bool(metrics.read_text()), STARTUP_SECONDS)
        actor, victim = process_of(run, "WorkerDict"), process_of(run, name)
        method = PHASES[phase]
        wait_for(run, log, lambda: method in title(actor) if method else title(actor).endswith("::WorkerDict"), 120)
        victim.kill()
        killed = time.monotonic()
        assert run.wait(MOST_SECONDS) != 0
        seconds = time.monotonic() - killed
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    text = log.read_text(errors="replace")
    said = [line for line in text.splitlines() if line.strip()][-1]
    print(f"{name} killed in {phase}: ended after {seconds:.0f} s with: {said[:200]}")
    assert "error: step " in said or "EngineCore of a vLLM server has died" in said, said
    assert name not in ("vLLMHttpServer", "VLLM::EngineCore") or "vLLM server" in said, said
    assert f"setting global step to {before}" in " ".join(text.split()) or before == 0
    assert int(tracker.read_text()) > before, "each start comes further"


def test_a_server_ends_where_its_worker_refuses_the_weights(tmp_path: Path) -> None:
    """In a process, because it ends."""
    script = """
from echo_plugins.for_verl.engine_watch import end_where_weights_are_refused

class Extension:
    def update_weights_from_ipc(self):
        raise AttributeError("'Parameter' object has no attribute 'weight_loader'")

end_where_weights_are_refused(Extension)
Extension().update_weights_from_ipc()
"""
    cause = tmp_path / "failure.txt"
    environment: dict[str, Any] = {**os.environ, "ECHO_FAILURE_FILE": str(cause), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop(CLIENT_VARIABLE, None)  # an engine of another test may have made this process its client
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert cause.read_text() == (
        "vLLM refused the weights of the actor: AttributeError: 'Parameter' object has no attribute 'weight_loader'\n"
    )
