#!/usr/bin/env bash
# The whole chain on this machine, from nothing: set-up, then recipes/tiny-cpu (SFT, RL that listens again, merge,
# inference, scores). No GPU, no account, no download but the packages. Stop it and start it again at any time.
# Words after it go on to recipes/tiny-cpu/run.sh.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

bash "$ROOT/script/setup.sh" cpu
exec bash "$ROOT/recipes/tiny-cpu/run.sh" "$@"
