"""verl's actor worker on CPU ranks, without Ray: it takes the rows of each job, and writes what became of them.

    python tests/plugin/actor_ranks.py CONFIG.yaml JOBS.pt RESULTS.pt

CONFIG is verl's whole configuration. JOBS: number of ranks -> name -> Job; RESULTS: number of ranks -> name -> what the
job gave on each rank. All jobs of one number of ranks share one actor, in their order. Run by test_exactness.py in its
own process, with the environment that script/stage2_multiturn_rl.sh gives verl.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch

Row = dict[str, Any]  # verl_rollout.row_of


class Job(TypedDict):
    """A method of Actor, the rows of each rank, and what else the method takes."""

    method: str
    ranks: list[list[Row]]
    options: dict[str, Any]


def main() -> None:
    from omegaconf import OmegaConf
    from torch.multiprocessing.spawn import start_processes

    config_file, jobs_file, results_file = sys.argv[1:]
    config, jobs = OmegaConf.load(config_file), torch.load(jobs_file, weights_only=False)
    torch.set_num_threads(1)
    import verl.workers.engine_workers  # noqa: F401 - once, before the ranks fork

    results = {}
    for world, named in jobs.items():
        # forked, so that verl is imported once and not by every rank
        start_processes(run_rank, (world, config, named, results_file), nprocs=world, start_method="fork")
        ranks = [torch.load(f"{results_file}.{rank}", weights_only=False) for rank in range(world)]
        results[world] = {name: [rank[name] for rank in ranks] for name in named}
    torch.save(results, results_file)


def run_rank(rank: int, world: int, config: Any, jobs: dict[str, Job], results_file: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # PyTorch renews its pool of threads at its first use after a fork. Autograd's threads, eight at once, would race
    # for it, and now and then one would find none ("Invalid thread pool!").
    torch.set_num_threads(1)
    os.environ["DIST_INIT_METHOD"] = f"file://{results_file}.{world}.rendezvous"
    actor = Actor(config)
    results = {name: getattr(actor, job["method"])(job["ranks"][rank], **job["options"]) for name, job in jobs.items()}
    torch.save(results, f"{results_file}.{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class Actor:
    """verl's worker with the role of the actor, as its trainer calls it."""

    def __init__(self, config: Any) -> None:
        from verl.workers.engine_workers import ActorRolloutRefWorker

        self.config = config
        self.worker = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor")
        self.worker.init_model()
        assert self.worker.actor is not None
        self.engine: Any = self.worker.actor.engine
        self.loss_fn: Any = self.worker.actor.loss_fn
        self.take_step = self.engine.optimizer_step

    def log_probs(self, rows: list[Row], **options: Any) -> list[torch.Tensor]:
        """trainer_base.py _compute_old_log_prob: of each row's response, a tensor (tokens,)."""
        from verl.workers.utils.padding import response_from_nested

        data = self.batch(rows, calculate_entropy=True, compute_loss=False, **options)
        output = self.worker.compute_log_prob(data)
        entropy: Any = output["entropy"]
        assert entropy.values().isfinite().all()
        return list(response_from_nested(output["log_probs"], data["response_mask"]).unbind())

    def gradients(self, rows: list[Row], **options: Any) -> dict[str, Any]:
        """trainer_base.py _update_actor, up to the step itself: what would be stepped along, and what was logged."""
        gradients: dict[str, torch.Tensor | None] = {}

        def look() -> float:
            for name, parameter in self.engine.module.named_parameters():
                gradients[name] = None if parameter.grad is None else parameter.grad.full_tensor().clone()
            return 0.0

        return {"metrics": self.update(rows, look, **options), "gradients": gradients}

    def step(self, rows: list[Row], **options: Any) -> dict[str, Any]:
        """_update_actor whole: what was logged, and the names of the weights that have changed."""
        before = self.weights()
        metrics = self.update(rows, self.take_step, **options)
        return {"metrics": metrics, "changed": {n for n, v in self.weights().items() if not torch.equal(v, before[n])}}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.full_tensor().clone() for name, value in self.engine.module.state_dict().items()}

    def update(
        self,
        rows: list[Row],
        step: Callable[[], float],
        from_reference: float = 0.1,
        moves: Mapping[str, float] | None = None,
        where: int = 1,
    ) -> dict[str, Any]:
        """What verl logs of one update on `rows`.

        The old log-probs are the actor's, the reference's lie `from_reference` above them. `moves`, field to amount, is
        added to a field at the tokens with the response mask `where`; the field `log_probs` is what the loss is given.
        """
        actor, moves = self.config.actor_rollout_ref.actor, moves or {}
        ready = []
        for row, old in zip(rows, self.log_probs(rows), strict=True):
            fields = {"old_log_probs": old, "ref_log_prob": old + from_reference, "advantages": row["advantages"]}
            place = (row["response_mask"] == where).float()
            ready.append(row | {name: value + moves.get(name, 0.0) * place for name, value in fields.items()})

        def loss_fn(model_output: Any, data: Any, dp_group: Any) -> Any:
            log_probs = shifted(model_output["log_probs"], data, where, moves.get("log_probs", 0.0))
            return self.loss_fn(model_output={**model_output, "log_probs": log_probs}, data=data, dp_group=dp_group)

        self.engine.optimizer_step = step
        self.worker.set_loss_fn(loss_fn)
        size = len(rows) * torch.distributed.get_world_size()
        data = self.batch(
            ready,
            calculate_entropy=False,
            global_batch_size=size,
            mini_batch_size=size,
            epochs=actor.ppo_epochs,
            seed=actor.data_loader_seed,
            dataloader_kwargs={"shuffle": actor.shuffle},
        )
        return self.worker.update_actor(data)["metrics"]

    def batch(self, rows: list[Row], **settings: Any) -> Any:
        """A rank's share of a batch as verl's ranks read it from the queue: ragged columns, and settings."""
        from verl.utils import tensordict_utils as tu

        columns: dict[str, Any] = {"multi_modal_inputs": [row["multi_modal_inputs"] for row in rows]}
        for name in rows[0].keys() - columns.keys():
            columns[name] = torch.nested.as_nested_tensor([row[name] for row in rows], layout=torch.jagged)
        temperature = self.config.actor_rollout_ref.rollout.temperature
        return tu.get_tensordict(columns, {"temperature": temperature, **settings})


def shifted(log_probs: Any, data: Any, mask: int, amount: float) -> torch.Tensor:
    """Log-probs of whole rows, nested, as a model gives them: at a token stands that of the next one."""
    added = []
    for row, response_mask in zip(log_probs.unbind(), data["response_mask"].unbind(), strict=True):
        end = len(row) - 1
        row_added = torch.zeros_like(row)
        row_added[end - len(response_mask) : end][response_mask == mask] = amount
        added.append(row_added)
    return torch.nested.nested_tensor_from_jagged(log_probs.values() + torch.cat(added), log_probs.offsets())


if __name__ == "__main__":
    main()
