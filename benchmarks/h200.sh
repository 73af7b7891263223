#!/usr/bin/env bash
# Measures on one NVIDIA H200; see --help.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<'HELP'
On a machine with one NVIDIA H200 and this repository: sets up, checks decoding on the GPU against float32 numbers of the
CPU, and measures decoding (Llama 3.1 8B with a guide of 1B, random weights, batch 1, 16 and 64; in 8 bits 1 and 64) and a
step of the guide's fit (1B, 2,048 tokens). It is meant to take less than 15 minutes after the set-up, and has not
run on one yet. What is printed is appended to benchmarks/RESULTS.md, with the date and the device.

  bash benchmarks/h200.sh
  bash benchmarks/h200.sh --small    # the same way with tiny models, on any device, in a minute
  bash benchmarks/h200.sh --only decode --results decode.md    # a part, where a command may take ten minutes only

Options
  --small          tiny models; appends nothing, unless --results is given
  --only PARTS     of parity, parity-wide, decode, decode-bare, decode-int8 and fit, with commas between them; --small has
                   no parity-wide and no decode-bare
  --results FILE   appends to this file instead
  --help           this

Environment
  QSHARP_VENV      the virtual environment, made where it is missing (.venv in the repository)
  QSHARP_PYTHON    a Python that has the package and its requirements; nothing is set up then

With vLLM in that environment, its decoding is measured too.
HELP
}

fail() {
    echo "h200.sh: $*" >&2
    exit 2
}

small="" results="" only=""
while (($#)); do
    case $1 in
        --small) small=yes ;;
        --results) [[ $# -gt 1 ]] || fail "--results takes a file" && results=$2 && shift ;;
        --only) [[ $# -gt 1 ]] || fail "--only takes parts" && only=$2 && shift ;;
        --help | -h) usage && exit ;;
        *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
parts="parity parity-wide decode decode-bare decode-int8 fit"
[[ -z $small ]] || parts="parity decode decode-int8 fit"
for name in ${only//,/ }; do
    [[ " $parts " == *" $name "* ]] || fail "there is no part $name; --only takes some of ${parts// /,}${small:+ with --small}"
done
[[ -n $small || -n $results ]] || results=$repo/benchmarks/RESULTS.md
[[ -z $results || $results == /* ]] || results=$PWD/$results
[[ -n $small ]] || nvidia-smi -L >/dev/null 2>&1 || fail "there is no NVIDIA GPU here (nvidia-smi -L fails); see --help"

python=${QSHARP_PYTHON-}
if [[ -z $python ]]; then
    # shellcheck source=/dev/null
    source "$repo/launch/setup.sh"
    # PyTorch brings CUDA 13, which this driver may not have, or JAX in this environment.
    if [[ $(accelerator) == cuda ]] || has_plugin cuda12; then set_up; else set_up bench; fi
    python=$QSHARP_VENV/bin/python
fi
if [[ -z $small ]]; then
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # the CPU computes what the GPU is compared with
    export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false} # PyTorch shares the GPU
fi

cd "$repo"
report=${results:-/dev/null}
export PYTHONUNBUFFERED=1 PYTHONPATH=$repo${PYTHONPATH:+:$PYTHONPATH}
failed=""

say() { printf '%s\n' "$@" | tee -a "$report"; }

# Runs a program of this folder, and shows what it prints as a section of the report.
part() { # NAME TITLE PROGRAM [ARGUMENT...]
    local title=$2 began=$SECONDS
    [[ -z $only || ,$only, == *,$1,* ]] || return 0
    shift 2
    say "" "### $title" "" "\`python benchmarks/$*\`" "" '```text'
    "$python" "benchmarks/$1" "${@:2}" 2>&1 | tee -a "$report" || failed+=" $1"
    say '```' "" "$((SECONDS - began)) s."
}

# The versions of what decides the numbers, and a sentence where flax is not as requirements.txt asks.
versions() {
    "$python" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement


def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


flax = installed("flax")
print(f"Python {platform.python_version()}, jax {installed('jax')}, jaxlib {installed('jaxlib')}, flax {flax}.")
lines = [line.partition("#")[0].strip() for line in open("requirements.txt")]
for asked in map(Requirement, filter(None, lines)):
    if asked.name != "flax" or (asked.marker and not asked.marker.evaluate()):
        continue
    if flax is None or not asked.specifier.contains(flax, prereleases=True):
        print(f"flax {flax} is not what requirements.txt asks for, flax{asked.specifier}: parts may fail.")
PYTHON
}

say "" "## Decoding and fitting on an accelerator ($(date -u +%F))" "" \
    "\`bash benchmarks/h200.sh${small:+ --small}${only:+ --only $only}\`, revision $(git rev-parse --short HEAD 2>/dev/null || echo unknown)." \
    "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null || echo "No NVIDIA GPU.")" \
    "$(versions)"
if [[ -n $small ]]; then
    part parity "Parity with the CPU" parity.py --models tiny --rows 2 --new-tokens 16
    part decode "Decoding" decode.py --models tiny --batch 1,2 --rounds 1 --programs unguided,guided --without-torch
    part decode-int8 "Decoding in 8 bits" decode.py --models tiny --batch 1 --rounds 1 --settings run --programs guided --quantize int8
    part fit "Fitting" train.py --model tiny --rounds 1
else
    part parity "Parity with the CPU" parity.py
    part parity-wide "Parity with the CPU, wide" parity.py --models wide
    part decode "Decoding as a run does" decode.py --models 8b --batch 1,16,64 --rounds 3 --settings run --programs unguided,guided
    part decode-bare "Decoding, bare" decode.py --models 8b --batch 1,64 --rounds 3 --settings bare --programs guided --without-torch
    part decode-int8 "Decoding in 8 bits" decode.py --models 8b --batch 1,64 --rounds 3 --settings run --programs guided --quantize int8
    part fit "Fitting" train.py --model 1b --attention cudnn --beside xla
fi
say "" "${SECONDS} s in all."
[[ -z $failed ]] || {
    echo "h200.sh: failed:$failed" >&2
    exit 1
}
