#!/usr/bin/env bash
# The chain, shared by every recipe: recipes/NAME/run.sh sources this file and calls `main "$@"`. A recipe may define
# make_audio_qa, which makes the AudioQA manifests (and a model) first and points the variables below at them.
set -euo pipefail

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STAGES=(data sft rl merge infer score)
RECIPE="$(basename "$(dirname "$(realpath "$0")")")"
RECIPE_DIR="$ROOT/recipes/$RECIPE"
: "${RUN_DIR:=$ROOT/runs/$RECIPE}"
RUN_DIR="$(realpath -m "$RUN_DIR")"
set -a
# shellcheck source=/dev/null
source "$RECIPE_DIR/recipe.env"
set +a

DATA_DIR="$RUN_DIR/data"
SFT_DIR="$RUN_DIR/sft"
RL_DIR="$RUN_DIR/rl"
MERGED_DIR="$RUN_DIR/merged"
EVAL_DIR="$RUN_DIR/eval"
WORDS=()

usage() {
  cat <<EOF
usage: bash recipes/$RECIPE/run.sh [STAGE ...] [-- WORDS]

$(sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$RECIPE_DIR/run.sh")

Runs the whole chain, or the named stages of it: ${STAGES[*]}.
A finished stage is skipped; a stopped one goes on when the same command is given again.
WORDS go on to the framework of the one stage that is named.

  DRY_RUN=1      print every command, run none
  FORCE=1        run finished stages again; their earlier output is kept beside the new one
  CONTINUE=1     after a change of settings, go on from the checkpoints instead of starting afresh
  RUN_DIR=DIR    where everything is written (now $RUN_DIR)

Every variable of recipes/$RECIPE/recipe.env can be given from the environment.
EOF
}

make_audio_qa() { :; }

prepare_data() {
  [[ "$DRY_RUN" == 1 ]] || mkdir -p "$DATA_DIR"
  make_audio_qa
  : "${RL_AUDIO_QA:?is not set: the AudioQA manifest for RL (see recipes/$RECIPE/recipe.env)}"
  : "${AUDIO_ROOT:?is not set: the folder that the audio paths in the manifests start from}"
  : "${SFT_AUDIO_QA:=$RL_AUDIO_QA}"
  require "$RL_AUDIO_QA" "RL_AUDIO_QA is the AudioQA manifest for RL: recipes/$RECIPE/recipe.env says where to get it."
  require "$SFT_AUDIO_QA" "SFT_AUDIO_QA is the AudioQA manifest for SFT: see recipes/$RECIPE/recipe.env."
  if [[ -z "${VAL_AUDIO_QA:-}" ]]; then
    VAL_AUDIO_QA="$DATA_DIR/val.jsonl"
    run "$PYTHON" -m converters.holdout "$RL_AUDIO_QA" --rows "$RL_HOLDOUT" --held "$VAL_AUDIO_QA" \
      --rest "$DATA_DIR/rl.jsonl"
    RL_AUDIO_QA="$DATA_DIR/rl.jsonl"
  fi
  run "$PYTHON" -m converters.sft_jsonl "$SFT_AUDIO_QA" "$DATA_DIR/sft-rows.jsonl" --audio-root "$AUDIO_ROOT" \
    --mode "$SFT_MODE" --seed "$SEED"
  run "$PYTHON" -m converters.rl_parquet "$RL_AUDIO_QA" "$DATA_DIR/rl.parquet" --audio-root "$AUDIO_ROOT" \
    --model "$BASE_MODEL"
  run "$PYTHON" -m converters.rl_parquet "$VAL_AUDIO_QA" "$DATA_DIR/val.parquet" --audio-root "$AUDIO_ROOT" \
    --model "$BASE_MODEL"
}

stage_data() {
  local inputs=() file
  for file in "${AUDIO_QA:-}" "${SFT_AUDIO_QA:-}" "${RL_AUDIO_QA:-}" "${VAL_AUDIO_QA:-}" "$RECIPE_DIR"/*.py; do
    if [[ -f "$file" && "$file" != "$DATA_DIR"/* ]]; then inputs+=(--input "$file"); fi
  done
  stage data --output "$DATA_DIR" "${inputs[@]}" --setting SFT_MODE --setting '*_HOLDOUT' --setting 'DATA_*' \
    --setting 'TINY_*' --setting SEED --setting AUDIO_ROOT -- prepare_data
}

stage_sft() {
  stage sft --output "$SFT_DIR" --input "$DATA_DIR/sft-rows.jsonl" --input "$BASE_MODEL" --setting 'SFT_*' \
    --setting NUM_GPUS --setting DEVICE --setting SEED --setting WORDS_TEXT -- \
    env MODEL="$BASE_MODEL" TRAIN_FILE="$DATA_DIR/sft-rows.jsonl" OUTPUT_DIR="$SFT_DIR" \
    bash "$ROOT/script/stage1_ground_reason.sh" "${WORDS[@]}"
}

stage_rl() {
  local preset=() file
  if [[ "$REWARD_PRESET" == *.y*ml ]]; then
    # A preset of your own: it and the terms beside it are inputs, so that a change of them is a change of the run.
    for file in "$REWARD_PRESET" "$(dirname "$REWARD_PRESET")"/*.py; do
      if [[ -f "$file" ]]; then preset+=(--input "$file"); fi
    done
  fi
  stage rl --output "$RL_DIR" --input "$DATA_DIR/rl.parquet" --input "$DATA_DIR/val.parquet" --input "$SFT_DIR/last/" \
    "${preset[@]}" --setting 'RL_*' --setting REWARD_PRESET --setting '*_SEGMENT*' --setting NUM_GPUS --setting DEVICE \
    --setting SEED --setting WORDS_TEXT -- \
    env MODEL="$SFT_DIR/last" TRAIN_FILE="$DATA_DIR/rl.parquet" VAL_FILE="$DATA_DIR/val.parquet" OUTPUT_DIR="$RL_DIR" \
    bash "$ROOT/script/stage2_multiturn_rl.sh" "${WORDS[@]}"
}

stage_merge() {
  stage merge --output "$MERGED_DIR" --input "$RL_DIR/latest_checkpointed_iteration.txt" --setting WORDS_TEXT -- \
    env CHECKPOINT="$RL_DIR" BASE_MODEL="$SFT_DIR/last" OUTPUT_DIR="$MERGED_DIR" \
    bash "$ROOT/script/merge.sh" -- "${WORDS[@]}"
}

stage_infer() {
  local inputs=(--input "$MERGED_DIR")
  if [[ -n "${EVAL_AUDIO_QA:-}" ]]; then inputs+=(--input "$EVAL_AUDIO_QA"); fi
  stage infer --output "$EVAL_DIR" "${inputs[@]}" --setting 'EVAL_*' --setting BENCHMARKS --setting BENCHMARK_ROOT \
    --setting '*_SEGMENT*' --setting SEED --setting WORDS_TEXT -- infer
}

infer() {
  local name
  if [[ -n "${EVAL_AUDIO_QA:-}" ]]; then
    name="$(basename "$EVAL_AUDIO_QA" .jsonl)"
    env MODEL="$MERGED_DIR" AUDIO_QA="$EVAL_AUDIO_QA" AUDIO_ROOT="$AUDIO_ROOT" OUTPUT_DIR="$EVAL_DIR/$name" \
      bash "$ROOT/script/inference.sh" "${WORDS[@]}"
  fi
  for name in ${BENCHMARKS:-}; do
    : "${BENCHMARK_ROOT:?is not set: the folder that holds a folder for each of $BENCHMARKS}"
    env -u AUDIO_QA MODEL="$MERGED_DIR" BENCHMARK="$name" BENCHMARK_ROOT="$BENCHMARK_ROOT/$name" \
      OUTPUT_DIR="$EVAL_DIR/$name" bash "$ROOT/script/inference.sh" "${WORDS[@]}"
  done
}

# inference.sh has scored each file already; here they are scored anew, as after a change of the scorer, into text files.
stage_score() {
  local name mode names=() rows command
  if [[ -n "${EVAL_AUDIO_QA:-}" ]]; then names+=("$(basename "$EVAL_AUDIO_QA" .jsonl)"); fi
  # shellcheck disable=SC2206  # names are separated by blanks
  names+=(${BENCHMARKS:-})
  if [[ "$DRY_RUN" == 1 ]]; then printf '\n# stage score\n'; fi
  for name in "${names[@]}"; do
    for mode in $EVAL_MODES; do
      rows="$EVAL_DIR/$name/$mode"
      require "$rows.jsonl" "Run the stage infer first."
      command=("$PYTHON" -m eval.score "$rows.jsonl" --json "$rows.json" --rows "$rows.verdicts.jsonl")
      if [[ "$DRY_RUN" == 1 ]]; then run "${command[@]}"; else run "${command[@]}" > "$rows.txt"; fi
    done
  done
  run "$PYTHON" "$ROOT/script/summary.py" "$RUN_DIR"
  run "$PYTHON" -m eval.report "$RUN_DIR" --output "$RUN_DIR/report.html"
}

main() {
  local chosen=() name
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --) shift; WORDS=("$@"); export WORDS_TEXT="$*"; break ;;
      *)
        [[ " ${STAGES[*]} " == *" $1 "* ]] || { usage >&2; die "no stage '$1'; the stages are ${STAGES[*]}" 2; }
        chosen+=("$1")
        shift ;;
    esac
  done
  ((${#WORDS[@]} == 0 || ${#chosen[@]} == 1)) || die "words after -- go to one stage: run.sh STAGE -- ${WORDS[*]}" 2
  ((${#chosen[@]})) || chosen=("${STAGES[@]}")
  for name in "${STAGES[@]}"; do
    [[ " ${chosen[*]} " != *" $name "* ]] || "stage_$name"
  done
}
