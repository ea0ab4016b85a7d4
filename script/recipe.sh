#!/usr/bin/env bash
# The chain, shared by every recipe: recipes/NAME/run.sh sources this file and calls `main "$@"`. A recipe may define
# make_audio_qa, make_base_model and start_judge, and point the lower-case places below at what they make.
# The user's variables, in capitals, are read and never assigned.
set -euo pipefail

# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

STAGES=(data sft gate rl merge infer score)
RECIPE="$(basename "$(dirname "$(realpath "$0")")")"
RECIPE_DIR="$ROOT/recipes/$RECIPE"
: "${RUN_DIR:=$ROOT/runs/$RECIPE}"
RUN_DIR="$(realpath -m "$RUN_DIR")"
export RUN_DIR
set -a
# shellcheck source=/dev/null
source "$RECIPE_DIR/recipe.env"
set +a
defaults all

DATA_DIR="$RUN_DIR/data"
SFT_DIR="$RUN_DIR/sft"
RL_DIR="$RUN_DIR/rl"
MERGED_DIR="$RUN_DIR/merged"
GATE_DIR="$RUN_DIR/gate"  # scores of the model that RL starts from
EVAL_DIR="$RUN_DIR/eval"
WORDS=()
WORDS_TEXT=''
RECIPE_SETTINGS=()  # learned settings of the recipe's data stage that script/settings.md does not have

# Where things are. One manifest for everything is split: EVAL_HOLDOUT rows for the scores, the rest for training.
base_model="${BASE_MODEL:-}"
audio_root="${AUDIO_ROOT:-}"
judge_url="${JUDGE_URL:-}"
if [[ -n "${AUDIO_QA:-}" ]]; then
  sft_audio_qa="$DATA_DIR/train.jsonl" rl_audio_qa="$DATA_DIR/train.jsonl"
  val_audio_qa="$DATA_DIR/test.jsonl" eval_audio_qa="$DATA_DIR/test.jsonl"
else
  rl_audio_qa="${RL_AUDIO_QA:-${SFT_AUDIO_QA:-}}" sft_audio_qa="${SFT_AUDIO_QA:-${RL_AUDIO_QA:-}}"
  val_audio_qa="${VAL_AUDIO_QA:-}" eval_audio_qa="${EVAL_AUDIO_QA:-}"
fi

