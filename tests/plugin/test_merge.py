"""The merge on a real 2-rank FSDP2 checkpoint, written by verl's own checkpoint manager from the tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoProcessor,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeForConditionalGeneration,
)

from echo_plugins.for_verl import merge as merging
from echo_plugins.for_verl.merge import MergeError, merge

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_runs(tiny_model, tmp_path_factory.mktemp("checkpoints") / "runs")


def save_runs(model: Path, output: Path) -> Path:
    """fsdp/ and hsdp/, two runs as stage 2 leaves them, and expected.safetensors, the actor's full state."""
    script = Path(__file__).with_name("save_fsdp_checkpoint.py")
    environment = os.environ | {"VERL_USE_EXTERNAL_PLUGINS": "none", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(model), str(output)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return output


def test_experts_that_are_trained_together_are_saved_one_by_one(tiny_qwen3: Path, tmp_path: Path) -> None:
    runs = save_runs(tiny_qwen3, tmp_path / "runs")
    expected, before = load_file(runs / "expected.safetensors"), all_weights(tiny_qwen3)
    experts = "thinker.model.layers.1.mlp.experts"
    assert f"{experts}.gate_up_proj" in expected and f"{experts}.3.up_proj.weight" in before
    for mesh in ("fsdp", "hsdp"):
        report = merge(runs / mesh, tiny_qwen3, tmp_path / mesh)
        merged = all_weights(tmp_path / mesh)
        assert {key: tensor.shape for key, tensor in merged.items()} == {key: t.shape for key, t in before.items()}
        inner = merged[f"{experts}.3.up_proj.weight"].shape[0]
        assert torch.equal(merged[f"{experts}.3.up_proj.weight"], expected[f"{experts}.gate_up_proj"][3, inner:])
        text = report["trained_tensors"]["thinker.model"]
        assert text["changed"] == text["total"] and report["trained_tensors"]["thinker.audio_tower"]["changed"] == 0
        others = [key for key in before if key.startswith(("talker.", "code2wav."))]
        assert others and all(torch.equal(merged[key], before[key]) for key in others)
    loaded = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tmp_path / "fsdp").state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_experts_that_the_base_holds_in_one_tensor_stay_so(tiny_qwen3: Path, tmp_path: Path) -> None:
    runs = save_runs(tiny_qwen3, tmp_path / "runs")
    expected = load_file(runs / "expected.safetensors")
    base = tmp_path / "base"
    shutil.copytree(tiny_qwen3, base)
    model = Qwen3OmniMoeForConditionalGeneration.from_pretrained(tiny_qwen3)
    save_file(model.state_dict(), base / "model.safetensors", {"format": "pt"})
    merge(runs / "fsdp", base, tmp_path / "merged")
    assert_merged(tmp_path / "merged", base, expected)


@pytest.fixture(scope="module")
def expected(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / "expected.safetensors")


@pytest.fixture(scope="module")
def sharded_bfloat16_base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as large public checkpoints are: bfloat16 (token2wav float32), in two shards with an index."""
    base = tmp_path_factory.mktemp("base") / "bfloat16"
    shutil.copytree(tiny_model, base)
    (base / "model.safetensors").unlink()
    weights = {
        key: tensor if key.startswith("token2wav.") else tensor.bfloat16()
        for key, tensor in load_file(tiny_model / "model.safetensors").items()
    }
    weight_map = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(sorted(weights))}
    for shard in set(weight_map.values()):
        save_file({key: weights[key] for key in weights if weight_map[key] == shard}, base / shard, {"format": "pt"})
    (base / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    config = (base / "config.json").read_text()
    assert '"dtype": "float32"' in config
    (base / "config.json").write_text(config.replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    return base


def all_weights(model: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in model.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_merged(model: Path, base: Path, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor is the actor's where it has one and the base's where not, in the base's dtype, none more or less."""
    merged, before = all_weights(model), all_weights(base)
    assert merged.keys() == before.keys()
    assert {key for key in merged if key.startswith("thinker.")} == expected.keys()
    for key, tensor in merged.items():
        assert tensor.dtype == before[key].dtype, key
        assert torch.equal(tensor, expected[key].to(tensor.dtype) if key in expected else before[key]), key


