"""Two real steps of each kind of RL that a setting chooses: GSPO with token weights and filtered groups, LoRA, and
rollouts that run ahead of the update; and of a model whose layers have experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.rl_parquet import main as rl_parquet
from echo_plugins.for_verl.merge import merge

ROOT = Path(__file__).resolve().parents[2]
# A random model answers nothing right: what differs between its rollouts is how many words they have.
PRESET = "terms: {accuracy: 1.0, mine.py:brevity: {weight: 1.0}}\n"
TERM = "def brevity(record) -> float:\n    return 1.0 / (1 + len(record.text))\n"

pytestmark = pytest.mark.timeout(900)


def two_steps(model: Path, soundscapes: Path, folder: Path, **settings: str) -> dict[int, dict[str, float]]:
    """The metrics of each step of a run in `folder`/out. `val` runs after the last."""
    rows = folder / "rl.parquet"
    rl_parquet(soundscapes / "rl.jsonl", rows, audio_root=soundscapes, model=model, workers=1)
    (folder / "mine.py").write_text(TERM)
    (folder / "mine.yaml").write_text(PRESET)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("VERL_", "RAY_", "RL_"))},
        **{"MODEL": str(model), "TRAIN_FILE": str(rows), "VAL_FILE": str(rows), "OUTPUT_DIR": str(folder / "out")},
        **{"DEVICE": "cpu", "RL_STEPS": "2", "RL_BATCH_SIZE": "4", "RL_MINI_BATCH": "4", "RL_GROUP": "2"},
        **{"RL_MAX_PROMPT": "512", "RL_MAX_RESPONSE": "96", "RL_TEST_FREQ": "-1", "RL_SAVE_FREQ": "2", "RL_LR": "1e-3"},
        **{"REWARD_PRESET": str(folder / "mine.yaml"), "PYTHON": sys.executable, **settings},
    }
    done = subprocess.run(
        ["bash", str(ROOT / "script" / "stage2_multiturn_rl.sh")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["data"] for line in lines}


def test_gspo_with_token_weights_over_filtered_groups(tiny_model: Path, soundscapes: Path, tmp_path: Path) -> None:
    settings = {"RL_LOSS": "gspo", "RL_LOSS_AGG": "seq-mean-token-mean", "RL_CLIP_LOW": "3e-4", "RL_CLIP_HIGH": "4e-4"}
    metrics = two_steps(tiny_model, soundscapes, tmp_path, RL_FILTER_GROUPS="True", RL_TIS="2.0", RL_KL="0", **settings)
    for step in (1, 2):
        assert metrics[step]["groups/equal"] == 0.0, "questions without a difference are replaced"
        assert metrics[step]["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=1e-3)
        assert metrics[step]["actor/grad_norm"] > 0 and "actor/kl_loss" not in metrics[step]


def test_lora_trains_an_adapter_that_merge_takes(tiny_model: Path, soundscapes: Path, tmp_path: Path) -> None:
    metrics = two_steps(tiny_model, soundscapes, tmp_path, RL_LORA_RANK="4", RL_KEEP_BEST="1", RL_TEST_FREQ="2")
    # The engine takes the merged weights in bfloat16 (verl, transformer_impl.py, _merged_lora_per_tensor_param).
    assert metrics[2]["training/rollout_probs_diff_max"] < 0.05 and metrics[2]["actor/grad_norm"] > 0
    merge(tmp_path / "out", tiny_model, tmp_path / "merged", best=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".layers." in name and name.endswith("_proj.weight") for name in changed)
    assert all(name.startswith("thinker.model.") for name in changed), "the towers have no adapter"
    actor = torch.load(tmp_path / "out/global_step_2/actor/model_world_size_1_rank_0.pt", weights_only=False)
    layer = "thinker.model.layers.0.self_attn.q_proj"
    base, down, up = (
        actor[f"base_model.model.{layer}.{part}.weight"].to_local()
        for part in ("base_layer", "lora_A.default", "lora_B.default")
    )
    assert torch.allclose(after[f"{layer}.weight"].float(), base + 32 / 4 * up @ down, atol=1e-6)


def test_rollouts_that_run_ahead_of_the_update(tiny_model: Path, soundscapes: Path, tmp_path: Path) -> None:
    metrics = two_steps(tiny_model, soundscapes, tmp_path, RL_ASYNC="1", RL_KL="0")
    for step in (1, 2):
        assert metrics[step]["actor/grad_norm"] > 0 and metrics[step]["failed/share"] == 0.0
    assert (tmp_path / "out" / "global_step_2" / "transfer_queue").exists(), "what was begun is kept for the next start"
    assert len((tmp_path / "out" / "trajectories" / "2.jsonl").read_text().splitlines()) == 8


@pytest.mark.skipif("ECHO_TEST_ALL" not in os.environ, reason="a minute, and what is new in it is tested apart")
def test_lora_of_a_model_with_experts(tiny_qwen3: Path, soundscapes: Path, tmp_path: Path) -> None:
    metrics = two_steps(tiny_qwen3, soundscapes, tmp_path, RL_LORA_RANK="4")
    assert metrics[2]["training/rollout_probs_diff_max"] < 0.05 and metrics[2]["actor/grad_norm"] > 0
    merge(tmp_path / "out", tiny_qwen3, tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_qwen3, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("thinker.model.layers.") for name in changed), "the towers have no adapter"


def test_a_model_with_experts(tiny_qwen3: Path, soundscapes: Path, tmp_path: Path) -> None:
    metrics = two_steps(tiny_qwen3, soundscapes, tmp_path)
    for step in (1, 2):  # the second has rollouts of weights that the engine was sent after an update
        assert metrics[step]["training/rollout_probs_diff_max"] < 1e-4
        assert metrics[step]["actor/grad_norm"] > 0 and metrics[step]["failed/share"] == 0.0
    actor = torch.load(tmp_path / "out/global_step_2/actor/model_world_size_1_rank_0.pt", weights_only=False)
    before = load_file(tiny_qwen3 / "model.safetensors")
    layer = "thinker.model.layers.0.mlp.experts"
    trained = actor[f"{layer}.down_proj"].to_local()
    assert any(not torch.equal(trained[i], before[f"{layer}.{i}.down_proj.weight"]) for i in range(len(trained)))
    frozen = [name for name in actor if name.startswith(("thinker.audio_tower.", "thinker.visual."))]
    assert frozen and all(torch.equal(actor[name].to_local(), before[name]) for name in frozen)
