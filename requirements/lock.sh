#!/usr/bin/env bash
# Writes cpu.lock and gpu.lock again from the pins in setup.cfg. What is already in a lock stays as it is where it can;
# words after the command go on to uv, for example: bash requirements/lock.sh --upgrade-package rich
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$here")"
uv="${UV:-$root/.venv/bin/uv}"
[[ -x "$uv" ]] || { echo "lock.sh: no uv at $uv; run 'bash script/setup.sh cpu' first, or set UV" >&2; exit 1; }

for kind in cpu gpu; do
  overrides=()
  [[ "$kind" == cpu ]] && overrides=(--overrides "$here/overrides.txt")
  "$uv" pip compile --quiet "$root/setup.cfg" \
    --extra sft --extra rl --extra eval --extra data --extra synthesis --extra dev --extra "$kind" \
    --excludes "$here/excludes.txt" "${overrides[@]}" \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
    --generate-hashes --no-annotate --no-emit-index-url --no-emit-find-links \
    --custom-compile-command "bash requirements/lock.sh" \
    --output-file "$here/$kind.lock" "$@"
done
