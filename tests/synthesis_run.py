"""A synthesis run as a user starts it: a config, a process, and what is in the folder afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

ASKING = {
    "eaqa": ("caption", "question", "judge", "silence", "difficulty"),
    "cogito": ("question", "think", "judge", "silence", "difficulty"),
    "vet": ("vet",),
}
CONCURRENCY = 4


def clips_of(soundscapes: Path, target: Path, count: int) -> None:
    """An event manifest of the first clips of the soundscapes."""
    rows = [json.loads(line) for line in (soundscapes / "sft.jsonl").read_text().splitlines()]
    clips = {row["audio"]: row for row in rows}
    events = [{name: row[name] for name in ("audio", "events", "duration")} for row in list(clips.values())[:count]]
    target.write_text("".join(json.dumps({"id": Path(e["audio"]).stem, **e}) + "\n" for e in events))


def write_config(folder: Path, pipeline: str, url: str, audio_root: Path, **more: Any) -> Path:
    """A config with one model for all stages, and thresholds that suit clips of a second or two."""
    endpoint = {
        "url": url,
        "model": "rules",
        "timeout_seconds": 1.0,
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
        "stages": dict.fromkeys(ASKING[pipeline], endpoint),
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


def kill_when(reached: Callable[[], bool], pipeline: str, config: Path, *words: str) -> bool:
    """Start a run and kill it, and all that it started, as soon as `reached`; False where it ended before."""
    process = subprocess.Popen(
        command(pipeline, config, *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
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
