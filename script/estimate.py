"""What a stage will need: memory of a GPU and of a node, disk, steps. Arithmetic on the headers of the model's files.

`script/preflight.py` prints these numbers and compares them with the machine. Nothing was measured on a GPU: each
formula names its source, and what no source gives is an ASSUMPTION. GB is 10^9 bytes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GB = 1e9
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
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
CPU_HOST_BYTES = 2 * GB  # a training process with DEVICE=cpu
RL_CPU_HOST_BYTES = 13 * GB  # recipes/tiny-cpu: a dozen processes with torch and vLLM; 1 GB is the KV cache
INFER_CPU_HOST_BYTES = 4 * GB
SHARD_BYTES = 5 * GB  # the files of a model that ms-swift writes
FEATURE_BYTES = 4 * 128 * 3_000  # log-mel features of 30 s in float32
MIN_KV_BYTES = 3 * GB  # below it vLLM has too few blocks for a batch


class Settings(dict[str, str]):
    """The settings of a run. One that nobody has set is empty."""

    def __missing__(self, name: str) -> str:
        return ""

    def whole(self, name: str) -> int:
        return int(self[name])

    def on(self, name: str) -> bool:
        return self[name].lower() == "true"

    @property
    def cuda(self) -> bool:
        return self["DEVICE"] == "cuda"

    def processes(self, stage: str) -> int:
        """Training processes: one for each GPU. On a CPU stage 1 has one, and stage 2 has RL_WORKERS on a node."""
        if stage == "sft" and not self.cuda:
            return 1
        return self.whole("NUM_GPUS" if self.cuda else "RL_WORKERS") * self.whole("NUM_NODES")


class ModelError(ValueError):
    """The files of a model directory cannot be used; the message names the file and the cure."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a model directory. `parameters` by part: text, audio, vision, other. `lora_width`
    is the sum of rows and columns of the matrices that LoRA adapts, and `expert_width` that of the experts, which it
    adapts with SFT_LORA_EXPERTS."""

    parameters: Mapping[str, int]
    weight_bytes: int
    lora_width: int
    expert_width: int
    hidden_size: int
    layers: int
    ffn_size: int
    vocab_size: int

    @property
    def text(self) -> int:
        return self.parameters.get("text", 0)

    @property
    def thinker(self) -> int:
        return self.text + self.parameters.get("audio", 0) + self.parameters.get("vision", 0)

    @property
    def total(self) -> int:
        return sum(self.parameters.values())

    def trained(self, settings: Settings) -> int:
        """Parameters that stage 1 trains: the text model, or with it the audio tower, or LoRA's matrices beside each
        matrix that it adapts (rank x (rows + columns), Hu et al. 2021)."""
        if settings["SFT_TUNER"] == "lora":
            experts = self.expert_width if settings.on("SFT_LORA_EXPERTS") else 0
            return settings.whole("SFT_LORA_RANK") * (self.lora_width + experts)
        return self.text + (0 if settings.on("SFT_FREEZE_AUDIO") else self.parameters.get("audio", 0))


PARTS = {"thinker.audio_tower.": "audio", "thinker.visual.": "vision", "thinker.": "text"}  # by the tensor's name
LORA_ADAPTS = re.compile(r"thinker\.model\.layers\.\d+\.(?!mlp\.experts).*_proj\.weight$")
EXPERT = re.compile(r"thinker\.model\.layers\.\d+\.mlp\.experts\.")


def expert_width(name: str, shape: Sequence[int]) -> int:
    """What a tensor of a checkpoint adds to the rows and columns of the matrices that an adapter of the experts has.

    transformers fuses gate and up into one matrix, so both share its columns. A checkpoint may hold all experts of a
    layer in one tensor.
    """
    if not EXPERT.match(name):
        return 0
    if len(shape) == 3:
        return shape[0] * (shape[1] + shape[2])
    return shape[0] if name.endswith(".up_proj.weight") else sum(shape)


def read_model(folder: Path) -> Model:
    """Raises ModelError when weights are missing or cut."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"].values() if index.is_file() else ()
    files = sorted({folder / name for name in names}) or sorted(folder.glob("*.safetensors"))
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        what = f"lacks {len(missing)} of its {len(files)} files of weights, {missing[0].name} for one" if files else ""
        raise ModelError(f"{folder} {what or 'has no safetensors files'}. Download it again, or correct BASE_MODEL.")
    parameters: Counter[str] = Counter()
    lora_width = experts_width = 0
    for path in files:
        try:
            with safe_open(path, "numpy") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ModelError(f"{path} is cut ({error}). Download it again, or correct BASE_MODEL.") from error
        for name, shape in shapes.items():
            part = next((part for prefix, part in PARTS.items() if name.startswith(prefix)), "other")
            parameters[part] += math.prod(shape)
            lora_width += sum(shape) if LORA_ADAPTS.match(name) else 0
            experts_width += expert_width(name, shape)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("thinker_config", config).get("text_config", {})
    experts = text.get("num_experts_per_tok")
    ffn_size = experts * text.get("moe_intermediate_size", 0) if experts else text.get("intermediate_size", 0)
    sizes = (text.get("hidden_size", 0), text.get("num_hidden_layers", 0), ffn_size, text.get("vocab_size", 0))
    return Model(parameters, sum(file.stat().st_size for file in files), lora_width, experts_width, *sizes)


