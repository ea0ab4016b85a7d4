#!/usr/bin/env bash
# The whole chain on a laptop without a GPU: soundscapes, a tiny Qwen2.5-Omni from scratch, SFT, RL that listens again,
# merge, and scores of the three modes. QUICK=1 takes minutes and only shows that the machinery works.
# AUDIO_QA=my.jsonl AUDIO_ROOT=dir runs it on your own AudioQA rows; EVAL_HOLDOUT rows of them are kept for the scores.
set -euo pipefail
# shellcheck source=../../script/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../script/recipe.sh"

if [[ -n "${AUDIO_QA:-}" ]]; then
  : "${AUDIO_ROOT:?is the folder that the audio paths in AUDIO_QA start from}"
  SFT_AUDIO_QA="$DATA_DIR/train.jsonl" RL_AUDIO_QA="$DATA_DIR/train.jsonl"
  VAL_AUDIO_QA="$DATA_DIR/test.jsonl" EVAL_AUDIO_QA="$DATA_DIR/test.jsonl"
else
  AUDIO_ROOT="$DATA_DIR/soundscapes"
  SFT_AUDIO_QA="$AUDIO_ROOT/sft.jsonl" RL_AUDIO_QA="$AUDIO_ROOT/rl.jsonl"
  VAL_AUDIO_QA="$AUDIO_ROOT/val.jsonl" EVAL_AUDIO_QA="$AUDIO_ROOT/test.jsonl"
fi
: "${BASE_MODEL:=$DATA_DIR/model}"

# Each piece is written whole or not at all, so one that is there after a kill need not be made again.
make_audio_qa() {
  local shape=() name
  if [[ -n "${AUDIO_QA:-}" ]]; then
    run "$PYTHON" -m converters.holdout "$AUDIO_QA" --rows "$EVAL_HOLDOUT" --held "$EVAL_AUDIO_QA" \
      --rest "$SFT_AUDIO_QA"
  elif [[ ! -d "$AUDIO_ROOT" ]]; then
    run "$PYTHON" "$RECIPE_DIR/soundscapes.py" --output "$AUDIO_ROOT" --seed "$SEED" \
      --sft-rows "$DATA_SFT_ROWS" --rl-rows "$DATA_RL_ROWS" --val-rows "$DATA_VAL_ROWS" --test-rows "$DATA_TEST_ROWS"
  fi
  if [[ ! -d "$BASE_MODEL" ]]; then
    for name in "${!TINY_@}"; do
      shape+=("--$(tr '[:upper:]_' '[:lower:]-' <<< "${name#TINY_}")" "${!name}")
    done
    run "$PYTHON" "$RECIPE_DIR/tiny_omni.py" --output "$BASE_MODEL" --text "$SFT_AUDIO_QA" --seed "$SEED" "${shape[@]}"
  fi
}

main "$@"
