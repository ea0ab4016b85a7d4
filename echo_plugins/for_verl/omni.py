"""Everything that verl 0.9.1 lacks for the Omni models: sound in, text out, the audio tower frozen.

Each function below makes up for one gap and names its place in verl; tests/plugin/test_verl_gaps.py fails when verl has
closed it. What differs between the families is in echo_plugins/model.py.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
import verl.utils.flops_counter
import verl.utils.tokenizer.tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.feature_extraction_utils import BatchFeature

from ..audio import pad_to_longest
from ..model import FAMILIES, OmniFamily

BANNED_LOGIT = -100.0  # the rollout's own bias: a probability of 0 in float32. With -inf the entropy would be NaN


def pack_clips(features: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features (clips, mel, frames) without the padding of the shorter clips: frames of all clips one after the other
    (frames, mel), and frames a clip (clips,). verl sends them from process to process, and joins rows along the first
    dimension (verl/utils/model.py, extract_multi_modal_inputs)."""
    valid = mask.bool()
    return {"audio_frames": features.transpose(1, 2)[valid], "audio_num_frames": valid.sum(-1)}


def unpack_clips(audio_frames: torch.Tensor, audio_num_frames: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `pack_clips` was given, for the thinker, which itself drops what is padded here."""
    clips = list(audio_frames.split(audio_num_frames.tolist()))
    features = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True).transpose(1, 2)
    places = torch.arange(features.shape[-1], device=features.device)
    return {
        "input_features": features,
        "feature_attention_mask": (places < audio_num_frames.to(places.device).unsqueeze(-1)).long(),
    }


class ThinkerOnly(PreTrainedModel):
    """A full Omni checkpoint as verl trains it: the thinker alone, under the checkpoint's own names (`thinker.*`).

    Talker and vocoder are never built; script/merge.sh takes them from the base model. Both towers are frozen, as in
    the paper (stage 1 and 2), before FSDP wraps the model and the optimiser sees it.

    Tokens that the rollout may not sample have no probability here either: the agent loop biases placeholders out, and
    verl masks the ids past the tokenizer's end (vllm_rollout/utils.py, monkey_patch_compute_logits). Left in, they
    would take their share of every log-prob of the actor and of none of the engine's.
    """

    thinker_class: type[PreTrainedModel]
    decoder_layer: str
    banned_ids: Sequence[int] = ()
    banned_index: torch.Tensor | None = None  # `banned_ids` on the device of the logits
    _keys_to_ignore_on_load_unexpected = [r"^talker\.", r"^token2wav\.", r"^code2wav\."]  # noqa: RUF012 - transformers'
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.thinker = self.thinker_class(config.thinker_config)
        self.post_init()
        # verl/utils/fsdp_utils.py:579 shards each class named here on its own, and a rank whose micro-batch is text
        # only would wait for ever for one whose micro-batch has sound. So only what every row passes is named; the
        # towers are gathered with the embeddings (2.6 GB a GPU of a 7B model).
        self._no_split_modules = [self.decoder_layer]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path)
        family, vocab_size = FAMILIES[model.config.model_type], model.config.text_config.vocab_size
        for name in family.frozen:
            model.get_submodule(name).requires_grad_(False)
        model.banned_ids = family.banned_ids(tokenizer, vocab_size)
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "audio_frames" in kwargs:
            kwargs |= unpack_clips(kwargs.pop("audio_frames"), kwargs.pop("audio_num_frames"))
        output = self.thinker(*args, **kwargs)
        device = output.logits.device
        if self.banned_index is None or self.banned_index.device != device:  # made anew, it would be sent each time
            self.banned_index = torch.tensor(self.banned_ids, dtype=torch.long, device=device)
        # There are gigabytes of logits: no copy of them here, nor of their gradient, which is 0 at these ids by itself.
        with torch.no_grad():
            output.logits.index_fill_(-1, self.banned_index, BANNED_LOGIT)
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT asks every causal model for it (peft_model.py, PeftModelForCausalLM)."""
        thinker: Any = self.thinker
        return thinker.prepare_inputs_for_generation(*args, **kwargs)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.thinker.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.thinker.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.thinker.get_output_embeddings()


def train_the_thinker() -> None:
    """verl/utils/model.py:705 looks a configuration's type up in AutoModelForImageTextToText, and raises for Omni; the
    full classes have no forward() besides."""
    for family in FAMILIES.values():
        full_class = getattr(transformers, family.model_class)
        # The full class's name: save_pretrained writes it to config.json as the architecture.
        members = {
            "config_class": full_class.config_class,
            "thinker_class": getattr(transformers, family.thinker_class),
            "decoder_layer": family.decoder_layer,
            "__module__": __name__,
        }
        trainable = type(full_class.__name__, (ThinkerOnly,), members)
        AutoModelForImageTextToText.register(full_class.config_class, trainable, exist_ok=True)


class _FromTheThinker:
    """An attribute of the thinker's configuration, read on the full one where that has none of its own."""

    def __init__(self, path: str) -> None:
        self.read = operator.attrgetter(f"thinker_config.{path}")

    def __get__(self, config: Any, _owner: type | None = None) -> Any:
        return self if config is None else self.read(config)


def show_the_text_config() -> None:
    """verl/workers/rollout/utils.py:31 and verl/utils/flops_counter.py read `config.text_config`, which Omni nests;
    verl/workers/engine/fsdp/transformer_impl.py:267 reads `config.tie_word_embeddings`, which the full Omni
    configurations need not have (what ms-swift saves has none)."""
    for family in FAMILIES.values():
        config_class = getattr(transformers, family.model_class).config_class
        for name, path in (("text_config", "text_config"), ("tie_word_embeddings", "tie_word_embeddings")):
            setattr(config_class, name, _FromTheThinker(path))


def audio_positions(_processor: Any, *, attention_mask: torch.Tensor, **_media: Any) -> tuple[torch.Tensor, None]:
    """Positions (3, batch, tokens) of text and sound: TMRoPE without pictures is 1-D positions in all three rows
    (transformers, get_rope_index, the branch without grids)."""
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.masked_fill(attention_mask == 0, 1).unsqueeze(0).expand(3, -1, -1), None


def omni_processor(name_or_path: str, family: OmniFamily, **kwargs: Any) -> Any:
    """The checkpoint's processor, with what verl asks of one.

    `get_rope_index`: without it verl makes 1-row positions, and rows packed into one sequence attend to each other
    without a word (verl/experimental/agent_loop/agent_loop.py, _compute_position_ids). `*_token_id`:
    verl/workers/rollout/utils.py:110. `audio` may be features: verl calls the processor twice a trajectory in the event
    loop, the agent loop has extracted them in a thread by then.
    """
    processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    base = type(processor)

    def __call__(self: Any, *args: Any, audio: Any = None, **rest: Any) -> BatchFeature:
        if isinstance(audio, BatchFeature):
            return BatchFeature(dict(audio))
        return base.__call__(self, *args, audio=audio, **rest)

    ids = {
        f"{medium}_token_id": processor.tokenizer.convert_tokens_to_ids(getattr(processor, f"{medium}_token"))
        for medium in ("audio", "image", "video")
    }
    members = {"__call__": __call__, "get_rope_index": audio_positions, "__module__": base.__module__, **ids}
    processor.__class__ = type(base.__name__, (base,), members)  # the name is kept: it is saved with checkpoints
    pad_to_longest(processor.feature_extractor, family)
    return processor


def load_omni_processors() -> None:
    """verl/utils/tokenizer/tokenizer.py:236 hf_processor raises for a processor it does not know, swallows that, and
    returns None: the run goes on as if the model were text only. Other families stay verl's business."""
    original = verl.utils.tokenizer.tokenizer.hf_processor

    def hf_processor(name_or_path: str, **kwargs: Any) -> Any:
        family = FAMILIES.get(AutoConfig.from_pretrained(name_or_path, **kwargs).model_type)
        return original(name_or_path, **kwargs) if family is None else omni_processor(name_or_path, family, **kwargs)

    for name, module in list(sys.modules.items()):  # most of verl has imported it by name
        if name.partition(".")[0] == "verl" and getattr(module, "hf_processor", None) is original:
            vars(module)["hf_processor"] = hf_processor


def count_flops() -> None:
    """verl/utils/flops_counter.py:678 knows no Omni model, so `perf/mfu` would be 0. The operations of the text model
    are counted. Those of the audio tower are not: it is frozen, and has a tenth of the parameters."""
    counters = verl.utils.flops_counter
    for family in FAMILIES.values():
        text = counters._estimate_qwen2_moe_flops if family.moe else counters._estimate_qwen2_flops

        def estimate(
            config: Any, tokens_sum: int, batch_seqlens: Sequence[int], delta_time: float, of_text: Any = text
        ) -> float:
            return of_text(config.text_config, tokens_sum, batch_seqlens, delta_time)

        counters.ESTIMATE_FUNC.setdefault(family.model_type, estimate)


count_flops()
train_the_thinker()
show_the_text_config()
load_omni_processors()
