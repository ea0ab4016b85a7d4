"""The rollout: verl's agent loop drives `relisten.trajectory` against the engine, one coroutine a trajectory.

    actor_rollout_ref.rollout.agent.default_agent_loop=relisten
    +echo.mode=interleaved +echo.max_segments=8 +echo.min_segment_seconds=0.2 +echo.straddle=cut
    +echo.rollout_timeout_seconds=1800

A rollout that fails (bad audio, engine error, time limit, a prompt that is too long) is data: it comes back with stop
reason `error`, outside the loss, and the reward manager scores it 0. `extra_fields` has the same keys in every
trajectory, since verl collates them; for_verl/reward_manager.py and trainer.py read them.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

import numpy as np
from ray.exceptions import RayError
from transformers.feature_extraction_utils import BatchFeature
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.utils.profiler import simple_timer

from ..audio import SAMPLING_RATE, AudioError, crop
from ..model import FAMILIES, OmniFamily
from ..relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS
from ..relisten.trajectory import Settings, SpecialIds, StopReason, Trajectory, expand_placeholders
from .engine_watch import one_line
from .omni import pack_clips

_log = logging.getLogger(__name__)

BANNED_BIAS = -100.0  # vLLM's lowest logit bias
ROLLOUT_TIMEOUT_SECONDS = 1800.0
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


class PromptTooLongError(ValueError):
    """A row whose prompt, its audio tokens counted, is over data.max_prompt_length."""


@register("relisten")
class RelistenAgentLoop(AgentLoopBase):
    """Interleaves sampling with the clips that the policy asks for."""

    tokenizer: Any
    processor: Any

    def __init__(self, *args: Any, hf_model_type: str | None = None, tools: Any = None, **kwargs: Any) -> None:
        # The base class makes a builder of chat tokens that is of no use here, since the turn step keeps the ids, and
        # warns of an unknown model type in every trajectory.
        super().__init__(*args, hf_model_type="qwen2_5_vl", **kwargs)
        family = FAMILIES.get(hf_model_type or "")
        if family is None:
            raise ValueError(f"model type {hf_model_type!r} cannot listen: Echo knows {sorted(FAMILIES)}")
        self.ids, self.bias = ids_and_bias(family, self.tokenizer, self.config.actor_rollout_ref.model.path)
        self.hop_length = self.processor.feature_extractor.hop_length
        self.family = family
        self.settings, self.timeout_seconds = settings_from(self.config)

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """One trajectory of `row`, a row of for_verl.dataset. Never raises for what the row or the engine did."""
        engine: list[dict[str, Any]] = []  # what the engine said beside the tokens, turn by turn
        timing: dict[str, Any] = {"generate_sequences": 0.0, "tool_calls": 0.0}
        prompt = self._prompt(list(row["raw_prompt"]))
        trajectory = self._start(prompt, num_samples=0)
        prompt_ids: list[int] = []
        features: BatchFeature | None = None
        try:
            async with asyncio.timeout(self.timeout_seconds):
                audios = (await self.process_multi_modal_info(list(row["raw_prompt"]))).get("audios") or []
                trajectory = self._start(prompt, num_samples=len(audios[0]) if audios else 0)
                prompt_ids = self._expand(prompt, audios)
                with simple_timer("generate_sequences", timing):
                    await self._generate(trajectory, audios, sampling_params, int(row.get("priority", 0)), engine)
                with simple_timer("tool_calls", timing):
                    features = await asyncio.to_thread(self._features, audios)
        except TimeoutError:
            trajectory.fail(f"the rollout was not done after {self.timeout_seconds:g} s (echo.rollout_timeout_seconds)")
        except (AudioError, PromptTooLongError, RayError) as error:
            trajectory.fail(one_line(error))
        failed = trajectory.stop_reason is StopReason.ERROR
        if failed:
            _log.warning("== rollout of row %s failed: %s", row.get("index"), trajectory.error)
            prompt_ids = expand_placeholders(prompt, self.ids.audio, [0] * prompt.count(self.ids.audio))
            prompt_ids = prompt_ids[-self.rollout_config.prompt_length :]
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            **self._response(trajectory, failed, with_logprobs=bool(sampling_params.get("logprobs"))),
            multi_modal_data={} if failed or features is None else {"audios": features},
            num_turns=max(1, trajectory.num_turns),
            metrics=AgentLoopMetrics(**timing),
            extra_fields={
                **engine_account(engine, version=int(row.get("global_steps", 0)) - 1),
                **await asyncio.to_thread(self._account, trajectory),
            },
        )

    def _prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt with one placeholder a clip."""
        text = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.apply_chat_template_kwargs
        )
        return self.tokenizer.encode(self.family.prompt(text), add_special_tokens=False)

    def _expand(self, prompt: Sequence[int], audios: Sequence[np.ndarray]) -> list[int]:
        """The prompt as the trainer takes it. Raises AudioError and PromptTooLongError for what would not fit."""
        window = self.family.window_samples(self.processor.feature_extractor)
        if any(len(audio) > window for audio in audios):
            raise AudioError(
                f"{len(audios[0]) / SAMPLING_RATE:.1f} s of audio: the model hears {window / SAMPLING_RATE:g} s at most"
                " and would cut off the rest"
            )
        counts = [self._count_audio_tokens(len(audio)) for audio in audios]
        expanded = expand_placeholders(prompt, self.ids.audio, counts)
        if len(expanded) > self.rollout_config.prompt_length:
            raise PromptTooLongError(
                f"{len(expanded)} tokens, {sum(counts)} of them audio, are over "
                f"data.max_prompt_length={self.rollout_config.prompt_length}"
            )
        return expanded

    def _count_audio_tokens(self, num_samples: int) -> int:
        return self.family.num_audio_tokens(num_samples, self.hop_length)

    def _start(self, prompt: Sequence[int], num_samples: int) -> Trajectory:
        return Trajectory(
            prompt,
            num_samples,
            SAMPLING_RATE,
            self.ids,
            self.settings,
            decode=self._decode,
            encode=lambda text: self.tokenizer.encode(text, add_special_tokens=False),
            count_audio_tokens=self._count_audio_tokens,
        )

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    async def _generate(
        self,
        trajectory: Trajectory,
        audios: list[np.ndarray],
        sampling_params: Mapping[str, Any],
        priority: int,
        engine: list[dict[str, Any]],
    ) -> None:
        """Drive `trajectory` to its end. `audios` grows by each clip that is inserted, views of its first waveform."""
        request_id = uuid4().hex  # one for all turns: they go to the replica whose cache has the turns before
        source = audios[0] if audios else None
        # Special tokens stay in vLLM's text: else "</se<|im_start|>g>" would stop it at a tag that is none.
        fixed = {"logit_bias": self.bias, "skip_special_tokens": False}
        while (turn := trajectory.next_turn()) is not None:
            stop = {"stop": list(turn.stop), "include_stop_str_in_output": True} if turn.stop else {}
            output = await self.server_manager.generate(
                request_id=request_id,
                prompt_ids=turn.engine_ids,
                sampling_params={**sampling_params, **fixed, "max_tokens": turn.max_tokens, **stop},
                audio_data=list(audios) or None,
                mm_processor_kwargs=self._get_mm_processor_kwargs(audios or None),
                priority=priority,
            )
            engine.append(output.extra_fields)
            # verl calls vLLM's "abort" so, and both "stop" and "length" completed (vllm_async_server.py:719)
            finish_reason = "abort" if output.stop_reason == "aborted" else None
            trajectory.absorb(output.token_ids, output.log_probs, finish_reason)
            if source is not None:
                for clip in trajectory.clips[len(audios) - 1 :]:
                    audios.append(crop(source, clip.start_sample, clip.end_sample))

    def _features(self, audios: list[np.ndarray]) -> BatchFeature | None:
        """Log-mel features of the prompt's audio and of each clip, as `ThinkerOnly.forward` takes them."""
        if not audios:
            return None
        features = self.processor.feature_extractor(
            audios, sampling_rate=SAMPLING_RATE, return_attention_mask=True, return_tensors="pt"
        )
        return BatchFeature(pack_clips(features["input_features"], features["attention_mask"]))

    def _response(self, trajectory: Trajectory, failed: bool, with_logprobs: bool) -> dict[str, Any]:
        """Ids, mask and log-probs as the trainer takes them.

        What failed stays out of the loss, as no doing of the policy's, and out of the audio tower: its clips go. verl
        cannot take an empty response (AgentLoopOutput.as_dict), so a token outside the loss stands for one.
        """
        ids, mask, logprobs = trajectory.response_ids, trajectory.response_mask, trajectory.response_logprobs
        if failed:
            ids = [token for token in ids if token != self.ids.audio] or [self.tokenizer.eos_token_id]
            mask, logprobs = [0] * len(ids), [0.0] * len(ids)
        return {
            "response_ids": ids,
            "response_mask": mask,
            "response_logprobs": logprobs if with_logprobs else None,
        }

    def _account(self, trajectory: Trajectory) -> dict[str, Any]:
        """What reward terms and logs read of a trajectory."""
        return {
            "text": trajectory.text(),
            "attempts": trajectory.attempts,
            "duration_seconds": trajectory.duration_seconds,
            "stop_reason": str(trajectory.stop_reason),
            "error": trajectory.error,
            "answer_logprobs": answer_logprobs(trajectory, self._decode),
            "sampled_tokens": sum(trajectory.response_mask),
            "observation_tokens": len(trajectory.response_mask) - sum(trajectory.response_mask),
            "turn_scores": [],
            "tool_rewards": [],
        }


