"""The rules of the house: who may import whom, which scripts can be run, and that every recipe can be read."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("echo_plugins", "converters", "eval")
RECIPES = sorted(path.parent.name for path in ROOT.glob("recipes/*/run.sh"))
HEAVY = {"torch", "transformers", "ray", "vllm", "verl", "swift", "pandas", "pyarrow", "soundfile", "soxr", "librosa"}

# room -> the rooms of ours that it may import (its own is always allowed)
RELISTEN, REWARDS = "echo_plugins.relisten", "echo_plugins.rewards"
AUDIO, MODEL, CHAT = "echo_plugins.audio", "echo_plugins.model", "echo_plugins.chat_client"
END, RECORDING = "echo_plugins.end_with_client", "echo_plugins.recording"
FOR_VLLM = "echo_plugins.for_vllm"
RECORD = "echo_plugins.audio_qa"
MAY_IMPORT = {
    RELISTEN: set(),
    REWARDS: {RELISTEN},
    AUDIO: {RELISTEN, MODEL},
    MODEL: {RELISTEN},
    RECORD: {RELISTEN},
    CHAT: set(),
    END: set(),
    RECORDING: set(),
    FOR_VLLM: {AUDIO, MODEL},
    "echo_plugins.for_verl": {RELISTEN, REWARDS, AUDIO, MODEL, END, FOR_VLLM},
    "echo_plugins.for_swift": {RELISTEN, REWARDS, AUDIO, MODEL, END},
    "eval": {RELISTEN, REWARDS, AUDIO, MODEL, CHAT, END, RECORD, RECORDING, FOR_VLLM},
    "converters": {RELISTEN, AUDIO, MODEL, CHAT, RECORD, RECORDING},
}
# framework -> where alone it may be imported
FRAMEWORK_HOME = {
    "verl": ("echo_plugins/for_verl/",),
    "swift": ("echo_plugins/for_swift/",),
    "vllm": ("eval/engine.py", "eval/throughput_worker.py", "echo_plugins/for_vllm.py", "echo_plugins/for_verl/"),
}


def modules() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, by its full name; `from a.b import c` gives a.b and a.b.c, which may be one."""
    package = relative(path).split("/")[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def is_within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str | None:
    return next((room for room in MAY_IMPORT if is_within(name, room)), None)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", list(modules()), ids=relative)
def test_a_module_imports_only_the_rooms_its_own_room_may(path: Path) -> None:
    room = room_of(relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    names = imported(path)
    if room is None:
        assert relative(path) == "echo_plugins/__init__.py", "a new room: add it to DESIGN and to MAY_IMPORT"
        assert not {name.partition(".")[0] for name in names} & HEAVY
        return
    wrong = {name for name in names if (other := room_of(name)) and other != room and other not in MAY_IMPORT[room]}
    assert not wrong, f"{room} may not import {sorted(wrong)}"
    for framework, homes in FRAMEWORK_HOME.items():
        if not relative(path).startswith(homes):
            assert not any(is_within(name, framework) for name in names), f"{framework} belongs in {homes}"


@pytest.mark.parametrize("path", sorted((ROOT / "echo_plugins/relisten").glob("*.py")), ids=relative)
def test_relisten_is_the_standard_library_and_numpy(path: Path) -> None:
    outside = {
        name
        for name in imported(path)
        if name.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "echo_plugins"}
    }
    assert not outside


def test_every_script_is_executable_and_stops_at_the_first_error() -> None:
    scripts = [path for folder in ("script", "recipes/*", "requirements") for path in ROOT.glob(f"{folder}/*.sh")]
    assert len(scripts) > len(RECIPES)
    for script in scripts:
        assert os.access(script, os.X_OK), f"{script} is not executable"
        text = script.read_text()
        assert text.startswith("#!/usr/bin/env bash\n")
        assert "set -euo pipefail" in text or script.name == "common.sh", f"{script} goes on after an error"


def bash(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_of_a_recipe_can_be_given_from_the_environment(recipe: str) -> None:
    lines = (ROOT / "recipes" / recipe / "recipe.env").read_text().split("\n")
    statements = [line.strip() for line in lines if line and not line.startswith("#")]
    plain = re.compile(r':( "\$\{[A-Z0-9_]+=[^"]*\}")+(\s+#.*)?|if \[\[ .* \]\]; then|fi')
    wrong = [statement for statement in statements if not plain.fullmatch(statement)]
    assert not wrong, 'every line is a comment or : "${NAME=value}" ...'
    names = re.findall(r'"\$\{([A-Z0-9_]+)=', "\n".join(statements))
    done = bash(
        f'source recipes/{recipe}/recipe.env; printf "%s\\n" ' + " ".join(f'"${name}"' for name in names),
        **dict.fromkeys(names, "given"),
    )
    assert done.stdout.split() == ["given"] * len(names), done.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_explains_itself_and_refuses_an_unknown_stage(recipe: str, tmp_path: Path) -> None:
    run = f"bash recipes/{recipe}/run.sh"
    explained = bash(f"{run} --help", RUN_DIR=str(tmp_path))
    assert explained.returncode == 0 and "DRY_RUN=1" in explained.stdout
    refused = bash(f"{run} nonsense", RUN_DIR=str(tmp_path))
    assert refused.returncode == 2 and "no stage 'nonsense'" in refused.stderr


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_prints_every_command_and_runs_none(recipe: str, tmp_path: Path) -> None:
    environment = {"DRY_RUN": "1", "PYTHON": "/nowhere/python", "RUN_DIR": str(tmp_path / "run")}
    done = bash(f"bash recipes/{recipe}/run.sh", **environment, RL_STEPS="")  # where RL is optional too
    assert done.returncode == 0, done.stderr
    for command in ("sft_jsonl", "rl_parquet", "swift", "main_ppo", "for_verl.merge", "eval.infer", "eval.score"):
        assert command in done.stdout, f"{command} is not in the commands that were printed"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_rl_the_model_of_stage_1_is_scored(recipe: str, tmp_path: Path) -> None:
    environment = {"DRY_RUN": "1", "PYTHON": "/nowhere/python", "RUN_DIR": str(tmp_path / "run"), "RL_STEPS": "0"}
    done = bash(f"bash recipes/{recipe}/run.sh", **environment)
    assert done.returncode == 0 and done.stderr.count("left out, RL_STEPS=0") == 2, done.stderr
    assert "main_ppo" not in done.stdout and "for_verl.merge" not in done.stdout
    scored = done.stdout.partition("# stage infer")[2]
    assert f"--model {tmp_path}/run/sft/last" in scored and "eval.score" in scored


def test_a_printed_command_can_be_pasted() -> None:
    words = ["a b", "x=[1, 2]", "it's", "$HOME", "+a.b={audio: 8}", "", "~/x"]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    printed = bash(f"source script/common.sh; DRY_RUN=1; run printf '<%s>\\n' {quoted}").stdout
    assert bash(printed).stdout == "".join(f"<{word}>\n" for word in words)
