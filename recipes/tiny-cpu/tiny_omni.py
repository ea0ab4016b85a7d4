"""Build a tiny, randomly initialised Qwen2.5-Omni checkpoint, offline.

The directory has the layout of the public checkpoints: thinker, talker and token2wav weights in safetensors, the
processor, generation_config.json and spk_dict.pt. transformers' full class, its thinker class and vLLM all load it.

The tokenizer has Qwen2.5-Omni's special tokens under their own names, and splits the tags as Qwen does: `<seg>` is
`<` `seg` `>`, `</seg>` is `</` `seg` `>`, and `>` merges with what may follow a tag (`>,` `>.` `></` `><`). A time such
as `2.50` and a word of the --text manifests are one token each, so that a model this small can learn to use them.

    python recipes/tiny-cpu/tiny_omni.py --output runs/tiny-omni --text sft.jsonl
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniProcessor,
    Qwen2VLImageProcessor,
    WhisperFeatureExtractor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.utils import logging

from echo_plugins.relisten.prompt import MODES, question_text

# Qwen2.5-Omni's added tokens, in its order (there they are ids 151643 to 151656).
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_bos|>", "<|vision_eos|>", "<|vision_pad|>", "<|IMAGE|>", "<|VIDEO|>"),
)
NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% set parts = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- for part in parts -%}
{%- if part.type == 'audio' -%}<|audio_bos|><|AUDIO|><|audio_eos|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

# A number with decimals, a comma before a number, a word with its blank, a digit, punctuation with line end, blanks.
# Qwen's own pattern glues one leading sign to a word ("<seg") and leaves it to the merges to part them again.
WORDS = r"\p{N}+\.\p{N}+|, (?=\p{N})| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TIME_STEP_SECONDS = 0.05
TIMES_UNTIL_SECONDS = 10.0
SYSTEM_PROMPT = "system\nYou are a helpful assistant.\nuser\nassistant\n"
TAGS = "<think> </think> <answer> </answer> <seg>0.00, 1.00</seg> </seg>, </seg>. </seg></think> </seg><seg> </seg>\n"
HEAD_SIZE = 32  # vLLM's attention on CPU takes heads of 32, 64, 80, ... only
MAX_POSITIONS = 4096


def texts(manifests: list[Path]) -> Iterator[str]:
    """What the tokenizer learns its words from: the protocol's own text, then what the manifests ask and answer."""
    yield SYSTEM_PROMPT
    yield TAGS
    for mode in MODES:
        yield question_text("", (), mode)
    for step in range(round(TIMES_UNTIL_SECONDS / TIME_STEP_SECONDS)):
        yield f"{step * TIME_STEP_SECONDS:.2f}"
    for manifest in manifests:
        with manifest.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield question_text(row["question"], row["choices"], "plain")
                yield f"<think>{row.get('think') or ''}</think><answer>{row['answer']}</answer>"


