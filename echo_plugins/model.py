"""What differs between the Omni families: one table, which everything else asks. transformers is never imported here.

How to add a family: write an entry below `QWEN3_OMNI` and put it into `FAMILIES`. Each field says where to look it up.
Then add its template to for_swift/template.py (ms-swift has one class per family) and its vLLM processor to
for_vllm.py. Give recipes/tiny-cpu/tiny_omni.py a builder for a random tiny checkpoint, and add the model type to the
`FAMILIES` of tests/conftest.py: the tests of the table, the features, the actor, the engine and the merge then run for
it. No other file names a family; where one would have to, the table lacks a field.

    python -m echo_plugins.model DIR FIELD    # a field of the entry of the model in DIR, for the scripts
    python -m echo_plugins.model DIR lora_modules REGEX    # what an adapter is put on, by full names; lora_experts too
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .relisten.trajectory import SpecialIds

SAMPLING_RATE = 16_000  # hertz; what the Qwen-Omni audio towers were trained on
MIRRORED_SAMPLES = 200  # half of the STFT window (n_fft 400 in the public checkpoints)
_WHISPER_SECONDS = 30  # `chunk_length` of transformers' WhisperFeatureExtractor where a checkpoint does not say


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
    """One family of models.

    `model_type`: of config.json. `model_class` and `thinker_class`: of transformers, the whole model and its part that
    writes text. `decoder_layer`: the class of one layer of the language model, which FSDP shards.
    `audio_token`, `audio_bos_token`, `audio_eos_token`: the placeholder of a clip, in the chat template.
    `banned_tokens`: may never be sampled, since each would claim media that is not there.
    `tokens_of_frames`: audio tokens of mel frames, transformers' `_get_feat_extract_output_lengths`.
    `clip_end`: what the family's processor puts after a clip. "silence": it pads to the extractor's window, and a frame
    that has begun counts. "mirror": it pads nothing, the last frames see the end of the clip mirrored, and only whole
    frames count.
    `window_seconds`: the longest clip that the model was made for.
    `frozen`: modules that training leaves as they are.
    `lora_parameters`: the ends of the names of weights that are no linear layers and can get an adapter too (the
    experts). The linear layers are a setting, SFT_LORA_TARGETS and RL_LORA_TARGETS, the same for all families.
    `moe`: the layers have experts, which transformers holds fused and checkpoints hold one by one.
    `images_in_engine`: how many images a prompt may have in vLLM, though none ever has one.
    `thinking_prefix`: what a chat template may open the answer with.
    """

    model_type: str
    model_class: str
    thinker_class: str
    decoder_layer: str
    audio_token: str
    audio_bos_token: str
    audio_eos_token: str
    banned_tokens: tuple[str, ...]
    tokens_of_frames: Callable[[int], int]
    clip_end: Literal["silence", "mirror"]
    window_seconds: int
    frozen: tuple[str, ...] = ("thinker.audio_tower", "thinker.visual")
    lora_parameters: tuple[str, ...] = ()
    moe: bool = False
    images_in_engine: int = 0
    thinking_prefix: str = "<think>\n"

    @property
    def audio_placeholder(self) -> str:
        """One clip in a prompt, as the engine takes it."""
        return self.audio_bos_token + self.audio_token + self.audio_eos_token

    def num_audio_tokens(self, num_samples: int, hop_length: int = 160) -> int:
        """Audio tokens of a clip of `num_samples`, from the model's own length formula; 0 when too short for one."""
        num_frames = self.num_frames(num_samples, hop_length)
        return max(0, self.tokens_of_frames(num_frames)) if num_frames else 0

    def num_frames(self, num_samples: int, hop_length: int = 160) -> int:
        """Mel frames that the model hears of a clip. 0 for a clip that is too short to be mirrored."""
        if self.clip_end == "silence":
            return -(-num_samples // hop_length)
        return num_samples // hop_length if num_samples > MIRRORED_SAMPLES else 0

    def window_samples(self, feature_extractor: Any) -> int:
        """Samples of the longest clip. A processor that pads to its extractor's window cuts there. Where it does not
        pad, the extractor's window says nothing: public Qwen3-Omni has 30 s there (QwenLM/Qwen3-Omni#40)."""
        longest = self.window_seconds * SAMPLING_RATE
        return min(longest, feature_extractor.n_samples) if self.clip_end == "silence" else longest

    def prompt(self, rendered: str) -> str:
        """A rendered chat prompt, without the `<think>` that some chat templates open the answer with. An answer of our
        protocol has its own: in the rows of stage 1, and as reward and evaluation read it."""
        return rendered.removesuffix(self.thinking_prefix)

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
    "Qwen2_5OmniForConditionalGeneration",
    "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniDecoderLayer",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|IMAGE|>", "<|VIDEO|>", "<|vision_bos|>", "<|vision_eos|>"),
    _qwen2_5_tokens,
    clip_end="silence",
    window_seconds=300,  # chunk_length of the public checkpoints
)
QWEN3_OMNI = OmniFamily(
    "qwen3_omni_moe",
    "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3OmniMoeThinkerForConditionalGeneration",
    "Qwen3OmniMoeThinkerTextDecoderLayer",
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
    clip_end="mirror",
    window_seconds=2400,  # Qwen3-Omni Technical Report (arXiv 2509.17765), section 1: recordings up to 40 minutes
    lora_parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    moe=True,
    # vLLM 0.24.0 leaves the buffers of the vision tower on the meta device when a prompt may have neither image nor
    # video, and the first forward dies (vllm/model_executor/models/qwen3_omni_moe_thinker.py:1710).
    images_in_engine=1,
)
FAMILIES = {family.model_type: family for family in (QWEN2_5_OMNI, QWEN3_OMNI)}
MAX_AUDIO_SECONDS = min(family.window_seconds for family in FAMILIES.values())  # where no checkpoint is known


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
    return int(_feature_extractor(model_dir)["hop_length"])


