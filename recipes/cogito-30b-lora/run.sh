#!/usr/bin/env bash
# Audio-Cogito on 8 GPUs: Qwen3-Omni-30B-A3B-Thinking, LoRA on free-form reasoning, MMAR. No RL, as in the report;
# RL_STEPS= (empty) puts GSPO with an adapter on top. SFT_AUDIO_QA, AUDIO_ROOT and BENCHMARK_ROOT say where the data is.
set -euo pipefail
# shellcheck source=../../script/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../script/recipe.sh"
main "$@"
