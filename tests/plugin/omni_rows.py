"""Training rows for tests: a prompt, and a response that mixes text and clips, as the actor gets them from a rollout;
and a short training on such rows, after which a random model names segments."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
from verl.utils.model import extract_multi_modal_inputs, get_hf_auto_model_class
from verl.utils.tokenizer import hf_processor

from echo_plugins.for_verl.omni import pack_clips
from echo_plugins.model import family_of, hop_length

WARM_STEPS, WARM_ROWS = 80, 48


class Row:
    """`ids` and `mask` (1: sampled) of shape (tokens,), `positions` (4, tokens) as verl's worker makes them, `inputs`:
    the features of every clip. A part is text, or the samples of a clip."""

    def __init__(
        self, model_dir: Path, processor: Any, prompt: Sequence[str | np.ndarray], response: Sequence[str | np.ndarray]
    ) -> None:
        family, hop, tokenizer = family_of(model_dir), hop_length(model_dir), processor.tokenizer
        audio, bos, eos = (
            tokenizer.convert_tokens_to_ids(token)
            for token in (family.audio_token, family.audio_bos_token, family.audio_eos_token)
        )
        ids: list[int] = []
        mask: list[int] = []
        clips: list[np.ndarray] = []
        for number, part in enumerate([*prompt, *response]):
            if isinstance(part, str):
                added = tokenizer.encode(part)
            else:
                clips.append(part)
                added = [bos, *[audio] * family.num_audio_tokens(len(part), hop), eos]
            ids += added
            mask += [int(number >= len(prompt) and isinstance(part, str))] * len(added)
        self.ids, self.mask = torch.tensor(ids), torch.tensor(mask)
        self.inputs: dict[str, torch.Tensor] = {}
        if clips:
            features = processor.feature_extractor(clips, sampling_rate=16_000, return_tensors="pt")
            self.inputs = pack_clips(features["input_features"], features["attention_mask"])
        worker: Any = SimpleNamespace(processor=processor)
        ones = torch.ones_like(self.ids)
        self.positions = AgentLoopWorker._compute_position_ids(worker, self.ids[None], ones[None], dict(self.inputs))[0]


def load_actor(model_dir: Path) -> Any:
    """The model as verl's actor loads it."""
    config = AutoConfig.from_pretrained(model_dir)
    auto_class: Any = get_hf_auto_model_class(config)
    return auto_class.from_pretrained(model_dir, config=config, attn_implementation="sdpa", dtype=torch.float32)


def packed_logits(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Logits (tokens, vocabulary) of all rows in one sequence without a mask, as use_remove_padding runs them."""
    return model(
        input_ids=torch.cat([row.ids for row in rows])[None],
        position_ids=torch.cat([row.positions for row in rows], dim=1)[:, None],
        attention_mask=None,
        use_cache=False,
        **extract_multi_modal_inputs([row.inputs for row in rows]),
    ).logits[0]


def warm(model_dir: Path, warmed: Path, prompts: Sequence[Sequence[str | np.ndarray]]) -> Path:
    """Train the model in `model_dir` to answer prompts in the form of the protocol, with segments of the prompt's clip
    and one of the answers A and B drawn at random, and write it to `warmed`. A prompt without a clip: no segment."""
    processor = hf_processor(str(model_dir))
    random = np.random.default_rng(0)
    rows = []
    for _ in range(WARM_ROWS):
        prompt = prompts[int(random.integers(len(prompts)))]
        response: list[str | np.ndarray] = ["<think>In"]
        for waveform in prompt:
            if not isinstance(waveform, str):
                start = random.integers(0, 6) / 4
                end = start + random.integers(2, 5) / 4
                response += [f" <seg>{start:.2f}, {end:.2f}</seg>", waveform[int(start * 16_000) : int(end * 16_000)]]
        response.append(f" there is.</think><answer>{random.choice(['A', 'B'])}</answer><|im_end|>")
        rows.append(Row(model_dir, processor, prompt, response))
    model = load_actor(model_dir)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for _ in range(WARM_STEPS):
        batch = [rows[index] for index in random.choice(WARM_ROWS, 4, replace=False)]
        labels = torch.cat([torch.where(row.mask.bool(), row.ids, -100) for row in batch])
        loss = torch.nn.functional.cross_entropy(packed_logits(model, batch)[:-1], labels[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    shutil.copytree(model_dir, warmed)
    model.save_pretrained(warmed)
    return warmed
