"""The inference engine: vLLM, many trajectories at once, each through the same turn step as the RL rollout.

CPU and GPU run the same code; only the defaults of `EngineSettings` differ. One engine a process.

    async with running_engine(EngineSettings(model=model_dir, device="cpu")) as engine:
        outcomes = await asyncio.gather(*(engine.answer(question, sampling) for question in questions))

What goes wrong with one row (its audio, its length, a request that vLLM refuses) is data: an outcome with stop reason
`error`. An engine that died is an EngineDied, which ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from echo_plugins import audio
from echo_plugins.end_with_client import become_client
from echo_plugins.model import family_of, hop_length
from echo_plugins.relisten.control import ClipSound, clip_sound
from echo_plugins.relisten.prompt import Mode, question_text
from echo_plugins.relisten.segment import MAX_SEGMENTS, MIN_SEGMENT_SECONDS
from echo_plugins.relisten.trajectory import (
    MAX_FORCING_TOKENS,
    Attempt,
    Settings,
    StopReason,
    Trajectory,
    Turn,
    expand_placeholders,
)
from echo_plugins.relisten.transcript import parse

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

# Set before vLLM is imported, where the user has not set them.
_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",  # ms-swift registers one, and importing it takes longer than a tiny model takes to load
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
# With fork (see `_start`) these bring the start on two cores from 154 CPU seconds to 30.
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # binding to cores is for a machine of one's own
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker in the engine's process: torch is imported once less
    "TORCH_COMPILE_DISABLE": "1",  # vLLM's sampler compiles even when eager: a C++ compiler, and six Pythons to probe
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

CPU_MODEL_LEN = 8192  # tokens; where the model takes more, a CPU's memory and patience do not
_DECODER_THREADS = 4  # soundfile and soxr release the GIL
GAP_SECONDS = 1.0  # of silence between the clips of a question that has several

E = TypeVar("E", bound="Engine")


class EngineDied(RuntimeError):
    """The engine process is gone: nothing more can be answered. Rows that are done are done."""


@dataclass(frozen=True)
class EngineSettings:
    """How vLLM is set up. None is vLLM's own default; `extra` goes to its AsyncEngineArgs as it is."""

    model: str
    device: Literal["cpu", "cuda"]
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    max_clips: int = 1 + MAX_SEGMENTS  # the source and what is inserted
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    seed: int = 0
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def concurrency(self) -> int:
        """Rows in flight: what the engine runs at once, and some whose audio is being decoded meanwhile."""
        return self.num_seqs + _DECODER_THREADS

    @property
    def num_seqs(self) -> int:
        return self.max_num_seqs or (32 if self.device == "cpu" else 128)

    def engine_args(self) -> dict[str, Any]:
        """The arguments of vLLM's AsyncEngineArgs."""
        args: dict[str, Any] = {
            "model": self.model,
            # vLLM's own "auto" runs float32 checkpoints in bfloat16, in which likely tokens tie.
            "dtype": "float32" if self.dtype == "auto" and self.device == "cpu" else self.dtype,
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_num_seqs": self.num_seqs,
            "max_model_len": self.max_model_len,
            "seed": self.seed,
            "limit_mm_per_prompt": {
                "audio": self.max_clips,
                "image": family_of(self.model).images_in_engine,
                "video": 0,
            },
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",  # as in RL: after temperature and bias
            "disable_log_stats": True,
            "worker_extension_cls": "eval.worker.WorkerExtension",
        }
        if self.device == "cpu":
            length = self.max_model_len or min(_max_positions(self.model), CPU_MODEL_LEN)
            args |= {
                # A prompt in parts would end the engine: vLLM sets the seed of such a row back, which torch's generator
                # cannot do on a CPU (v1/worker/gpu_model_runner.py:3640, "CPU Generator does not use offset").
                "enable_chunked_prefill": False,
                "max_model_len": length,
                "max_num_batched_tokens": max(length, CPU_MODEL_LEN),
                "block_size": 32,  # vLLM's CPU attention wants a multiple of 32; a turn reuses whole blocks only
                "enforce_eager": True,
                "skip_mm_profiling": True,
                "use_tqdm_on_load": False,
                "kv_cache_memory_bytes": int(self.cpu_kv_cache_gib * 2**30),
                "mm_processor_cache_gb": 1,
            }
        else:
            args["gpu_memory_utilization"] = self.gpu_memory_utilization
        return args | dict(self.extra)


