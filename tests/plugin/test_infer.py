"""`python -m eval.infer` as a user runs it: killed three times, and given the same command again until it is done."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 280  # for an engine to start and answer, on a machine that does other things too


@pytest.fixture(scope="module")
def manifest(soundscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows with their audio, of which one is no sound and one is not there."""
    folder = tmp_path_factory.mktemp("questions")
    lines = [*(soundscapes / "test.jsonl").open(), *(soundscapes / "sft.jsonl").open()]
    rows = [json.loads(line) for line in lines][:40]
    for row in rows:
        target = folder / row["audio"]
        target.parent.mkdir(exist_ok=True)
        shutil.copy(soundscapes / row["audio"], target)
    (folder / "noise.txt").write_text("no sound")
    rows[1]["audio"], rows[9]["audio"] = "noise.txt", "audio/none.wav"
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def command(tiny_model: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("predictions") / "out.jsonl"
    return [
        *(sys.executable, "-m", "eval.infer", "--model", str(tiny_model), "--output", str(output)),
        *("--audio-qa", str(manifest), "--audio-root", str(manifest.parent), "--max-num-seqs", "2"),
        *("--temperature", "1", "--max-tokens", "200", "--force-answer-tokens", "8", "--cpu-kv-cache-gib", "0.25"),
        *("--shuffle-choices", "5"),
    ]


def output_of(command: list[str]) -> Path:
    return Path(command[command.index("--output") + 1])


def ids_in(file: Path) -> list[str]:
    """Ids of whole rows; the last may be under way."""
    return [json.loads(line)["id"] for line in file.read_text().split("\n")[:-1]] if file.exists() else []


@pytest.fixture
def started(command: list[str], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command and wait for so many rows; whatever is left of it ends with the test."""
    running: list[subprocess.Popen[str]] = []

    def start(rows: int, *more: str) -> subprocess.Popen[str]:
        with (tmp_path / f"log-{len(running)}").open("w+") as log:
            process = subprocess.Popen([*command, *more], cwd=ROOT, stderr=log, text=True)
        running.append(process)
        deadline = time.monotonic() + WAIT_SECONDS
        while len(ids_in(output_of(command))) < rows:
            said = (tmp_path / f"log-{len(running) - 1}").read_text()
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.05)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()


def actors_of(process: subprocess.Popen[str]) -> Iterator[psutil.Process]:
    """The processes of its Ray actors, under a node that it started."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("ray::_Actor"):
                yield child


def run(command: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on_until_every_row_is_there_once(
    command: list[str], manifest: Path, started: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output = output_of(command)
    expected = [json.loads(line)["id"] for line in manifest.read_text().splitlines()]

    # kill -9: the rows that were done stay, and the engine's process, with its memory, goes too
    process = started(4)
    engines = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert engines
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive, "the engine outlived the process that started it"
    first = ids_in(output)
    assert 4 <= len(first) < len(expected)
    with output.open("a") as stream:
        stream.write('{"id": "torn')

    # the engine dies under it: an error that ends the run, with what was done kept
    process = started(len(first) + 1)
    engine = next(child for child in psutil.Process(process.pid).children() if "EngineCore" in child.name())
    engine.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    second = ids_in(output)
    assert second[: len(first)] == first and len(second) < len(expected)

    # two engines in Ray actors, one of which is killed: its rows are done all the same
    process = started(len(second) + 2, "--data-parallel", "2")
    next(actors_of(process)).send_signal(signal.SIGKILL)
    assert len(ids_in(output)) < len(expected), "all was done before anything was killed"
    said = tmp_path / "log-2"
    assert process.wait(timeout=WAIT_SECONDS) == 0, said.read_text()
    assert "rows are asked again, and another engine is started" in said.read_text()
    assert f"2 of {len(expected)} rows could not be answered and count as wrong" in said.read_text()
    assert ids_in(output)[: len(second)] == second
    assert sorted(ids_in(output)) == sorted(expected), "a row is lost or there twice"

    # and once more: nothing to do, and nothing started
    before = output.read_bytes()
    began = time.monotonic()
    assert run(command).returncode == 0
    assert output.read_bytes() == before and time.monotonic() - began < 30

    check_rows(output, manifest)
    score = subprocess.run(
        [sys.executable, "-m", "eval.score", str(output)], cwd=ROOT, capture_output=True, check=False
    )
    assert score.returncode == 0


def check_rows(output: Path, manifest: Path) -> None:
    """Every row is the question's, with all keys of a prediction; bad audio is an error with its reason."""
    questions = {row["id"]: row for row in map(json.loads, manifest.read_text().splitlines())}
    for row in map(json.loads, output.read_text().splitlines()):
        question = questions[row["id"]]
        assert row["choices"] == [question["choices"][place] for place in row.pop("choices_order")]
        assert question.items() <= (row | {"choices": question["choices"]}).items()
        assert {"model_response", "segments", "thinking_prediction", "num_tokens", "seconds"} <= row.keys()
        assert row["answer_prediction"] == row["model_prediction"] == row["model_output"]
        if question["audio"] in ("noise.txt", "audio/none.wav"):
            assert row["stop_reason"] == "error" and row["num_tokens"] == 0 and row["answer_prediction"] == ""
            assert "not readable as audio" in row["error"] or "no such file" in row["error"]
        else:
            assert row["stop_reason"] in ("answered", "length") and row["num_tokens"] > 0 and "error" not in row
            assert row["num_tokens"] + row["num_inserted_tokens"] <= 200
            assert "<answer>" in row["model_response"] or not row.get("forced_answer")
    assert any(row.get("forced_answer") for row in map(json.loads, output.read_text().splitlines()))


def test_other_settings_are_refused_and_the_rows_stay(command: list[str]) -> None:
    output = output_of(command)
    if not output.exists():
        pytest.skip("needs the rows of the test before")
    before = output.read_bytes()
    result = run(command, "--seed", "7")
    assert result.returncode == 1 and "sampling.seed: 0 -> 7" in result.stderr
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "--benchmark and --benchmark-root, or"),
        (["--benchmark", "mmar"], 2, "--benchmark and --benchmark-root, or"),
        (["--benchmark", "nope", "--benchmark-root", "."], 2, "no benchmark 'nope'"),
        (["--benchmark", "mmar", "--benchmark-root", "."], 1, "MMAR-meta.jsonl: no such file"),
        (["--audio-qa", "none.jsonl", "--audio-root", "."], 1, "none.jsonl: No such file"),
        (["--audio-qa", "{manifest}", "--audio-root", "."], 1, "none of the 40 audio files is there"),
        (["--audio-qa", "{manifest}", "--audio-root", "{root}", "--ids", "x"], 1, "1 of the ids are not in"),
        (["--audio-qa", "{manifest}", "--audio-root", "{root}", "--mode", "loud"], 2, "'loud' is not one of"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_starts(
    options: list[str], status: int, message: str, tmp_path: Path, tiny_model: Path, manifest: Path
) -> None:
    filled = [option.format(manifest=manifest, root=manifest.parent) for option in options]
    environment = {**os.environ, "COLUMNS": "200"}
    base = [sys.executable, "-m", "eval.infer", "--model", str(tiny_model), "--output", str(tmp_path / "out.jsonl")]
    result = subprocess.run([*base, *filled], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == status and message in result.stderr, result.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_dry_run_shows_three_prompts_and_writes_nothing(tmp_path: Path, tiny_model: Path, manifest: Path) -> None:
    without_weights = tmp_path / "model"
    without_weights.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, without_weights)
    words = ["--model", str(without_weights), "--output", str(tmp_path / "out.jsonl"), "--mode", "plain", "--dry-run"]
    words += ["--audio-qa", str(manifest), "--audio-root", str(manifest.parent)]
    result = run([sys.executable, "-m", "eval.infer"], *words)
    assert result.returncode == 0, result.stderr
    questions = [json.loads(line) for line in manifest.read_text().splitlines()]
    for question in questions[:3]:
        assert f"--- {question['id']}: " in result.stdout
        assert question["question"] in result.stdout and f"(A) {question['choices'][0]}" in result.stdout
    assert result.stdout.count("<|im_start|>assistant") == 3 and "temperature=0.7" in result.stdout
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.run.json").exists()