def max_audio_seconds(model_dir: str | Path) -> float:
    """Seconds of a clip that the checkpoint hears: `OmniFamily.window_samples`, from its files alone. RL, infer, serve
    and the converters refuse longer clips. Raises ValueError where it has no feature extractor's configuration."""
    family = family_of(model_dir)
    hears = float(_feature_extractor(model_dir).get("chunk_length") or _WHISPER_SECONDS)
    return min(hears, family.window_seconds) if family.clip_end == "silence" else float(family.window_seconds)


def lora_modules(model_dir: str | Path, pattern: str) -> list[str]:
    """The full names of the checkpoint's layers that match `pattern` from end to end.

    Names, because PEFT 0.20 takes of a pattern only the ends of what it matches where a model has experts. The audio
    tower and the talker have layers of the same ends (transformers_weight_conversion.py:355).
    """
    layers = (name.removesuffix(".weight") for name in _weight_names(Path(model_dir)) if name.endswith(".weight"))
    return sorted(layer for layer in layers if re.fullmatch(pattern, layer))


def lora_experts(model_dir: str | Path) -> list[str]:
    """The full names of `lora_parameters` in the language model, as transformers holds them: one tensor a layer."""
    family = family_of(model_dir)
    layers = {
        match[1]
        for name in _weight_names(Path(model_dir))
        if (match := re.match(r"(thinker\.model\.layers\.\d+)\.mlp\.experts\.", name))
    }
    return sorted(f"{layer}.{parameter}" for layer in layers for parameter in family.lora_parameters)


def _weight_names(model_dir: Path) -> set[str]:
    """Of every tensor in the checkpoint's safetensors files."""
    index = _read_json(model_dir / "model.safetensors.index.json")
    if index is not None:
        return set(index["weight_map"])
    from safetensors import safe_open

    names: set[str] = set()
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            names.update(file.keys())
    return names


def _feature_extractor(model_dir: str | Path) -> dict[str, Any]:
    """The configuration of the checkpoint's feature extractor, with its hop_length."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        config = _read_json(Path(model_dir) / name) or {}
        extractor = config.get("feature_extractor", config)
        if extractor.get("hop_length"):
            return extractor
    raise ValueError(f"{model_dir}: neither preprocessor_config.json nor processor_config.json gives hop_length")


def _generation_eos_ids(model_dir: Path) -> list[int]:
    value = (_read_json(model_dir / "generation_config.json") or {}).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main(argv: list[str]) -> int:
    """Print a field of the model's entry, or the names that an adapter is put on; of several values, one a line."""
    model_dir, field, *pattern = argv
    try:
        if field == "lora_modules":
            value: Any = tuple(lora_modules(model_dir, pattern[0]))
        elif field == "lora_experts":
            value = tuple(lora_experts(model_dir))
        else:
            value = getattr(family_of(model_dir), field)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(*(value if isinstance(value, tuple) else [value]), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
