"""Seconds and peak memory of a training step of an Omni thinker with random weights, on a GPU or a CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from echo_plugins.model import QWEN2_5_OMNI

FRAMES = 1_000  # 10 s of sound


@dataclass(frozen=True)
class Measured:
    """A forward and a backward pass with gradient checkpointing; no optimizer step."""

    parameters: float
    trained: float
    seconds: float
    peak_bytes: float
    loss: float


def training_step(config: Any, device: str, num_tokens: int, attention: str = "sdpa") -> Measured:
    """Of `num_tokens` tokens, 10 s of sound among them: the second of two steps. Both towers are frozen. `config` is a
    Qwen2_5OmniThinkerConfig."""
    config._attn_implementation = attention
    on_gpu = device == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        model_class: Any = Qwen2_5OmniThinkerForConditionalGeneration
        model = model_class._from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
        num_audio = QWEN2_5_OMNI.tokens_of_frames(FRAMES)
        ids = torch.randint(0, min(1_000, config.text_config.vocab_size - 1), (1, num_tokens))
        ids[0, 8 : 8 + num_audio] = config.audio_token_id
        features = torch.randn(1, config.audio_config.num_mel_bins, FRAMES).to(model.dtype)
        mask = torch.ones(1, FRAMES, dtype=torch.long)
    model.audio_tower.requires_grad_(False)
    model.visual.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    seconds = loss = 0.0
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        output = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features,
            feature_attention_mask=mask,
            labels=ids.masked_fill(ids == config.audio_token_id, -100),
            use_cache=False,
        )
        output.loss.backward()
        loss = float(output.loss.detach())
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    parameters = [parameter.numel() for parameter in model.parameters()]
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0.0
    return Measured(sum(parameters), sum(trained), seconds, peak, loss)


def as_table(card: str, date: str, rows: Mapping[str, Measured]) -> str:
    """Markdown, for recipes/echo-7b/README.md."""
    lines = [f"{card}, {date}:", "", "| | parameters | trained | seconds | peak GB |", "|---|---:|---:|---:|---:|"]
    for name, row in rows.items():
        billions = f"{row.parameters / 1e9:.2f} B | {row.trained / 1e9:.2f} B"
        lines.append(f"| {name} | {billions} | {row.seconds:.2f} | {row.peak_bytes / 1e9:.1f} |")
    return "\n".join(lines)