@dataclass(frozen=True)
class Estimate:
    """What one stage needs. `gpu_bytes` is for the fullest GPU, `host_bytes` for one node; `disk_left` stays when the
    stage is over. None: cannot be said."""

    stage: str
    basis: str
    gpu_bytes: float | None
    host_bytes: float
    disk_peak: float = 0
    disk_left: float = 0
    steps: int | None = None


def transient_bytes(model: Model, tokens: int, recompute: bool) -> float:
    """Activations and logits of a forward and backward pass.

    Activations are those of the text model in 16 bits. A layer has about 8 x hidden and 3 x ffn numbers a token
    (Korthikanti et al. 2022, equation 1, without the attention scores that SDPA does not keep, with the three matrices
    of SwiGLU). With recomputing, a layer keeps its input and one layer at a time has all (Chen et al. 2016). Logits are
    in 16 bits; verl's and transformers' losses also hold a float32 copy and its gradient.
    """
    layer = 2 * (8 * model.hidden_size + 3 * model.ffn_size)
    activations = 2 * model.hidden_size * model.layers + layer if recompute else layer * model.layers
    return tokens * (activations + model.vocab_size * (2 + 4 + 4))


def num_kept(steps: int | None, every: int, keep: int) -> int:
    """Checkpoints after `steps`, of which `keep` are kept; 0 keeps all, and of an unknown number 1 counts."""
    if steps is None:
        return keep or 1
    saves = math.ceil(steps / every)
    return min(saves, keep or saves)


def sft_checkpoint_bytes(model: Model, settings: Settings) -> float:
    """A checkpoint of stage 1, of which every process writes its share.

    Full fine-tuning: the model, and with DeepSpeed the model once more (`*_model_states.pt`) and 12 bytes a trained
    parameter (float32 weight and Adam's two moments; Rajbhandari et al. 2020, 3.1). Without DeepSpeed `optimizer.pt`
    has the two moments in the dtype of the weights. LoRA: the same of the matrices alone (in float32).
    """
    trained, lora = model.trained(settings), settings["SFT_TUNER"] == "lora"
    width = 4 if lora else DTYPE_BYTES[settings["SFT_DTYPE"]]
    weights = (trained if lora else model.total) * width
    return 2 * weights + 12 * trained if settings["SFT_DEEPSPEED"] else weights + 2 * width * trained


