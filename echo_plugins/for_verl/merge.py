"""A verl FSDP checkpoint becomes a complete Omni model directory, laid out as its base model is.

    python -m echo_plugins.for_verl.merge RUN/rl/global_step_40 --base RUN/sft --output RUN/merged

verl trains the thinker alone, so everything else (talker, token2wav, spk_dict.pt, processor, configurations, chat
template) is carried over from the base model, and the thinker's tensors are written under the base's own names, in its
shards and its dtypes: what loads the base loads the result. The rank files are memory-mapped and merged one tensor at a
time, so that a shard of the base is all that has to fit in memory.

verl's own merger (`python -m verl.model_merger`) is not used: it casts everything to bfloat16, writes no talker and no
spk_dict.pt, and unpickles whatever the files hold. The layout read here is that of
verl/utils/checkpoint/fsdp_checkpoint_manager.py (0.9.1).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Replicate, Shard
from tqdm import tqdm

LATEST = "latest_checkpointed_iteration.txt"
BEST = "best_checkpointed_iteration.txt"  # trainer.py writes it
INDEX = "model.safetensors.index.json"
REPORT = "echo_merge.json"  # marks a directory as ours to replace
THINKER = "thinker."
CARRIED_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "spk_dict.pt", "LICENSE*")
NOT_CARRIED_FILES = (INDEX, REPORT, "trainer_state.json")
# transformers holds a layer's experts as two tensors, (experts, 2 * inner, hidden) and (experts, hidden, inner), and
# saves them one by one (conversion_mapping.py).
FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FUSED_NAME = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class MergeError(Exception):
    """What cannot be merged, why, and what to do about it."""


def find_actor(checkpoint: Path, best: bool = False) -> Path:
    """The actor of a run (its latest or its best checkpoint) or of a `global_step_N`, or the directory itself.

    Raises MergeError when there is none.
    """
    if not checkpoint.is_dir():
        raise MergeError(f"{checkpoint} is not a directory; give a run of stage 2 or one of its global_step_N")
    latest = checkpoint / (BEST if best else LATEST)
    if best and not latest.is_file():
        raise MergeError(f"{checkpoint} has no {BEST}: RL_KEEP_BEST was not set, or no checkpoint was validated")
    if latest.is_file():
        step = latest.read_text().strip()
        if not step.isdecimal():
            raise MergeError(f"{latest} says {step!r}, which is no step; give a global_step_N directory")
        checkpoint = checkpoint / f"global_step_{step}"
    actor = checkpoint / "actor" if (checkpoint / "actor").is_dir() else checkpoint
    if not (actor / "fsdp_config.json").is_file():
        steps = sorted(path.name for path in checkpoint.glob("global_step_*"))
        hint = f"; there are {', '.join(steps)} in it, none of which was finished" if steps else ""
        raise MergeError(f"{actor} has no fsdp_config.json, so it is no finished verl FSDP checkpoint{hint}")
    return actor


@dataclass(frozen=True)
class Expert:
    """Where an expert's tensor lies: which part of which expert, in the actor's tensor `fused`."""

    fused: str
    number: int
    part: int
    parts: int


class ActorState:
    """The actor's full state under the names of `base_keys`, read from its rank files one tensor at a time. Experts
    that the actor holds in one tensor and the base one by one are taken out of it.

    Raises MergeError for a checkpoint that is not whole: a rank file that is missing, cut short, or has other tensors
    than rank 0's.
    """

    def __init__(self, actor: Path, base_keys: set[str]) -> None:
        world_size = _read_json(actor / "fsdp_config.json").get("world_size")
        if not isinstance(world_size, int) or world_size < 1:
            raise MergeError(f"{actor / 'fsdp_config.json'} gives world_size {world_size!r}")
        paths = [actor / f"model_world_size_{world_size}_rank_{rank}.pt" for rank in range(world_size)]
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            names = ", ".join(missing[:4]) + (" ..." if len(missing) > 4 else "")
            raise MergeError(
                f"{actor} is incomplete: {len(missing)} of {world_size} rank files are missing ({names}); copy them "
                "from the nodes that wrote them, or take another step"
            )
        self._actor = actor
        self._ranks = [_load_rank(path) for path in tqdm(paths, desc="opening rank files", unit="file")]
        self._keys = self._ranks[0].keys()
        for path, state in zip(paths, self._ranks, strict=True):
            if state.keys() != self._keys:
                key = sorted(state.keys() ^ self._keys)[0]
                raise MergeError(f"{path} has not the tensors of rank 0 (first: {key}); the ranks are not of one save")
        # PEFT's names by the model's own: `base_model.model.X.base_layer.weight`, with X.lora_A and X.lora_B beside it.
        self._names = {own_name(key): key for key in self._keys if "lora_" not in key}
        self._experts: dict[str, Expert] = {}
        for name in self._names.keys() - base_keys:
            if match := FUSED_NAME.fullmatch(name):
                self._take_apart(name, match[1], FUSED_EXPERTS[match[2]])
        self._whole_experts = lru_cache(maxsize=2)(self._whole)  # both of a layer: experts come one after the other
        self._scaling = 0.0
        adapted = {key.replace("lora_A.default.weight", "base_layer.weight") for key in self._keys if "lora_A" in key}
        if adapted - self._keys:
            raise MergeError(
                f"{actor} has an adapter of {min(adapted - self._keys)}. It is no linear layer, so it stays apart: "
                "leave it out of RL_LORA_TARGETS"
            )
        if any("lora_" in key for key in self._keys):
            adapter = _read_json(actor / "lora_train_meta.json")
            self._scaling = adapter["lora_alpha"] / adapter["r"]

    def _take_apart(self, name: str, experts: str, parts: tuple[str, ...]) -> None:
        for number in range(self._ranks[0][self._names[name]].shape[0]):
            for place, part in enumerate(parts):
                self._experts[f"{experts}.{number}.{part}.weight"] = Expert(
                    self._names[name], number, place, len(parts)
                )
        del self._names[name]

    def keys(self) -> set[str]:
        return self._names.keys() | self._experts.keys()

    def tensor(self, key: str) -> torch.Tensor:
        """The whole tensor, in the dtype it was trained in, with its adapter merged: W + alpha / r * B A (LoRA, arXiv
        2106.09685, section 4.1). Raises MergeError when its shards do not make one."""
        if expert := self._experts.get(key):
            return self._whole_experts(expert.fused)[expert.number].chunk(expert.parts)[expert.part].clone()
        stored = self._names[key]
        whole = self._whole(stored)
        down = stored.replace("base_layer.weight", "lora_A.default.weight")
        if down == stored or down not in self._keys:
            return whole
        up = self._whole(down.replace("lora_A", "lora_B")).float() @ self._whole(down).float()
        return (whole.float() + self._scaling * up).to(whole.dtype)

    def _whole(self, key: str) -> torch.Tensor:
        parts = [state[key] for state in self._ranks]
        first = parts[0]
        if not isinstance(first, DTensor):
            if any(not torch.equal(first, part) for part in parts[1:]):
                raise MergeError(f"{self._actor}: {key} is not sharded, yet differs between ranks")
            return first
        *outer, inner = first.placements
        if isinstance(inner, Replicate):
            return first.to_local()
        if type(inner) is not Shard or not all(isinstance(placement, Replicate) for placement in outer):
            raise MergeError(f"{self._actor}: {key} is placed as {first.placements}; only FSDP and HSDP can be merged")
        mesh = first.device_mesh.mesh
        group = mesh.reshape(-1, mesh.shape[-1])[0].tolist()  # of the replicas the first
        whole = torch.cat([parts[rank].to_local() for rank in group], dim=inner.dim)
        if whole.shape != first.shape:
            raise MergeError(f"{self._actor}: the shards of {key} make {tuple(whole.shape)}, not {tuple(first.shape)}")
        return whole


def own_name(key: str) -> str:
    """A tensor's name in the model, from the one that PEFT gives it."""
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _load_rank(path: Path) -> dict[str, torch.Tensor]:
    try:
        # weights_only: a checkpoint is data, and nothing in it gets to run
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MergeError(f"{path} cannot be read, it was probably cut short while it was written: {reason}") from error


