"""script/stage1_ground_reason.sh with the tiny model: going on after a kill, what it trains, what it leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
)

from converters.sft_jsonl import main as sft_jsonl
from echo_plugins.model import family_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "script"))

from estimate import Settings, read_model  # noqa: E402

SETTINGS = {
    "DEVICE": "cpu",
    "SFT_DTYPE": "float32",
    "SFT_RECOMPUTE": "false",
    "SFT_BATCH_SIZE": "4",
    "SFT_MICRO_BATCH": "2",
    "SFT_LR": "1e-3",
    "SFT_SAVE_STEPS": "2",
    "SFT_SAVE_LIMIT": "2",
    "SFT_LOG_STEPS": "1",
    "SFT_MAX_STEPS": "4",
    "SFT_WARMUP_RATIO": "0",  # with a warm-up the first step has a learning rate of 0
    "OMP_NUM_THREADS": "1",
}

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def rows_file(soundscapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    sft_jsonl(soundscapes / "sft.jsonl", target, audio_root=soundscapes, mode="interleaved", workers=1)
    return target


def train(model: Path, rows: Path, output: Path, **settings: str) -> str:
    """Run the stage; returns what it said on stderr."""
    places = {"MODEL": str(model), "TRAIN_FILE": str(rows), "OUTPUT_DIR": str(output), "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(ROOT / "script" / "stage1_ground_reason.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, **SETTINGS, **places, **settings},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def losses(output: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (output / "logging.jsonl").open()]
    return [(line["global_step/max_steps"], line["loss"]) for line in lines if "loss" in line]


def weights(model: Path) -> dict[str, torch.Tensor]:
    model_class = getattr(transformers, family_of(model).model_class)
    return model_class.from_pretrained(model, dtype=torch.float32).state_dict()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The parts of the model whose weights differ: thinker.model, thinker.audio_tower, talker, ..."""
    assert before.keys() == after.keys()
    names = {name for name in before if not torch.equal(before[name], after[name])}
    return {".".join(name.split(".")[:2]) if name.startswith("thinker") else name.split(".")[0] for name in names}


@pytest.fixture(scope="module")
def trained(omni_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sft") / "out"
    held = output.parent / "held.jsonl"
    held.write_text("".join(rows_file.read_text().splitlines(keepends=True)[-6:]))
    train(omni_model, rows_file, output, SFT_FREEZE_AUDIO="false", VAL_FILE=str(held), SFT_EVAL_STEPS="2")
    return output


def test_the_loss_on_held_rows_is_in_the_log(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "logging.jsonl").open()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["global_step/max_steps"] for line in evaluated] == ["2/4", "4/4"]
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]


def test_it_trains_the_text_model_and_when_asked_the_audio_tower(trained: Path, omni_model: Path) -> None:
    parts = changed(weights(omni_model), weights(trained / "last"))
    assert parts == {"thinker.model", "thinker.lm_head", "thinker.audio_tower"}
    first, last = losses(trained)[0], losses(trained)[-1]
    assert (first[0], last[0]) == ("1/4", "4/4") and float(last[1]) < float(first[1])


def test_the_trained_model_is_complete(trained: Path, omni_model: Path) -> None:
    last = trained / "last"
    for name in ("generation_config.json", "config.json", "tokenizer.json", *(p.name for p in omni_model.glob("*.pt"))):
        assert (last / name).is_file(), name
    family = family_of(last)
    whole = getattr(transformers, family.model_class).from_pretrained(last).thinker.state_dict()
    loaded: Any = getattr(transformers, family.thinker_class).from_pretrained(last, output_loading_info=True)
    thinker, report = loaded
    assert not report["missing_keys"]
    assert all(torch.equal(whole[name], weight) for name, weight in thinker.state_dict().items())
    ours, base = (AutoProcessor.from_pretrained(path) for path in (last, omni_model))
    assert ours.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert ours.feature_extractor.to_dict() == base.feature_extractor.to_dict()
    assert ours.chat_template == base.chat_template


def test_after_a_kill_it_goes_on_from_the_last_whole_checkpoint(
    trained: Path, omni_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(trained, output, symlinks=True)
    for half_written in ("checkpoint-4", "checkpoint-10"):  # one with a cut state, one without
        shutil.rmtree(output / half_written, ignore_errors=True)
        shutil.copytree(output / "checkpoint-2", output / half_written)
    (output / "checkpoint-10" / "trainer_state.json").unlink()
    state = output / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    said = train(omni_model, rows_file, output, SFT_FREEZE_AUDIO="false")
    assert f"going on from step 2 of 4: {output}/checkpoint-2" in said
    first, again = losses(output)[:4], losses(output)[4:]
    assert again == first[2:]
    assert not changed(weights(trained / "last"), weights(output / "last"))


def test_a_checkpoint_does_not_go_on_with_what_it_was_not_begun_with(
    trained: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(rows_file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(AssertionError, match="was begun with another: SFT_TUNER rows MODEL"):
        train(trained / "last", rows, trained, SFT_TUNER="lora", SFT_MAX_STEPS="6")
    assert losses(trained)[-1][0] == "4/4"


def test_the_audio_tower_stays_as_it_is_by_default(omni_model: Path, rows_file: Path, tmp_path: Path) -> None:
    train(omni_model, rows_file, tmp_path, SFT_MAX_STEPS="1")
    before, after = weights(omni_model), weights(tmp_path / "last")
    assert changed(before, after) == {"thinker.model", "thinker.lm_head"}
    experts = [name for name in before if name.startswith("thinker.model.") and ".experts." in name]
    assert all(not torch.equal(before[name], after[name]) for name in experts)
    assert bool(experts) == family_of(omni_model).moe


def rank_of(adapter: Path) -> int:
    return json.loads((adapter.parent / "adapter_config.json").read_text())["r"]


def num_parameters(adapter: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(adapter).values())


def test_lora_leaves_a_merged_model(omni_model: Path, rows_file: Path, tmp_path: Path) -> None:
    train(omni_model, rows_file, tmp_path, SFT_MAX_STEPS="1", SFT_TUNER="lora")
    assert changed(weights(omni_model), weights(tmp_path / "last")) == {"thinker.model"}
    (adapter,) = tmp_path.glob("checkpoint-*/adapter_model.safetensors")
    settings = Settings(SFT_TUNER="lora", SFT_LORA_RANK=str(rank_of(adapter)))
    assert read_model(omni_model).trained(settings) == num_parameters(adapter), "pre-flight counts what is trained"
    assert {path.name for path in omni_model.glob("spk_dict.pt")} <= {path.name for path in tmp_path.glob("last/*")}
    AutoProcessor.from_pretrained(tmp_path / "last")


def test_lora_of_experts_is_merged_too(tiny_qwen3: Path, rows_file: Path, tmp_path: Path) -> None:
    train(tiny_qwen3, rows_file, tmp_path, SFT_MAX_STEPS="1", SFT_TUNER="lora", SFT_LORA_EXPERTS="true")
    before, after = weights(tiny_qwen3), weights(tmp_path / "last")
    assert changed(before, after) == {"thinker.model"}
    experts = [name for name in before if name.startswith("thinker.model.") and ".experts." in name]
    assert experts and all(not torch.equal(before[name], after[name]) for name in experts)
    (adapter,) = tmp_path.glob("checkpoint-*/adapter_model.safetensors")
    settings = Settings(SFT_TUNER="lora", SFT_LORA_RANK=str(rank_of(adapter)), SFT_LORA_EXPERTS="true")
    assert read_model(tiny_qwen3).trained(settings) == num_parameters(adapter), "pre-flight counts what is trained"