def sft(model: Model, settings: Settings, rows: int | None) -> Estimate:
    """Stage 1.

    GPU: weights in SFT_DTYPE (a share of them with zero3) + gradients + optimizer + activations + logits of
    SFT_MICRO_BATCH rows of SFT_MAX_LENGTH tokens + context. DeepSpeed spreads 12 bytes a trained parameter from zero1
    on, gradients from zero2 on, weights with zero3 (Rajbhandari et al. 2020); a file counts as zero2. `*_offload`
    holds the optimizer in host memory. Without DeepSpeed: two moments in the dtype of the weights.

    Steps: the last batch of an epoch may be smaller, and SFT_MAX_STEPS wins (transformers' Trainer).

    Disk: transformers saves first and deletes the oldest after (trainer.py:3060), so SFT_SAVE_LIMIT + 1 at the peak.
    Without SFT_KEEP_OPTIMIZER the weights alone stay; of LoRA, the merged model too.
    """
    width, processes = DTYPE_BYTES[settings["SFT_DTYPE"]], settings.processes("sft")
    trained, lora = model.trained(settings), settings["SFT_TUNER"] == "lora"
    trained_width = 4 if lora else width
    zero, offload = settings["SFT_DEEPSPEED"], "offload" in settings["SFT_DEEPSPEED"]
    level = int(match[1]) if (match := re.match(r"zero(\d)", zero)) else 2 if zero else 0
    weights = model.total * width / (processes if level >= 3 else 1)
    gradients = trained * trained_width / (processes if level >= 2 else 1)
    optimizer = trained * (12 / (processes if level >= 1 else 1) if zero else 2 * trained_width)
    tokens = settings.whole("SFT_MICRO_BATCH") * settings.whole("SFT_MAX_LENGTH")
    device = weights + gradients + (0 if offload else optimizer)
    device += transient_bytes(model, tokens, settings.on("SFT_RECOMPUTE"))
    gpu, host = None, CPU_HOST_BYTES + device
    if settings.cuda:
        gpu = device + CONTEXT_BYTES
        host = settings.whole("NUM_GPUS") * (SFT_HOST_BYTES + (optimizer if offload else 0)) + model.weight_bytes
    steps = settings.whole("SFT_MAX_STEPS") if settings.whole("SFT_MAX_STEPS") > 0 else None
    if steps is None and rows is not None:
        steps = math.ceil(math.ceil(rows / settings.whole("SFT_BATCH_SIZE")) * float(settings["SFT_EPOCHS"]))
    checkpoint, limit = sft_checkpoint_bytes(model, settings), settings.whole("SFT_SAVE_LIMIT")
    every = settings.whole("SFT_SAVE_STEPS")
    slim = trained * 4 if lora else model.total * width
    stays = num_kept(steps, every, limit) * (checkpoint if settings.on("SFT_KEEP_OPTIMIZER") else slim)
    stays += model.total * width if lora else 0
    peak = max(num_kept(steps, every, limit + 1) * checkpoint, stays)
    basis = f"{'LoRA' if lora else 'full'}, {model.total / 1e9:.3g} B parameters, {trained / 1e9:.3g} B trained "
    basis += f"({trained / model.total:.2%}), "
    basis += f"{settings['SFT_DTYPE']}, {zero or 'no DeepSpeed'}, {tokens:,} tokens at once; "
    basis += f"a checkpoint {checkpoint / GB:.3g} GB"
    return Estimate("sft", basis, gpu, host, peak, stays, steps)


def rl_trained(model: Model, settings: Settings) -> int:
    """Parameters that stage 2 trains: the text model, or LoRA's matrices beside it."""
    return settings.whole("RL_LORA_RANK") * model.lora_width or model.text


def rl_checkpoint_bytes(model: Model, trained: int) -> float:
    """verl's FSDP checkpoint: the thinker in float32 and Adam's two moments of what is trained, in shards."""
    return 4 * model.thinker + 8 * trained


def rl_tokens(settings: Settings) -> int:
    default = 2 * (settings.whole("RL_MAX_PROMPT") + settings.whole("RL_MAX_RESPONSE"))
    return int(settings["RL_TOKENS_PER_GPU"] or default)


