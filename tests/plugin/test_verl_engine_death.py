"""A rollout server that dies, or refuses the actor's weights, ends the run within a minute and is named at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from converters.rl_parquet import main as rl_parquet
from echo_plugins.end_with_client import CLIENT_VARIABLE

ROOT = Path(__file__).resolve().parents[2]
STARTUP_SECONDS = 400
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


def server_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    (server,) = [
        one
        for one in psutil.Process(process.pid).children(recursive=True)
        if "vLLMHttpServer" in " ".join(one.cmdline())
    ]
    return server


def test_a_killed_server_ends_the_run_with_its_cause(tiny_model: Path, soundscapes: Path, tmp_path: Path) -> None:
    log, metrics = tmp_path / "log", tmp_path / "out" / "metrics.jsonl"
    process = start(tiny_model, soundscapes, tmp_path, log)
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not (metrics.is_file() and metrics.read_text()):  # a step is done, so the next is on its way
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
            time.sleep(0.1)
        server_of(process).kill()
        killed = time.monotonic()
        assert process.wait(MOST_SECONDS) != 0
        assert time.monotonic() - killed < MOST_SECONDS
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = [line for line in log.read_text().splitlines() if line.strip()][-1]
    assert "error: step " in said and "vLLM server" in said and "has died" in said, said
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "1", "the same command goes on"


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
