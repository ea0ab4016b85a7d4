#!/usr/bin/env bash
# The paper on 8 GPUs: Qwen2.5-Omni-7B, grounded SFT, GRPO that listens again, merge, MMAR and MMAU-mini in three modes.
# SFT_AUDIO_QA, RL_AUDIO_QA, AUDIO_ROOT and BENCHMARK_ROOT say where the data is; recipe.env has every number.
set -euo pipefail
# shellcheck source=../../script/recipe.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../script/recipe.sh"
main "$@"