@functools.lru_cache(maxsize=1)  # verl makes an agent loop for each trajectory, and this reads a file
def ids_and_bias(family: OmniFamily, tokenizer: Any, model_dir: str) -> tuple[SpecialIds, dict[int, float]]:
    """The ids of the audio tokens, and vLLM's logit bias against all that the policy may not sample.

    Ids past the tokenizer's end are masked by verl's workers (vllm_rollout/utils.py, monkey_patch_compute_logits).
    """
    banned = family.banned_ids(tokenizer, len(tokenizer))
    return family.special_ids(tokenizer, model_dir), dict.fromkeys(banned, BANNED_BIAS)


def settings_from(config: Any) -> tuple[Settings, float]:
    """The settings of the turn step and the time limit in seconds, from the `echo` section of verl's configuration.

    Raises ValueError for a key or value that means nothing.
    """
    section = dict(config.get("echo") or {})
    mode = section.pop("mode", "interleaved")
    timeout_seconds = float(section.pop("rollout_timeout_seconds", ROLLOUT_TIMEOUT_SECONDS))
    for of_the_trainer in ("max_failed_share", "max_gen_batches", "keep_best"):
        section.pop(of_the_trainer, None)
    settings = Settings(
        max_response_tokens=config.actor_rollout_ref.rollout.response_length,
        max_segments=int(section.pop("max_segments", MAX_SEGMENTS)),
        min_segment_seconds=float(section.pop("min_segment_seconds", MIN_SEGMENT_SECONDS)),
        straddle=section.pop("straddle", "cut"),
        relisten=mode == "interleaved",
    )
    if section or mode not in ("interleaved", "grounded", "plain"):
        raise ValueError(f"echo.mode={mode!r} or the keys {sorted(section)} mean nothing")
    return settings, timeout_seconds


