"""script/stage2_multiturn_rl.sh up to the command that it runs. Hydra composes verl's configuration from it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from echo_plugins.for_verl.trainer import LogSettings

STAGE = Path(__file__).resolve().parents[2] / "script" / "stage2_multiturn_rl.sh"
GIVEN = {"MODEL": "model", "TRAIN_FILE": "train.parquet", "VAL_FILE": "val.parquet", "OUTPUT_DIR": "out"}


def stage(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("RL_", "RAY_", "VERL_", "WANDB_"))
    }
    values = {**clean, "PYTHON": sys.executable, "DRY_RUN": "1", **environment}
    return subprocess.run(["bash", str(STAGE), *words], capture_output=True, text=True, env=values, check=False)


def configuration(*words: str, **environment: str) -> Any:
    """verl's configuration as the stage's command sets it."""
    done = stage(*words, **{**GIVEN, **environment})
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout.replace("\\\n", " "))
    overrides = command[command.index("verl.trainer.main_ppo") + 1 :]
    found = importlib.util.find_spec("verl")
    assert found is not None and found.origin is not None
    with initialize_config_dir(str(Path(found.origin).parent / "trainer" / "config"), version_base=None):
        return compose("ppo_trainer", overrides=[word for word in overrides if not word.startswith("hydra.")])


def test_the_defaults_are_the_papers() -> None:
    config = configuration()
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.algorithm.adv_estimator == "grpo" and not config.algorithm.use_kl_in_reward
    assert (actor.use_kl_loss, actor.kl_loss_coef, actor.kl_loss_type) == (True, 0.04, "low_var_kl")
    assert (actor.optim.lr, config.data.train_batch_size, actor.ppo_mini_batch_size) == (1e-6, 64, 32)
    assert (rollout.n, rollout.temperature, config.trainer.total_epochs) == (8, 1.0, 1)
    assert config.trainer.total_training_steps is None
    assert config.actor_rollout_ref.model.use_remove_padding and config.trainer.resume_mode == "auto"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_paths_with_blanks_brackets_and_quotes_arrive_as_they_are(device: str, tmp_path: Path) -> None:
    folder = tmp_path / "my data, (v2) [x]=it's"
    places = {"MODEL": str(folder / "m"), "TRAIN_FILE": str(folder / "t"), "OUTPUT_DIR": str(folder / "o")}
    config = configuration(DEVICE=device, **places)
    assert config.actor_rollout_ref.model.path == places["MODEL"]
    assert config.data.train_files == places["TRAIN_FILE"]
    assert config.trainer.default_local_dir == places["OUTPUT_DIR"]


def test_a_cpu_differs_from_a_gpu_in_numbers_and_devices_only() -> None:
    cpu, cuda = configuration(DEVICE="cpu", RL_WORKERS="2"), configuration()
    assert (cpu.trainer.device, cpu.trainer.n_gpus_per_node) == ("cpu", 2)
    assert cuda.trainer.n_gpus_per_node == 8
    for name in ("data", "algorithm", "echo"):
        assert cpu[name] == cuda[name]
    for role in ("actor", "ref"):
        assert cpu.actor_rollout_ref[role].strategy == cuda.actor_rollout_ref[role].strategy == "fsdp2"
    for config in (cpu, cuda):
        assert config.trainer.v1.trainer_mode == "echo_sync"
        assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "relisten"
        assert config.actor_rollout_ref.rollout.calculate_log_probs


def test_what_people_set_in_grpo_reaches_verl() -> None:
    plain = configuration(DEVICE="cpu")
    assert plain.actor_rollout_ref.actor.entropy_from_logits_with_chunking
    assert plain.algorithm.rollout_correction.rollout_is is None and not plain.algorithm.filter_groups.enable
    config = configuration(
        DEVICE="cpu",
        RL_LOSS="gspo",
        RL_LOSS_AGG="seq-mean-token-mean",
        RL_CLIP_LOW="3e-4",
        RL_CLIP_HIGH="4e-4",
        RL_NORM_ADV="False",
        RL_ENTROPY="0.001",
        RL_GRAD_CLIP="0.5",
        RL_LR_SCHEDULER="cosine",
        RL_WEIGHT_DECAY="0.1",
        RL_TIS="2.0",
        RL_BYPASS="True",
        RL_FILTER_GROUPS="True",
        RL_KL="0",
        RL_MAX_FAILED="0.25",
    )
    actor, correction = config.actor_rollout_ref.actor, config.algorithm.rollout_correction
    assert (actor.policy_loss.loss_mode, actor.loss_agg_mode) == ("gspo", "seq-mean-token-mean")
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.grad_clip) == (3e-4, 4e-4, 0.5)
    assert (actor.entropy_coeff, actor.optim.lr_scheduler_type, actor.optim.weight_decay) == (0.001, "cosine", 0.1)
    assert not actor.use_kl_loss and not config.algorithm.norm_adv_by_std_in_grpo
    assert (correction.rollout_is, correction.rollout_is_threshold, correction.bypass_mode) == ("token", 2.0, True)
    assert config.algorithm.filter_groups.enable and config.echo.max_failed_share == 0.25


def test_lora_the_asynchronous_trainer_and_a_single_validation_reach_verl() -> None:
    plain = configuration(DEVICE="cpu")
    assert plain.actor_rollout_ref.model.lora_rank == 0 and not plain.trainer.val_only
    config = configuration(
        DEVICE="cpu", RL_LORA_RANK="16", RL_ASYNC="1", RL_VAL_ONLY="1", RL_TEST_FREQ="-1", RL_KEEP_BEST="1"
    )
    model = config.actor_rollout_ref.model
    assert (model.lora_rank, model.lora_alpha, model.lora.merge) == (16, 32, True)
    layers = re.compile(model.target_modules)
    assert layers.fullmatch("thinker.model.layers.27.self_attn.q_proj")
    assert not layers.fullmatch("thinker.audio_tower.layers.0.self_attn.q_proj"), "the towers have no adapter"
    assert config.trainer.v1.trainer_mode == "echo_async"
    assert config.trainer.val_only and config.trainer.val_before_train and config.echo.keep_best


def test_words_at_the_end_and_rl_args_have_the_last_say() -> None:
    config = configuration("trainer.save_freq=7", RL_ARGS="trainer.test_freq=5 data.shuffle=False", RL_SAVE_FREQ="3")
    assert (config.trainer.save_freq, config.trainer.test_freq, config.data.shuffle) == (7, 5, False)


def test_steps_decide_when_they_are_given() -> None:
    config = configuration(RL_STEPS="12")
    assert config.trainer.total_training_steps == 12 and config.trainer.total_epochs >= 12


def test_verls_trackers_are_passed_through_beside_console_and_file(tmp_path: Path) -> None:
    assert list(configuration().trainer.logger) == ["console", "file"]
    for given in ("tensorboard,wandb", "tensorboard wandb", " tensorboard, wandb "):
        assert list(configuration(TRACKERS=given).trainer.logger) == ["console", "file", "tensorboard", "wandb"]
    sent = dict(configuration(OUTPUT_DIR=str(tmp_path)).ray_kwargs.ray_init.runtime_env.env_vars)
    assert sent["VERL_FILE_LOGGER_PATH"] == str(tmp_path / "metrics.jsonl")
    assert (sent["TENSORBOARD_DIR"], sent["WANDB_DIR"]) == (str(tmp_path / "tensorboard"), str(tmp_path))
    assert sent["WANDB_MODE"] == "offline"
    assert configuration(WANDB_MODE="online").ray_kwargs.ray_init.runtime_env.env_vars.WANDB_MODE == "online"


def test_the_trajectory_log_has_its_settings(tmp_path: Path) -> None:
    assert LogSettings.from_config(configuration()) == LogSettings(shown=8)
    given = configuration(TRAJECTORY_ROWS="32", TRAJECTORY_MEGABYTES="0.5", TRAJECTORY_IDS="True")
    assert LogSettings.from_config(given) == LogSettings(32, 0.5, True, 8)
    config = configuration(OUTPUT_DIR=str(tmp_path))
    assert config.trainer.rollout_data_dir == str(tmp_path / "trajectories")
    assert config.trainer.validation_data_dir == str(tmp_path / "validation")


def test_a_preset_is_named_or_a_file_from_wherever_the_run_is_started() -> None:
    assert configuration(REWARD_PRESET="quota-2").reward.reward_kwargs.preset == "quota-2"
    here = configuration(REWARD_PRESET="my rewards/short.yaml").reward.reward_kwargs.preset
    assert here == str(Path.cwd() / "my rewards" / "short.yaml")


def test_a_wrong_preset_ends_the_stage_before_its_slow_start(tmp_path: Path) -> None:
    given = {name: str(tmp_path / name.lower()) for name in GIVEN}
    for name in ("MODEL", "TRAIN_FILE", "VAL_FILE"):
        Path(given[name]).touch()
    (tmp_path / "mine.yaml").write_text("terms: {accuracy: much}\n")
    done = stage(**{**given, "DRY_RUN": "0", "REWARD_PRESET": str(tmp_path / "mine.yaml")})
    assert done.returncode == 1 and "weight of accuracy is 'much'" in " ".join(done.stderr.replace("│", "").split())
    assert "mine.yaml cannot be used" in done.stderr and not Path(given["OUTPUT_DIR"]).exists()


def test_a_run_starts_its_own_ray_unless_it_is_sent_to_a_cluster() -> None:
    own, sent = configuration(), configuration(RAY_ADDRESS="10.0.0.1:6379")
    assert own.ray_kwargs.ray_init.address == "local"
    assert len(f"{own.ray_kwargs.ray_init._temp_dir}/session_2026-11-21_23-14-15_950000_12345/sockets/raylet") < 100
    assert "address" not in sent.ray_kwargs.ray_init and "_temp_dir" not in sent.ray_kwargs.ray_init
    assert own.ray_kwargs.ray_init._temp_dir != configuration(OUTPUT_DIR="other").ray_kwargs.ray_init._temp_dir


def test_what_is_missing_is_named() -> None:
    done = stage(**{name: value for name, value in GIVEN.items() if name != "MODEL"})
    assert done.returncode != 0 and "MODEL: is the model directory to start from" in done.stderr
    done = stage(**{**GIVEN, "DRY_RUN": "0", "MODEL": "/nowhere"})
    assert done.returncode == 1 and "/nowhere does not exist. Run script/stage1" in done.stderr


def test_help_says_what_to_give() -> None:
    done = stage("--help")
    assert (
        done.returncode == 0
        and "TRAIN_FILE=rl.parquet" in done.stdout
        and "RL_GROUP=8" in done.stdout
        and "set -euo" not in done.stdout
    )
