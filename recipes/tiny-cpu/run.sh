#!/usr/bin/env bash
# The whole chain on a laptop without a GPU: soundscapes, a tiny Qwen2.5-Omni from scratch, SFT, RL that listens again,
# merge, and scores of the three modes. QUICK=1 takes minutes and only shows that the machinery works.
# MODEL_FAMILY=qwen3_omni_moe takes a tiny Qwen3-Omni.
# AUDIO_QA=my.jsonl AUDIO_ROOT=dir runs it on your own AudioQA rows; EVAL_HOLDOUT rows of them are kept for the scores.
set -euo pipefail
# shellcheck source=../../script/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../script/recipe.sh"

RECIPE_SETTINGS=(
  DATA_SFT_ROWS DATA_RL_ROWS DATA_VAL_ROWS DATA_TEST_ROWS DATA_HABIT
  MODEL_FAMILY TINY_HIDDEN_SIZE TINY_LAYERS TINY_AUDIO_HIDDEN_SIZE TINY_AUDIO_LAYERS
)
if [[ -z "$rl_audio_qa" ]]; then
  audio_root="$DATA_DIR/soundscapes"
  sft_audio_qa="$audio_root/sft.jsonl" rl_audio_qa="$audio_root/rl.jsonl"
  val_audio_qa="$audio_root/val.jsonl" eval_audio_qa="$audio_root/test.jsonl"
fi
: "${base_model:=$DATA_DIR/model}"

# Each piece is written whole or not at all, so one that is there after a kill need not be made again.
make_audio_qa() {
  if [[ "$audio_root" == "$DATA_DIR"/* && ! -d "$audio_root" ]]; then
    run "$PYTHON" "$RECIPE_DIR/soundscapes.py" --output "$audio_root" --seed "$SEED" --habit "$DATA_HABIT" \
      --sft-rows "$DATA_SFT_ROWS" --rl-rows "$DATA_RL_ROWS" --val-rows "$DATA_VAL_ROWS" --test-rows "$DATA_TEST_ROWS"
  fi
}

make_base_model() {
  if [[ "$base_model" == "$DATA_DIR"/* && ! -d "$base_model" ]]; then
    run "$PYTHON" "$RECIPE_DIR/tiny_omni.py" --output "$base_model" --text "$sft_audio_qa" --seed "$SEED" \
      --family "$MODEL_FAMILY" \
      --hidden-size "$TINY_HIDDEN_SIZE" --layers "$TINY_LAYERS" \
      --audio-hidden-size "$TINY_AUDIO_HIDDEN_SIZE" --audio-layers "$TINY_AUDIO_LAYERS"
  fi
}

main "$@"
