"""Which rows of stage 1 can be trained on, found out before training starts.

    python -m echo_plugins.for_swift.dataset ROWS.jsonl FIT.jsonl --model DIR --max-length 4096 --overlong FILE

ms-swift finds out while it trains: it puts another row in the place of one that is too long, takes the path of a
missing file for base64, and adds `<audio>` tags of its own where their number is off. Here an overlong row is left out
and named in a side file, and anything else that is wrong with the rows ends the run at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import soundfile
from rich.console import Console
from rich.progress import open as open_with_progress

from echo_plugins.audio import SAMPLING_RATE, parse_fragment, too_long
from echo_plugins.model import MAX_AUDIO_SECONDS, OmniFamily, family_of, hop_length, max_audio_seconds
from echo_plugins.relisten.control import CLIP_SOUNDS
from echo_plugins.relisten.prompt import AUDIO_TAG
from echo_plugins.relisten.segment import Segment

# What ms-swift's template writes around the turns: roles, line ends, the default system prompt. 19 tokens in Qwen's
# vocabulary with "You are a helpful assistant."
TEMPLATE_TOKENS = 24
AUDIO_BOUNDS = 2  # audio_bos and audio_eos


class BadRowError(ValueError):
    """This row cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Lengths:
    """Counts the tokens of a row from its text and from the headers of its audio files."""

    family: OmniFamily
    hop_length: int
    encode: Callable[[str], list[int]]
    max_seconds: float = MAX_AUDIO_SECONDS

    @classmethod
    def of_model(cls, model_dir: str | Path) -> Lengths:
        """Raises ValueError when the directory holds no Omni model."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        return cls(family_of(model_dir), hop_length(model_dir), encode, max_audio_seconds(model_dir))

    def num_tokens(self, row: dict[str, Any]) -> int:
        """Tokens of a row of `converters.sft_jsonl` in training. Raises BadRowError."""
        messages, audios = row.get("messages") or [], row.get("audios") or []
        if [message.get("role") for message in messages] != ["user", "assistant"]:
            raise BadRowError("its messages are not one of the user and one of the assistant")
        pieces = [piece for message in messages for piece in message["content"].split(AUDIO_TAG)]
        tags = len(pieces) - len(messages)
        if tags != len(audios):
            raise BadRowError(f"it has {tags} {AUDIO_TAG} tags for {len(audios)} audios")
        text_tokens = sum(len(self.encode(piece)) for piece in pieces)
        lengths = [clip_samples(audio) for audio in audios]
        if (longest := max(lengths, default=0)) > self.max_seconds * SAMPLING_RATE:
            words = too_long(audios[lengths.index(longest)], longest / SAMPLING_RATE, self.max_seconds)
            raise BadRowError(f"{words}, or make the rows with converters.sft_jsonl --model, which leaves it out")
        audio_tokens = sum(self.family.num_audio_tokens(length, self.hop_length) for length in lengths)
        return TEMPLATE_TOKENS + text_tokens + audio_tokens + AUDIO_BOUNDS * len(audios)


def clip_samples(reference: str) -> int:
    """Length at 16 kHz of a `path` or `path#t=START,END`. Raises BadRowError."""
    path, bounds = parse_fragment(reference)
    whole = file_samples(path)
    if bounds is None:
        return whole
    start, end = Segment(*bounds).sample_bounds(SAMPLING_RATE)
    if start >= min(end, whole):
        raise BadRowError(f"{reference} names no sound: the file is {whole / SAMPLING_RATE:.2f} s long")
    return min(end, whole) - start


@lru_cache(maxsize=1 << 16)
def file_samples(path: str) -> int:
    """Length at 16 kHz from the file's header. `converters.sft_jsonl` has decoded it all."""
    if not Path(path).is_file():
        raise BadRowError(f"there is no file {path}. Paths are absolute: were the rows made on another machine?")
    try:
        info = soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise BadRowError(f"{path} is not readable as audio ({error.error_string.strip()})") from error
    return round(info.frames * SAMPLING_RATE / info.samplerate)


def sort_out(
    rows: Path, fit: Path, overlong: Path, lengths: Lengths, max_length: int, clip: str = "own"
) -> tuple[int, int]:
    """Write the rows of at most `max_length` tokens to `fit` and name the others in `overlong`, whole or not at all.

    Returns how many rows went where. Raises BadRowError with file and line. It is raised too where `clip` (SFT_CLIP) is
    a control and no row has a clip that could be replaced.
    """
    num_fit = num_overlong = num_clips = 0
    unfinished = [path.with_name(f".{path.name}.{os.getpid()}") for path in (fit, overlong)]
    with (
        open_with_progress(rows, "rb", description="lengths of rows", console=Console(stderr=True)) as source,
        unfinished[0].open("wb") as fit_file,
        unfinished[1].open("w", encoding="utf-8") as overlong_file,
    ):
        for number, line in enumerate(source, start=1):
            try:
                row = json.loads(line)
                num_tokens = lengths.num_tokens(row)
            except ValueError as error:
                raise BadRowError(f"{rows}, line {number}: {error}") from error
            if num_tokens <= max_length:
                fit_file.write(line)
                num_fit += 1
                num_clips += sum(parse_fragment(audio)[1] is not None for audio in row["audios"])
            else:
                name = {"file": str(rows), "line": number, "tokens": num_tokens, "audio": row["audios"][:1]}
                overlong_file.write(json.dumps(name) + "\n")
                num_overlong += 1
    if num_fit and not num_clips and clip != "own":
        raise BadRowError(
            f"SFT_CLIP={clip}: no row of {rows} has sound behind a tag. Make the rows with SFT_MODE=interleaved "
            "(converters.sft_jsonl --mode interleaved), or use SFT_CLIP=own"
        )
    unfinished[1].replace(overlong)
    unfinished[0].replace(fit)
    return num_fit, num_overlong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m echo_plugins.for_swift.dataset",
        description="Check rows of converters.sft_jsonl, and leave out those that are too long to train on.",
    )
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl")
    parser.add_argument("fit", type=Path, metavar="FIT.jsonl", help="the rows that fit, in the same order")
    parser.add_argument("--model", required=True, help="directory of the model to train")
    parser.add_argument("--max-length", type=int, required=True, help="tokens of a row, inserted audio counted")
    parser.add_argument("--overlong", type=Path, required=True, help="JSONL that names the rows left out")
    parser.add_argument("--clip", choices=CLIP_SOUNDS, default="own", help="what training will hear behind the tags")
    args = parser.parse_args(argv)
    try:
        num_fit, num_overlong = sort_out(
            args.rows, args.fit, args.overlong, Lengths.of_model(args.model), args.max_length, args.clip
        )
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    where = f"over {args.max_length} tokens (SFT_MAX_LENGTH); {args.overlong} names them"
    if not num_fit:
        print(f"{parser.prog}: error: none of {num_overlong} rows can be trained on: all are {where}", file=sys.stderr)
        return 1
    if num_overlong:
        print(f"== {num_overlong} of {num_fit + num_overlong} rows are left out: {where}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
