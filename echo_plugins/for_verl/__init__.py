"""Adapters that verl 0.9.1 loads. verl imports this package in each of its processes, by either way in:

    VERL_USE_EXTERNAL_MODULES=echo_plugins.for_verl   set by script/stage2_multiturn_rl.sh; an error here ends the run
    the entry point verl.plugins                      what an installed echo-relisten adds; verl hides errors (DEBUG)

Nothing heavy may be imported here: eight processes of a run pass by, and most need one adapter or none. Each adapter is
imported after the module of verl that it extends.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import partial
from types import ModuleType

import wrapt

# After the import of this module of verl, the adapter is imported.
_ADAPTERS = {
    "verl.workers.config.model": ".omni",  # HFModelConfig: whoever builds a model or reads its configuration
    "verl.experimental.agent_loop.agent_loop": ".agent_loop",
    "verl.trainer.ppo.v1": ".trainer",
    "verl.utils.torch_functional": ".log_probs",
    "verl.workers.rollout.vllm_rollout.vllm_async_server": ".vllm_features",
    "verl.workers.rollout.vllm_rollout.utils": ".vllm_end",
}


def _bring_in(adapter: str, _after: ModuleType | None = None) -> None:
    try:
        importlib.import_module(adapter, __name__)
    except (ImportError, AttributeError):
        # An entry point's error verl logs at DEBUG, and goes on without Omni models.
        logging.getLogger(__name__).exception("echo_plugins.for_verl%s does not fit this verl", adapter)
        raise


for _verl_module, _adapter in _ADAPTERS.items():
    wrapt.register_post_import_hook(partial(_bring_in, _adapter), _verl_module)

if os.environ.get("VERL_PLATFORM") == "cpu":
    _bring_in(".cpu_platform")