usage() {
  cat <<USAGE
usage: bash recipes/$RECIPE/run.sh [STAGE ...] [-- WORDS]

$(sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$RECIPE_DIR/run.sh")

Runs the whole chain, or the named stages of it: ${STAGES[*]}. 'check' only looks for what is wrong.
A finished stage is skipped; a stopped one goes on when the same command is given again.
WORDS go on to the framework of the one stage that is named.

  RUN_DIR=DIR    where everything is written (now $RUN_DIR)
  AUDIO_QA=FILE AUDIO_ROOT=DIR   your own rows (AudioQA, JSON lines) and the folder of their audio
  DRY_RUN=1      print every command and what it needs, run none
  VERBOSE=1      show all that the frameworks print; otherwise it is in RUN_DIR/logs/STAGE.log alone
  CONTINUE=1     after a change of what is learned: go on from the checkpoints with the new settings
  FORCE=1        begin the stages anew, once; what is there is kept beside as DIR.old-1
  PREFLIGHT=warn go on although the check before the first stage refuses

Every setting can be given from the environment. recipes/$RECIPE/recipe.env has the recipe's, script/settings.md all,
with what a change of each does to a run that has begun.
USAGE
}

make_audio_qa() { :; }
make_base_model() { :; }
start_judge() { :; }

prepare_data() {
  local rl_rows="$rl_audio_qa" val_rows="$val_audio_qa" sft_rows="$sft_audio_qa" common
  [[ "$DRY_RUN" == 1 ]] || mkdir -p "$DATA_DIR"
  make_audio_qa
  if [[ -n "${AUDIO_QA:-}" ]]; then
    run "$PYTHON" -m converters.holdout "$AUDIO_QA" --rows "$EVAL_HOLDOUT" --most-share 0.25 --held "$eval_audio_qa" \
      --rest "$sft_audio_qa"
  fi
  require "$rl_audio_qa" "RL_AUDIO_QA is the AudioQA manifest for RL: recipes/$RECIPE/recipe.env says where to get it."
  require "$sft_audio_qa" "SFT_AUDIO_QA is the AudioQA manifest for SFT: see recipes/$RECIPE/recipe.env."
  make_base_model
  if [[ -z "$val_rows" ]]; then
    rl_rows="$DATA_DIR/rl.jsonl" val_rows="$DATA_DIR/val.jsonl"
    run "$PYTHON" -m converters.holdout "$rl_audio_qa" --rows "$RL_HOLDOUT" --most-share 0.25 --held "$val_rows" \
      --rest "$rl_rows"
    # What RL validates on is not trained on in SFT either.
    [[ "$sft_audio_qa" != "$rl_audio_qa" ]] || sft_rows="$rl_rows"
  fi
  common=(--audio-root "$audio_root" --model "$base_model")
  [[ "$FOLLOW_LINKS" == false ]] || common+=(--follow-links)
  run "$PYTHON" -m converters.sft_jsonl "$sft_rows" "$DATA_DIR/sft-rows.jsonl" "${common[@]}" --mode "$SFT_MODE" \
    --seed "$SEED" --without-think "$SFT_WITHOUT_THINK"
  # Held rows for the loss that SFT evaluates; none where they have no reasoning.
  run "$PYTHON" -m converters.sft_jsonl "$val_rows" "$DATA_DIR/sft-val-rows.jsonl" "${common[@]}" --mode "$SFT_MODE" \
    --seed "$SEED" --without-think "${SFT_WITHOUT_THINK/refuse/skip}"
  run "$PYTHON" -m converters.rl_parquet "$rl_rows" "$DATA_DIR/rl.parquet" "${common[@]}" --mode "$RL_MODE"
  run "$PYTHON" -m converters.rl_parquet "$val_rows" "$DATA_DIR/val.parquet" "${common[@]}" --mode "$RL_MODE"
}

stage_data() {
  local options=() name names=(SFT_AUDIO_QA RL_AUDIO_QA VAL_AUDIO_QA)
  [[ -z "${AUDIO_QA:-}" ]] || names=(AUDIO_QA)
  for name in "${names[@]}"; do
    [[ -z "${!name:-}" ]] || options+=(--input "$name=${!name}")
  done
  for name in "${RECIPE_SETTINGS[@]}"; do options+=(--learned "$name"); done
  for name in "$rl_audio_qa" "$val_audio_qa"; do
    [[ -z "$name" ]] || options+=(--questions "$name")
  done
  AUDIO_ROOT="$audio_root" stage data --output "$DATA_DIR" "${options[@]}" --place AUDIO_ROOT -- prepare_data
}

# The data stage writes no SFT rows where none has reasoning and SFT_WITHOUT_THINK=skip.
has_sft() { [[ "$DRY_RUN" == 1 || -e "$DATA_DIR/sft-rows.jsonl" || ! -e "$DATA_DIR/rl.parquet" ]]; }
rl_base() {
  if [[ -n "${RL_MODEL:-}" ]]; then
    echo "$RL_MODEL"
  elif has_sft; then
    echo "$SFT_DIR/last"
  else
    echo "$base_model"
  fi
}

stage_sft() {
  [[ -z "${RL_MODEL:-}" ]] || { note "sft: left out, RL starts from RL_MODEL=$RL_MODEL"; return; }
  has_sft || { note "sft: left out, the rows have no reasoning. RL starts from $base_model"; return; }
  stage sft --output "$SFT_DIR" --after data --model "the base model=$base_model" --learned WORDS_TEXT -- \
    env MODEL="$base_model" TRAIN_FILE="$DATA_DIR/sft-rows.jsonl" VAL_FILE="$DATA_DIR/sft-val-rows.jsonl" OUTPUT_DIR="$SFT_DIR" \
    bash "$ROOT/script/stage1_ground_reason.sh" "${WORDS[@]}"
}

# Before RL costs anything: what the model of stage 1 scores, and whether RL can gain by listening elsewhere.
stage_gate() {
  [[ "$EVAL_BEFORE_RL" == 1 ]] || return 0
  local options=(--after data) said="$GATE_DIR/grounding.txt" rows
  rows="$GATE_DIR/$(basename "$eval_audio_qa" .jsonl)/interleaved.jsonl"
  if [[ "$(rl_base)" == "$SFT_DIR/last" ]]; then options+=(--after sft); fi
  stage gate --output "$GATE_DIR" "${options[@]}" --learned WORDS_TEXT -- infer "$(rl_base)" "$GATE_DIR"
  if [[ "$DRY_RUN" != 1 && -e "$rows" && ! -e "$said" ]]; then
    "$PYTHON" -m eval.grounding "$rows" > "$said" || true  # data without events
    cat "$said" >&2
  fi
}

# RL_STEPS=0: the chain ends with the model of stage 1.
without_rl() { [[ "$RL_STEPS" == 0 ]]; }

stage_rl() {
  local options=(--after data) file
  ! without_rl || { note "rl: left out, RL_STEPS=0"; return; }
  if [[ "$(rl_base)" == "$SFT_DIR/last" ]]; then
    options+=(--after sft)
  else
    options+=(--model "the model that RL starts from=$(rl_base)")
  fi
  if [[ "$REWARD_PRESET" == *.y*ml ]]; then
    # A preset of the user's: it and the terms beside it are inputs, so that a change of them is a change of the run.
    for file in "$REWARD_PRESET" "$(dirname "$REWARD_PRESET")"/*.py; do
      if [[ -f "$file" ]]; then options+=(--input "the reward's $(basename "$file")=$file"); fi
    done
  fi
  stage rl --output "$RL_DIR" "${options[@]}" --learned WORDS_TEXT -- \
    env MODEL="$(rl_base)" TRAIN_FILE="$DATA_DIR/rl.parquet" VAL_FILE="$DATA_DIR/val.parquet" OUTPUT_DIR="$RL_DIR" \
    bash "$ROOT/script/stage2_multiturn_rl.sh" "${WORDS[@]}"
}

stage_merge() {
  local best=()
  ! without_rl || { note "merge: left out, RL_STEPS=0"; return; }
  ((RL_KEEP_BEST == 0)) || best=(--best)
  stage merge --output "$MERGED_DIR" --after rl --learned WORDS_TEXT --learned RL_KEEP_BEST -- \
    env CHECKPOINT="$RL_DIR" BASE_MODEL="$(rl_base)" OUTPUT_DIR="$MERGED_DIR" \
    bash "$ROOT/script/merge.sh" -- "${best[@]}" "${WORDS[@]}"
}

stage_infer() {
  local options=(--after merge) model="$MERGED_DIR"
  if without_rl; then
    model="$(rl_base)" options=(--after sft)
    [[ "$model" == "$SFT_DIR/last" ]] || options=(--model "the model=$model")
  fi
  if [[ "$eval_audio_qa" == "$DATA_DIR"/* ]]; then
    options+=(--after data)
  elif [[ -n "$eval_audio_qa" ]]; then
    options+=(--input "EVAL_AUDIO_QA=$eval_audio_qa")
  fi
  stage infer --output "$EVAL_DIR" "${options[@]}" --learned WORDS_TEXT -- infer "$model" "$EVAL_DIR"
}

# infer MODEL DIR
infer() {
  local name model="$1" folder="$2"
  if [[ -n "$eval_audio_qa" ]]; then
    name="$(basename "$eval_audio_qa" .jsonl)"
    env MODEL="$model" AUDIO_QA="$eval_audio_qa" AUDIO_ROOT="$audio_root" OUTPUT_DIR="$folder/$name" \
      bash "$ROOT/script/inference.sh" "${WORDS[@]}"
  fi
  for name in $BENCHMARKS; do
    : "${BENCHMARK_ROOT:?is not set: the folder that holds a folder for each of $BENCHMARKS}"
    env -u AUDIO_QA MODEL="$model" BENCHMARK="$name" BENCHMARK_ROOT="$BENCHMARK_ROOT/$name" \
      OUTPUT_DIR="$folder/$name" bash "$ROOT/script/inference.sh" "${WORDS[@]}"
  done
}

# inference.sh has scored each file already; here they are scored anew, as after a change of the scorer, into text files.
stage_score() {
  local name mode names=() rows command
  if [[ -n "$eval_audio_qa" ]]; then names+=("$(basename "$eval_audio_qa" .jsonl)"); fi
  # shellcheck disable=SC2206  # names are separated by blanks
  names+=($BENCHMARKS)
  if [[ "$DRY_RUN" == 1 ]]; then printf '\n# stage score\n'; fi
  for name in "${names[@]}"; do
    for mode in $EVAL_MODES; do
      rows="$EVAL_DIR/$name/$mode"
      require "$rows.jsonl" "Run the stage infer first."
      command=("$PYTHON" -m eval.score "$rows.jsonl" --json "$rows.json" --rows "$rows.verdicts.jsonl")
      if [[ "$DRY_RUN" == 1 ]]; then run "${command[@]}"; else "${command[@]}" > "$rows.txt"; fi
    done
  done
  score_reasoning
  command=("$PYTHON" -m eval.report "$RUN_DIR" --output "$RUN_DIR/report.html")
  if [[ "$DRY_RUN" == 1 ]]; then
    run "$PYTHON" "$ROOT/script/summary.py" "$RUN_DIR"
    run "${command[@]}"
  else
    "${command[@]}" >&2
    "$PYTHON" "$ROOT/script/summary.py" "$RUN_DIR"
  fi
}

# How a model reasoned, where a benchmark has rubrics and there is a judge: the challenge's three numbers and its submission.
score_reasoning() {
  local mode folder="$EVAL_DIR/mmar/rubric"
  [[ " $BENCHMARKS " == *" mmar "* ]] || return 0
  start_judge
  [[ -n "$judge_url" ]] || { note "score: no JUDGE_URL, so the reasoning is not judged (Rubrics, CRS)"; return; }
  [[ "$DRY_RUN" == 1 ]] || mkdir -p "$folder"
  for mode in $EVAL_MODES; do
    run "$PYTHON" -m eval.rubric "$EVAL_DIR/mmar/$mode.jsonl" --rubrics "$BENCHMARK_ROOT/mmar/MMAR-meta.jsonl" \
      --judge-url "$judge_url" --judge-model "$JUDGE_MODEL" --json "$folder/$mode.json" \
      --rows "$folder/$mode.judgements.jsonl" --submission "$folder/$mode.submission.jsonl" \
      --journal "$folder/$mode.journal.jsonl"
  done
}

# What is wrong is said before it costs. Takes the stages that are to run.
preflight() {
  local quiet=() status=0 name stages=()
  [[ -x "$PYTHON" ]] || { [[ "$DRY_RUN" == 1 ]] && return; die "no Python at $PYTHON. Run 'bash script/setup.sh cpu' (or gpu) first, or set PYTHON."; }
  [[ "$DRY_RUN" == 1 || "$*" == check ]] || quiet=(--quiet)
  [[ "$*" != check ]] || set -- "${STAGES[@]}"
  for name; do
    [[ "$name" =~ ^(rl|merge)$ ]] && without_rl || stages+=("$name")
  done
  ((${#stages[@]})) || return 0
  env AUDIO_ROOT="$audio_root" WORDS_TEXT="$WORDS_TEXT" PREFLIGHT_MODEL="$base_model" \
    PREFLIGHT_SFT_AUDIO_QA="$sft_audio_qa" PREFLIGHT_RL_AUDIO_QA="$rl_audio_qa" \
    PREFLIGHT_VAL_AUDIO_QA="$val_audio_qa" PREFLIGHT_EVAL_AUDIO_QA="$eval_audio_qa" \
    "$PYTHON" "$ROOT/script/preflight.py" --recipe "$RECIPE" "${quiet[@]}" "${stages[@]}" || status=$?
  # A dry run shows all of it, what would be refused too.
  [[ "$DRY_RUN" == 1 ]] || ((status == 0)) || exit "$status"
}

main() {
  local chosen=() name
  while (($#)); do
    case "$1" in
      -h | --help) usage; exit 0 ;;
      --) shift; WORDS=("$@"); WORDS_TEXT="$*"; break ;;
      *)
        [[ " ${STAGES[*]} check " == *" $1 "* ]] || { usage >&2; die "no stage '$1'; the stages are ${STAGES[*]}" 2; }
        chosen+=("$1")
        shift ;;
    esac
  done
  export WORDS_TEXT
  ((${#WORDS[@]} == 0 || ${#chosen[@]} == 1)) || die "words after -- go to one stage: run.sh STAGE -- ${WORDS[*]}" 2
  ((${#chosen[@]})) || chosen=("${STAGES[@]}")
  preflight "${chosen[@]}"
  if [[ "$FORCE" == 1 && "$DRY_RUN" != 1 && ! -e "$RUN_DIR/manifests/force" ]]; then
    mkdir -p "$RUN_DIR/manifests"
    printf '%s\n' "${chosen[*]}" > "$RUN_DIR/manifests/force"
  fi
  for name in "${STAGES[@]}"; do
    [[ " ${chosen[*]} " != *" $name "* ]] || "stage_$name"
  done
  [[ "$DRY_RUN" == 1 ]] || rm -f "$RUN_DIR/manifests/force"
}
