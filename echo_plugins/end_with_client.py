"""Processes end with the one that started them, even by kill -9: vLLM's, in eval's engine and in verl's server, and the
workers of ms-swift.

    the client -> EngineCore -> workers, one a GPU (on a CPU, eval's worker is in EngineCore's own process)

Left alone EngineCore waits for its client's next message for ever, and the workers keep their memory, GPU memory too:
the same command could not go on. vLLM ends them by what a killed process does not run, Ray by its raylet, which may be
killed as well (`ray stop --force`). So the client says who it is before it starts an engine, and each worker watches.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import threading

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
CLIENT_VARIABLE = "ECHO_ENGINE_CLIENT"  # the client's process id, for the processes that it starts


def become_client() -> None:
    """To be called in the client before it starts an engine."""
    os.environ[CLIENT_VARIABLE] = str(os.getpid())


def end_with_client() -> None:
    """To be called in a worker: from now on its engine ends when the client does."""
    client, parent = int(os.environ.get(CLIENT_VARIABLE, os.getpid())), multiprocessing.parent_process()
    if client != os.getpid() and parent is not None and parent.pid is not None:
        threading.Thread(target=_watch, args=(client, parent.pid), daemon=True).start()


def end_with_parent() -> None:
    """To be called in a process: it is killed when its parent ends, however that ends. Linux only (prctl)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


def _watch(client: int, parent: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone already
        ended = select.poll()
        ended.register(os.pidfd_open(client), select.POLLIN)
        ended.poll()
    if os.getppid() == parent:  # EngineCore; never whom we were left to when the client itself was our parent
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
