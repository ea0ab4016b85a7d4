"""Rollouts as verl makes them, on the vLLM that the tests share: our agent loop, verl's own server code around the
engine that runs already, and the rows that verl's worker makes of what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transfer_queue
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, DictConfigWrap
from verl.trainer.ppo.v1 import agent_loop_tq

import echo_plugins.for_verl.agent_loop as agent_loop
import echo_plugins.for_verl.cpu_platform
import echo_plugins.for_verl.dataset as dataset
import echo_plugins.for_verl.omni  # noqa: F401 - as in verl's own processes
from echo_plugins.model import family_of
from echo_plugins.relisten.prompt import question_text

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 1024, 400
MAX_MODEL_LEN = 4096


def verl_server(llm: Any, processor: Any) -> Any:
    """verl's server around a vLLM that runs already: what its `generate` reads, and no HTTP, Ray or workers."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer

    server = object.__new__(vLLMHttpServer)
    members = {
        "engine": llm,
        "config": OmegaConf.create(
            {
                "max_model_len": MAX_MODEL_LEN,
                "response_length": MAX_RESPONSE_TOKENS,
                "prompt_length": MAX_PROMPT_TOKENS,
                "full_determinism": False,
                "enable_rollout_routing_replay": False,
                "mtp": None,
            }
        ),
        "model_config": SimpleNamespace(processor=processor, lora_rank=0, lora={}),
        "replica_rank": 0,
        "global_steps": 1,
        "_disaggregation_role": "null",
        "_pd_decode_peers": [],
        "_submission_paused": False,
        "_rejecting": False,
        "_admitting": 0,
    }
    vars(server).update(members)
    return server


def messages_of(question: str, choices: Sequence[str], audio: str | None) -> list[dict[str, Any]]:
    """The prompt of a row as for_verl.dataset hands it on; `audio` is a path."""
    text = {"type": "text", "text": question_text(question, choices, "interleaved")}
    return [{"role": "user", "content": [text] if audio is None else [{"type": "audio", "audio": audio}, text]}]


async def roll_out(
    llm: Any,
    model: Path,
    processor: Any,
    messages: list[dict[str, Any]],
    sampling: dict[str, Any],
    max_response_tokens: int = MAX_RESPONSE_TOKENS,
    **echo: Any,
) -> AgentLoopOutput:
    """One trajectory through RelistenAgentLoop. `llm` is vLLM; `echo` the settings of the section of that name."""
    lengths = {"prompt_length": MAX_PROMPT_TOKENS, "response_length": max_response_tokens}
    loop = relisten_loop(model, processor, verl_server(llm, processor), lengths, echo)
    return await loop.run(sampling, raw_prompt=messages, index=0, global_steps=1)


def relisten_loop(
    model: Path, processor: Any, server: Any, lengths: Mapping[str, int], echo: Mapping[str, Any]
) -> agent_loop.RelistenAgentLoop:
    """The agent loop as verl's worker makes it. `server` answers `generate`."""
    config = OmegaConf.create(
        {"actor_rollout_ref": {"model": {"path": str(model)}, "rollout": lengths}, "data": {}, "echo": echo}
    )
    return agent_loop.RelistenAgentLoop(
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=processor.tokenizer,
        processor=processor,
        dataset_cls=dataset.RelistenDataset,
        data_config=DictConfigWrap(config.data),
        hf_model_type=family_of(model).model_type,
    )


async def row_of(output: AgentLoopOutput, processor: Any, uid: str) -> dict[str, Any]:
    """A trajectory as verl's worker puts it into the queue that the trainer's ranks read."""
    worker_class = agent_loop_tq.AgentLoopWorkerTQ.__ray_metadata__.modified_class  # type: ignore[attr-defined]
    worker = object.__new__(worker_class)
    vars(worker).update(
        processor=processor,
        tokenizer=processor.tokenizer,
        mm_processor_kwargs=None,
        reward_loop_worker_handles=None,
        distillation_enabled=False,
    )
    put = mock.AsyncMock()
    with mock.patch.object(transfer_queue, "async_kv_batch_put", put):
        await worker._agent_loop_postprocess(output, False, uid=uid, session_id=0, global_steps=1)
    fields = put.call_args.kwargs["fields"][0]
    return {key: value for key, value in fields.items() if isinstance(value, torch.Tensor)} | {
        "multi_modal_inputs": fields["multi_modal_inputs"]
    }
