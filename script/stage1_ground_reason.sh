#!/usr/bin/env bash
# Stage 1: SFT with ms-swift. The model learns to name segments as it reasons (grounded rows) or to go on after hearing
# them again (interleaved rows). Stop it and start it again at any time: it goes on from its last whole checkpoint.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'USAGE'
usage: MODEL=DIR TRAIN_FILE=rows.jsonl OUTPUT_DIR=DIR bash script/stage1_ground_reason.sh [WORDS]

Trains MODEL on the rows that `python -m converters.sft_jsonl` wrote. OUTPUT_DIR/last is the trained model, complete.
WORDS go on to `swift sft`; what they say comes last and wins.

  NUM_GPUS=0             0: on the processor        DEVICE=cpu|cuda          of NUM_GPUS=0: cpu
  SFT_BATCH_SIZE=16      rows a step, whatever NUM_GPUS; SFT_MICRO_BATCH=1 of them on a device at once
  SFT_LR=5e-6            SFT_WARMUP_RATIO=0.05      SFT_LR_SCHEDULER=cosine  SFT_WEIGHT_DECAY=0.1
  SFT_EPOCHS=1           SFT_MAX_STEPS=-1           -1: SFT_EPOCHS decides
  SFT_TUNER=full         full or lora (SFT_LORA_RANK=8, SFT_LORA_ALPHA=32); LoRA is merged into OUTPUT_DIR/last
  SFT_FREEZE_AUDIO=true  false: train the audio tower too
  SFT_MAX_LENGTH=4096    tokens; longer rows are left out, named in OUTPUT_DIR/overlong.jsonl and counted
  SFT_SHUFFLE=true       false: in the order of the file
  SFT_SAVE_STEPS=500     SFT_SAVE_LIMIT=2           SFT_LOG_STEPS=5          SFT_WORKERS=1 (reading rows)
  SFT_DTYPE=bfloat16     SFT_ATTN=sdpa              SFT_DEEPSPEED=           such as zero2
  SFT_RECOMPUTE=true     gradient checkpointing: less memory, slower
  SEED=42
USAGE
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
esac

require "${MODEL:?is not set: the directory of the model to train}/config.json" \
  "MODEL has to be a Hugging Face directory."
require "${TRAIN_FILE:?is not set: rows made by python -m converters.sft_jsonl}" \
  "Make it with: $PYTHON -m converters.sft_jsonl IN.jsonl $TRAIN_FILE --audio-root DIR"
: "${OUTPUT_DIR:?is not set: the folder for checkpoints and the trained model}"
: "${NUM_GPUS:=0}" "${SEED:=42}"
: "${SFT_BATCH_SIZE:=16}" "${SFT_MICRO_BATCH:=1}" "${SFT_EPOCHS:=1}" "${SFT_MAX_STEPS:=-1}" "${SFT_MAX_LENGTH:=4096}"
: "${SFT_LR:=5e-6}" "${SFT_WARMUP_RATIO:=0.05}" "${SFT_LR_SCHEDULER:=cosine}" "${SFT_WEIGHT_DECAY:=0.1}"
: "${SFT_TUNER:=full}" "${SFT_LORA_RANK:=8}" "${SFT_LORA_ALPHA:=32}" "${SFT_FREEZE_AUDIO:=true}" "${SFT_SHUFFLE:=true}"
: "${SFT_SAVE_STEPS:=500}" "${SFT_SAVE_LIMIT:=2}" "${SFT_LOG_STEPS:=5}" "${SFT_WORKERS:=1}"
: "${SFT_DTYPE:=bfloat16}" "${SFT_ATTN:=sdpa}" "${SFT_DEEPSPEED:=}" "${SFT_RECOMPUTE:=true}"
: "${NNODES:=1}"
[[ "$SFT_TUNER" == full || "$SFT_TUNER" == lora ]] || die "SFT_TUNER is '$SFT_TUNER'; it is full or lora" 2
[[ "$SFT_FREEZE_AUDIO" == true || "$SFT_FREEZE_AUDIO" == false ]] || die "SFT_FREEZE_AUDIO is '$SFT_FREEZE_AUDIO'" 2

# The same batch on any number of GPUs: what they do not hold at once is accumulated.
AT_ONCE=$((SFT_MICRO_BATCH * NNODES * (NUM_GPUS > 0 ? NUM_GPUS : 1)))
((SFT_BATCH_SIZE % AT_ONCE == 0)) ||
  die "SFT_BATCH_SIZE=$SFT_BATCH_SIZE is no multiple of the $AT_ONCE rows that SFT_MICRO_BATCH=$SFT_MICRO_BATCH on NUM_GPUS=$NUM_GPUS holds at once" 2

ENVIRONMENT=(env "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false)
DEVICES=()
if ((NUM_GPUS > 0)); then
  ENVIRONMENT+=("NPROC_PER_NODE=$NUM_GPUS") # ms-swift starts one process a GPU
else
  ENVIRONMENT+=(CUDA_VISIBLE_DEVICES=)
  DEVICES+=(--dataloader_pin_memory false)
fi
[[ -z "$SFT_DEEPSPEED" ]] || DEVICES+=(--deepspeed "$SFT_DEEPSPEED")

# ms-swift counts the audio tower as `vit` and its projection as `aligner`; both are frozen unless told otherwise, and so
# is the vision tower, which no row of ours trains.
TUNER=(--tuner_type "$SFT_TUNER" --freeze_vit true --freeze_aligner true)
if [[ "$SFT_TUNER" == lora ]]; then
  TUNER+=(--lora_rank "$SFT_LORA_RANK" --lora_alpha "$SFT_LORA_ALPHA" --target_modules all-linear)
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

RESUME=()
if [[ "$DRY_RUN" != 1 ]]; then
  mkdir -p "$OUTPUT_DIR"
  CHECKPOINT="$(last_checkpoint)"
  if [[ -n "$CHECKPOINT" ]]; then
    note "going on from $CHECKPOINT"
    RESUME=(--resume_from_checkpoint "$CHECKPOINT")
  fi
fi

ROWS="$OUTPUT_DIR/rows.jsonl"
run "${ENVIRONMENT[@]}" "$PYTHON" -m echo_plugins.for_swift.dataset "$TRAIN_FILE" "$ROWS" \
  --model "$MODEL" --max-length "$SFT_MAX_LENGTH" --overlong "$OUTPUT_DIR/overlong.jsonl"

run "${ENVIRONMENT[@]}" "$(dirname "$PYTHON")/swift" sft \
  --model "$MODEL" \
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
  "${DEVICES[@]}" \
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
  --save_total_limit "$SFT_SAVE_LIMIT" \
  --output_dir "$OUTPUT_DIR" \
  --add_version false \
  --check_model false \
  --report_to tensorboard \
  "${RESUME[@]}" \
  "$@"

[[ "$DRY_RUN" != 1 ]] || exit 0
CHECKPOINT="$(last_checkpoint)"
[[ -n "$CHECKPOINT" ]] || die "ms-swift left no checkpoint in $OUTPUT_DIR; its own messages above say why."
if [[ "$SFT_TUNER" == lora ]]; then
  rm -rf "$OUTPUT_DIR/last"
  run "${ENVIRONMENT[@]}" "$(dirname "$PYTHON")/swift" export \
    --adapters "$CHECKPOINT" --merge_lora true --output_dir "$OUTPUT_DIR/last"
else
  ln -sfn "$(basename "$CHECKPOINT")" "$OUTPUT_DIR/last"
fi
note "the trained model is $OUTPUT_DIR/last"
