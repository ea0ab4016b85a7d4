#!/usr/bin/env bash
# Audio-Cogito on a laptop without a GPU: labelled clips, questions and reasoning by converters.synthesis.cogito, SFT of a tiny
# Qwen3-Omni, a benchmark in MMAR's layout, and the challenge's three numbers: Avg, Rubrics, CRS. Rules play the models that
# write and judge (rule_server.py). The scores mean nothing; that each piece takes what the one before made does.
set -euo pipefail
# shellcheck source=../../script/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../script/recipe.sh"

RECIPE_SETTINGS=(DATA_CLIP_ROWS DATA_BENCHMARK_ROWS TINY_HIDDEN_SIZE TINY_LAYERS TINY_AUDIO_HIDDEN_SIZE TINY_AUDIO_LAYERS)
TINY="$ROOT/recipes/tiny-cpu"
SYNTHESIS="$DATA_DIR/synthesis"
: "${audio_root:=$DATA_DIR/soundscapes}" "${base_model:=$DATA_DIR/model}"
: "${sft_audio_qa:=$SYNTHESIS/run/sft.jsonl}" "${rl_audio_qa:=$SYNTHESIS/run/sft.jsonl}"
server_url=''

start_rule_server() {
  local file="$RUN_DIR/rule_server.url" tries
  [[ -z "$server_url" ]] || return 0
  if [[ "$DRY_RUN" == 1 ]]; then server_url=http://127.0.0.1:PORT/v1; return; fi
  rm -f "$file"
  "$PYTHON" "$RECIPE_DIR/rule_server.py" --url-file "$file" &
  for ((tries = 0; tries < 300; tries++)); do
    [[ ! -e "$file" ]] || break
    sleep 0.1
  done
  require "$file" "The server that plays the models did not start."
  server_url="$(< "$file")"
}

make_audio_qa() {
  start_rule_server
  if [[ ! -d "$audio_root" ]]; then
    run "$PYTHON" "$TINY/soundscapes.py" --output "$audio_root" --seed "$SEED" --sft-rows "$DATA_CLIP_ROWS" \
      --rl-rows 8 --val-rows 8 --test-rows "$DATA_BENCHMARK_ROWS"
  fi
  run "$PYTHON" "$RECIPE_DIR/make_inputs.py" --soundscapes "$audio_root" --url "$server_url" --synthesis "$SYNTHESIS" \
    --benchmark "$BENCHMARK_ROOT/mmar" --benchmark-rows "$DATA_BENCHMARK_ROWS"
  run "$PYTHON" -m converters.synthesis.cogito "$SYNTHESIS/cogito.yaml"
}

make_base_model() {
  if [[ ! -d "$base_model" ]]; then
    run "$PYTHON" "$TINY/tiny_omni.py" --output "$base_model" --text "$sft_audio_qa" --seed "$SEED" \
      --family qwen3_omni_moe --thinking --opens-thinking \
      --hidden-size "$TINY_HIDDEN_SIZE" --layers "$TINY_LAYERS" \
      --audio-hidden-size "$TINY_AUDIO_HIDDEN_SIZE" --audio-layers "$TINY_AUDIO_LAYERS"
  fi
}

# shellcheck disable=SC2034  # script/recipe.sh reads it
start_judge() {
  if [[ -z "$judge_url" ]]; then
    start_rule_server
    judge_url="$server_url"
  fi
}

main "$@"
