#!/usr/bin/env bash
# Merge: a checkpoint of stage 2 becomes a complete model directory that transformers and vLLM load.
#
#   CHECKPOINT=runs/x/rl BASE_MODEL=runs/x/sft OUTPUT_DIR=runs/x/merged bash script/merge.sh [WORDS]
#
# CHECKPOINT   a run of stage 2 (its latest step is taken) or one of its global_step_N
# BASE_MODEL   the model that the run was trained from; talker, token2wav, processor and dtype are carried over from it
# OUTPUT_DIR   written whole or not at all; an earlier merge there is replaced, anything else is refused
# WORDS        go on to `python -m echo_plugins.for_verl.merge`, such as --dtype float32
set -euo pipefail
# shellcheck source=script/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in
  -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  --) shift ;;
esac

: "${CHECKPOINT:?is the run of stage 2, or one of its global_step_N}"
: "${BASE_MODEL:?is the model directory that stage 2 started from}"
: "${OUTPUT_DIR:?is the model directory to write}"
require "$CHECKPOINT" "Run script/stage2_multiturn_rl.sh first, or point CHECKPOINT at its output."
require "$BASE_MODEL" "It is the MODEL that stage 2 started from."

run "$PYTHON" -m echo_plugins.for_verl.merge "$CHECKPOINT" --base "$BASE_MODEL" --output "$OUTPUT_DIR" "$@"
