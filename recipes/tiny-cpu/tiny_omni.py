"""Build a tiny, randomly initialised Omni checkpoint, offline: --family qwen2_5_omni or qwen3_omni_moe.

The directory has the layout of the public checkpoints: thinker, talker and vocoder weights in safetensors, the
processor, generation_config.json and, for Qwen2.5-Omni, spk_dict.pt. transformers' full class, its thinker class and
vLLM all load it.

The tokenizer has the family's special tokens under their own names, and splits the tags as Qwen does: `<seg>` is
`<` `seg` `>`, `</seg>` is `</` `seg` `>`, and `>` merges with what may follow a tag (`>,` `>.` `></` `><`). A time such
as `2.50` and a word of the protocol (`user`, `think`, the instructions) are always one token each, so that a model this
small can learn to use them. The words of the --text manifests share the rest of the vocabulary: the most frequent
become one token each, the others several.

    python recipes/tiny-cpu/tiny_omni.py --output runs/tiny-omni --text sft.jsonl
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    Qwen3OmniMoeConfig,
    Qwen3OmniMoeProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.utils import logging

from converters.events_to_think import think_of_events
from echo_plugins.audio_qa import AudioQA, RowError, read_rows
from echo_plugins.model import FAMILIES, QWEN2_5_OMNI, QWEN3_OMNI, OmniFamily
from echo_plugins.relisten.prompt import MODES, question_text

# The parts of a processor's placeholders, in the order of OmniFamily.banned_tokens.
PARTS = ("audio", "audio_bos", "audio_eos", "image", "video", "vision_bos", "vision_eos")
CHAT_TEMPLATE = """\
SYSTEM{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- for part in parts -%}
{%- if part.type == 'audio' -%}PLACEHOLDER{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
THINK{% endif -%}"""
DEFAULT_SYSTEM = """\
{%- if messages[0].role != 'system' -%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
"""

# A number with decimals, a comma before a number, a word with its blank, a digit, punctuation with line end, blanks.
# Qwen's own pattern glues one leading sign to a word ("<seg") and leaves it to the merges to part them again.
WORDS = r"\p{N}+\.\p{N}+|, (?=\p{N})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TIME_STEP_SECONDS = 0.05
TIMES_UNTIL_SECONDS = 10.0
SYSTEM_PROMPT = "system\nYou are a helpful assistant.\nuser\nassistant\n"
TAGS = "<think> </think> <answer> </answer> <seg>0.00, 1.00</seg> </seg>, </seg>. </seg></think> </seg><seg> </seg>\n"
MOST_COPIES = 1000  # copies of the manifests' most frequent word in the training text; the other words in proportion
HEAD_SIZE = 32  # vLLM's attention on CPU takes heads of 32, 64, 80, ... only
MAX_POSITIONS = 4096
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
CODEC_TOKENS = ("nothink", "think_bos", "think_eos", "pad", "bos")


@dataclass(frozen=True)
class Layout:
    """What a public checkpoint of a family has beside its weights, and what differs in the options' defaults.

    `special_tokens`: in the order of their ids. `text_tokens`: one token each, yet text. `default_system`: whether the
    chat template writes a system prompt where none is given. `hop_length`: of the tiny model, so that a token of
    audio lasts 80 ms in both families.
    """

    special_tokens: tuple[str, ...]
    text_tokens: tuple[str, ...]
    default_system: bool
    hop_length: int
    audio_window_frames: int
    config: Callable[[PreTrainedTokenizerFast, argparse.Namespace], Any]
    processor_class: Any
    vision: dict[str, Any]


class VocabularyError(ValueError):
    """The vocabulary is too small for the protocol's own words."""


def protocol_texts() -> Iterator[str]:
    """The text that every row has, whatever its question: chat roles, tags, instructions and times."""
    yield SYSTEM_PROMPT
    yield TAGS
    for mode in MODES:
        yield question_text("", (), mode)
        yield question_text("", ("", ""), mode)
    for step in range(round(TIMES_UNTIL_SECONDS / TIME_STEP_SECONDS)):
        yield f"{step * TIME_STEP_SECONDS:.2f}"


def manifest_texts(manifests: list[Path]) -> Iterator[str]:
    """What the manifests ask and answer. Rows that cannot be used are passed over: the exporters name them."""
    for manifest in manifests:
        for _, row in read_rows(manifest, lambda num_bytes: None):
            try:
                record = AudioQA.from_json(row)
            except RowError:
                continue
            yield question_text(record.question, record.choices, "plain")
            yield f"<think>{record.think or think_of_events(record) or ''}</think><answer>{record.answer}</answer>"


def chat_template(family: OmniFamily, opens_thinking: bool = False) -> str:
    """The same as the public templates write for one question, without tools and without an earlier answer."""
    layout = LAYOUTS[family.model_type]
    return (
        CHAT_TEMPLATE.replace("SYSTEM", DEFAULT_SYSTEM if layout.default_system else "")
        .replace("PLACEHOLDER", family.audio_placeholder)
        .replace("THINK", family.thinking_prefix if opens_thinking else "")
    )


def build_tokenizer(
    vocab_size: int, manifests: list[Path], family: OmniFamily, template: str
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, the special ones last as in Qwen. Raises VocabularyError."""
    layout = LAYOUTS[family.model_type]
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def words(texts: Iterable[str]) -> Counter[str]:
        """Words as the tokenizer sees them. They hold no blank: the byte level writes it as a letter."""
        return Counter(word for text in texts for word, _ in split.pre_tokenize_str(normalize(text)))

    normalizer = normalizers.NFC()
    normalize = normalizer.normalize_str
    protocol, learned = words(protocol_texts()), words(manifest_texts(manifests))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # the training text is words already
    tokenizer.train_from_iterator(
        (" ".join([word] * copies) for word, copies in training_words(protocol, learned, vocab_size).items()),
        trainers.BpeTrainer(
            vocab_size=max(0, vocab_size - len(layout.special_tokens) - len(layout.text_tokens)),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, split
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = tokenizer.get_vocab()
    missing = [word for word in protocol if word not in vocabulary]
    if missing:
        raise VocabularyError(
            f"--vocab-size {vocab_size} leaves {len(missing)} of the protocol's own {len(protocol)} words without a "
            f"token, such as {missing[0]!r}; the default is large enough"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in layout.special_tokens])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in layout.text_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(zip((f"{part}_token" for part in PARTS), family.banned_tokens, strict=True)),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = template
    return fast


def training_words(protocol: Iterable[str], learned: Counter[str], vocab_size: int) -> dict[str, int]:
    """Word -> copies in the training text, so that the protocol's words are merged first, whatever the manifests say.

    BPE merges the most frequent pair of neighbours until the vocabulary is full. A pair of tokens is never more
    frequent than the two characters where they meet. So a word is whole before any pair of `learned` has its turn, if
    it has more copies than the most frequent pair of characters in all of `learned`.
    """
    frequent = dict(learned.most_common(vocab_size))  # more cannot become tokens
    most = max(frequent.values(), default=1)
    copies = {word: -(-MOST_COPIES * count // most) for word, count in frequent.items()}
    pairs: Counter[str] = Counter()
    for word, count in copies.items():
        for start in range(len(word) - 1):
            pairs[word[start : start + 2]] += count
    first = max(pairs.values(), default=0) + 1
    return {**copies, **{word: first + copies.get(word, 0) for word in protocol}}


def text_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> dict[str, Any]:
    """The language model, as far as the families share it."""
    heads = args.hidden_size // HEAD_SIZE
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": ROPE,
        "tie_word_embeddings": False,
        "initializer_range": args.initializer_range,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def audio_config(args: argparse.Namespace) -> dict[str, Any]:
    """The audio tower, as far as the families share it."""
    return {
        "num_mel_bins": args.mel_bins,
        "encoder_layers": args.audio_layers,
        "encoder_attention_heads": max(1, args.audio_hidden_size // HEAD_SIZE),
        "encoder_ffn_dim": 2 * args.audio_hidden_size,
        "d_model": args.audio_hidden_size,
        "max_source_positions": 1500,
        "output_dim": args.hidden_size,
        "initializer_range": args.initializer_range,
    }


def thinker_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, **parts: Any) -> dict[str, Any]:
    return {
        "user_token_id": tokenizer.convert_tokens_to_ids("user"),
        "initializer_range": args.initializer_range,
        "tie_word_embeddings": False,
        **parts,
    }


SMALL = {"hidden_size": HEAD_SIZE, "num_hidden_layers": 1, "num_attention_heads": 1}
SMALL_VISION = {"depth": 1, "hidden_size": HEAD_SIZE, "intermediate_size": HEAD_SIZE, "num_heads": 1}


def qwen2_5_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen2_5OmniConfig:
    token_id: Callable[[str], Any] = tokenizer.convert_tokens_to_ids
    placeholders = {
        "audio_token_index": token_id("<|AUDIO|>"),
        "image_token_index": token_id("<|IMAGE|>"),
        "video_token_index": token_id("<|VIDEO|>"),
        "audio_start_token_id": token_id("<|audio_bos|>"),
        "audio_end_token_id": token_id("<|audio_eos|>"),
        "vision_start_token_id": token_id("<|vision_bos|>"),
        "vision_end_token_id": token_id("<|vision_eos|>"),
    }
    text = text_config(tokenizer, args)
    thinker = thinker_config(
        tokenizer,
        args,
        audio_config=audio_config(args) | {"n_window": args.audio_window_frames // 2},
        vision_config=SMALL_VISION | {"out_hidden_size": args.hidden_size, "fullatt_block_indexes": [0]},
        text_config=text,
        **placeholders,
    )
    talker = {
        **SMALL,
        **placeholders,
        "embedding_size": args.hidden_size,
        "vocab_size": text["vocab_size"],
        "intermediate_size": HEAD_SIZE,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "rope_parameters": ROPE,
        **{f"tts_text_{name}_token_id": 0 for name in ("start", "end", "pad")},
        **{f"tts_codec_{name}_token_id": 0 for name in ("start", "end", "pad", "mask")},
    }
    token2wav = {
        "dit_config": {
            **SMALL,
            "head_dim": HEAD_SIZE,
            "emb_dim": 16,
            "num_embeds": text["vocab_size"] + 1,
            "mel_dim": 16,
            "enc_emb_dim": 16,
            "enc_dim": 16,
            "enc_channels": [16, 16, 16, 16, 48],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
            "look_ahead_layers": [0],
            "look_backward_layers": [0],
        },
        "bigvgan_config": {
            "mel_dim": 16,
            "upsample_initial_channel": 64,
            "resblock_kernel_sizes": [3],
            "resblock_dilation_sizes": [[1, 3, 5]],
        },
    }
    return Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, token2wav_config=token2wav)


def qwen3_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3OmniMoeConfig:
    token_id: Callable[[str], Any] = tokenizer.convert_tokens_to_ids
    placeholders = {
        "audio_token_id": token_id("<|audio_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "audio_start_token_id": token_id("<|audio_start|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
    }
    rope = ROPE | {"mrope_section": [6, 5, 5], "mrope_interleaved": True, "interleaved": True}
    experts = {
        "moe_intermediate_size": args.expert_size,
        "num_experts": args.experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 0,
        "use_qk_norm": True,
        "head_dim": HEAD_SIZE,
        "rope_parameters": rope,
    }
    vision = {
        **SMALL_VISION,
        "out_hidden_size": args.hidden_size,
        "patch_size": 16,
        "num_position_embeddings": 16,
        "image_size": 64,
        "apply_vit_abs_pos_embed": True,  # as in the public checkpoints: vLLM reads it
        "deepstack_visual_indexes": [0],
    }
    thinker = thinker_config(
        tokenizer,
        args,
        # Blocks of 100 frames go through the convolutions, as 13 tokens each; so many of them attend to each other.
        audio_config=audio_config(args)
        | {"n_window": 50, "n_window_infer": args.audio_window_frames, "downsample_hidden_size": 16},
        vision_config=vision,
        text_config=text_config(tokenizer, args) | experts,
        position_id_per_seconds=13,
        audio_end_token_id=token_id("<|audio_end|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        **placeholders,
    )
    small = {**SMALL, "intermediate_size": HEAD_SIZE, "num_key_value_heads": 1, "head_dim": HEAD_SIZE}
    small_rope = {"rope_type": "default", "rope_theta": 10_000.0}
    talker = {
        "text_config": {
            **small,
            "vocab_size": 1100,
            "moe_intermediate_size": HEAD_SIZE,
            "num_experts": 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_expert_intermediate_size": HEAD_SIZE,
            "rope_parameters": rope,
        },
        "code_predictor_config": {**small, "vocab_size": 64, "num_code_groups": 4, "rope_parameters": small_rope},
        "num_code_groups": 4,
        "spatial_merge_size": 2,
        "thinker_hidden_size": args.hidden_size,
        "accept_hidden_layer": 1,
        "speaker_id": {"ethan": 0},
        "codec_eos_token_id": 10,
        **{f"codec_{name}_id": 11 + number for number, name in enumerate(CODEC_TOKENS)},
        **placeholders,
    }
    code2wav = {
        **{name: value for name, value in small.items() if name != "head_dim"},
        "codebook_size": 64,
        "num_quantizers": 4,
        "decoder_dim": HEAD_SIZE,
        "rope_parameters": small_rope,
        "max_position_embeddings": 512,
    }
    chat: dict[str, Any] = {f"{name}_token_id": token_id(name) for name in ("system", "user", "assistant")}
    chat |= {f"im_{end}_token_id": token_id(f"<|im_{end}|>") for end in ("start", "end")}
    speech: dict[str, Any] = {
        "tts_pad_token_id": token_id("<tts_pad>"),
        "tts_bos_token_id": token_id("<tts_text_bos>"),
        "tts_eos_token_id": token_id("<tts_text_eod>"),
    }
    return Qwen3OmniMoeConfig(
        thinker_config=thinker,
        talker_config=talker,
        code2wav_config=code2wav,
        enable_audio_output=not args.thinking,
        **chat,
        **speech,
    )


LAYOUTS = {
    "qwen2_5_omni": Layout(
        # The added tokens in their order (in the public checkpoints they are ids 151643 to 151656).
        special_tokens=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
            *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>"),
            *("<|IMAGE|>", "<|VIDEO|>"),
        ),
        text_tokens=(),
        default_system=True,
        hop_length=320,
        audio_window_frames=400,
        config=qwen2_5_config,
        processor_class=Qwen2_5OmniProcessor,
        vision={},
    ),
    "qwen3_omni_moe": Layout(
        special_tokens=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
            *("<|image_pad|>", "<|video_pad|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
            *("<tts_pad>", "<tts_text_bos>", "<tts_text_eod>"),
        ),
        text_tokens=("<think>", "</think>"),
        default_system=False,
        hop_length=160,
        audio_window_frames=800,
        config=qwen3_config,
        processor_class=Qwen3OmniMoeProcessor,
        vision={"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2},
    ),
}


def build_processor(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Any:
    layout = LAYOUTS[args.family]
    return layout.processor_class(
        image_processor=Qwen2VLImageProcessor(**layout.vision),
        video_processor=Qwen2VLVideoProcessor(**layout.vision),
        feature_extractor=WhisperFeatureExtractor(
            feature_size=args.mel_bins,
            sampling_rate=16_000,
            hop_length=args.hop_length,
            chunk_length=args.chunk_seconds,
            n_fft=400,
            return_attention_mask=True,
            dither=0.0,
        ),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


def fill_what_transformers_leaves(model: torch.nn.Module, standard_deviation: float) -> None:
    """Fill the fused experts of the talker: transformers 5 leaves them as whatever was in memory, NaN included."""
    for name, parameter in model.named_parameters():
        if name.startswith("talker.") and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            torch.nn.init.normal_(parameter, std=standard_deviation)


def build(args: argparse.Namespace) -> Any:
    """Write the checkpoint into args.output, whole or not at all, and return the model."""
    torch.manual_seed(args.seed)
    family = FAMILIES[args.family]
    template = chat_template(family, args.opens_thinking)
    tokenizer = build_tokenizer(args.vocab_size, args.text, family, template)
    config = LAYOUTS[args.family].config(tokenizer, args)
    # Where the Trainer looks for them: without these it reports that the tokenizer's differ, and sets them itself.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config.architectures = [family.model_class]
    model = getattr(transformers, family.model_class)(config)
    fill_what_transformers_leaves(model, args.initializer_range)
    model = model.to(getattr(torch, args.dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    unfinished = args.output.with_name(f".{args.output.name}.unfinished-{os.getpid()}")
    model.save_pretrained(unfinished)
    if args.thinking:  # the public configuration of the thinking model has neither
        file = unfinished / "config.json"
        saved = json.loads(file.read_text())
        kept = {key: value for key, value in saved.items() if key not in ("talker_config", "code2wav_config")}
        file.write_text(json.dumps(kept, indent=2))
    if args.family == QWEN2_5_OMNI.model_type:
        torch.save({}, unfinished / "spk_dict.pt")  # no voices, but without it transformers' full class does not load
    build_processor(tokenizer, args).save_pretrained(unfinished)
    if args.output.exists():
        shutil.rmtree(args.output)
    unfinished.rename(args.output)
    return model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build a tiny random Omni checkpoint, offline.")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--family", choices=tuple(LAYOUTS), default="qwen2_5_omni", help="(default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="AudioQA rows to learn words from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=1024, help="at most this many tokens (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help=f"of the text model, a multiple of {HEAD_SIZE}")
    parser.add_argument("--layers", type=int, default=4, help="of the text model (default %(default)s)")
    parser.add_argument("--experts", type=int, default=4, help="of a layer, in a family that has experts (%(default)s)")
    parser.add_argument("--expert-size", type=int, default=64, help="inner size of an expert (default %(default)s)")
    parser.add_argument("--thinking", action="store_true", help="qwen3_omni_moe: the layout without a talker")
    parser.add_argument("--opens-thinking", action="store_true", help="the chat template writes <think> itself")
    parser.add_argument("--audio-hidden-size", type=int, default=128, help="of the audio tower (default %(default)s)")
    parser.add_argument("--audio-layers", type=int, default=2, help="of the audio tower (default %(default)s)")
    parser.add_argument("--mel-bins", type=int, default=64, help="128 in the public checkpoints (default %(default)s)")
    parser.add_argument("--hop-length", type=int, help="samples; public: 160 (default: 80 ms of audio are a token)")
    parser.add_argument(
        "--chunk-seconds", type=int, default=30, help="longest audio; stock code pads to it; public: 300 (%(default)s)"
    )
    parser.add_argument(
        "--audio-window-frames", type=int, help="frames that attend to each other (default: 8 s of them)"
    )
    parser.add_argument("--initializer-range", type=float, default=0.05, help="standard deviation of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    layout = LAYOUTS[args.family]
    args.hop_length = args.hop_length or layout.hop_length
    args.audio_window_frames = args.audio_window_frames or layout.audio_window_frames
    if args.thinking and args.family != QWEN3_OMNI.model_type:
        parser.error(f"--thinking is a layout of {QWEN3_OMNI.model_type}")
    if args.hidden_size % HEAD_SIZE or args.audio_hidden_size % HEAD_SIZE:
        parser.error(f"--hidden-size and --audio-hidden-size must be multiples of {HEAD_SIZE}")
    if args.output.exists() and not args.overwrite:
        parser.error(f"{args.output} exists already; --overwrite replaces it")
    for file in args.text:
        if not file.is_file():
            parser.error(f"--text {file}: no such file")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # transformers builds a talker with its own defaults to print ours, and warns that their ids pass their vocabulary.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model = build(args)
    except VocabularyError as error:
        print(f"tiny_omni.py: error: {error}", file=sys.stderr)
        return 1
    parameters = sum(p.numel() for p in model.thinker.parameters())
    vocab_size = model.thinker.get_input_embeddings().num_embeddings
    print(f"{args.output}: thinker of {parameters / 1e6:.2f} M parameters, vocabulary of {vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
