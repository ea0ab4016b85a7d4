"""Imported by vLLM's worker: its engine ends when the process that started it is gone, even by kill -9.

Left alone the engine would live on and keep its memory, GPU memory too, and the same command could not go on.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

from .engine import CLIENT_VARIABLE


class WorkerExtension:
    """Adds nothing. vLLM imports this module, early and in the worker's process, because it is told this name."""


def _watch(client: int, parent: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # gone already
        select.select([os.pidfd_open(client)], [], [])
    # With several GPUs an engine the worker is a child of the engine's process, else it is in that process itself.
    for process in {parent, os.getpid()} - {client}:
        os.kill(process, signal.SIGKILL)


if (_client := int(os.environ.get(CLIENT_VARIABLE, os.getpid()))) != os.getpid():
    threading.Thread(target=_watch, args=(_client, os.getppid()), daemon=True).start()