def engine_account(turns: Sequence[Mapping[str, Any]], version: int) -> dict[str, Any]:
    """What verl reads of the engine: cached prompt tokens, and the first and last version of the weights that sampled.
    `version` is the step's own, for a trajectory that failed before its first turn."""
    versions = [turn["global_steps"] for turn in turns if turn.get("global_steps") is not None] or [version]
    return {
        "num_cached_tokens": sum(turn.get("num_cached_tokens") or 0 for turn in turns),
        "min_global_steps": min(versions),
        "max_global_steps": max(versions),
    }


def answer_logprobs(trajectory: Trajectory, decode: Any) -> list[float] | None:
    """Log-probabilities of the sampled tokens that hold any of the text between the last answer tags; None without
    answer or without log-probs."""
    if trajectory.response_logprobs is None:
        return None
    ids = trajectory.response_ids
    text = decode(ids)
    first = text.rfind(ANSWER_OPEN)
    last = text.find(ANSWER_CLOSE, first)
    if first < 0 or last < 0:
        return None

    def length(count: int) -> int:
        return len(decode(ids[:count]))

    # From the first token that goes on beyond the opening tag to the one that reaches the closing tag, as `.</` does.
    start = bisect.bisect_right(range(len(ids) + 1), first + len(ANSWER_OPEN), key=length) - 1
    end = bisect.bisect_left(range(len(ids) + 1), last, key=length)
    pairs = zip(trajectory.response_logprobs[start:end], trajectory.response_mask[start:end], strict=True)
    return [logprob for logprob, mask in pairs if mask] or None
