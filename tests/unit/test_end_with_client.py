"""A worker ends with its parent, in a session of its own too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARENT = """
import subprocess, sys
child = "import time, echo_plugins.end_with_client as ending; {call}; print(1, flush=True); time.sleep(60)"
worker = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
worker.stdout.readline()
print(worker.pid, flush=True)
worker.wait()
"""


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def worker_of_a_killed_parent(call: str) -> int:
    command = [sys.executable, "-c", PARENT.format(call=call)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
    return worker


def test_it_ends_with_its_parent_and_would_not_by_itself() -> None:
    worker = worker_of_a_killed_parent("ending.end_with_parent()")
    deadline = time.monotonic() + 10
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(worker)
    left = worker_of_a_killed_parent("None")
    try:
        time.sleep(0.2)
        assert is_alive(left)
    finally:
        os.kill(left, signal.SIGKILL)