@dataclass(frozen=True)
class Sampling:
    """How rows are answered. `max_tokens` counts sampled and inserted tokens of a response."""

    mode: Mode = "interleaved"
    seed: int = 0
    temperature: float = 0.7  # the paper, section 5
    top_p: float = 1.0
    max_tokens: int = 2048
    max_segments: int = MAX_SEGMENTS
    min_segment_seconds: float = MIN_SEGMENT_SECONDS
    straddle: Literal["cut", "keep"] = "cut"
    force_answer_tokens: int = 0  # of max_tokens, kept back for an answer where thinking has used up the rest
    clip: ClipSound = "own"  # what stands behind a tag
    deaf: bool = False  # the question's audio is silence of the same length

    @property
    def reserve(self) -> int:
        """Tokens of the budget that thinking may not use."""
        return self.force_answer_tokens and self.force_answer_tokens + MAX_FORCING_TOKENS

    def turn_settings(self, max_response_tokens: int) -> Settings:
        return Settings(
            max_response_tokens,
            max_segments=self.max_segments,
            min_segment_seconds=self.min_segment_seconds,
            straddle=self.straddle,
            relisten=self.mode == "interleaved",
        )

    def turn_seed(self, row_id: str, num_turns: int) -> int:
        """From the run's seed, the row and its turn alone, so that neither order nor company changes a result."""
        name = json.dumps([self.seed, row_id, num_turns])
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Question:
    """One row to answer. `audio` is relative to `audio_root`, and may not leave it, but by a link with `follow_links`.
    Where a question is about several clips, `more_audio` are heard after it with GAP_SECONDS between, and segments
    count from the first one's start."""

    id: str
    audio_root: str
    audio: str
    question: str
    choices: tuple[str, ...]
    more_audio: tuple[str, ...] = ()
    follow_links: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a question. `seconds` from the start of decoding its audio to its last token. `bare_answer`: the
    answer of a hosted model that wrote no answer block."""

    response: str
    attempts: tuple[Attempt, ...]
    stop_reason: StopReason
    error: str | None
    num_sampled_tokens: int
    num_inserted_tokens: int
    seconds: float
    forced_answer: bool = False
    bare_answer: str | None = None


def _max_positions(model: str) -> int:
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return config["thinker_config"]["text_config"]["max_position_embeddings"]


def _start(settings: EngineSettings) -> Any:
    on_cpu = settings.device == "cpu"
    # Where torch was used with several threads before us there are OpenMP threads, which do not survive a fork.
    torch = sys.modules.get("torch")
    can_fork = torch is None or torch.get_num_threads() == 1
    for name, value in (_ENVIRONMENT | (_CPU_ENVIRONMENT if on_cpu else {})).items():
        os.environ.setdefault(name, value)
    become_client()
    from echo_plugins.for_vllm import make_features_as_in_training

    make_features_as_in_training()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    args = settings.engine_args()
    config = AsyncEngineArgs(**args).create_engine_config()
    if on_cpu and can_fork:
        # vLLM has just asked for spawn, for the sake of its thread binding. A fork need not import torch once more.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    return AsyncLLM.from_vllm_config(config, disable_log_stats=args["disable_log_stats"])


class Engine:
    """Answers questions. Made by `running_engine`; safe for any number of concurrent calls on one event loop."""

    def __init__(self, llm: Any, settings: EngineSettings, decoders: ThreadPoolExecutor) -> None:
        self.llm = llm
        self._family = family_of(settings.model)
        self._hop_length = hop_length(settings.model)
        self.max_model_len = llm.model_config.max_model_len
        self._processor = llm.renderer.get_mm_processor().info.get_hf_processor()
        self._max_samples = self._family.window_samples(self._processor.feature_extractor)
        self.tokenizer = llm.get_tokenizer()
        self.ids = self._family.special_ids(self.tokenizer, settings.model)
        self.banned_ids = self._family.banned_ids(self.tokenizer, llm.model_config.get_vocab_size())
        self._decoders = decoders

    async def answer(self, question: Question, sampling: Sampling) -> Outcome:
        """One question through all its turns. Raises EngineDied, and for nothing that the row did."""
        started = time.monotonic()
        try:
            waveform, name = await asyncio.get_running_loop().run_in_executor(self._decoders, load_sound, question)
            if sampling.deaf:
                waveform, name = np.zeros_like(waveform), f"silence:{len(waveform)}"
            trajectory = self.trajectory(question, len(waveform), sampling)
        except ValueError as error:  # AudioError, or a prompt that does not fit
            return Outcome("", (), StopReason.ERROR, str(error), 0, 0, time.monotonic() - started)
        await self.run(trajectory, waveform, name, question.id, sampling)
        out_of_budget = trajectory.stop_reason is StopReason.LENGTH and parse(trajectory.text()).answer is None
        if forced := out_of_budget and sampling.force_answer_tokens > 0:
            trajectory.force_answer(sampling.force_answer_tokens)
            await self.run(trajectory, waveform, name, question.id, sampling)
        sampled = sum(trajectory.response_mask)
        return Outcome(
            trajectory.text(),
            tuple(trajectory.attempts),
            trajectory.stop_reason or StopReason.ERROR,
            trajectory.error,
            sampled,
            len(trajectory.response_mask) - sampled,
            time.monotonic() - started,
            forced,
        )

    def trajectory(self, question: Question, num_samples: int, sampling: Sampling) -> Trajectory:
        """The turn step of a question about a clip of `num_samples`. Raises ValueError when it does not fit."""
        if num_samples > self._max_samples:
            limit, seconds = self._max_samples / audio.SAMPLING_RATE, num_samples / audio.SAMPLING_RATE
            raise ValueError(f"the clip has {seconds:.1f} s and the model hears no more than {limit:g} s: cut it")
        num_audio_tokens = self.count_audio_tokens(num_samples)
        if not num_audio_tokens:
            raise ValueError(f"the clip is too short: it has {num_samples} samples at 16 kHz")
        check_text(question)
        prompt = self.prompt_ids(question, sampling.mode)
        num_tokens = len(expand_placeholders(prompt, self.ids.audio, [num_audio_tokens]))
        room = self.max_model_len - num_tokens
        if room < 1:
            raise ValueError(f"the prompt has {num_tokens} tokens and the engine takes {self.max_model_len}")
        budget = max(1, min(sampling.max_tokens, room) - sampling.reserve)
        return self.start_trajectory(prompt, num_samples, sampling.turn_settings(budget))

    def start_trajectory(self, prompt: Sequence[int], num_samples: int, settings: Settings) -> Trajectory:
        """The turn step after `prompt`, about a clip of `num_samples`."""
        return Trajectory(
            prompt,
            num_samples,
            audio.SAMPLING_RATE,
            self.ids,
            settings,
            decode=self._decode,
            encode=self.encode,
            count_audio_tokens=self.count_audio_tokens,
        )

    async def run(
        self,
        trajectory: Trajectory,
        waveform: np.ndarray,
        name: str,
        row_id: str,
        sampling: Sampling,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Drive a trajectory to its end. `name` identifies the waveform's content to vLLM's caches; `on_turn` is called
        after each turn."""
        clips, names = [waveform], [name]
        while (turn := trajectory.next_turn()) is not None:
            for clip in trajectory.clips[len(clips) - 1 :]:
                place = clip.start_sample, clip.end_sample
                clips.append(clip_sound(waveform, *place, audio.SAMPLING_RATE, sampling.clip, row_id))
                names.append(
                    f"{name}:{place[0]}-{place[1]}" + ("" if sampling.clip == "own" else f"{sampling.clip}:{row_id}")
                )
            request_id = f"{row_id}-{sampling.seed}-{trajectory.num_turns}"
            params = self.sampling_params(trajectory, turn, row_id, sampling)
            try:
                output = await self.generate(turn.engine_ids, clips, names, params, request_id)
            except ValueError as error:  # a request that vLLM refuses, or fails at
                return trajectory.fail(str(error))
            completion = output.outputs[0]
            ids = completion.token_ids
            positions: Any = completion.logprobs  # never None: `sampling_params` asks for them
            logprobs = [position[token].logprob for token, position in zip(ids, positions, strict=True)]
            trajectory.absorb(ids, logprobs, completion.finish_reason)
            on_turn()

    def sampling_params(self, trajectory: Trajectory, turn: Turn, row_id: str, sampling: Sampling) -> SamplingParams:
        """What vLLM is told of one turn."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.turn_seed(row_id, trajectory.num_turns),
            max_tokens=turn.max_tokens,
            logprobs=0,  # of the sampled token only
            stop=list(turn.stop),
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # else "</se<|im_start|>g>" would stop vLLM at a tag that is none
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def generate(
        self,
        engine_ids: Sequence[int],
        clips: Sequence[np.ndarray],
        names: Sequence[str],
        params: SamplingParams,
        request_id: str,
    ) -> RequestOutput:
        """One engine call: `engine_ids` with one placeholder for each of `clips`, whose contents `names` identify.

        Raises EngineDied, and ValueError for a request that vLLM refuses or fails at.
        """
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = {
            "prompt_token_ids": list(engine_ids),
            "multi_modal_data": {"audio": list(clips)},
            "multi_modal_uuids": {"audio": list(names)},
        }
        try:
            # Rendering here and not in generate() keeps feature extraction off the event loop.
            (rendered,) = await self.llm.renderer.render_cmpl_async([prompt])
            async for output in self.llm.generate(rendered, params, request_id):
                last = output
        except EngineDeadError as error:
            raise EngineDied(f"the engine died at request {request_id!r}; its own messages are above") from error
        except EngineGenerateError as error:
            raise ValueError(f"{type(error).__name__}: {error.__cause__ or error}") from error
        counts = [self.count_audio_tokens(len(clip)) for clip in clips]
        if list(last.prompt_token_ids) != expand_placeholders(engine_ids, self.ids.audio, counts):
            raise ValueError("the engine's prompt is not ours: audio token counts differ from its own")
        return last

    def prompt_ids(self, question: Question, mode: Mode) -> list[int]:
        """The prompt with one placeholder for the clip, as vLLM takes it."""
        return self.encode(self._family.prompt(prompt_text(self._processor, question, mode)))

    def count_audio_tokens(self, num_samples: int) -> int:
        return self._family.num_audio_tokens(num_samples, self._hop_length)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_text(question: Question) -> None:
    """Raises ValueError for text that no tokenizer takes, and no JSON in UTF-8 can hold."""
    try:
        "".join((question.question, *question.choices)).encode()
    except UnicodeEncodeError as error:
        lone = error.object[error.start]
        raise ValueError(f"the text has the lone surrogate {lone!r}, which no tokenizer takes: correct it") from error


def prompt_text(processor: Any, question: Question, mode: Mode) -> str:
    """The prompt with one placeholder for the clip, as the chat template of `processor` renders it."""
    text = question_text(question.question, question.choices, mode)
    messages = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def load_sound(question: Question) -> tuple[np.ndarray, str]:
    """The waveform, and the name of its content. Raises AudioError."""
    waveform = audio.load(audio.resolve_path(question.audio_root, question.audio, question.follow_links))
    gap = np.zeros(round(GAP_SECONDS * audio.SAMPLING_RATE), waveform.dtype)
    for path in question.more_audio:
        more = audio.load(audio.resolve_path(question.audio_root, path, question.follow_links))
        waveform = np.concatenate([waveform, gap, more])
    return waveform, hashlib.blake2b(waveform.data, digest_size=16).hexdigest()


_running = False


@contextlib.asynccontextmanager
async def running_engine(settings: EngineSettings, kind: type[E] = Engine) -> AsyncIterator[E]:
    """Start vLLM, yield the Engine (of the class `kind`), and shut it down.

    Raises EngineDied when it does not start, and RuntimeError when this process has an engine already.
    """
    global _running
    if _running:
        raise RuntimeError("this process has an engine already; vLLM takes one a process")
    _running = True
    try:
        try:
            llm = _start(settings)
        except RuntimeError as error:
            raise EngineDied(f"the engine did not start: {error}") from error
        try:
            with ThreadPoolExecutor(_DECODER_THREADS, thread_name_prefix="decode-audio") as decoders:
                engine = kind(llm, settings, decoders)
                await llm.collective_rpc("ban", args=(engine.banned_ids,))
                yield engine
        finally:
            llm.shutdown()
    finally:
        _running = False
