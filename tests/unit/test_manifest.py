"""A finished stage is skipped, a stopped one goes on, a changed one starts afresh without mixing or losing anything."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Stage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """Runs a stage that appends a line to out/log, and fails after it when FAIL=1."""
    (tmp_path / "in.txt").write_text("one")

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        script = """
            set -euo pipefail
            source script/common.sh
            work() { mkdir -p "$RUN_DIR/out"; echo "$LR" >> "$RUN_DIR/out/log"; [[ "${FAIL:-0}" != 1 ]] || kill -9 $$; }
            stage work --output "$RUN_DIR/out" --input "$RUN_DIR/in.txt" --setting 'LR*' -- work
        """
        values = {"RUN_DIR": str(tmp_path), "LR": "1e-6", "PYTHON": sys.executable, **environment}
        return subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **values}, check=False
        )

    return run


def log(tmp_path: Path, folder: str = "out") -> list[str]:
    return (tmp_path / folder / "log").read_text().split()


def test_a_finished_stage_is_skipped(stage: Stage, tmp_path: Path) -> None:
    assert stage().returncode == 0
    again = stage()
    assert again.returncode == 0 and "skipped" in again.stderr
    assert log(tmp_path) == ["1e-6"]
    manifest = json.loads((tmp_path / "manifests" / "work.json").read_text())
    assert manifest["finished"] and manifest["settings"] == {"LR": "1e-6"} and manifest["versions"]["python"]


def test_force_runs_a_finished_stage_again_and_keeps_what_was_there(stage: Stage, tmp_path: Path) -> None:
    stage()
    assert stage(FORCE="1").returncode == 0
    assert log(tmp_path) == log(tmp_path, "out.old-1") == ["1e-6"]


def test_a_killed_stage_goes_on_in_its_own_output(stage: Stage, tmp_path: Path) -> None:
    assert stage(FAIL="1").returncode == -9
    again = stage()
    assert "goes on" in again.stderr
    assert log(tmp_path) == ["1e-6", "1e-6"]


@pytest.mark.parametrize("killed", ["0", "1"], ids=["finished", "killed"])
def test_a_changed_setting_starts_afresh_and_is_named(stage: Stage, tmp_path: Path, killed: str) -> None:
    stage(FAIL=killed)
    again = stage(LR="2e-6")
    assert "LR was 1e-6, is 2e-6" in again.stderr
    assert log(tmp_path) == ["2e-6"] and log(tmp_path, "out.old-1") == ["1e-6"]


def test_continue_goes_on_after_a_change(stage: Stage, tmp_path: Path) -> None:
    stage()
    assert "LR was 1e-6, is 2e-6" in stage(LR="2e-6", CONTINUE="1").stderr
    assert log(tmp_path) == ["1e-6", "2e-6"]


def test_a_changed_input_runs_the_stage_again(stage: Stage, tmp_path: Path) -> None:
    stage()
    (tmp_path / "in.txt").write_text("two")
    assert "in.txt has changed" in stage().stderr
    assert log(tmp_path) == ["1e-6"]


def test_an_output_that_was_removed_is_made_again(stage: Stage, tmp_path: Path) -> None:
    stage()
    (tmp_path / "out" / "log").unlink()
    (tmp_path / "out").rmdir()
    stage()
    assert log(tmp_path) == ["1e-6"]


def test_a_missing_input_is_one_clear_line(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "in.txt").unlink()
    failed = stage()
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and "in.txt does not exist" in failed.stderr


def test_a_dry_run_needs_no_input_and_leaves_no_manifest(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "in.txt").unlink()
    assert stage(DRY_RUN="1").returncode == 0
    assert not (tmp_path / "manifests").exists()
