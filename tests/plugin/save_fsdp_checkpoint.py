"""Write 2-rank FSDP2 checkpoints of a slightly trained tiny model through verl's own checkpoint manager, on CPU.

    python save_fsdp_checkpoint.py MODEL OUTPUT

OUTPUT gets expected.safetensors (the actor's full state) and, for a plain and a replicated mesh, fsdp/ and hsdp/ with
global_step_3/actor and verl's tracker file, as a run of stage 2 leaves them. Run by test_merge.py in its own process.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from echo_plugins.model import family_of

MESHES = {"fsdp": ((2,), ("fsdp",)), "hsdp": ((2, 1), ("ddp", "fsdp"))}


def trained_model(path: str) -> Any:
    """The model as verl trains it, without talker and vocoder; every tensor but the audio tower's has moved."""
    model = getattr(transformers, family_of(path).model_class).from_pretrained(path, dtype=torch.float32)
    model.disable_talker()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "audio_tower" not in name:
                parameter.add_(torch.linspace(0.01, 0.02, parameter.numel()).view_as(parameter))
    return model


def save(rank: int, path: str, output: str, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name, (shape, dimensions) in MESHES.items():
        model = trained_model(path)
        if rank == 0:
            save_file(model.state_dict(), Path(output) / "expected.safetensors")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=dimensions)
        for layer in model.thinker.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        contents = OmegaConf.create({"save_contents": ["model"], "load_contents": ["model"]})
        manager = FSDPCheckpointManager(model, checkpoint_config=contents)  # type: ignore[arg-type]
        manager.save_checkpoint(f"{output}/{name}/global_step_3/actor", global_step=3)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    model, output = sys.argv[1:]
    Path(output).mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # forked, so that verl is imported once and not by every rank
    start_processes(save, (model, output, f"{output}/rendezvous"), nprocs=2, start_method="fork")
    for name in MESHES:
        (Path(output) / name / "latest_checkpointed_iteration.txt").write_text("3")


if __name__ == "__main__":
    main()
