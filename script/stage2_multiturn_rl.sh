#!/usr/bin/env bash
# Stage 2: GRPO on verl with vLLM rollouts that re-listen. A stopped run goes on from its last checkpoint.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<USAGE
usage: MODEL=DIR TRAIN_FILE=rl.parquet VAL_FILE=val.parquet OUTPUT_DIR=DIR bash script/stage2_multiturn_rl.sh [OVERRIDE ...]

MODEL is the model to start from, and the reference of the KL term. The files are those of \`python -m converters.rl_parquet\`.
OUTPUT_DIR gets checkpoints (global_step_N), metrics.jsonl, trajectories/STEP.jsonl and validation/STEP.jsonl.
OVERRIDE words are Hydra overrides of verl; they come last, after RL_ARGS, and win. With RAY_ADDRESS set the run joins that
cluster; otherwise it starts a Ray cluster and ends it too. Settings, as variables of the environment:

$(explain_settings rl)
USAGE
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --) shift ;;
esac

: "${MODEL:?is the model directory to start from, the output of stage 1}"
: "${TRAIN_FILE:?is a Parquet file of converters.rl_parquet}"
: "${VAL_FILE:?is a Parquet file of converters.rl_parquet}"
: "${OUTPUT_DIR:?is where checkpoints and logs go}"
OUTPUT_DIR="$(realpath -m "$OUTPUT_DIR")"
defaults rl
[[ "$DEVICE" == cpu || "$DEVICE" == cuda ]] || die "DEVICE is '$DEVICE'; it is cpu or cuda" 2
[[ "$RL_STEPS" != 0 ]] || die "RL_STEPS=0 leaves stage 2 out of a recipe. Here it takes one step or more, or all rows if it is empty." 2
: "${RL_TOKENS_PER_GPU:=$((2 * (RL_MAX_PROMPT + RL_MAX_RESPONSE)))}"

require "$MODEL" "Run script/stage1_ground_reason.sh first, or point MODEL at a model directory."
require "$TRAIN_FILE" "Make it with python -m converters.rl_parquet."
require "$VAL_FILE" "Make it with python -m converters.rl_parquet."

case "$REWARD_PRESET" in
  *.yaml | *.yml) REWARD_PRESET="$(realpath -m "$REWARD_PRESET")" ;;  # verl's processes may run in another folder
esac
read -ra loggers <<< "${TRACKERS//,/ }"
LOGGERS="$(IFS=,; echo "console,file${loggers[*]:+,${loggers[*]}}")"

# A path as a Hydra string: without quotes a blank, a comma or a bracket in it would mean something.
hydra_string() { printf "'%s'" "${1//\'/\\\'}"; }

environment=(  # of every process of the run, on other nodes too
  ECHO_FAILURE_FILE="$OUTPUT_DIR/failure.txt"
  VERL_FILE_LOGGER_PATH="$OUTPUT_DIR/metrics.jsonl" TENSORBOARD_DIR="$OUTPUT_DIR/tensorboard"
  WANDB_DIR="$OUTPUT_DIR" WANDB_MODE="${WANDB_MODE:-offline}"  # nothing leaves the machine unasked
  VLLM_PLUGINS="${VLLM_PLUGINS-}"  # ms-swift has one, and verl does not work in a process that has imported ms-swift
  VERL_USE_EXTERNAL_MODULES=echo_plugins.for_verl  # unlike the entry point, an error in the plug-in ends the run
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  PYTHONUNBUFFERED=1 HYDRA_FULL_ERROR=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0
)
IMAGES=0  # a dry run may come before the model is there
if [[ -f "$MODEL/config.json" ]]; then
  IMAGES="$(PYTHONPATH="$ROOT" "$PYTHON" -m echo_plugins.model "$MODEL" images_in_engine)"
fi
data=(
  data.train_files="$(hydra_string "$TRAIN_FILE")" data.val_files="$(hydra_string "$VAL_FILE")"
  data.custom_cls.path=pkg://echo_plugins.for_verl.dataset data.custom_cls.name=RelistenDataset
  data.train_batch_size="$RL_BATCH_SIZE" data.seed="$SEED" data.dataloader_num_workers=0
  data.max_prompt_length="$RL_MAX_PROMPT" data.max_response_length="$RL_MAX_RESPONSE" data.filter_overlong_prompts=True
)
algorithm=(
  algorithm.adv_estimator=grpo algorithm.use_kl_in_reward=False critic.enable=False
  algorithm.norm_adv_by_std_in_grpo="$RL_NORM_ADV" algorithm.filter_groups.enable="$RL_FILTER_GROUPS"
  algorithm.filter_groups.metric=filter +echo.max_gen_batches="$RL_MAX_GEN_BATCHES"
  algorithm.rollout_correction.bypass_mode="$RL_BYPASS"
)
[[ -z "$RL_TIS" ]] || algorithm+=(
  algorithm.rollout_correction.rollout_is=token algorithm.rollout_correction.rollout_is_threshold="$RL_TIS"
)
model=(
  actor_rollout_ref.model.path="$(hydra_string "$MODEL")" actor_rollout_ref.model.use_remove_padding=True
  +actor_rollout_ref.model.override_config.attn_implementation="$RL_ATTENTION"
)
# LoRA: the language model's layers alone, as the towers are frozen. The engine gets the merged weights, since vLLM takes
# no adapters for some of these models; the reference is the model without its adapter.
if ((RL_LORA_RANK > 0)); then
  lora_layers "$MODEL" RL_LORA_TARGETS
  TARGETS="'$RL_LORA_TARGETS'"
  [[ ! -e "$MODEL/config.json" ]] || TARGETS="[$(IFS=,; echo "${LAYERS[*]}")]"
  model+=(
    actor_rollout_ref.model.lora_rank="$RL_LORA_RANK" actor_rollout_ref.model.lora_alpha="$RL_LORA_ALPHA"
    actor_rollout_ref.model.target_modules="$TARGETS" actor_rollout_ref.model.lora.merge=True
  )
fi
actor=(
  actor_rollout_ref.actor.strategy=fsdp2
  actor_rollout_ref.actor.optim.lr="$RL_LR" actor_rollout_ref.actor.optim.lr_warmup_steps="$RL_WARMUP_STEPS"
  actor_rollout_ref.actor.optim.lr_scheduler_type="$RL_LR_SCHEDULER"
  actor_rollout_ref.actor.optim.weight_decay="$RL_WEIGHT_DECAY" actor_rollout_ref.actor.grad_clip="$RL_GRAD_CLIP"
  actor_rollout_ref.actor.ppo_mini_batch_size="$RL_MINI_BATCH"
  actor_rollout_ref.actor.policy_loss.loss_mode="$RL_LOSS" actor_rollout_ref.actor.loss_agg_mode="$RL_LOSS_AGG"
  actor_rollout_ref.actor.clip_ratio="$RL_CLIP_LOW" actor_rollout_ref.actor.clip_ratio_low="$RL_CLIP_LOW"
  actor_rollout_ref.actor.clip_ratio_high="$RL_CLIP_HIGH"
  actor_rollout_ref.actor.use_dynamic_bsz=True actor_rollout_ref.actor.ppo_max_token_len_per_gpu="$RL_TOKENS_PER_GPU"
  actor_rollout_ref.actor.kl_loss_coef="$RL_KL" actor_rollout_ref.actor.kl_loss_type=low_var_kl
  actor_rollout_ref.actor.entropy_coeff="$RL_ENTROPY"
  actor_rollout_ref.actor.data_loader_seed="$SEED" actor_rollout_ref.actor.fsdp_config.seed="$SEED"
  actor_rollout_ref.actor.fsdp_config.param_offload="$RL_OFFLOAD"
  actor_rollout_ref.actor.fsdp_config.optimizer_offload="$RL_OFFLOAD"
)
# Without a KL term no reference is loaded.
if awk -v kl="$RL_KL" 'BEGIN { exit !(kl > 0) }'; then
  actor+=(actor_rollout_ref.actor.use_kl_loss=True)
else
  actor+=(actor_rollout_ref.actor.use_kl_loss=False)
fi
# The entropy of 8,192 tokens at once takes 12 GB; in chunks it takes none to speak of.
for role in actor ref; do actor+=("actor_rollout_ref.$role.entropy_from_logits_with_chunking=True"); done
reference=(
  actor_rollout_ref.ref.strategy=fsdp2
  actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.ref.log_prob_max_token_len_per_gpu="$RL_TOKENS_PER_GPU"
)
rollout=(
  actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n="$RL_GROUP" actor_rollout_ref.rollout.seed="$SEED"
  actor_rollout_ref.rollout.temperature="$RL_TEMPERATURE"
  actor_rollout_ref.rollout.val_kwargs.temperature="$RL_VAL_TEMPERATURE"
  actor_rollout_ref.rollout.tensor_model_parallel_size="$RL_TP"
  actor_rollout_ref.rollout.gpu_memory_utilization="$RL_GPU_MEMORY"
  actor_rollout_ref.rollout.max_model_len="$((RL_MAX_PROMPT + RL_MAX_RESPONSE))"
  actor_rollout_ref.rollout.max_num_batched_tokens="$((RL_MAX_PROMPT + RL_MAX_RESPONSE > 8192 ? RL_MAX_PROMPT + RL_MAX_RESPONSE : 8192))"
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu="$RL_TOKENS_PER_GPU"
  actor_rollout_ref.rollout.agent.default_agent_loop=relisten
  actor_rollout_ref.rollout.agent.num_workers="$RL_AGENT_WORKERS"
  "+actor_rollout_ref.rollout.engine_kwargs.vllm.limit_mm_per_prompt={audio: $((MAX_SEGMENTS + 1)), image: $IMAGES, video: 0}"
  +actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=echo_plugins.for_verl.vllm_worker.WorkerExtension
  +echo.mode="$RL_MODE" +echo.max_segments="$MAX_SEGMENTS" +echo.min_segment_seconds="$MIN_SEGMENT_SECONDS"
  +echo.straddle="$STRADDLE" +echo.rollout_timeout_seconds="$RL_TIMEOUT" +echo.max_failed_share="$RL_MAX_FAILED"
  +echo.keep_best="$RL_KEEP_BEST"
)
reward=(
  reward.num_workers="$RL_REWARD_WORKERS" reward.reward_manager.source=importlib
  reward.reward_manager.name=EchoRewardManager
  reward.reward_manager.module.path=pkg://echo_plugins.for_verl.reward_manager
  +reward.reward_kwargs.preset="$(hydra_string "$REWARD_PRESET")"
)
trainer=(
  trainer.v1.trainer_mode="$( ((RL_ASYNC)) && echo echo_async || echo echo_sync)" trainer.nnodes="$NUM_NODES" trainer.n_gpus_per_node="$NUM_GPUS"
  trainer.project_name=echo trainer.experiment_name="$(hydra_string "$(basename "$(dirname "$OUTPUT_DIR")")")"
  trainer.total_epochs="${RL_STEPS:-$RL_EPOCHS}" trainer.total_training_steps="${RL_STEPS:-null}"
  trainer.save_freq="$RL_SAVE_FREQ" trainer.test_freq="$RL_TEST_FREQ"
  trainer.val_before_train="$([[ "$RL_TEST_FREQ" -gt 0 || "$RL_VAL_ONLY" == 1 ]] && echo True || echo False)"
  trainer.val_only="$( ((RL_VAL_ONLY)) && echo True || echo False)"
  trainer.max_actor_ckpt_to_keep="$( ((RL_KEEP_CHECKPOINTS > 0)) && echo "$RL_KEEP_CHECKPOINTS" || echo null)" trainer.resume_mode=auto
  trainer.default_local_dir="$(hydra_string "$OUTPUT_DIR")" "trainer.logger=[$LOGGERS]"
  trainer.rollout_data_dir="$(hydra_string "$OUTPUT_DIR/trajectories")"
  trainer.validation_data_dir="$(hydra_string "$OUTPUT_DIR/validation")"
  +echo_log.rows="$TRAJECTORY_ROWS" +echo_log.megabytes="$TRAJECTORY_MEGABYTES" +echo_log.ids="$TRAJECTORY_IDS"
  +echo_log.shown="$TRAJECTORY_SHOWN"
  hydra.run.dir="$(hydra_string "$OUTPUT_DIR/hydra")"
)
ray=()
if [[ "$DEVICE" == cpu ]]; then
  # fp32 and no sleeping engine: what a GPU saves memory with needs a GPU. The rest of the block says "CPU" to each of
  # verl, vLLM and Ray; Ray's CPUs and GPUs are slots for processes here.
  environment+=(
    VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
    VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}" VLLM_CPU_OMP_THREADS_BIND=nobind
    TORCH_COMPILE_DISABLE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0  # a shorter start: see eval/engine.py
    TQ_NUM_THREADS=1 RAY_worker_niceness=0  # Ray's default is 15: whatever else the machine does would come first
  )
  model+=(actor_rollout_ref.model.enable_gradient_checkpointing=False)
  for role in actor ref; do
    actor+=(
      "actor_rollout_ref.$role.fsdp_config.model_dtype=fp32" "actor_rollout_ref.$role.fsdp_config.use_torch_compile=False"
      "+actor_rollout_ref.$role.fsdp_config.mixed_precision.param_dtype=fp32"
      "actor_rollout_ref.$role.use_torch_compile=False"
    )
  done
  rollout+=(
    actor_rollout_ref.rollout.dtype=float32 actor_rollout_ref.rollout.enforce_eager=True
    actor_rollout_ref.rollout.free_cache_engine=False +actor_rollout_ref.rollout.enable_sleep_mode=False
    actor_rollout_ref.rollout.max_num_seqs=128
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=16
    +actor_rollout_ref.rollout.engine_kwargs.vllm.block_size=32
    +actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend=uni
    actor_rollout_ref.rollout.agent.num_workers=1
  )
  reward+=(reward.num_workers=1)
  trainer+=(
    trainer.device=cpu trainer.n_gpus_per_node="$RL_WORKERS"
    transfer_queue.backend.SimpleStorage.num_data_storage_units=1
  )
  # A cluster that is joined has its own. Ray starts a Python process for each CPU, so no more than are used.
  [[ -n "${RAY_ADDRESS:-}" ]] || ray+=(
    ray_kwargs.ray_init.num_cpus="$((6 + 4 * RL_WORKERS))" +ray_kwargs.ray_init.num_gpus="$RL_WORKERS"
    +ray_kwargs.ray_init.object_store_memory=500000000
  )
fi
if [[ "$DEVICE" == cuda ]]; then
  # The reference is read only, so half the bytes serve. The bucket of the weight sync holds the embeddings in float32.
  reference+=(actor_rollout_ref.ref.fsdp_config.model_dtype=bf16)
  rollout+=(actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes=4096)
fi
if [[ -z "${RAY_ADDRESS:-}" ]]; then
  # A cluster of its own, never one that happens to run here. The folder is short (a socket's path has 107 characters)
  # and the same for each try of this run, so that what a killed try left is found and cleared.
  RAY_DIR="/tmp/echo-ray-$(cksum <<< "$OUTPUT_DIR" | cut -d' ' -f1)"
  ray+=(
    +ray_kwargs.ray_init.address=local +ray_kwargs.ray_init._temp_dir="$RAY_DIR"
    +ray_kwargs.ray_init.include_dashboard=False
  )
fi
# Nodes of a cluster that this shell has not started have none of it.
for variable in "${environment[@]}"; do
  ray+=("+ray_kwargs.ray_init.runtime_env.env_vars.${variable%%=*}=$(hydra_string "${variable#*=}")")
done
# shellcheck disable=SC2206  # RL_ARGS holds several words
command=(
  env "${environment[@]}" "$PYTHON" -m verl.trainer.main_ppo "${data[@]}" "${algorithm[@]}" "${model[@]}" "${actor[@]}"
  "${reference[@]}" "${rollout[@]}" "${reward[@]}" "${trainer[@]}" "${ray[@]}" $RL_ARGS "$@"
)
if [[ "$DRY_RUN" == 1 ]]; then
  run "${command[@]}"
  exit
fi

# A preset that is not right is known in a second, and not only when the models are loaded.
env PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m echo_plugins.rewards.explain --preset "$REWARD_PRESET" >&2 ||
  die "REWARD_PRESET=$REWARD_PRESET cannot be used."
lock "$OUTPUT_DIR"
if [[ -n "${RAY_DIR:-}" ]]; then
  rm -rf -- "$RAY_DIR"
  trap 'rm -rf -- "$RAY_DIR"' EXIT
fi
# verl empties the file when it starts: what an earlier try logged is kept beside it as metrics.TIME.jsonl.
if [[ -e "$OUTPUT_DIR/metrics.jsonl" ]]; then mv "$OUTPUT_DIR/metrics.jsonl" "$OUTPUT_DIR/metrics.$(date +%s).jsonl"; fi
# The step of the last whole checkpoint, 0 without one. verl names it in a file when all ranks have saved; where a kill
# left that file empty, the newest checkpoint is whole.
trained_steps() {
  local named newest
  named="$(cat "$OUTPUT_DIR/latest_checkpointed_iteration.txt" 2> /dev/null || echo 0)"
  if [[ ! "$named" =~ ^[0-9]+$ ]]; then
    newest="$(find "$OUTPUT_DIR" -maxdepth 1 -name 'global_step_*' | sort -V | tail -1)"
    named="${newest##*_}"
    printf '%s' "${named:=0}" > "$OUTPUT_DIR/latest_checkpointed_iteration.txt"
  fi
  printf '%s\n' "$named"
}

BEFORE="$(trained_steps)"
no_step_left() {
  die "no step is left: $BEFORE are trained. Give more (RL_STEPS, RL_EPOCHS), or FORCE=1 to begin anew." 2
}
[[ "${CONTINUED:-}" != continued || -z "$RL_STEPS" || "$BEFORE" -lt "$RL_STEPS" ]] || no_step_left
# In braces, so that bash has read to the end when a run of hours begins: this file may change meanwhile.
{
  rm -f "$OUTPUT_DIR/failure.txt"
  status=0
  run "${command[@]}" 2>&1 || status=$?
  if ((status)); then
    [[ ! -s "$OUTPUT_DIR/failure.txt" ]] || die "$(< "$OUTPUT_DIR/failure.txt")"
    exit "$status"
  fi
  [[ "${CONTINUED:-}" != continued || "$(trained_steps)" -gt "$BEFORE" ]] || no_step_left
  exit
}