def rl(model: Model, settings: Settings, rows: int | None, gpu_total: float) -> Estimate:
    """Stage 2, on a GPU the larger of two phases.

    Rollout: vLLM's share RL_GPU_MEMORY of the GPU + the trainer's state, a share of a checkpoint (none with RL_OFFLOAD)
    + contexts. Update: that state + gradients in float32 (a share) + the towers and the two embeddings in bfloat16, as
    FSDP gathers them + activations and logits of RL_TOKENS_PER_GPU tokens + contexts + what vLLM keeps asleep.

    Host memory of a node: the reference model in float32, which verl keeps there (transformer_impl.py:395), with
    RL_OFFLOAD the trainer's state too, the processes, and the features of a step's clips, three times (TransferQueue,
    fetched, sent). With LoRA the reference is the trainer's own model without its adapter.

    Steps: verl drops an epoch's last, smaller batch (trainer_base.py:747, 765).

    Disk: verl deletes before it saves where RL_KEEP_CHECKPOINTS is 2 or more, and after where it is 1
    (checkpoint_manager.py:166), so the larger of 2 and RL_KEEP_CHECKPOINTS at the peak; 0 keeps all.
    """
    processes, nodes, offload = settings.processes("rl"), settings.whole("NUM_NODES"), settings.on("RL_OFFLOAD")
    trained, tokens, batch = rl_trained(model, settings), rl_tokens(settings), settings.whole("RL_BATCH_SIZE")
    checkpoint = rl_checkpoint_bytes(model, trained)
    features = 3 * batch * settings.whole("RL_GROUP") * FEATURE_BYTES
    gathered = 2 * (model.thinker - model.text) + 2 * 2 * model.vocab_size * model.hidden_size
    update = (checkpoint + 4 * trained) / processes + gathered + transient_bytes(model, tokens, settings.cuda)
    gpu = None
    if settings.cuda:
        rollout = float(settings["RL_GPU_MEMORY"]) * gpu_total + (0 if offload else checkpoint / processes)
        gpu = max(rollout, update + ASLEEP_BYTES) + ROLLOUT_CONTEXT_BYTES
        small = settings.whole("RL_AGENT_WORKERS") + settings.whole("RL_REWARD_WORKERS")
        host = settings.whole("NUM_GPUS") * RL_HOST_BYTES + small * RL_SMALL_HOST_BYTES / nodes + RL_BASE_HOST_BYTES
        reference = 0 if trained < model.text else 4 * model.thinker
        host += (reference + (checkpoint if offload else 0)) / nodes + features
    else:  # the reference model, and an engine for each process
        host = RL_CPU_HOST_BYTES + (processes - 1) * CPU_HOST_BYTES
        host += processes * update + (processes + 1) * 4 * model.thinker + features
    steps = int(settings["RL_STEPS"]) if settings["RL_STEPS"] else None
    if steps is None and rows is not None:
        steps = rows // batch * settings.whole("RL_EPOCHS")
    every, keep = settings.whole("RL_SAVE_FREQ"), settings.whole("RL_KEEP_CHECKPOINTS")
    keep += settings.whole("RL_KEEP_BEST") if keep else 0
    peak, stays = (num_kept(steps, every, number) * checkpoint for number in (keep and max(keep, 2), keep))
    basis = f"FSDP over {processes}, {model.thinker / 1e9:.3g} B, {trained / 1e9:.3g} B trained, "
    basis += f"{tokens:,} tokens at once{f', GPU of {gpu_total / GB:.0f} GB' if settings.cuda else ''}; "
    basis += f"a checkpoint {checkpoint / GB:.3g} GB"
    return Estimate("rl", basis, gpu, host, peak, stays, steps)


def merge(model: Model) -> Estimate:
    """A whole model in the dtype of the base model, written beside the old one and then moved. One file of the base
    model is in memory at a time (for_verl/merge.py), read and written."""
    size = model.weight_bytes
    return Estimate(
        "merge", f"the model, {size / GB:.3g} GB", None, CPU_HOST_BYTES + 2 * min(SHARD_BYTES, size), size, size
    )


def infer(model: Model, settings: Settings, gpu_total: float) -> Estimate:
    """vLLM takes 0.9 of a GPU (eval/engine.py). On a CPU it holds the thinker in float32."""
    if not settings.cuda:
        return Estimate("infer", "one engine", None, INFER_CPU_HOST_BYTES + 4 * model.thinker)
    host = settings.whole("NUM_GPUS") / settings.whole("EVAL_TP") * INFER_HOST_BYTES
    return Estimate("infer", f"vLLM takes 0.9 of {gpu_total / GB:.0f} GB", 0.9 * gpu_total, host)


def of_stages(
    model: Model, settings: Settings, stages: Sequence[str], rows: Mapping[str, int], gpu_sizes: Sequence[float]
) -> list[Estimate]:
    """Of each stage that needs something; `rows` by purpose, SFT or RL."""
    gpu = min(gpu_sizes, default=ASSUMED_GPU_BYTES)
    made = [sft(model, settings, rows.get("SFT")), rl(model, settings, rows.get("RL"), gpu)]
    made += [merge(model), infer(model, settings, gpu)]
    return [estimate for estimate in made if estimate.stage in stages]


def disk_needed(found: Sequence[Estimate], there: Mapping[str, float]) -> float:
    """Free bytes that the stages need one after the other. What a stage has written already (`there`) counts."""
    needed = left = 0.0
    for estimate in found:
        written = there.get(estimate.stage, 0)
        needed = max(needed, left + estimate.disk_peak - written)
        left += estimate.disk_left - written
    return needed
