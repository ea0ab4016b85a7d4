#!/usr/bin/env bash
# Sourced by every stage and recipe: clear errors, dry runs, stage manifests. Sets ROOT and PYTHON.
#
#   die MESSAGE [EXIT]       says what is wrong and what to do next, and ends with 1 (2: wrong usage)
#   require PATH HINT        PATH exists, or die with HINT (in a dry run nothing has to exist yet)
#   run COMMAND...           prints the command so that it can be pasted, and runs it unless DRY_RUN=1
#   stage NAME OPTIONS -- COMMAND...   runs COMMAND once; see below
#
# DRY_RUN=1 prints every command and runs none. FORCE=1 runs finished stages again. CONTINUE=1 lets a stage whose inputs
# or settings changed go on from its own checkpoints instead of starting afresh.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${PYTHON:=$ROOT/.venv/bin/python}" "${DRY_RUN:=0}" "${FORCE:=0}" "${CONTINUE:=0}"
export ROOT PYTHON DRY_RUN FORCE CONTINUE
# Where it is set, as in many container images, each of a run's dozen processes compiles thousands of files anew.
unset PYTHONDONTWRITEBYTECODE

die() {
  printf '%s: error: %s\n' "$(basename "$0")" "$1" >&2
  exit "${2:-1}"
}

note() { printf '== %s\n' "$*" >&2; }

require() {
  [[ "$DRY_RUN" == 1 || -e "$1" ]] || die "$1 does not exist. $2"
}

# An option, override or variable a line, so that sixty can be read; the whole can be pasted into a shell.
print_command() {
  local word next='' begins='^(--|\+|[A-Za-z0-9_.]+=)' variable='^[A-Z0-9_]+=' plain='^[A-Za-z0-9_./:=+,@%-]+$'
  local line=$' \\\n  '
  for word in "$@"; do
    if [[ -n "$next" && "$word" =~ $begins ]]; then next="$line"; fi
    printf '%s' "$next"
    if [[ "$word" =~ $variable ]]; then next="$line"; else next=' '; fi
    if [[ "$word" =~ $plain ]]; then printf '%s' "$word"; else printf '%s' "${word@Q}"; fi
  done
  printf '\n'
}

run() {
  if [[ "$DRY_RUN" == 1 ]]; then
    print_command "$@"
  else
    print_command "$@" >&2
    "$@"
  fi
}

# stage NAME --output DIR [--input PATH]... [--setting GLOB]... -- COMMAND...
# Runs COMMAND unless the manifest RUN_DIR/manifests/NAME.json says that it finished with the same inputs and the same
# values of every variable that a GLOB names. A killed stage is given the same command again and goes on by its own
# means; where inputs or settings changed, DIR is first set aside as DIR.old-N: nothing is mixed and nothing lost.
stage() {
  local name="$1" options=() variable status
  local manifest="${RUN_DIR:?is the folder that a recipe writes to}/manifests/$name.json"
  shift
  while [[ "$1" != -- ]]; do
    case "$1" in
      --setting)
        # shellcheck disable=SC2053  # the right-hand side is a pattern on purpose
        while read -r variable; do
          [[ "$variable" == $2 ]] && options+=(--setting "$variable=${!variable}")
        done < <(compgen -v)
        shift 2 ;;
      --input | --output) options+=("$1" "$2"); shift 2 ;;
      *) die "stage $name: unknown option $1" 2 ;;
    esac
  done
  shift
  if [[ "$DRY_RUN" == 1 ]]; then
    printf '\n# stage %s\n' "$name"
    "$@"
    return
  fi
  [[ -x "$PYTHON" ]] || die "no Python at $PYTHON. Run 'bash script/setup.sh cpu' (or gpu) first, or set PYTHON."
  status=0
  "$PYTHON" "$ROOT/script/manifest.py" begin "$manifest" --stage "$name" "${options[@]}" || status=$?
  case "$status" in
    0) ;;
    3) return 0 ;;
    *) exit "$status" ;;
  esac
  "$@"
  "$PYTHON" "$ROOT/script/manifest.py" finish "$manifest"
}