def build_tokenizer(vocab_size: int, manifests: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, the special ones last as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(manifests),
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED_TOKENS,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen2_5OmniConfig:
    token_id = tokenizer.convert_tokens_to_ids
    heads = args.hidden_size // HEAD_SIZE
    vocab_size = -(-len(tokenizer) // 64) * 64
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    placeholders = {
        "audio_token_index": token_id("<|AUDIO|>"),
        "image_token_index": token_id("<|IMAGE|>"),
        "video_token_index": token_id("<|VIDEO|>"),
        "audio_start_token_id": token_id("<|audio_bos|>"),
        "audio_end_token_id": token_id("<|audio_eos|>"),
        "vision_start_token_id": token_id("<|vision_bos|>"),
        "vision_end_token_id": token_id("<|vision_eos|>"),
    }
    text = {
        "vocab_size": vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": rope,
        "tie_word_embeddings": False,
        "initializer_range": args.initializer_range,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    thinker = {
        "audio_config": {
            "num_mel_bins": args.mel_bins,
            "encoder_layers": args.audio_layers,
            "encoder_attention_heads": max(1, args.audio_hidden_size // HEAD_SIZE),
            "encoder_ffn_dim": 2 * args.audio_hidden_size,
            "d_model": args.audio_hidden_size,
            "n_window": args.audio_window_frames // 2,
            "max_source_positions": 1500,
            "output_dim": args.hidden_size,
            "initializer_range": args.initializer_range,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": HEAD_SIZE,
            "intermediate_size": HEAD_SIZE,
            "num_heads": 1,
            "out_hidden_size": args.hidden_size,
            "fullatt_block_indexes": [0],
        },
        "text_config": text,
        "user_token_id": token_id("user"),
        "initializer_range": args.initializer_range,
        "tie_word_embeddings": False,
        **placeholders,
    }
    small = {"hidden_size": HEAD_SIZE, "num_hidden_layers": 1, "num_attention_heads": 1}
    talker = {
        **small,
        **placeholders,
        "embedding_size": args.hidden_size,
        "vocab_size": vocab_size,
        "intermediate_size": HEAD_SIZE,
        "num_key_value_heads": 1,
        "head_dim": HEAD_SIZE,
        "rope_parameters": rope,
        **{f"tts_text_{name}_token_id": 0 for name in ("start", "end", "pad")},
        **{f"tts_codec_{name}_token_id": 0 for name in ("start", "end", "pad", "mask")},
    }
    token2wav = {
        "dit_config": {
            **small,
            "head_dim": HEAD_SIZE,
            "emb_dim": 16,
            "num_embeds": vocab_size + 1,
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
    config = Qwen2_5OmniConfig(thinker_config=thinker, talker_config=talker, token2wav_config=token2wav)
    config.architectures = ["Qwen2_5OmniForConditionalGeneration"]
    return config


def build_processor(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(),
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
        chat_template=CHAT_TEMPLATE,
    )


def build(args: argparse.Namespace) -> Qwen2_5OmniForConditionalGeneration:
    """Write the checkpoint into args.output, whole or not at all, and return the model."""
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.vocab_size, args.text)
    model = Qwen2_5OmniForConditionalGeneration(build_config(tokenizer, args)).to(getattr(torch, args.dtype))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    unfinished = args.output.with_name(f".{args.output.name}.unfinished-{os.getpid()}")
    model.save_pretrained(unfinished)
    torch.save({}, unfinished / "spk_dict.pt")  # no voices: but without the file transformers' full class does not load
    build_processor(tokenizer, args).save_pretrained(unfinished)
    if args.output.exists():
        shutil.rmtree(args.output)
    unfinished.rename(args.output)
    return model


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build a tiny random Qwen2.5-Omni checkpoint, offline.")
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already there")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[], metavar="FILE", help="AudioQA rows to learn words from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=1024, help="at most this many tokens (default %(default)s)")
    parser.add_argument("--hidden-size", type=int, default=128, help=f"of the text model, a multiple of {HEAD_SIZE}")
    parser.add_argument("--layers", type=int, default=4, help="of the text model (default %(default)s)")
    parser.add_argument("--audio-hidden-size", type=int, default=128, help="of the audio tower (default %(default)s)")
    parser.add_argument("--audio-layers", type=int, default=2, help="of the audio tower (default %(default)s)")
    parser.add_argument("--mel-bins", type=int, default=64, help="128 in the public checkpoints (default %(default)s)")
    parser.add_argument(
        "--hop-length", type=int, default=320, help="samples; 4 hops are an audio token; public: 160 (%(default)s)"
    )
    parser.add_argument(
        "--chunk-seconds", type=int, default=30, help="longest audio; stock code pads to it; public: 300 (%(default)s)"
    )
    parser.add_argument(
        "--audio-window-frames", type=int, default=400, help="frames that attend to each other (default %(default)s)"
    )
    parser.add_argument("--initializer-range", type=float, default=0.05, help="standard deviation of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
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
    logging.set_verbosity_error()  # the talker's public token ids lie outside its tiny vocabulary, one warning each
    logging.disable_progress_bar()
    model = build(args)
    parameters = sum(p.numel() for p in model.thinker.parameters())
    vocab_size = model.thinker.get_input_embeddings().num_embeddings
    print(f"{args.output}: thinker of {parameters / 1e6:.2f} M parameters, vocabulary of {vocab_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
