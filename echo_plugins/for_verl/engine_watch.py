"""A dead rollout server ends the run within seconds.

verl 0.9.1 waits for a server that was killed: in a weight sync for ever, in generation until the rollouts time out. The
trainer's process watches its servers and ends itself; the driver then ends with an error, and Ray with it.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from ..end_with_client import CLIENT_VARIABLE

WATCH_SECONDS = 5.0
FAILURE_FILE = "ECHO_FAILURE_FILE"  # where script/stage2_multiturn_rl.sh looks for the cause of a run's end


class EngineWatch(threading.Thread):
    """Asks each of `servers` (Ray actors) for a sign of life until `stop` is set. `dead` is called once, with the place
    of the first that has died and Ray's error. A server that is slow to answer is not dead."""

    def __init__(self, servers: Sequence[Any], dead: Callable[[int, Exception], None]) -> None:
        super().__init__(name="engine-watch", daemon=True)
        self.servers, self.dead = servers, dead
        self.stop = threading.Event()

    def run(self) -> None:
        asked: list[Any] = [None] * len(self.servers)
        while not self.stop.wait(WATCH_SECONDS):
            for place, server in enumerate(self.servers):
                asked[place] = asked[place] or server.__ray_ready__.remote()
                answered, _ = ray.wait([asked[place]], timeout=0)
                if not answered:
                    continue
                asked[place] = None
                try:
                    ray.get(answered)
                except RayActorError as error:
                    if not self.stop.is_set():
                        self.dead(place, error)
                    return


def end_the_process() -> None:
    """At once, whatever other threads wait for."""
    os._exit(1)


def one_line(error: BaseException, most: int = 400) -> str:
    """Type and message of an error. Ray's message of a process that died names it in one of many lines."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    died = re.search(r"class_name: (\w+)", text) if isinstance(error, RayActorError) else None
    if died:
        name = "a vLLM server" if died[1] == "vLLMHttpServer" else f"the process of {died[1]}"
        return f"{type(error).__name__}: {name} has died: it was killed, ran out of memory, or crashed"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def note_failure(cause: str) -> None:
    """Say it, and keep the first cause of the run's end where the stage finds it."""
    print(f"== {cause}", flush=True)
    if file := os.environ.get(FAILURE_FILE):
        path = Path(file)
        if not path.exists():
            path.write_text(cause + "\n", encoding="utf-8")


def end_where_weights_are_refused(extension: Any) -> None:
    """Wrap `update_weights_from_ipc`: on an error the server ends, which EngineWatch notices."""
    original = extension.update_weights_from_ipc

    @functools.wraps(original)
    def update_weights_from_ipc(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except Exception as error:
            note_failure(f"vLLM refused the weights of the actor: {type(error).__name__}: {error}")
            os.kill(int(os.environ.get(CLIENT_VARIABLE, os.getpid())), signal.SIGKILL)
            raise

    extension.update_weights_from_ipc = update_weights_from_ipc