@pytest.mark.parametrize("mesh", ["fsdp", "hsdp"])
def test_merged_weights_equal_the_actors_full_state(
    runs: Path, tiny_model: Path, expected: dict[str, torch.Tensor], tmp_path: Path, mesh: str
) -> None:
    report = merge(runs / mesh, tiny_model, tmp_path / "merged")
    assert_merged(tmp_path / "merged", tiny_model, expected)
    assert report["trained_tensors"]["thinker.audio_tower"]["changed"] == 0
    assert report["trained_tensors"]["thinker.model"]["changed"] == report["trained_tensors"]["thinker.model"]["total"]
    assert report["carried_tensors"] == sum(
        key.startswith(("talker.", "token2wav.")) for key in all_weights(tiny_model)
    )


def test_every_file_of_the_base_is_carried_over(runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "optimizer.pt").write_bytes(b"x")
    (base / "trainer_state.json").write_text("{}")
    merge(runs / "fsdp", base, tmp_path / "merged")
    names = {path.name for path in tiny_model.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names | {"echo_merge.json"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_model / name).read_bytes()


def test_full_class_thinker_class_and_processor_load_the_result(
    runs: Path, tiny_model: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    merge(runs / "fsdp", tiny_model, tmp_path / "merged")
    full = Qwen2_5OmniForConditionalGeneration.from_pretrained(tmp_path / "merged")
    weights = all_weights(tmp_path / "merged")
    assert full.has_talker and weights.keys() <= full.state_dict().keys()
    for key, tensor in full.state_dict().items():
        assert key not in weights or torch.equal(tensor, weights[key]), key
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "merged")
    for key, tensor in thinker.state_dict().items():
        assert torch.equal(tensor, expected[f"thinker.{key}"]), key
    assert AutoProcessor.from_pretrained(tmp_path / "merged").chat_template


def test_dtype_and_shards_stay_as_in_the_base(
    runs: Path, sharded_bfloat16_base: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    merge(runs / "fsdp", sharded_bfloat16_base, tmp_path / "merged")
    assert_merged(tmp_path / "merged", sharded_bfloat16_base, expected)
    index = json.loads((tmp_path / "merged" / INDEX).read_text())
    assert index["weight_map"] == json.loads((sharded_bfloat16_base / INDEX).read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_weights(tmp_path / "merged").values())


def test_another_dtype_is_for_the_thinker_alone(
    runs: Path, sharded_bfloat16_base: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    merge(runs / "fsdp", sharded_bfloat16_base, tmp_path / "merged", torch.float32)
    for key, tensor in all_weights(tmp_path / "merged").items():
        if key in expected:
            assert torch.equal(tensor, expected[key]), key
        else:
            assert tensor.dtype == (torch.float32 if key.startswith("token2wav.") else torch.bfloat16), key
    thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype="auto")
    assert thinker.dtype == torch.float32


def test_a_step_and_an_actor_folder_are_taken_too(runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    actor = runs / "fsdp" / "global_step_3" / "actor"
    for checkpoint in (actor, actor.parent, runs / "fsdp"):
        assert merging.find_actor(checkpoint) == actor


def copy_of(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda actor: (actor / "model_world_size_2_rank_1.pt").unlink(), "1 of 2 rank files are missing.*rank_1.pt"),
        (lambda actor: cut_short(actor / "model_world_size_2_rank_1.pt"), "rank_1.pt cannot be read.*cut short"),
        (lambda actor: (actor / "model_world_size_2_rank_0.pt").write_bytes(b""), "rank_0.pt cannot be read"),
        (lambda actor: (actor / "fsdp_config.json").unlink(), "no fsdp_config.json"),
        (lambda actor: cut_short(actor / "fsdp_config.json"), "cannot read .*fsdp_config.json"),
        (lambda actor: torch.save({"w": torch.ones(1)}, actor / "model_world_size_2_rank_1.pt"), "not the tensors of"),
        (lambda actor: shutil.rmtree(actor.parent), "no fsdp_config.json"),
        (lambda actor: (actor.parents[1] / "latest_checkpointed_iteration.txt").write_text(""), "which is no step"),
    ],
)
def test_an_incomplete_checkpoint_is_refused_and_nothing_is_left(
    runs: Path, tiny_model: Path, tmp_path: Path, damage: object, complaint: str
) -> None:
    run = copy_of(runs / "fsdp", tmp_path)
    damage(run / "global_step_3" / "actor")  # type: ignore[operator]
    with pytest.raises(MergeError, match=complaint):
        merge(run, tiny_model, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_base_that_the_run_was_not_trained_from_is_refused(runs: Path, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    key = "thinker.model.norm.weight"
    save_file(weights | {key: weights[key][:-1].contiguous()}, base / "model.safetensors")
    with pytest.raises(MergeError, match=f"{key} is .128,.*127"):
        merge(runs / "fsdp", base, tmp_path / "merged")
    del weights[key]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(MergeError, match=f"{key} is only in the checkpoint"):
        merge(runs / "fsdp", base, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("stored", [True, False])
def test_tied_weights_are_merged_whether_the_base_stores_them_twice_or_once(
    tiny_model: Path, tmp_path: Path, stored: bool
) -> None:
    head, embeddings = "thinker.lm_head.weight", "thinker.model.embed_tokens.weight"
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    save_file(weights | {head: weights[embeddings].clone()}, base / "model.safetensors", {"format": "pt"})
    runs = save_runs(base, tmp_path / "runs")
    rank_files = list((runs / "fsdp").rglob("model_world_size_*"))
    for file in rank_files:
        state = torch.load(file, weights_only=True)
        torch.save(state | {head: state[embeddings]}, file)
    if not stored:
        save_file({key: value for key, value in weights.items() if key != head}, base / "model.safetensors")
    merge(runs / "fsdp", base, tmp_path / "merged")
    merged = all_weights(tmp_path / "merged")
    assert (head in merged) == stored
    assert not stored or torch.equal(merged[head], merged[embeddings])


def test_what_is_no_merge_is_never_replaced_but_an_earlier_merge_is(
    runs: Path, tiny_model: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(MergeError, match="exists and is not the output of a merge"):
        merge(runs / "fsdp", tiny_model, output)
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    (output / "thesis.tex").unlink()
    for _ in range(2):
        merge(runs / "fsdp", tiny_model, output)
    assert_merged(output, tiny_model, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_command_after_kill_9_ends_with_a_whole_model(
    runs: Path, tiny_model: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    # killed with SIGKILL after the first shard is on disk: no handler of the merge gets to run
    killed = (
        "import os, signal, sys\n"
        "from echo_plugins.for_verl import merge\n"
        "save = merge.save_file\n"
        "def save_and_die(*words, **options):\n"
        "    save(*words, **options)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge.save_file = save_and_die\n"
        "sys.exit(merge.main())\n"
    )
    words = [str(runs / "fsdp"), "--base", str(tiny_model), "--output", str(output)]
    first = subprocess.run([sys.executable, "-c", killed, *words], cwd=ROOT, capture_output=True, check=False)
    assert first.returncode == -9, first.stderr
    assert not output.exists()
    assert any(tmp_path.iterdir())

    environment = os.environ | {
        "CHECKPOINT": str(runs / "fsdp"),
        "BASE_MODEL": str(tiny_model),
        "OUTPUT_DIR": str(output),
        "PYTHON": sys.executable,
    }
    again = subprocess.run(
        ["bash", str(ROOT / "script" / "merge.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert "thinker.audio_tower: 0 of 39 tensors changed" in again.stdout
    assert_merged(output, tiny_model, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_refusal_is_one_line_and_exit_1(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = merging.main([str(tmp_path / "gone"), "--base", str(tiny_model), "--output", str(tmp_path / "merged")])
    assert status == 1
    assert capsys.readouterr().err.splitlines() == [
        f"merge: error: {tmp_path / 'gone'} is not a directory; give a run of stage 2 or one of its global_step_N"
    ]