class BaseModel:
    """The model that the training started from: a complete Omni directory in safetensors.

    Raises MergeError when something that the result needs is missing in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = _read_json(path / "config.json")
        if "thinker_config" not in self.config:
            raise MergeError(f"{path} is not a full Omni model: its config.json has no thinker_config")
        if self.config.get("model_type") == "qwen2_5_omni" and not (path / "spk_dict.pt").is_file():
            raise MergeError(f"{path} has no spk_dict.pt, without which transformers does not load the full model")
        if (path / INDEX).is_file():
            weight_map: dict[str, str] = _read_json(path / INDEX).get("weight_map", {})
        else:
            weight_map = dict.fromkeys(_safetensors_keys(path / "model.safetensors"), "model.safetensors")
        self.shards: dict[str, list[str]] = {}
        for key, shard in weight_map.items():
            self.shards.setdefault(shard, []).append(key)
        for shard, keys in self.shards.items():
            absent = set(keys) - set(_safetensors_keys(path / shard))
            if absent:
                raise MergeError(f"{path / shard} lacks {min(absent)}, which {INDEX} puts there")
        self.keys = set(weight_map)

    def carried_files(self) -> list[Path]:
        found = {path for pattern in CARRIED_FILES for path in self.path.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.name not in NOT_CARRIED_FILES)


def _safetensors_keys(path: Path) -> list[str]:
    if not path.is_file():
        raise MergeError(f"{path} does not exist; the base model must be complete, with its weights in safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise MergeError(f"{path} is not whole: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MergeError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise MergeError(f"{path} does not hold a JSON object")
    return document


def merge(
    checkpoint: Path, base_path: Path, output: Path, dtype: torch.dtype | None = None, best: bool = False
) -> dict[str, Any]:
    """Write `output`, whole or not at all, and return the report that is also kept in it.

    `dtype` is for the trained tensors; None keeps each as it is in the base. Raises MergeError; `output` is then as it
    was before.
    """
    actor = find_actor(checkpoint, best)
    base = BaseModel(base_path)
    state = ActorState(actor, base.keys)
    trained = {key for key in base.keys if key.startswith(THINKER)}
    _check_names(state.keys() - repeated(state, base), trained, actor, base_path)
    changed: Counter[str] = Counter()
    total: Counter[str] = Counter()
    num_bytes = 0
    with _written_whole(output) as folder, tqdm(total=len(base.keys), desc="merging", unit="tensor") as progress:
        _check_space(folder, base, dtype)
        for shard, keys in base.shards.items():
            tensors: dict[str, torch.Tensor] = {}
            with safe_open(base_path / shard, framework="pt") as file:
                for key in keys:
                    before = file.get_tensor(key)
                    tensors[key] = before
                    if key in trained:
                        tensor = state.tensor(key)
                        if tensor.shape != before.shape:
                            raise MergeError(
                                f"{key} is {tuple(tensor.shape)} in {actor} and {tuple(before.shape)} in {base_path}; "
                                "give the base model that this checkpoint was trained from"
                            )
                        tensors[key] = tensor.to(dtype or before.dtype).contiguous()
                        part = ".".join(key.split(".")[:2])
                        total[part] += 1
                        changed[part] += not torch.equal(tensor.to(before.dtype), before)
                    num_bytes += tensors[key].nbytes
                    progress.update()
            save_file(tensors, folder / shard, metadata={"format": "pt"})
        if (base_path / INDEX).is_file():
            weight_map = {key: shard for shard, keys in base.shards.items() for key in keys}
            _write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
        for path in base.carried_files():
            shutil.copyfile(path, folder / path.name)
        if dtype is not None:
            _write_json(folder / "config.json", _with_dtype(base.config, _dtype_name(dtype)))
        report = {
            "checkpoint": str(actor.resolve()),
            "base": str(base_path.resolve()),
            "dtype": _dtype_name(dtype) if dtype else "as in the base",
            "carried_tensors": len(base.keys - trained),
            "trained_tensors": {part: {"total": total[part], "changed": changed[part]} for part in sorted(total)},
        }
        _write_json(folder / REPORT, report)
    return report


def repeated(state: ActorState, base: BaseModel) -> set[str]:
    """Tied weights, which a state dict holds under both their names and a checkpoint under one."""
    head, embeddings = f"{THINKER}lm_head.weight", f"{THINKER}model.embed_tokens.weight"
    if head in base.keys or not {head, embeddings} <= state.keys():
        return set()
    return {head} if torch.equal(state.tensor(head), state.tensor(embeddings)) else set()


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_names(actor_keys: set[str], base_keys: set[str], actor: Path, base: Path) -> None:
    absent, extra = sorted(base_keys - actor_keys), sorted(actor_keys - base_keys)
    if absent or extra:
        example = f"{absent[0]} is only in the base" if absent else f"{extra[0]} is only in the checkpoint"
        raise MergeError(
            f"{actor} and {base} differ in the names of {len(absent) + len(extra)} thinker tensors ({example}); "
            "give the base model that this checkpoint was trained from"
        )


def _check_space(folder: Path, base: BaseModel, dtype: torch.dtype | None) -> None:
    size = sum((base.path / shard).stat().st_size for shard in base.shards)
    needed = size * (2 if dtype is torch.float32 else 1)  # at most: a base in bfloat16 written as float32
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MergeError(
            f"{folder.parent} has {free / 2**30:.1f} GiB free, the merged model takes {needed / 2**30:.1f}"
        )


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration with `dtype` set for the thinker and its parts; talker and token2wav keep theirs."""
    changed: dict[str, Any] = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name}
    for part in ("thinker_config", "text_config", "audio_config", "vision_config"):
        if isinstance(changed.get(part), dict):
            changed[part] = _with_dtype(changed[part], name)
    return changed


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _written_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place, synced to disk, when the block ends well, and else is removed.

    What a killed merge left behind is cleared away first. Only a merge's own output is replaced.
    """
    if output.exists() and not (output / REPORT).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise MergeError(f"{output} exists and is not the output of a merge; give another --output or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    folder, replaced = (output.with_name(f".{output.name}.{word}") for word in ("unfinished", "replaced"))
    for leftover in (folder, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for path in (*folder.iterdir(), folder):
            _sync(path)
        if output.exists():
            output.rename(replaced)
        folder.rename(output)
        _sync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m echo_plugins.for_verl.merge",
        description="Merge a verl FSDP checkpoint into a complete Omni model directory (transformers, vLLM).",
    )
    parser.add_argument("checkpoint", type=Path, help="a run of stage 2 (its latest step) or one of its global_step_N")
    parser.add_argument("--base", type=Path, required=True, help="the model that the run was trained from")
    parser.add_argument("--output", type=Path, required=True, help="directory to write; an earlier merge is replaced")
    parser.add_argument("--best", action="store_true", help="of a run, the checkpoint of its best validation")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="of the thinker (default: as it is in the base)")
    args = parser.parse_args(argv)
    # One warning a rank file, that meshes come without process groups: none is needed to read them.
    logging.getLogger("torch.distributed.device_mesh").setLevel(logging.ERROR)
    try:
        report = merge(args.checkpoint, args.base, args.output, DTYPES.get(args.dtype), args.best)
    except MergeError as error:
        print(f"merge: error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {report['checkpoint']} merged into {report['base']}")
    for part, count in report["trained_tensors"].items():
        print(f"  {part}: {count['changed']} of {count['total']} tensors changed by training")
    print(f"  {report['carried_tensors']} other tensors carried over")
    return 0


if __name__ == "__main__":
    sys.exit(main())
