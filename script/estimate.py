"""What a stage will need: memory of a GPU and of a node, disk, steps. Arithmetic on the headers of the model's files.

`script/preflight.py` prints these numbers and compares them with the machine. Nothing was measured on a GPU: each
formula names its source, and what no source gives is an ASSUMPTION. GB is 10^9 bytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB = 1e9
STAGES = ("data", "sft", "rl", "merge", "infer", "score")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ASSUMED_GPU_BYTES = 80 * GB  # where no GPU can be asked

# ASSUMPTION, all of these: round numbers, in which 8 x 80 GB and the tiny recipe come out as they should.
CONTEXT_BYTES = 3 * GB  # of a training process on a GPU: CUDA context, NCCL's buffers, what the allocator loses
ROLLOUT_CONTEXT_BYTES = 4 * GB  # the same, and that of vLLM's process beside it
ASLEEP_BYTES = 4 * GB  # what vLLM keeps on the GPU while it sleeps
SFT_HOST_BYTES = 6 * GB  # a training process of ms-swift in host memory
RL_HOST_BYTES = 18 * GB  # a GPU's trainer, vLLM engine and server, with their pinned buffers
RL_SMALL_HOST_BYTES = 3 * GB  # a process that runs rollouts or rewards
RL_BASE_HOST_BYTES = 10 * GB  # Ray, the driver and TransferQueue
INFER_HOST_BYTES = 8 * GB  # an engine of inference
SFT_CPU_HOST_BYTES = 2 * GB
RL_CPU_HOST_BYTES = (
    13 * GB
)  # recipes/tiny-cpu: a dozen processes that have imported torch and vLLM; 1 GB is the KV cache
INFER_CPU_HOST_BYTES = 4 * GB
FEATURE_BYTES = 4 * 128 * 3_000  # log-mel features of 30 s in float32
MIN_KV_BYTES = 3 * GB  # below it vLLM has too few blocks for a batch


@dataclass(frozen=True)
class Settings:
    """The settings of a run. A value that is not in the environment has its default of settings.md."""

    values: Mapping[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")

    def whole(self, name: str) -> int:
        return int(self[name])

    def number(self, name: str) -> float:
        return float(self[name])

    def on(self, name: str) -> bool:
        return self[name].lower() == "true"

    @property
    def cuda(self) -> bool:
        return self["DEVICE"] == "cuda"

    @property
    def sft_processes(self) -> int:
        """Training processes of stage 1: a GPU each, one on a CPU."""
        return self.whole("NUM_GPUS") * self.whole("NUM_NODES") if self.cuda else 1

    @property
    def rl_processes(self) -> int:
        """Training processes of stage 2, verl's world size."""
        return (self.whole("NUM_GPUS") if self.cuda else self.whole("RL_WORKERS")) * self.whole("NUM_NODES")

    @property
    def sharded(self) -> bool:
        """Whether stage 1 keeps float32 weights in an optimizer that is spread over the GPUs, as DeepSpeed does."""
        return bool(self["SFT_DEEPSPEED"])


class ModelError(ValueError):
    """The files of a model directory cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a model directory. `parameters` by part: text, audio, vision, talker, token2wav,
    other. `layer_shapes` are those of the text layers' matrices, which LoRA adapts."""

    path: Path
    parameters: Mapping[str, int]
    weight_bytes: int
    layer_shapes: tuple[tuple[int, int], ...]
    hidden_size: int
    layers: int
    ffn_size: int
    vocab_size: int

    @property
    def thinker(self) -> int:
        return sum(self.parameters.get(part, 0) for part in ("text", "audio", "vision"))

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def trained(self, settings: Settings, stage: str) -> int:
        """Parameters with gradients. Stage 2 trains the text model; stage 1 that, or with it the audio tower, or LoRA
        matrices beside each matrix of the text layers (rank x (rows + columns), Hu et al. 2021)."""
        if stage == "rl":
            return self.parameters.get("text", 0)
        if settings["SFT_TUNER"] == "lora":
            return settings.whole("SFT_LORA_RANK") * sum(rows + columns for rows, columns in self.layer_shapes)
        audio = 0 if settings.on("SFT_FREEZE_AUDIO") else self.parameters.get("audio", 0)
        return self.parameters.get("text", 0) + audio


