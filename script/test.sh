#!/usr/bin/env bash
# Every check of this repository: set-up, shell and Python lint, types, then the tests.
#
#   bash script/test.sh [LAYER ...] [-- WORDS]     LAYER: lint unit plugin chain gpu; without one: all but gpu
#
# unit takes seconds and loads no framework; plugin runs the real frameworks on a tiny model; chain runs the whole recipe
# and kills it half-way; gpu shows what only a GPU can. WORDS go on to pytest.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

layers=()
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    lint | unit | plugin | chain | gpu) layers+=("$1"); shift ;;
    --) shift; break ;;
    *) die "no layer '$1'; the layers are lint unit plugin chain gpu" 2 ;;
  esac
done
((${#layers[@]})) || layers=(lint unit plugin chain)

lint() {
  local scripts
  mapfile -t scripts < <(git ls-files --cached --others --exclude-standard -- '*.sh' .ci/run)
  run "${PYTHON%/*}/shellcheck" "${scripts[@]}"
  run "${PYTHON%/*}/ruff" check .
  run "${PYTHON%/*}/ruff" format --check .
  run "${PYTHON%/*}/pyright" --pythonpath "$PYTHON"
}

cd "$ROOT"
packages=cpu
[[ " ${layers[*]} " != *' gpu '* ]] || packages=gpu
bash script/setup.sh "$packages"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
failed=()
pytest=("$PYTHON" -m pytest --durations 5)
check() {
  local status=0
  run "$@" || status=$?
  # 5: WORDS chose no test of these
  ((status == 0 || status == 5)) || failed+=("$layer")
}
# The files of a layer that GLOB names, and after them the command `afterwards`, run beside the others: frameworks that
# start leave half of two cores idle.
afterwards=(true)
beside() {
  local glob="$1" files others
  shift
  # shellcheck disable=SC2206  # a pattern
  files=($glob)
  mapfile -t others < <(printf '%s\n' "tests/$layer"/test_*.py | grep -vxF "$(printf '%s\n' "${files[@]}")")
  log="$(mktemp)"
  {
    local first=0 second=0
    "${pytest[@]}" "${files[@]}" "$@" || first=$?
    "${afterwards[@]}" || second=$?
    ((first == 0 || first == 5)) || exit "$first"
    exit "$second"
  } > "$log" 2>&1 &
  other=$!
  trap 'kill "$other" 2> /dev/null || true; rm -f "$log"' EXIT
  check "${pytest[@]}" "${others[@]}" "$@"
  check wait "$other"
  cat "$log"
}
for layer in "${layers[@]}"; do
  case "$layer" in
    lint) lint ;;
    plugin)
      bash script/setup.sh browser
      # Two processes: ms-swift and verl both change transformers as they are imported, and no stage has both. Then what
      # the engine's tests say of Qwen2.5-Omni is asked of Qwen3-Omni.
      afterwards=(env ECHO_TEST_FAMILY=qwen3_omni_moe "${pytest[@]}"
        tests/plugin/test_{agent_loop_equals_engine,engine,exactness,serve_engine,verl_agent_loop}.py "$@")
      beside 'tests/plugin/test_swift*.py' "$@"
      afterwards=(true)
      ;;
    chain)
      # The frameworks are played in this one, so it takes one core and little memory.
      beside 'tests/chain/test_resume_*.py' "$@"
      ;;
    gpu) check "${pytest[@]}" -s tests/gpu "$@" ;;
    *) check "${pytest[@]}" "tests/$layer" "$@" ;;
  esac
done
((${#failed[@]} == 0)) || die "tests failed in ${failed[*]}"
