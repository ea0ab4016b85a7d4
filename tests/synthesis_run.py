"""A synthesis run as a user starts it: a config, a process, and what is in the folder afterwards."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ASKING = {
    "eaqa": ("caption", "question", "judge", "silence", "difficulty"),
    "cogito": ("question", "think", "judge", "silence", "difficulty"),
    "vet": ("vet",),
}
CONCURRENCY = 4


def clips_of(soundscapes: Path, target: Path, count: int) -> None:
    """An event manifest of the first clips of the soundscapes."""
    splits = (rows(soundscapes / f"{name}.jsonl") for name in ("sft", "rl", "test", "val"))
    clips = {row["audio"]: row for split in splits for row in split}
    events = [{name: row[name] for name in ("audio", "events", "duration")} for row in list(clips.values())[:count]]
    target.write_text("".join(json.dumps({"id": Path(e["audio"]).stem, **e}) + "\n" for e in events))


def write_config(
    folder: Path,
    pipeline: str,
    url: str,
    audio_root: Path,
    *,
    asking: Sequence[str] = (),
    timeout_seconds: float = 30.0,
    **more: Any,
) -> Path:
    """A config with one model for the stages that ask, all of them by default, and thresholds that suit clips of a
    second or two."""
    endpoint = {
        "url": url,
        "model": "rules",
        "timeout_seconds": timeout_seconds,
        "longest_wait_seconds": 0.05,
        "concurrency": CONCURRENCY,
    }
    lenient = {
        "near_duplicate": {"scope": "recording"},
        "max_length_ratio": 4.0,
        "max_clip_share": 1.0,
        "max_silence_accuracy": 0.75,
        "min_pass_rate": 0.1,
        **({"min_segments": 0} if pipeline == "cogito" else {}),
    }
    config = {
        "input": "clips.jsonl",
        "audio_root": str(audio_root),
        "output": "run",
        "stages": dict.fromkeys(asking or ASKING[pipeline], endpoint),
        "filters": lenient,
        "silence_seconds": 0.5,
        "samples_per_question": 4,
        "report_rows": 2,
    }
    file = folder / f"{pipeline}.yaml"
    file.write_text(yaml.safe_dump(config | more))
    return file


def command(pipeline: str, config: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", f"converters.synthesis.{pipeline}", str(config), *words]


def run(pipeline: str, config: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(pipeline, config, *words),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **environment},
    )


def module(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False, timeout=120)


def start(pipeline: str, config: Path, *words: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(pipeline, config, *words),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def kill_when(reached: Callable[[], bool], pipeline: str, config: Path, *words: str, **environment: str) -> bool:
    """Start a run and kill it, and all that it started, as soon as `reached`; False where it ended before."""
    process = start(pipeline, config, *words, **environment)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None and not reached():
            assert time.monotonic() < deadline, "the run hangs"
            time.sleep(0.005)
        return process.poll() is None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@dataclass
class TwoNodes:
    """A Ray cluster: `environment` sends a driver to it."""

    environment: dict[str, str]
    second: subprocess.Popen[bytes]

    def second_works_on(self, journals: Path, answers: int) -> bool:
        """Whether a task on the second node has as many answers of a stage."""
        for process in psutil.Process(self.second.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                for file in process.open_files():
                    if Path(file.path).parent == journals and Path(file.path).read_bytes().count(b"\n") >= answers:
                        return True
        return False

    def lose_second(self) -> None:
        """All that runs on the second node dies at once."""
        for process in [*psutil.Process(self.second.pid).children(recursive=True), psutil.Process(self.second.pid)]:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.second.wait()


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Two Ray nodes of one processor each on this machine, started as a user does; a lost one is noticed soon."""
    health = {"initial_delay_ms": "1000", "period_ms": "300", "timeout_ms": "1000", "failure_threshold": "3"}
    settings = {
        **{f"RAY_health_check_{name}": value for name, value in health.items()},
        **{"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"},
        "RAY_prestart_worker_first_driver": "0",  # each task gets a process with an environment of its own
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    command += ["--object-store-memory=80000000", "--include-log-monitor=false"]
    folder = Path(tempfile.mkdtemp(prefix="echo-ray-", dir="/tmp"))  # a socket's path has 107 characters

    def node(name: str, *words: str) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            environment = {**os.environ, **settings}
            process = subprocess.Popen([*command, *words], stdout=log, stderr=subprocess.STDOUT, env=environment)
        nodes[name] = process
        return process

    def wait_until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not reached():
            said = {name: (folder / f"{name}.log").read_text() for name in nodes}
            assert all(process.poll() is None for process in nodes.values()) and time.monotonic() < deadline, said
            time.sleep(0.05)

    def listens() -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    nodes: dict[str, subprocess.Popen[bytes]] = {}
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    try:
        node("head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}")
        wait_until(listens)
        second = node("second", f"--address=127.0.0.1:{port}")
        wait_until(lambda: all("block forever" in (folder / f"{name}.log").read_text() for name in nodes))
        yield TwoNodes({"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}, second)
    finally:
        for process in nodes.values():
            process.terminate()  # with --block it takes its node along
        for process in nodes.values():
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def written(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: rows(folder / f"{name}.jsonl") for name in ("sft", "rl", "validation", "dropped")}


def timeless(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run: when its answers came, and after how many attempts."""
    steps = row.get("meta", {}).get("provenance")
    if steps is None:
        return dict(row)
    kept = [{key: step[key] for key in step if key not in ("time", "attempts")} for step in steps]
    return {**row, "meta": {**row["meta"], "provenance": kept}}
