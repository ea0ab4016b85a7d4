"""What tests share: the tiny checkpoint and a small set of soundscapes, made once by the recipe's own scripts."""

import subprocess
import sys
from pathlib import Path

import pytest

TINY_CPU = Path(__file__).resolve().parents[1] / "recipes" / "tiny-cpu"


def _make(script: str, output: Path, *options: str) -> Path:
    """Run a script of recipes/tiny-cpu in its own process, so that unit tests load no framework."""
    command = [sys.executable, str(TINY_CPU / script), "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{script} failed:\n{result.stderr}"
    return output


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2.5-Omni checkpoint directory."""
    return _make("tiny_omni.py", tmp_path_factory.mktemp("models") / "tiny-omni")


@pytest.fixture(scope="session")
def soundscapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with audio/, sft.jsonl (60 rows), rl.jsonl (16), val.jsonl (8) and test.jsonl (16), all AudioQA."""
    rows = ("--sft-rows", "60", "--rl-rows", "16", "--val-rows", "8", "--test-rows", "16")
    return _make("soundscapes.py", tmp_path_factory.mktemp("data") / "soundscapes", *rows)
