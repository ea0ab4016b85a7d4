"""What only a GPU can show: bash script/test.sh gpu. Ten minutes on one card; skipped where there is none.

The last test prints a table for recipes/echo-7b/README.md (pytest -s).
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_measure import as_table, training_step
from transformers import AutoProcessor, Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from echo_plugins.audio import pad_to_longest
from echo_plugins.model import QWEN2_5_OMNI

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.timeout(1200),
]
FLASH = find_spec("flash_attn") is not None


def log_probs(model_dir: Path, dtype: torch.dtype, attention: str) -> torch.Tensor:
    """Of the next tokens of a prompt with 3 s of noise, (tokens,), in float32 on the CPU."""
    processor: Any = AutoProcessor.from_pretrained(model_dir)
    pad_to_longest(processor.feature_extractor, QWEN2_5_OMNI)
    message: Any = [
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "How many sounds are there?"}]}
    ]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    sound = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    inputs = processor(text=[text], audio=[sound], sampling_rate=16_000, return_tensors="pt").to("cuda")
    inputs["input_features"] = inputs["input_features"].to(dtype)
    model: Any = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        model_dir, dtype=dtype, attn_implementation=attention
    )
    with torch.no_grad():
        logits = model.to("cuda")(**inputs, use_cache=False).logits[0, :-1].float()
    chosen = inputs["input_ids"][0, 1:]
    return logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu()


def test_log_probs_in_bf16_are_those_in_fp32_within_its_digits(tiny_model: Path) -> None:
    exact = log_probs(tiny_model, torch.float32, "sdpa")
    assert (log_probs(tiny_model, torch.bfloat16, "sdpa") - exact).abs().max() < 0.1


@pytest.mark.skipif(not FLASH, reason="flash_attn is not installed")
def test_flash_attention_gives_what_sdpa_gives(tiny_model: Path) -> None:
    sdpa = log_probs(tiny_model, torch.bfloat16, "sdpa")
    assert (log_probs(tiny_model, torch.bfloat16, "flash_attention_2") - sdpa).abs().max() < 0.1


def test_the_chain_runs_on_the_gpu_and_engine_and_actor_agree(tmp_path: Path) -> None:
    settings = {"QUICK": "1", "DEVICE": "cuda", "NUM_GPUS": "1", "RL_BYPASS": "False", "RL_GPU_MEMORY": "0.3"}
    environment = {**os.environ, **settings, "RUN_DIR": str(tmp_path / "run"), "VERBOSE": "1"}
    command = ["bash", str(ROOT / "recipes" / "tiny-cpu" / "run.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    lines = [json.loads(line)["data"] for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "training/rollout_probs_diff_mean" in line]
    assert len(steps) == 2
    for step in steps:
        assert step["training/rollout_probs_diff_mean"] < 0.01 and step["perf/mfu/actor"] > 0
        print({name: value for name, value in step.items() if name.startswith(("timing_s/", "perf/"))})


def test_a_step_of_a_7b_model_is_measured() -> None:
    config: Any = Qwen2_5OmniThinkerConfig()  # transformers' defaults are the 7B's shape
    assert config.text_config.hidden_size == 3584
    rows = {"SFT step, 1,024 tokens, sdpa": training_step(config, "cuda", 1_024)}
    rows["SFT step, 4,096 tokens, sdpa"] = training_step(config, "cuda", 4_096)
    if FLASH:
        rows["SFT step, 4,096 tokens, flash"] = training_step(config, "cuda", 4_096, "flash_attention_2")
    print("\n" + as_table(torch.cuda.get_device_name(), str(datetime.date.today()), rows))
    for row in rows.values():
        assert row.parameters > 8e9 and row.peak_bytes < torch.cuda.get_device_properties(0).total_memory
