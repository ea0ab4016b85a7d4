"""What tests share: the tiny checkpoint and a small set of soundscapes, made once by the recipe's own scripts."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("COLUMNS", "300")  # a message's line breaks would else depend on how long a temporary path is

FAMILIES = ("qwen2_5_omni", "qwen3_omni_moe")
TINY_CPU = Path(__file__).resolve().parents[1] / "recipes" / "tiny-cpu"


def _make(script: str, output: Path, *options: str) -> Path:
    """Run a script of recipes/tiny-cpu in its own process, so that unit tests load no framework."""
    command = [sys.executable, str(TINY_CPU / script), "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{script} failed:\n{result.stderr}"
    return output


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random checkpoint directory of a family, made once."""

    @functools.cache
    def make(family: str) -> Path:
        return _make("tiny_omni.py", tmp_path_factory.mktemp("models") / f"tiny-{family}", "--family", family)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[[str], Path]) -> Path:
    """Of Qwen2.5-Omni, or of the family that ECHO_TEST_FAMILY names."""
    return make_tiny_model(os.environ.get("ECHO_TEST_FAMILY", FAMILIES[0]))


@pytest.fixture(scope="session")
def tiny_qwen3(make_tiny_model: Callable[[str], Path]) -> Path:
    """Of Qwen3-Omni, with a talker."""
    return make_tiny_model("qwen3_omni_moe")


@pytest.fixture(scope="session", params=FAMILIES)
def omni_model(request: pytest.FixtureRequest, make_tiny_model: Callable[[str], Path]) -> Path:
    """Of each family in turn."""
    return make_tiny_model(request.param)


@pytest.fixture(scope="session")
def soundscapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with audio/, sft.jsonl (60 rows), rl.jsonl (16), val.jsonl (8) and test.jsonl (16), all AudioQA."""
    rows = ("--sft-rows", "60", "--rl-rows", "16", "--val-rows", "8", "--test-rows", "16")
    return _make("soundscapes.py", tmp_path_factory.mktemp("data") / "soundscapes", *rows)