def part_of(tensor: str) -> str:
    """The part of an Omni checkpoint that a tensor belongs to, by its name."""
    for prefix, part in (
        ("thinker.audio_tower.", "audio"),
        ("thinker.visual.", "vision"),
        ("thinker.", "text"),
        ("talker.", "talker"),
        ("token2wav.", "token2wav"),
        ("code2wav.", "token2wav"),
    ):
        if tensor.startswith(prefix):
            return part
    return "other"


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file: its first 8 bytes are the length of the JSON that follows. Raises ModelError
    when the file is shorter than its header says."""
    cure = "Download it again, or point BASE_MODEL at a whole model directory."
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = json.loads(file.read(min(size, 100_000_000)))  # the limit of the format
        except ValueError as error:
            raise ModelError(f"{path} has no safetensors header ({error}). {cure}") from error
    header.pop("__metadata__", None)
    whole = 8 + size + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if path.stat().st_size < whole:
        raise ModelError(f"{path} has {path.stat().st_size:,} bytes of {whole:,}. {cure}")
    return header


def read_model(folder: Path) -> Model:
    """Raises ModelError when weights are missing or cut."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        what = f"lacks {len(missing)} of its {len(names)} files of weights, {missing[0]} for one" if missing else ""
        raise ModelError(f"{folder} {what or 'has no safetensors files'}. Download it again, or correct BASE_MODEL.")
    parameters: Counter[str] = Counter()
    weight_bytes, shapes = 0, []
    for name in names:
        for tensor, entry in read_header(folder / name).items():
            parameters[part_of(tensor)] += math.prod(entry["shape"])
            weight_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
            if re.match(r"thinker\.model\.layers\.\d+\..*_proj\.weight$", tensor) and len(entry["shape"]) == 2:
                shapes.append(tuple(entry["shape"]))
    config = json.loads((folder / "config.json").read_text())
    text = config.get("thinker_config", config).get("text_config", {})
    experts = text.get("num_experts_per_tok")
    ffn_size = experts * text.get("moe_intermediate_size", 0) if experts else text.get("intermediate_size", 0)
    sizes = (text.get("hidden_size", 0), text.get("num_hidden_layers", 0), ffn_size, text.get("vocab_size", 0))
    return Model(folder, dict(parameters), weight_bytes, tuple(shapes), *sizes)


@dataclass(frozen=True)
class Estimate:
    """What one stage needs. `gpu_bytes` is for the fullest GPU, `host_bytes` for one node; `disk_left` stays when the
    stage is over. None: cannot be said."""

    stage: str
    gpu_bytes: float | None
    host_bytes: float | None
    disk_peak: float
    disk_left: float
    steps: int | None
    basis: str


def activation_bytes(model: Model, tokens: int, recompute: bool) -> float:
    """Activations of the text model in 16 bits, for the backward pass. With recomputing, a layer keeps its input
    (Chen et al. 2016) and one layer at a time all of: about 8 x hidden and 3 x ffn numbers a token (Korthikanti et
    al. 2022, equation 1, without the attention scores that SDPA does not keep, with the three matrices of SwiGLU)."""
    whole_layer = tokens * 2 * (8 * model.hidden_size + 3 * model.ffn_size)
    return tokens * 2 * model.hidden_size * model.layers + whole_layer if recompute else whole_layer * model.layers


def logit_bytes(model: Model, tokens: int) -> float:
    """Logits in 16 bits, their float32 copy and its gradient: verl's and transformers' losses hold all three."""
    return tokens * model.vocab_size * (2 + 4 + 4)


def sft_steps(settings: Settings, rows: int | None) -> int | None:
    """transformers' Trainer: the last batch of an epoch may be smaller, and SFT_MAX_STEPS wins."""
    if settings.whole("SFT_MAX_STEPS") > 0:
        return settings.whole("SFT_MAX_STEPS")
    if rows is None:
        return None
    return math.ceil(math.ceil(rows / settings.whole("SFT_BATCH_SIZE")) * settings.number("SFT_EPOCHS"))


def rl_steps(settings: Settings, rows: int | None) -> int | None:
    """verl drops an epoch's last, smaller batch (trainer_base.py:747, 765)."""
    if settings["RL_STEPS"]:
        return settings.whole("RL_STEPS")
    return None if rows is None else rows // settings.whole("RL_BATCH_SIZE") * settings.whole("RL_EPOCHS")


def num_saves(steps: int | None, every: int) -> float:
    return math.inf if steps is None else math.ceil(steps / every)


def sft_checkpoint_bytes(model: Model, settings: Settings) -> float:
    """A checkpoint of stage 1, of which every process writes its share.

    Full fine-tuning: the model, and with DeepSpeed the model once more (`*_model_states.pt`) and 12 bytes a trained
    parameter (float32 weight and Adam's two moments; Rajbhandari et al. 2020, 3.1). Without DeepSpeed `optimizer.pt`
    has the two moments in the dtype of the weights. LoRA: the same of the matrices alone (in float32).
    """
    trained = model.trained(settings, "sft")
    lora = settings["SFT_TUNER"] == "lora"
    width = 4 if lora else DTYPE_BYTES[settings["SFT_DTYPE"]]
    weights = (trained if lora else model.total) * width
    return 2 * weights + 12 * trained if settings.sharded else weights + 2 * width * trained


