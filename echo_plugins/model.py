"""What differs between the Omni families: special tokens by text, audio tokens per second, the checkpoint's layout.

Read from a checkpoint's own files; transformers is never imported here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .relisten.trajectory import SpecialIds

_WHISPER_SECONDS = 30  # `chunk_length` of transformers' WhisperFeatureExtractor where a checkpoint does not say
MAX_AUDIO_SECONDS = 300  # the public checkpoints' feature window; what is longer they cut off without a word


def _qwen2_5_tokens(num_frames: int) -> int:
    # transformers, modeling_qwen2_5_omni: _get_feat_extract_output_lengths (convolution stride 2, then pooling by 2)
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def _qwen3_tokens(num_frames: int) -> int:
    # transformers, modeling_qwen3_omni_moe: _get_feat_extract_output_lengths (13 tokens a block of 100 frames)
    rest = num_frames % 100
    halved = (rest - 1) // 2 + 1
    return ((halved - 1) // 2 + 1 - 1) // 2 + 1 + num_frames // 100 * 13


@dataclass(frozen=True)
class OmniFamily:
    """One family of models. `banned_tokens` may never be sampled: each would claim media that is not there."""

    model_type: str
    audio_token: str
    audio_bos_token: str
    audio_eos_token: str
    banned_tokens: tuple[str, ...]
    tokens_of_frames: Callable[[int], int]

    @property
    def audio_placeholder(self) -> str:
        """One clip in a prompt, as the engine takes it."""
        return self.audio_bos_token + self.audio_token + self.audio_eos_token

    def num_audio_tokens(self, num_samples: int, hop_length: int = 160) -> int:
        """Audio tokens of a clip of `num_samples`, from the model's own length formula; 0 when too short for one."""
        num_frames = -(-num_samples // hop_length)
        return max(0, self.tokens_of_frames(num_frames)) if num_frames else 0

    def special_ids(self, tokenizer: Any, model_dir: str | Path) -> SpecialIds:
        """The ids of the audio tokens, and the ids that end a message: the tokenizer's eos and the generation config's.

        Raises ValueError when the tokenizer lacks one of the texts.
        """
        audio, bos, eos = (
            self._id(tokenizer, text) for text in (self.audio_token, self.audio_bos_token, self.audio_eos_token)
        )
        return SpecialIds(audio, bos, eos, frozenset({tokenizer.eos_token_id, *_generation_eos_ids(Path(model_dir))}))

    def banned_ids(self, tokenizer: Any, vocab_size: int) -> list[int]:
        """What may never be sampled, in rollout, actor and inference alike: `banned_tokens`, and the ids past the
        tokenizer's end, up to `vocab_size`, which have no text."""
        return [*(self._id(tokenizer, text) for text in self.banned_tokens), *range(len(tokenizer), vocab_size)]

    def _id(self, tokenizer: Any, text: str) -> int:
        token = tokenizer.convert_tokens_to_ids(text)
        if token is None or token == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {text!r}: this is no {self.model_type} checkpoint")
        return token


QWEN2_5_OMNI = OmniFamily(
    "qwen2_5_omni",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"),
    _qwen2_5_tokens,
)
QWEN3_OMNI = OmniFamily(
    "qwen3_omni_moe",
    "<|audio_pad|>",
    "<|audio_start|>",
    "<|audio_end|>",
    (
        "<|audio_pad|>",
        "<|audio_start|>",
        "<|audio_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
    ),
    _qwen3_tokens,
)
FAMILIES = {family.model_type: family for family in (QWEN2_5_OMNI, QWEN3_OMNI)}


def family_of(model_dir: str | Path) -> OmniFamily:
    """The family of a checkpoint, by `model_type` in its config.json. Raises ValueError for any other."""
    config = _read_json(Path(model_dir) / "config.json")
    if config is None:
        raise ValueError(f"{model_dir}: no config.json, so this is no Hugging Face model directory")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{model_dir}: model_type {model_type!r} is not one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def hop_length(model_dir: str | Path) -> int:
    """Samples a mel frame, from the checkpoint's feature extractor; 160 (10 ms) in the public ones."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = _read_json(Path(model_dir) / name) or {}
        value = config.get("feature_extractor", config).get("hop_length")
        if value:
            return int(value)
    raise ValueError(f"{model_dir}: neither preprocessor_config.json nor processor_config.json gives hop_length")


def max_audio_seconds(model_dir: str | Path) -> float:
    """Seconds of a clip that the checkpoint hears: its feature extractor cuts off the rest without a word. RL, infer
    and serve refuse longer clips, and so do the converters. Raises ValueError where it has no configuration of one."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = _read_json(Path(model_dir) / name)
        extractor = (config or {}).get("feature_extractor", config)
        if extractor and "hop_length" in extractor:
            return float(extractor.get("chunk_length") or _WHISPER_SECONDS)
    raise ValueError(
        f"{model_dir}: neither preprocessor_config.json nor processor_config.json is a feature extractor's"
    )


def _generation_eos_ids(model_dir: Path) -> list[int]:
    value = (_read_json(model_dir / "generation_config.json") or {}).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
