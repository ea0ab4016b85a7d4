"""What a recipe's dry run prints is taken by the frameworks themselves: every Hydra override by verl, every flag by
ms-swift, with the recipe's numbers in the right places."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.parent.name for path in ROOT.glob("recipes/*/run.sh"))

# Reads the arguments as `swift sft` does; the remaining words are those that it would not know.
SWIFT_PARSE = """
import json, sys
from swift.arguments import SftArguments
from swift.utils import parse_args
arguments, unknown = parse_args(SftArguments, sys.argv[1:])
fields = {name: value if isinstance(value, (str, int, float)) else None for name, value in vars(arguments).items()}
print("PARSED" + json.dumps({"unknown": unknown, "fields": fields}))
"""


def dry_run(recipe: str, stage: str, **environment: str) -> list[list[str]]:
    """The words of every command that a stage of the recipe would run."""
    values = {**os.environ, "DRY_RUN": "1", "PYTHON": sys.executable, **environment}
    command = ["bash", str(ROOT / "recipes" / recipe / "run.sh"), stage]
    done = subprocess.run(command, capture_output=True, text=True, env=values, check=True)
    printed = done.stdout.replace(" \\\n  ", " ").split("\n")
    return [shlex.split(line) for line in printed if line and not line.startswith("#")]


def find(commands: list[list[str]], word: str) -> list[str]:
    (command,) = [command for command in commands if word in command]
    return command


@pytest.mark.parametrize("recipe", RECIPES)
def test_verl_composes_its_configuration_with_every_override(recipe: str, tmp_path: Path) -> None:
    # Empty, for the recipe whose RL is optional.
    command = find(dry_run(recipe, "rl", RUN_DIR=str(tmp_path), RL_STEPS=""), "verl.trainer.main_ppo")
    done = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    config = yaml.safe_load(done.stdout[done.stdout.index("actor_rollout_ref:") :])
    assert config["algorithm"]["adv_estimator"] == "grpo"
    assert config["actor_rollout_ref"]["model"]["path"] == str(tmp_path / "sft" / "last")
    assert config["trainer"]["default_local_dir"] == str(tmp_path / "rl")
    assert config["trainer"]["resume_mode"] == "auto"
    if recipe == "echo-7b":
        actor, rollout = config["actor_rollout_ref"]["actor"], config["actor_rollout_ref"]["rollout"]
        assert (actor["optim"]["lr"], actor["kl_loss_coef"], actor["kl_loss_type"]) == (1e-6, 0.04, "low_var_kl")
        assert (config["data"]["train_batch_size"], actor["ppo_mini_batch_size"], rollout["n"]) == (64, 32, 8)
        assert (rollout["temperature"], config["trainer"]["n_gpus_per_node"]) == (1.0, 8)
    if recipe == "cogito-30b-lora":
        actor, model = config["actor_rollout_ref"]["actor"], config["actor_rollout_ref"]["model"]
        assert (actor["policy_loss"]["loss_mode"], actor["clip_ratio_low"], actor["clip_ratio_high"]) == (
            "gspo",
            3e-4,
            4e-4,
        )
        assert (model["lora_rank"], model["lora_alpha"]) == (32, 64)


@pytest.mark.parametrize("recipe", RECIPES)
def test_ms_swift_knows_every_flag(recipe: str, tmp_path: Path, tiny_model: Path) -> None:
    """The tiny model and float32 stand in for what needs a download or a GPU; DeepSpeed is only in the GPU set."""
    places = {"RUN_DIR": str(tmp_path), "BASE_MODEL": str(tiny_model), "SFT_DTYPE": "float32"}
    command = find(dry_run(recipe, "sft", **places), "sft")
    words = command[command.index("sft") + 1 :]
    if "--deepspeed" in words:
        place = words.index("--deepspeed")
        assert words[place + 1] == ("zero3" if recipe == "cogito-30b-lora" else "zero2")
        del words[place : place + 2]
    values = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    reading = [sys.executable, "-c", SWIFT_PARSE, *words]
    done = subprocess.run(reading, capture_output=True, text=True, env=values, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    parsed = json.loads(done.stdout[done.stdout.index("PARSED") + len("PARSED") :])
    fields = parsed["fields"]
    assert parsed["unknown"] == [] and "deepspeed" in fields
    if recipe == "echo-7b":
        batch = fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"] * 8
        assert (fields["learning_rate"], fields["num_train_epochs"], batch) == (5e-6, 1, 16)
        assert (fields["warmup_ratio"], fields["freeze_vit"], fields["tuner_type"]) == (0.05, True, "full")
    if recipe == "cogito-30b-lora":
        assert (fields["learning_rate"], fields["num_train_epochs"], fields["tuner_type"]) == (1e-5, 1, "lora")
