#!/usr/bin/env bash
# Sourced by every stage and recipe: clear errors, defaults, dry runs, stages that are never done twice. Sets ROOT, PYTHON.
#
#   die MESSAGE [EXIT]       says what is wrong and what to do next, and ends with 1 (2: wrong usage)
#   require PATH HINT        PATH exists, or die with HINT (in a dry run nothing has to exist yet)
#   run COMMAND...           prints the command so that it can be pasted, and runs it unless DRY_RUN=1
#   lora_layers MODEL NAME   LAYERS becomes the full names of the model's layers that the setting NAME matches, or die
#   defaults STAGE           gives the settings of a stage (all: of every stage) their defaults of script/settings.md
#   lock DIR                 no second run writes DIR while this one, or a process that it started, lives
#   stage NAME OPTIONS -- COMMAND...   runs COMMAND unless it has finished before; see below
#
# DRY_RUN=1 prints every command and runs none. VERBOSE=1 shows all that the frameworks print.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
: "${PYTHON:=$ROOT/.venv/bin/python}" "${DRY_RUN:=0}" "${FORCE:=0}" "${CONTINUE:=0}" "${VERBOSE:=0}"
export ROOT PYTHON DRY_RUN FORCE CONTINUE VERBOSE
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

# A dry run may come before the model is there, and has the pattern alone. echo_plugins/model.py says why names are needed.
lora_layers() {
  LAYERS=("${!2}")
  [[ -e "$1/config.json" ]] || return 0
  mapfile -t LAYERS < <(PYTHONPATH="$ROOT" "$PYTHON" -m echo_plugins.model "$1" lora_modules "${!2}")
  [[ -n "${LAYERS[*]}" ]] || die "$2 matches no layer of $1: it is a regular expression over full names" 2
}

# NAME|DEFAULT|WHAT of each setting of a stage, from the table of script/settings.md.
settings_of() {
  awk -F ' *[|] *' -v stage="$1" \
    '$2 ~ /^[A-Z0-9_]+$/ && NF > 6 && (stage == "all" || index("," $4 ",", "," stage ",")) { print $2 "|" $3 "|" $6 }' \
    "$ROOT/script/settings.md"
}

defaults() {
  local name default _
  while IFS='|' read -r name default _; do
    [[ -v "$name" ]] || printf -v "$name" '%s' "$default"
    export "${name?}"
  done < <(settings_of "$1")
  [[ -z "${NNODES:-}" || "${NUM_NODES:-1}" == "$NNODES" ]] || die "NNODES is called NUM_NODES here" 2
}

# What --help says of the settings of a stage.
explain_settings() {
  local name default what
  while IFS='|' read -r name default what; do
    printf '  %-34s %s\n' "$name=$default" "$what"
  done < <(settings_of "$1")
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

# The processes of a run inherit the open file: what a killed run left behind keeps the folder locked while it lives.
lock() {
  mkdir -p "$1"
  exec 9> "$1/.lock"
  flock --wait 60 9 || die "another run still writes $1: wait for it, or end it (fuser $1/.lock names it)."
}

# stage NAME --output DIR [--after STAGE] [--input ROLE=FILE]... [--model ROLE=DIR]... [--place NAME]...
#       [--learned NAME]... [--questions FILE]... -- COMMAND...
# Runs COMMAND unless RUN_DIR/manifests/NAME.json says that it finished with the same inputs and learned settings
# (script/manifest.py compares them). A killed stage is given the same command again and goes on by its own means. Where
# something learned has changed the stage stops with 2 and asks for CONTINUE=1 or FORCE=1. What COMMAND prints goes to
# RUN_DIR/logs/NAME.log; the terminal shows how far it is.
stage() {
  local name="$1" options=() status=0
  local manifest="${RUN_DIR:?is the folder that a recipe writes to}/manifests/$name.json" log="$RUN_DIR/logs/$name.log"
  local output
  shift
  while [[ "$1" != -- ]]; do
    [[ "$1" != --output ]] || output="$2"
    options+=("$1" "$2")
    shift 2
  done
  shift
  if [[ "$DRY_RUN" == 1 ]]; then
    printf '\n# stage %s\n' "$name"
    "$@"
    return
  fi
  [[ -x "$PYTHON" ]] || die "no Python at $PYTHON. Run 'bash script/setup.sh cpu' (or gpu) first, or set PYTHON."
  # `continued`: a changed stage goes on from its checkpoint, and has to say so where no step is left.
  CONTINUED="$("$PYTHON" "$ROOT/script/manifest.py" begin "$manifest" --stage "$name" "${options[@]}")" || status=$?
  case "$status" in
    0) ;;
    3) return 0 ;;
    *) exit "$status" ;;
  esac
  export CONTINUED
  mkdir -p "$RUN_DIR/logs"
  exec 7>&2
  STAGE_WATCHER=''
  STAGE_LOG=(--log "$log" --offset "$(stat -c %s "$log" 2> /dev/null || echo 0)" --output "$output")
  # An `if` around the command would switch its `set -e` off; so its failure is met as the shell ends.
  trap 'stage_failed $? '"$name" EXIT
  if [[ "$VERBOSE" == 1 ]]; then
    "$@" 2>&1 | tee -a "$log" >&2
  else
    "$PYTHON" "$ROOT/script/watch.py" follow "$name" "${STAGE_LOG[@]}" --parent "$$" &
    STAGE_WATCHER=$!
    "$@" >> "$log" 2>&1
  fi
  trap - EXIT
  stop_watcher
  exec 7>&-
  "$PYTHON" "$ROOT/script/manifest.py" finish "$manifest"
}

stop_watcher() {
  local tries
  [[ -n "$STAGE_WATCHER" ]] || return 0
  # Again and again: where a stage ends at once, the first signal comes before the watcher's program runs, and is lost.
  for ((tries = 0; tries < 100; tries++)); do
    kill "$STAGE_WATCHER" 2> /dev/null || break
    sleep 0.05
  done
  kill -9 "$STAGE_WATCHER" 2> /dev/null || true
  wait "$STAGE_WATCHER" 2> /dev/null || true
}

stage_failed() {
  local status="$1" name="$2"
  stop_watcher
  # 2: the stage refused to begin; what the manifest said before still stands.
  [[ "$status" != 2 ]] || "$PYTHON" "$ROOT/script/manifest.py" undo "$RUN_DIR/manifests/$name.json" >&7 2>&7
  "$PYTHON" "$ROOT/script/watch.py" cause "${STAGE_LOG[@]}" >&7 2>&7
  printf '%s: error: stage %s ended with %s. The same command goes on where it stopped.\n' \
    "$(basename "$0")" "$name" "$status" >&7
  exit "$status"
}