def sft(model: Model, settings: Settings, rows: int | None) -> Estimate:
    """Stage 1.

    GPU: weights in SFT_DTYPE (a share of them with zero3) + gradients + optimizer + activations + logits of
    SFT_MICRO_BATCH rows of SFT_MAX_LENGTH tokens + context. DeepSpeed spreads 12 bytes a trained parameter from zero1
    on, gradients from zero2 on, weights with zero3 (Rajbhandari et al. 2020); a file counts as zero2. `*_offload`
    holds the optimizer in host memory. Without DeepSpeed: two moments in the dtype of the weights.

    Disk: transformers saves first and deletes the oldest after (trainer.py:3060), so SFT_SAVE_LIMIT + 1 at the peak.
    Without SFT_KEEP_OPTIMIZER the weights alone stay; of LoRA, the merged model too.
    """
    width, processes = DTYPE_BYTES[settings["SFT_DTYPE"]], settings.sft_processes
    trained, lora = model.trained(settings, "sft"), settings["SFT_TUNER"] == "lora"
    zero, offload = settings["SFT_DEEPSPEED"], "offload" in settings["SFT_DEEPSPEED"]
    level = int(match[1]) if (match := re.match(r"zero(\d)", zero)) else 2 if zero else 0
    weights = model.total * width / (processes if level >= 3 else 1)
    trained_width = 4 if lora else width
    gradients = trained * trained_width / (processes if level >= 2 else 1)
    optimizer = trained * (12 / (processes if level >= 1 else 1) if zero else 2 * trained_width)
    tokens = settings.whole("SFT_MICRO_BATCH") * settings.whole("SFT_MAX_LENGTH")
    transient = activation_bytes(model, tokens, settings.on("SFT_RECOMPUTE")) + logit_bytes(model, tokens)
    device = weights + gradients + (0 if offload else optimizer) + transient
    if settings.cuda:
        gpu = device + CONTEXT_BYTES
        local = settings.whole("NUM_GPUS")
        host = local * (SFT_HOST_BYTES + (optimizer if offload else 0)) + model.weight_bytes
    else:
        gpu, host = None, SFT_CPU_HOST_BYTES + device
    steps = sft_steps(settings, rows)
    saves = num_saves(steps, settings.whole("SFT_SAVE_STEPS"))
    checkpoint, limit = sft_checkpoint_bytes(model, settings), settings.whole("SFT_SAVE_LIMIT")
    kept = min(saves, limit)
    merged = model.total * width if lora else 0
    peak = min(saves, limit + 1) * checkpoint
    stays = kept * (checkpoint if settings.on("SFT_KEEP_OPTIMIZER") else (trained * 4 if lora else model.total * width))
    how = "LoRA" if lora else "full"
    basis = f"{how}, {model.total / 1e9:.3g} B parameters, {trained / 1e9:.3g} B trained, {settings['SFT_DTYPE']}, "
    basis += f"{zero or 'no DeepSpeed'}, {tokens:,} tokens at once; a checkpoint {checkpoint / GB:.3g} GB"
    return Estimate("sft", gpu, host, max(peak, stays + merged), stays + merged, steps, basis)


def rl_checkpoint_bytes(model: Model) -> float:
    """verl's FSDP checkpoint: the thinker in float32 and Adam's two moments of what is trained, in shards."""
    return 4 * model.thinker + 8 * model.parameters.get("text", 0)


def rl_state_bytes(model: Model, settings: Settings) -> float:
    """What FSDP keeps on each GPU between its uses: its share of the thinker in float32 and of Adam's moments."""
    return 0.0 if settings.on("RL_OFFLOAD") else rl_checkpoint_bytes(model) / settings.rl_processes


def rl_tokens(settings: Settings) -> int:
    default = 2 * (settings.whole("RL_MAX_PROMPT") + settings.whole("RL_MAX_RESPONSE"))
    return int(settings["RL_TOKENS_PER_GPU"] or default)


