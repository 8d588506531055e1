#!/usr/bin/env bash
# Make .venv and install Quickchange into it: `tools/setup.sh runtime` or `tools/setup.sh dev`.
#
# PYTHON  the interpreter that makes .venv (default: python3)
# TORCH   auto, cpu or cuda (default: auto)
# TORCH_CPU_INDEX  another address of PyTorch's index of CPU builds, such as a mirror
#
# A stamp in .venv remembers what was installed from which files, so that a second run is instant.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-auto}
KIND=${1:-runtime}
VENV=.venv
CPU_INDEX=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
TORCH_VERSION=$(sed -n 's/^torch==//p' constraints.txt)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
venv_pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

check_arguments() {
  case $TORCH in auto | cpu | cuda) ;; *) die "TORCH is '$TORCH'; use auto, cpu or cuda" ;; esac
  case $KIND in runtime | dev) ;; *) die "unknown kind '$KIND'; use runtime or dev" ;; esac
}

check_python() {
  command -v "$PYTHON" >/dev/null || die "no '$PYTHON' here; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$PYTHON" --version) is too old; Quickchange needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"
}

fingerprint() {
  { printf '%s\n' "$PWD" "$TORCH"; "$PYTHON" --version; cat pyproject.toml clients/python/pyproject.toml constraints.txt tools/setup.sh; } | cksum
}

stamp_of() { printf '%s/.quickchange-%s' "$VENV" "$1"; }

is_installed() {
  local kind
  for kind in "$KIND" dev; do
    if [[ -x $VENV/bin/python && $(cat "$(stamp_of "$kind")" 2>/dev/null) == "$WANTED" ]]; then return 0; fi
  done
  return 1
}

make_venv() {
  if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    say "making $VENV with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$VENV" ||
      die "could not make $VENV; on Debian and Ubuntu: apt-get install python3-venv"
  fi
  venv_pip install --quiet -c constraints.txt pip
}

has_nvidia_gpu() { [[ -e /proc/driver/nvidia/version ]] || nvidia-smi -L >/dev/null 2>&1; }

has_cpu_index() {
  "$PYTHON" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/torch/", timeout=3)' "$CPU_INDEX" >/dev/null 2>&1
}

installed_torch() {
  "$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

has_wanted_torch() {
  case "$TORCH:$(installed_torch)" in
    cuda:"$TORCH_VERSION+cpu") return 1 ;;
    *:"$TORCH_VERSION" | *:"$TORCH_VERSION"+*) return 0 ;;
    *) return 1 ;;
  esac
}

install_local_torch() {
  venv_pip install --quiet --no-index --no-deps "torch==$TORCH_VERSION" >/dev/null 2>&1 && has_wanted_torch
}

install_cpu_torch() {
  [[ $TORCH == cpu ]] || { [[ $TORCH == auto ]] && ! has_nvidia_gpu; } || return 1
  has_cpu_index || { say "PyTorch's CPU index does not answer; taking what pip offers"; return 1; }
  venv_pip install --no-deps --index-url "$CPU_INDEX" "torch==$TORCH_VERSION"
}

install_default_torch() {
  # "===" leaves out builds with a local tag such as +cpu.
  venv_pip install --no-deps --upgrade "torch===$TORCH_VERSION" || venv_pip install --no-deps "torch==$TORCH_VERSION"
}

install_torch() {
  if has_wanted_torch; then return; fi
  say "installing torch $TORCH_VERSION (TORCH=$TORCH)"
  install_local_torch || install_cpu_torch || install_default_torch
  has_wanted_torch || die "torch $(installed_torch) was installed, but TORCH=$TORCH asks for another build"
}

install_quickchange() {
  local group=()
  if [[ $KIND == dev ]]; then group=(--group dev); fi
  say "installing Quickchange ($KIND) and what it needs"
  venv_pip install --quiet -c constraints.txt "${group[@]}" -e . -e clients/python
}

check_arguments
check_python
WANTED=$(fingerprint)
if is_installed; then exit 0; fi
make_venv
install_torch
install_quickchange
if ! "$VENV/bin/python" -m quickchange_adapters.native >/dev/null; then say "the portable kernels are used instead"; fi
printf '%s\n' "$WANTED" >"$(stamp_of "$KIND")"
say "ready: $VENV ($(installed_torch | sed 's/^/torch /'))"
