"""Build a tiny, randomly initialised Qwen2.5-Omni checkpoint, offline.

The directory has the layout of the public checkpoints: thinker, talker and token2wav weights in safetensors, the
processor, generation_config.json and spk_dict.pt. transformers' full class, its thinker class and vLLM all load it.

The tokenizer has Qwen2.5-Omni's special tokens under their own names, and splits the tags as Qwen does: `<seg>` is
`<` `seg` `>`, `</seg>` is `</` `seg` `>`, and `>` merges with what may follow a tag (`>,` `>.` `></` `><`). A time such
as `2.50` and a word of the protocol (`user`, `think`, the instructions) are always one token each, so that a model this
small can learn to use them. The words of the --text manifests share the rest of the vocabulary: the most frequent
become one token each, the others several.

    python recipes/tiny-cpu/tiny_omni.py --output runs/tiny-omni --text sft.jsonl
"""

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
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

from converters.events_to_think import think_of_events
from echo_plugins.audio_qa import AudioQA, RowError, read_rows
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
MOST_COPIES = 1000  # copies of the manifests' most frequent word in the training text; the other words in proportion
HEAD_SIZE = 32  # vLLM's attention on CPU takes heads of 32, 64, 80, ... only
MAX_POSITIONS = 4096


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


def build_tokenizer(vocab_size: int, manifests: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, the special ones last as in Qwen. Raises VocabularyError."""
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
            vocab_size=max(0, vocab_size - len(SPECIAL_TOKENS)),
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
    # Where the Trainer looks for them: without these it reports that the tokenizer's differ, and sets them itself.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
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