def rl(model: Model, settings: Settings, rows: int | None, gpu_total: float) -> Estimate:
    """Stage 2, on a GPU the larger of two phases.

    Rollout: vLLM's share RL_GPU_MEMORY of the GPU + the trainer's state (`rl_state_bytes`) + contexts. Update: the
    whole state + gradients in float32 (a share) + the towers and the two embeddings in bfloat16, which FSDP gathers +
    activations and logits of RL_TOKENS_PER_GPU tokens + contexts + what vLLM keeps asleep.

    Host memory of a node: the reference model in float32, which verl keeps there (transformer_impl.py:395), with
    RL_OFFLOAD the trainer's state too, the processes, and the features of a step's clips, three times (TransferQueue,
    fetched, sent).

    Disk: verl deletes before it saves where RL_KEEP_CHECKPOINTS is 2 or more, and after where it is 1
    (checkpoint_manager.py:166), so the larger of 2 and RL_KEEP_CHECKPOINTS at the peak; 0 keeps all.
    """
    processes, nodes = settings.rl_processes, settings.whole("NUM_NODES")
    text, checkpoint, tokens = model.parameters.get("text", 0), rl_checkpoint_bytes(model), rl_tokens(settings)
    features = 3 * settings.whole("RL_BATCH_SIZE") * settings.whole("RL_GROUP") * FEATURE_BYTES
    shard = checkpoint / processes
    gathered = 2 * (model.thinker - text) + 2 * 2 * model.vocab_size * model.hidden_size
    transient = activation_bytes(model, tokens, settings.cuda) + logit_bytes(model, tokens)
    update = shard + 4 * text / processes + gathered + transient
    if settings.cuda:
        rollout = settings.number("RL_GPU_MEMORY") * gpu_total + rl_state_bytes(model, settings)
        gpu = max(rollout + ROLLOUT_CONTEXT_BYTES, update + ROLLOUT_CONTEXT_BYTES + ASLEEP_BYTES)
        small = settings.whole("RL_AGENT_WORKERS") + settings.whole("RL_REWARD_WORKERS")
        host = settings.whole("NUM_GPUS") * RL_HOST_BYTES + small * RL_SMALL_HOST_BYTES / nodes + RL_BASE_HOST_BYTES
        host += (4 * model.thinker + (checkpoint if settings.on("RL_OFFLOAD") else 0)) / nodes + features
    else:
        gpu = None
        engines = settings.rl_processes * 4 * model.thinker
        host = RL_CPU_HOST_BYTES + (processes - 1) * SFT_CPU_HOST_BYTES
        host += processes * update + 4 * model.thinker + engines + features
    steps = rl_steps(settings, rows)
    saves, keep = num_saves(steps, settings.whole("RL_SAVE_FREQ")), settings.whole("RL_KEEP_CHECKPOINTS") or math.inf
    at_peak, left = min(saves, max(keep, 2)), min(saves, keep)
    at_peak, left = (
        (1 if math.isinf(at_peak) else at_peak),
        (1 if math.isinf(left) else left),
    )  # unknown steps, all kept
    basis = f"FSDP over {processes}, {model.thinker / 1e9:.3g} B, {text / 1e9:.3g} B trained, {tokens:,} tokens at once"
    basis += f", GPU of {gpu_total / GB:.0f} GB" if settings.cuda else ""
    basis += f"; a checkpoint {checkpoint / GB:.3g} GB"
    return Estimate("rl", gpu, host, at_peak * checkpoint, left * checkpoint, steps, basis)


def merge(model: Model) -> Estimate:
    """A whole model in the dtype of the base model, written beside the old one and then moved. The shards are read in
    float32 and joined."""
    host = 4 * model.thinker + model.weight_bytes + SFT_CPU_HOST_BYTES
    return Estimate("merge", None, host, model.weight_bytes, model.weight_bytes, None, "the model, dtype as it is")


def infer(model: Model, settings: Settings, gpu_total: float) -> Estimate:
    """vLLM takes 0.9 of a GPU (eval/engine.py). On a CPU it holds the thinker in float32."""
    if settings.cuda:
        host = settings.whole("NUM_GPUS") / settings.whole("EVAL_TP") * INFER_HOST_BYTES + model.weight_bytes
        return Estimate("infer", 0.9 * gpu_total, host, 0, 0, None, f"vLLM takes 0.9 of {gpu_total / GB:.0f} GB")
    return Estimate("infer", None, INFER_CPU_HOST_BYTES + 4 * model.thinker, 0, 0, None, "one engine")


def disk_needed(estimates: list[Estimate], there: Mapping[str, float]) -> float:
    """Free bytes that the stages need one after the other. What a stage has written already (`there`) counts."""
    needed = left = 0.0
    for estimate in estimates:
        written = there.get(estimate.stage, 0)
        needed = max(needed, left + estimate.disk_peak - written)
        left += estimate.disk_left - written
    return needed
