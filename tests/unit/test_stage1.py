"""The arithmetic and the refusals of script/stage1_ground_reason.sh, in dry runs."""

import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "script" / "stage1_ground_reason.sh"


def dry_run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    places = {"MODEL": "model", "TRAIN_FILE": "rows.jsonl", "OUTPUT_DIR": "out", "DRY_RUN": "1"}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **places, **settings},
        check=False,
    )


def flags(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout[done.stdout.index(" sft") :].replace("\\\n", " "))
    return {name: value for name, value in pairwise(words) if name.startswith("--")}


@pytest.mark.parametrize(
    ("device", "gpus", "nodes", "micro", "accumulated"),
    [
        ("cpu", "8", "1", "1", "16"),
        ("cpu", "8", "1", "16", "1"),
        ("cuda", "1", "1", "4", "4"),
        ("cuda", "8", "1", "1", "2"),
        ("cuda", "4", "2", "2", "1"),
    ],
)
def test_the_batch_is_the_same_on_any_number_of_gpus(
    device: str, gpus: str, nodes: str, micro: str, accumulated: str
) -> None:
    settings = {"DEVICE": device, "NUM_GPUS": gpus, "NUM_NODES": nodes, "NODE_LAUNCHER": "srun"}
    done = dry_run(SFT_MICRO_BATCH=micro, SFT_BATCH_SIZE="16", **settings)
    assert flags(done)["--per_device_train_batch_size"] == micro
    assert flags(done)["--gradient_accumulation_steps"] == accumulated


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"NUM_GPUS": "3", "SFT_BATCH_SIZE": "16"}, "SFT_BATCH_SIZE=16"),
        ({"NUM_GPUS": "0"}, "DEVICE=cpu"),
        ({"DEVICE": "tpu"}, "tpu"),
        ({"NNODES": "2"}, "NUM_NODES"),
        ({"NUM_NODES": "2"}, "NODE_LAUNCHER"),
        ({"SFT_TUNER": "qlora"}, "qlora"),
        ({"SFT_TUNER": "lora", "SFT_FREEZE_AUDIO": "false"}, "SFT_FREEZE_AUDIO"),
        ({"SFT_FREEZE_AUDIO": "yes"}, "yes"),
        ({"SFT_CLIP": "silence"}, "own, random, silent or shuffled"),
        ({"SFT_CLIP": "silent", "SFT_MODE": "grounded"}, "Use SFT_MODE=interleaved or SFT_CLIP=own"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, str], told: str) -> None:
    done = dry_run(**settings)
    assert done.returncode == 2
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["MODEL", "TRAIN_FILE", "OUTPUT_DIR"])
def test_a_place_that_is_not_given_is_asked_for(name: str) -> None:
    done = dry_run(**{name: ""})
    assert done.returncode != 0
    assert name in done.stderr


def test_words_go_on_to_ms_swift_and_come_last() -> None:
    done = dry_run("--learning_rate", "1e-4", "--packing", "true", SFT_LR="5e-6")
    assert flags(done)["--learning_rate"] == "1e-4"
    assert done.stdout.rstrip().endswith("true")


@pytest.mark.parametrize("mode", ["interleaved", "interleaved=50,plain=50"])
def test_the_sound_behind_the_tags_reaches_ms_swift_and_the_check_of_the_rows(mode: str) -> None:
    done = dry_run(SFT_CLIP="random", SFT_MODE=mode)
    check, swift = done.stdout[: done.stdout.index(" sft")], done.stdout
    assert "--clip random" in check and swift.count("SFT_CLIP=random") == 2
    assert "SFT_CLIP=own" in dry_run(SFT_MODE="grounded").stdout


def test_the_audio_tower_is_frozen_unless_asked() -> None:
    frozen = flags(dry_run())
    assert (frozen["--freeze_vit"], frozen["--freeze_aligner"]) == ("true", "true")
    assert "--trainable_parameters" not in frozen
    assert flags(dry_run(SFT_FREEZE_AUDIO="false"))["--trainable_parameters"] == "thinker.audio_tower"


def test_help_is_for_a_stranger() -> None:
    done = dry_run("--help")
    assert done.returncode == 0 and "OUTPUT_DIR/last" in done.stdout
