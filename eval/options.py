"""The options of an engine, the same in every command that starts one, and the settings that they come to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import typer

from .engine import EngineSettings

DRIVERS = (Path("/proc/driver/nvidia"), Path("/dev/kfd"))  # without one of them torch, slow to import, sees no GPU


class KeyValue(NamedTuple):
    """What one KEY=JSON says."""

    name: str
    value: Any


def key_value(pair: str) -> KeyValue:
    """`KEY=JSON`; what is no JSON is text."""
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"{pair!r} is not KEY=JSON, such as max_tokens=4096")
    try:
        return KeyValue(name, json.loads(value))
    except json.JSONDecodeError:
        return KeyValue(name, value)


DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option()]
TensorParallelOption = Annotated[int, typer.Option(min=1, help="GPUs for each engine.")]
DtypeOption = Annotated[str, typer.Option(help="auto: float32 on CPU, else the model's own.")]
MaxModelLenOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of prompt and response. Default: the model's.")
]
MaxNumSeqsOption = Annotated[int | None, typer.Option(min=1, help="Trajectories that an engine runs at once.")]
GpuMemoryOption = Annotated[float, typer.Option(min=0.1, max=1.0)]
CpuKvCacheOption = Annotated[float, typer.Option(min=0.01)]
EngineArgOption = Annotated[
    list[KeyValue] | None,
    typer.Option(parser=key_value, metavar="KEY=JSON", help="Any other argument of vLLM's AsyncEngineArgs."),
]


def visible_gpus(device: str) -> int:
    """This machine's GPUs, where `device` allows them; 0 is the CPU. Raises ValueError for "cuda" without one."""
    if device == "cpu" or (device == "auto" and not any(path.exists() for path in DRIVERS)):
        return 0
    import torch

    return require_gpus(torch.cuda.device_count(), device)


def require_gpus(number: int, device: str) -> int:
    """`number`. Raises ValueError when `device` is "cuda" and there is none."""
    if device == "cuda" and not number:
        raise ValueError("--device cuda, but there is no GPU to be seen (CUDA_VISIBLE_DEVICES?)")
    return number


def engine_settings(
    model: Path,
    num_gpus: int,
    max_segments: int,
    tensor_parallel: int,
    engine_arg: Sequence[KeyValue] | None,
    **same_names: Any,
) -> EngineSettings:
    """What the options above come to. `num_gpus` is what there is, 0 for the CPU."""
    return EngineSettings(
        model=str(model.resolve()),
        device="cuda" if num_gpus else "cpu",
        tensor_parallel_size=tensor_parallel,
        max_clips=1 + max_segments,
        extra=dict(engine_arg or ()),
        **same_names,
    )
