"""The options of an engine, the same in every command that starts one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

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
    list[str] | None, typer.Option(metavar="KEY=JSON", help="Any other argument of vLLM's AsyncEngineArgs.")
]


def engine_args(pairs: Sequence[str]) -> dict[str, Any]:
    """What --engine-arg says. Raises typer.BadParameter (exit status 2)."""
    args: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            args[key] = json.loads(value)
        except json.JSONDecodeError:
            args[key] = value
        if not key or not equals:
            raise typer.BadParameter(f"--engine-arg {pair!r} is not KEY=JSON, such as max_num_batched_tokens=4096")
    return args
