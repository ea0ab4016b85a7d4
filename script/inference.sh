#!/usr/bin/env bash
# Inference and scores: one benchmark or AudioQA manifest, in each mode of EVAL_MODES. A stopped run goes on at its rows.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<USAGE
usage: MODEL=DIR AUDIO_QA=rows.jsonl AUDIO_ROOT=DIR OUTPUT_DIR=DIR bash script/inference.sh [WORDS]
       MODEL=DIR BENCHMARK=mmar BENCHMARK_ROOT=DIR OUTPUT_DIR=DIR bash script/inference.sh [WORDS]

Writes OUTPUT_DIR/MODE.jsonl (predictions), MODE.json (scores) and MODE.verdicts.jsonl (a line a row) for each mode.
WORDS go on to \`python -m eval.infer\` (--ids, --shuffle-choices, --dry-run ...); what they say comes last and wins.

Settings, as variables of the environment (DEVICE may be auto too, which is the default here):

$(explain_settings infer)
USAGE
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --) shift ;;
esac

require "${MODEL:?is not set: the merged model}/config.json" "Make it with script/merge.sh."
: "${OUTPUT_DIR:?is not set: the folder for predictions and scores}"
[[ -v DEVICE ]] || DEVICE=auto
defaults infer
if [[ -n "${BENCHMARK:-}" && -z "${AUDIO_QA:-}" ]]; then
  require "${BENCHMARK_ROOT:?is not set: the folder of $BENCHMARK in its official layout}" "Download $BENCHMARK first."
  SOURCE=(--benchmark "$BENCHMARK" --benchmark-root "$BENCHMARK_ROOT")
elif [[ -n "${AUDIO_QA:-}" && -z "${BENCHMARK:-}" ]]; then
  require "$AUDIO_QA" "AUDIO_QA is an AudioQA manifest (JSON lines)."
  SOURCE=(--audio-qa "$AUDIO_QA" --audio-root "${AUDIO_ROOT:?is not set: the folder that the audio paths start from}")
else
  die "give AUDIO_QA and AUDIO_ROOT, or BENCHMARK and BENCHMARK_ROOT" 2
fi
LIMIT=() LINKS=()
[[ "$FOLLOW_LINKS" == false ]] || LINKS=(--follow-links)
[[ -z "$EVAL_MAX_ROWS" ]] || LIMIT=(--max-rows "$EVAL_MAX_ROWS")

for mode in $EVAL_MODES; do
  rows="$OUTPUT_DIR/$mode"
  arms=()
  [[ "$mode" != interleaved || -z "$EVAL_ARMS" ]] || arms=(--arms "$EVAL_ARMS")
  run "$PYTHON" -m eval.infer \
    --model "$MODEL" \
    "${SOURCE[@]}" \
    --output "$rows.jsonl" \
    --mode "$mode" \
    --temperature "$EVAL_TEMPERATURE" \
    --top-p "$EVAL_TOP_P" \
    --max-tokens "$EVAL_MAX_TOKENS" \
    --max-segments "$MAX_SEGMENTS" \
    --min-segment-seconds "$MIN_SEGMENT_SECONDS" \
    --force-answer-tokens "$EVAL_FORCE_ANSWER_TOKENS" \
    --runs "$EVAL_RUNS" \
    --tensor-parallel "$EVAL_TP" \
    --device "$DEVICE" \
    --seed "$SEED" \
    "${LIMIT[@]}" \
    "${LINKS[@]}" \
    "${arms[@]}" \
    "$@"
  [[ " $* " != *" --dry-run "* ]] || continue
  run "$PYTHON" -m eval.score "$rows.jsonl" --json "$rows.json" --rows "$rows.verdicts.jsonl"
  if ((${#arms[@]})); then
    files=()
    for arm in $EVAL_ARMS; do files+=("$rows.$arm.jsonl"); done
    run "$PYTHON" -m eval.compare "$rows.jsonl" "${files[@]}" --markdown "$rows.arms.md"
  fi
  if ((EVAL_RUNS > 1)); then
    files=("$rows.jsonl")
    for ((seed = SEED + 1; seed < SEED + EVAL_RUNS; seed++)); do files+=("$rows.seed$seed.jsonl"); done
    run "$PYTHON" -m eval.runs "${files[@]}" --json "$rows.runs.json"
  fi
done
