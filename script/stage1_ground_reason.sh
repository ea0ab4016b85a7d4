#!/usr/bin/env bash
# Stage 1: SFT with ms-swift. The model learns to name segments as it reasons (grounded rows) or to go on after hearing
# them again (interleaved rows). Stop it and start it again at any time: it goes on from its last whole checkpoint.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<USAGE
usage: MODEL=DIR TRAIN_FILE=rows.jsonl OUTPUT_DIR=DIR bash script/stage1_ground_reason.sh [WORDS]

Trains MODEL on the rows that \`python -m converters.sft_jsonl\` wrote. OUTPUT_DIR/last is the trained model, complete.
VAL_FILE, rows of the same kind: the loss on them is evaluated every SFT_EVAL_STEPS.
WORDS go on to \`swift sft\`; what they say comes last and wins. Settings, as variables of the environment:

$(explain_settings sft)
USAGE
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --) shift ;;
esac

require "${MODEL:?is not set: the directory of the model to train}/config.json" \
  "Download the model, or make the tiny one with recipes/tiny-cpu."
require "${TRAIN_FILE:?is not set: the rows of converters.sft_jsonl}" "Make it with python -m converters.sft_jsonl."
: "${OUTPUT_DIR:?is not set: the folder for checkpoints and the trained model}"
defaults sft
[[ "$SFT_TUNER" == full || "$SFT_TUNER" == lora ]] || die "SFT_TUNER is '$SFT_TUNER'; it is full or lora" 2
[[ "$SFT_FREEZE_AUDIO" == true || "$SFT_FREEZE_AUDIO" == false ]] || die "SFT_FREEZE_AUDIO is '$SFT_FREEZE_AUDIO'" 2
[[ "$SFT_CLIP" =~ ^(own|random|silent|shuffled)$ ]] ||
  die "SFT_CLIP is '$SFT_CLIP'; it is own, random, silent or shuffled" 2
# SFT_MODE is a setting of the rows; a recipe exports it. Rows without a clip are refused below in any case.
[[ "$SFT_CLIP" == own || "${SFT_MODE:-interleaved}" == *interleaved* ]] ||
  die "SFT_CLIP=$SFT_CLIP needs rows with sound behind their tags, and SFT_MODE is '$SFT_MODE'. Use SFT_MODE=interleaved or SFT_CLIP=own." 2
[[ "$DEVICE" == cpu || "$DEVICE" == cuda ]] || die "DEVICE is '$DEVICE'; it is cpu or cuda" 2
[[ "$DEVICE" == cpu ]] || ((NUM_GPUS > 0)) || die "NUM_GPUS=$NUM_GPUS: DEVICE=cpu trains without a GPU" 2

# The same batch on any number of GPUs: what they do not hold at once is accumulated.
if [[ "$DEVICE" == cpu ]]; then AT_ONCE=$((SFT_MICRO_BATCH * NUM_NODES)); else AT_ONCE=$((SFT_MICRO_BATCH * NUM_NODES * NUM_GPUS)); fi
((SFT_BATCH_SIZE % AT_ONCE == 0)) ||
  die "SFT_BATCH_SIZE=$SFT_BATCH_SIZE is no multiple of the $AT_ONCE rows that SFT_MICRO_BATCH=$SFT_MICRO_BATCH on NUM_GPUS=$NUM_GPUS holds at once" 2

ENVIRONMENT=(env)
DEVICE_FLAGS=()
LAUNCHER=()
if ((NUM_NODES > 1)); then
  # This script runs once, on the first node. The launcher starts ms-swift on each, where torchrun's processes find each other.
  [[ -n "$NODE_LAUNCHER" ]] ||
    die "NUM_NODES=$NUM_NODES needs NODE_LAUNCHER, which runs a command once on each node: 'srun --ntasks-per-node=1' under Slurm" 2
  read -ra LAUNCHER <<< "$NODE_LAUNCHER"
  # shellcheck disable=SC2016  # a variable of the node
  LAUNCHER+=(bash -c 'NODE_RANK="${SLURM_NODEID:?}" exec "$@"' node)
  export MASTER_ADDR="${MASTER_ADDR:-$(hostname)}" MASTER_PORT="${MASTER_PORT:-29511}"
fi
if [[ "$DEVICE" == cuda ]]; then
  ENVIRONMENT+=("NPROC_PER_NODE=$NUM_GPUS" "NNODES=$NUM_NODES") # ms-swift starts one process a GPU
else
  # One thread: two are no faster for so small a model, and on a busy machine they wait for each other. With NNODES or
  # NPROC_PER_NODE in the environment ms-swift would start torchrun.
  if ((NUM_NODES > 1)); then
    ENVIRONMENT+=("NNODES=$NUM_NODES" NPROC_PER_NODE=1)
    DEVICE_FLAGS+=(--ddp_backend gloo)
  else
    ENVIRONMENT+=(-u NNODES -u NPROC_PER_NODE)
  fi
  ENVIRONMENT+=(CUDA_VISIBLE_DEVICES= "OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
  DEVICE_FLAGS+=(--dataloader_pin_memory false)
fi
ENVIRONMENT+=("PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false "SFT_CLIP=$SFT_CLIP")
# For float32 ms-swift would ask for mixed precision in fp16.
[[ "$SFT_DTYPE" != float32 ]] || DEVICE_FLAGS+=(--fp16 false --bf16 false)
[[ -z "$SFT_DEEPSPEED" ]] || DEVICE_FLAGS+=(--deepspeed "$SFT_DEEPSPEED")

# ms-swift counts the audio tower as `vit` and its projection as `aligner`. Both are frozen unless told otherwise. The vision
# tower is frozen too: no row has images.
TUNER=(--tuner_type "$SFT_TUNER" --freeze_vit true --freeze_aligner true)
if [[ "$SFT_TUNER" == lora ]]; then
  lora_layers "$MODEL" SFT_LORA_TARGETS
  TUNER+=(--lora_rank "$SFT_LORA_RANK" --lora_alpha "$SFT_LORA_ALPHA" --target_modules "${LAYERS[@]}")
  if [[ "$SFT_LORA_EXPERTS" == true ]]; then
    # Experts are no linear layers but tensors, which PEFT adapts by their names and without dropout.
    mapfile -t EXPERTS < <(PYTHONPATH="$ROOT" "$PYTHON" -m echo_plugins.model "$MODEL" lora_experts)
    [[ -n "${EXPERTS[*]}" ]] || die "SFT_LORA_EXPERTS=true: $MODEL has no experts" 2
    TUNER+=(--target_parameters "${EXPERTS[@]}" --lora_dropout 0)
  fi
  [[ "$SFT_FREEZE_AUDIO" == true ]] || die "LoRA leaves the audio tower as it is: SFT_FREEZE_AUDIO=false needs SFT_TUNER=full" 2
elif [[ "$SFT_FREEZE_AUDIO" == false ]]; then
  # Recomputing the tower would leave it without gradients: its input, the features, needs none.
  TUNER+=(--trainable_parameters thinker.audio_tower --vit_gradient_checkpointing false)
fi

# A checkpoint is whole when trainer_state.json, which is written last, can be read to its end.
last_checkpoint() {
  local checkpoint
  while read -r checkpoint; do
    if "$PYTHON" -m json.tool "$checkpoint/trainer_state.json" > /dev/null 2>&1; then
      printf '%s\n' "$checkpoint"
      return
    fi
  done < <(find "$OUTPUT_DIR" -maxdepth 1 -name 'checkpoint-*' -type d 2> /dev/null | sort -rV)
}

# What a checkpoint holds for going on, in the layouts of transformers, DeepSpeed and FSDP. It is most of its size.
optimizer_state() {
  find "$1" -maxdepth 1 '(' -name 'optimizer*' -o -name 'global_step*' -o -name 'rng_state*' -o -name 'scheduler.pt' ')'
}

RESUME=() CHECKPOINT='' START="$MODEL"
if [[ "$DRY_RUN" != 1 ]]; then
  lock "$OUTPUT_DIR"
  CHECKPOINT="$(last_checkpoint)"
fi

# fitting_rows IN PREFIX [WORDS]: those of IN that can be trained on, to OUTPUT_DIR/PREFIXrows.jsonl
fitting_rows() {
  run "${ENVIRONMENT[@]}" "$PYTHON" -m echo_plugins.for_swift.dataset "$1" "$OUTPUT_DIR/${2}rows.jsonl" \
    --model "$MODEL" --max-length "$SFT_MAX_LENGTH" --overlong "$OUTPUT_DIR/${2}overlong.jsonl" "${@:3}"
}

ROWS="$OUTPUT_DIR/rows.jsonl"
fitting_rows "$TRAIN_FILE" '' --clip "$SFT_CLIP"

# A checkpoint goes on with what it was begun with: other rows would be taken up in the middle of their epoch, and the weights
# of another model would be lost.
begun_with() {
  printf 'SFT_TUNER %s\nSFT_CLIP %s\n' "$SFT_TUNER" "$SFT_CLIP"
  printf 'rows %s\n' "$(sha256sum < "$ROWS")"
  printf 'MODEL %s\n' "$(find -L "$MODEL" -name '*.safetensors' -type f -exec tail -c 1000000 '{}' + | sha256sum)"
}
if [[ "$DRY_RUN" != 1 && "${CONTINUED:-}" != continued ]]; then
  BEGUN="$OUTPUT_DIR/begun_with.txt"
  if [[ -n "$CHECKPOINT" && -f "$BEGUN" ]]; then
    CHANGED="$({ begun_with | diff - "$BEGUN" || true; } | sed -n 's/^< \([^ ]*\).*/\1/p' | paste -sd ' ')"
    [[ -z "$CHANGED" ]] ||
      die "$CHECKPOINT was begun with another: $CHANGED. Take another OUTPUT_DIR, or remove this one to begin anew." 2
  else
    begun_with > "$BEGUN.tmp"
    mv "$BEGUN.tmp" "$BEGUN"
  fi
fi

# The loss on rows that are not trained on.
EVALUATION=(--eval_strategy no)
if ((SFT_EVAL_STEPS > 0)) && [[ -s "${VAL_FILE:-}" || ( "$DRY_RUN" == 1 && -n "${VAL_FILE:-}" ) ]]; then
  fitting_rows "$VAL_FILE" val-
  EVALUATION=(
    --val_dataset "$OUTPUT_DIR/val-rows.jsonl" --val_dataset_shuffle false --per_device_eval_batch_size "$SFT_MICRO_BATCH"
    --eval_strategy steps --eval_steps "$SFT_EVAL_STEPS"
  )
fi

# Steps of the whole run, as transformers counts them. Words for ms-swift may give another number.
planned_steps() {
  "$PYTHON" -c 'import math, sys
rows, batch, epochs, most = map(float, sys.argv[1:])
print(int(most) if most > 0 else math.ceil(epochs * math.ceil(rows / batch)))' \
    "$(wc -l < "$ROWS")" "$SFT_BATCH_SIZE" "$SFT_EPOCHS" "$SFT_MAX_STEPS"
}

is_complete() {
  "$PYTHON" -c 'import json, sys
state = json.load(open(sys.argv[1]))
sys.exit(state["global_step"] < state["max_steps"])' "$1/trainer_state.json"
}

TRAINED=false
if [[ -n "$CHECKPOINT" ]]; then
  STEP="${CHECKPOINT##*-}" STEPS="$(planned_steps)"
  if (($# == 0 && STEP >= STEPS)); then
    [[ "${CONTINUED:-}" != continued ]] ||
      die "no step is left: $STEP of $STEPS are trained. Give more (SFT_EPOCHS, SFT_MAX_STEPS), or FORCE=1 to begin anew." 2
    TRAINED=true
  elif [[ -z "$(optimizer_state "$CHECKPOINT")" ]]; then
    # With words only the checkpoint itself says how many steps were planned.
    [[ "${CONTINUED:-}" != continued ]] && (($#)) && is_complete "$CHECKPOINT" && TRAINED=true
    [[ "$TRAINED" == true ]] ||
      die "$CHECKPOINT has no optimizer state, so training cannot go on from it. SFT_KEEP_OPTIMIZER=true keeps it in a run that is to be prolonged. FORCE=1 begins anew; or take this model as the BASE_MODEL of another RUN_DIR." 2
  else
    note "going on from step $STEP of $STEPS: $CHECKPOINT"
    RESUME=(--resume_from_checkpoint "$CHECKPOINT")
    # transformers' Trainer loads a checkpoint's weights by their names in the file, and leaves without a word what has
    # another name in memory: experts, which are fused there. So their weights come as those of a model do.
    if [[ "$SFT_TUNER" == full && "$(PYTHONPATH="$ROOT" "$PYTHON" -m echo_plugins.model "$MODEL" moe)" == True ]]; then
      START="$CHECKPOINT"
    fi
  fi
fi

# ms-swift draws its curves from tensorboard's file, so it is always written.
read -ra TRACKERS_LIST <<< "tensorboard ${TRACKERS//,/ }"
mapfile -t REPORT_TO < <(printf '%s\n' "${TRACKERS_LIST[@]}" | sort -u)

train() {
  run "${LAUNCHER[@]}" "${ENVIRONMENT[@]}" "WANDB_MODE=${WANDB_MODE:-offline}" "WANDB_DIR=$OUTPUT_DIR" "$(dirname "$PYTHON")/swift" sft \
    --model "$START" \
    --external_plugins "$ROOT/echo_plugins/for_swift/plugin.py" \
    --dataset "$ROWS" \
    --strict true \
    --max_length "$SFT_MAX_LENGTH" \
    --dataset_shuffle "$SFT_SHUFFLE" \
    --train_dataloader_shuffle "$SFT_SHUFFLE" \
    --dataloader_num_workers "$SFT_WORKERS" \
    "${TUNER[@]}" \
    --torch_dtype "$SFT_DTYPE" \
    --attn_impl "$SFT_ATTN" \
    --gradient_checkpointing "$SFT_RECOMPUTE" \
    "${DEVICE_FLAGS[@]}" \
    --per_device_train_batch_size "$SFT_MICRO_BATCH" \
    --gradient_accumulation_steps $((SFT_BATCH_SIZE / AT_ONCE)) \
    --num_train_epochs "$SFT_EPOCHS" \
    --max_steps "$SFT_MAX_STEPS" \
    --learning_rate "$SFT_LR" \
    --lr_scheduler_type "$SFT_LR_SCHEDULER" \
    --warmup_ratio "$SFT_WARMUP_RATIO" \
    --weight_decay "$SFT_WEIGHT_DECAY" \
    --seed "$SEED" \
    --data_seed "$SEED" \
    --logging_steps "$SFT_LOG_STEPS" \
    --save_steps "$SFT_SAVE_STEPS" \
    "${EVALUATION[@]}" \
    --save_total_limit "$SFT_SAVE_LIMIT" \
    --output_dir "$OUTPUT_DIR" \
    --add_version false \
    --check_model false \
    --report_to "${REPORT_TO[@]}" \
    "${RESUME[@]}" \
    "$@"
}
[[ "$TRAINED" == true ]] || train "$@"

[[ "$DRY_RUN" != 1 ]] || exit 0
CHECKPOINT="$(last_checkpoint)"
[[ -n "$CHECKPOINT" ]] || die "ms-swift left no checkpoint in $OUTPUT_DIR; its own messages above say why."
if [[ "$SFT_TUNER" == lora ]]; then
  rm -rf "$OUTPUT_DIR/.last"
  run "${ENVIRONMENT[@]}" "$(dirname "$PYTHON")/swift" export \
    --model "$MODEL" --adapters "$CHECKPOINT" --merge_lora true --output_dir "$OUTPUT_DIR/.last"
  rm -rf "$OUTPUT_DIR/last"
  mv "$OUTPUT_DIR/.last" "$OUTPUT_DIR/last"
else
  ln -sfn "$(basename "$CHECKPOINT")" "$OUTPUT_DIR/last"
fi
if [[ "$SFT_KEEP_OPTIMIZER" == false ]]; then
  mapfile -t STATE < <(optimizer_state "$CHECKPOINT")
  if ((${#STATE[@]})); then
    note "dropping the optimizer state, $(du -csh "${STATE[@]}" | tail -1 | cut -f1) (SFT_KEEP_OPTIMIZER=true keeps it)"
    rm -rf -- "${STATE[@]}"
  fi
fi
note "the trained model is $OUTPUT_DIR/last"
