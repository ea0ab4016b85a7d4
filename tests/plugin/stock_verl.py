"""What verl 0.9.1 does with an Omni model by itself. Prints one JSON object, gap -> whether it is still there, for
test_verl_gaps.py. In a process of its own without our plug-in, because what an adapter mends stays mended.

    python tests/plugin/stock_verl.py MODEL WAV FOLDER
"""

import contextlib
import importlib.metadata
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
os.environ.pop("VERL_USE_EXTERNAL_MODULES", None)

import torch
import torch.distributed
import verl
from datasets import Dataset
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModel, AutoProcessor, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration
from transformers.generation import candidate_generator
from verl.experimental.agent_loop import agent_loop
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.trainer.ppo.v1 import trainer_base
from verl.utils import torch_functional
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.model import get_hf_auto_model_class
from verl.utils.tokenizer import hf_processor
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine, FSDPEngineWithLMHead
from verl.workers.rollout import utils

model_dir, wav, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
config = AutoConfig.from_pretrained(model_dir)
processor = AutoProcessor.from_pretrained(model_dir)
tokenizer = processor.tokenizer
audio_id = tokenizer.convert_tokens_to_ids("<|AUDIO|>")
model = Qwen2_5OmniForConditionalGeneration.from_pretrained(model_dir)
gaps: dict[str, bool] = {}


def raises(kind: type[BaseException], call: Callable[[], object]) -> bool:
    try:
        call()
    except kind:
        return True
    return False


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    gaps["no processor"] = hf_processor(model_dir) is None
gaps["no auto class"] = get_hf_auto_model_class(config) is AutoModel
gaps["no forward"] = raises(NotImplementedError, lambda: model(torch.tensor([[1, 2]])))
gaps["towers sharded apart"] = "Qwen2_5OmniAudioEncoder" in (model._no_split_modules or ())
gaps["towers trained"] = all(parameter.requires_grad for parameter in model.thinker.audio_tower.parameters())
gaps["no maximal length"] = raises(ValueError, lambda: utils.get_max_position_embeddings(config))
gaps["no word of tied embeddings"] = not hasattr(Qwen2_5OmniConfig(), "tie_word_embeddings") and (
    "hf_config.tie_word_embeddings" in inspect.getsource(FSDPEngine._build_module)
)
gaps["no position rows"] = not hasattr(processor, "get_rope_index")
gaps["no image token id"] = raises(AttributeError, lambda: utils.qwen2_5_vl_dedup_image_tokens([1, 2], processor))
gaps["banned tokens in the actor"] = "banned" not in inspect.getsource(FSDPEngineWithLMHead)
gaps["audio can be sampled"] = audio_id not in utils.get_vision_placeholder_token_ids(processor)

part = {"type": "audio", "audio": wav}
messages = [{"role": "user", "content": [part]}]
gaps["audio stays a path"] = RLHFDataset._process_multi_modal_info(messages, 14, OmegaConf.create())[2] == [wav]
row = {"prompt": [{"role": "user", "content": "<audio>Which?"}], "audios": [wav], "data_source": "x"}
Dataset.from_list([row]).to_parquet(str(folder / "row.parquet"))
settings = {"max_prompt_length": 1000, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": None}
settings["cache_dir"] = str(folder)
with contextlib.redirect_stdout(sys.stderr):
    rows = RLHFDataset(str(folder / "row.parquet"), tokenizer, OmegaConf.create(settings), processor)
gaps["audio rows filtered out"] = len(rows) == 0

# Its text only: importing it brings in the whole of vLLM.
server = Path(verl.__file__).with_name("workers") / "rollout/vllm_rollout/vllm_async_server.py"
gaps["prompts rendered on the event loop"] = "TokensPrompt(**prompt_kwargs)" in server.read_text()
# Called in the workers, which it ties to EngineCore. Nothing ties EngineCore to the server.
gaps["engines outlive their server"] = "set_death_signal" not in server.read_text()
gaps["clips padded to the window"] = 'padding"] = "max_length"' in inspect.getsource(type(processor).__call__)
empty = agent_loop.AgentLoopOutput(
    prompt_ids=[1], response_ids=[], response_mask=[], reward_score=0.0, metrics=agent_loop.AgentLoopMetrics()
)
gaps["no empty response"] = raises(IndexError, empty.as_dict)
base = trainer_base.PPOTrainer
gaps["literal sync"] = 'self.trainer_mode == "sync"' in inspect.getsource(base._build_replay_buffer)
gaps["no components in training"] = "extra_info" not in inspect.getsource(base._compute_metrics)
logits: Any = torch.randn(4, 8).bfloat16()
gaps["log-probs rounded"] = torch_functional.logprobs_from_logits_v2(logits, torch.arange(4)).dtype == torch.bfloat16
gaps["entry point errors hidden"] = '.debug("Failed to load plugin' in inspect.getsource(verl)

gaps["no cpu platform"] = PlatformRegistry.get("cpu") is None
address = {"init_method": f"file://{folder}/store", "rank": 0, "world_size": 1}
gaps["no device twice"] = raises(
    ValueError, lambda: torch.distributed.init_process_group("cpu:gloo,cpu:gloo", **address)
)
gaps["vllm by its name only"] = raises(
    importlib.metadata.PackageNotFoundError, lambda: importlib.metadata.version("vllm")
)
gaps["scikit-learn at every start"] = "import roc_curve" in inspect.getsource(candidate_generator)
gaps["reference pinned"] = "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(FSDPEngine._build_fsdp_module)

print("GAPS" + json.dumps(gaps))
