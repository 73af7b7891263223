#!/usr/bin/env bash
# Makes the virtual environment at $QSHARP_VENV (else .venv in the repository) and installs the package there,
# editable, with the JAX that fits the machine. Called by itself (`bash launch/setup.sh [EXTRA...]`, extras of setup.py)
# or sourced by the other scripts, which then call `set_up [EXTRA...]`. Once set up, a call only compares a checksum.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
QSHARP_VENV=${QSHARP_VENV:-$repo/.venv}
[[ $QSHARP_VENV == /* ]] || QSHARP_VENV=$PWD/$QSHARP_VENV
export QSHARP_VENV

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# The extra that this machine's accelerator needs; nothing on a CPU. PyTorch brings CUDA 13, whose cuDNN and NCCL pip writes
# to the same files as CUDA 12's: JAX has CUDA 13 too where the driver does.
accelerator() {
    local driver
    if nvidia-smi -L >/dev/null 2>&1; then
        driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null || true)
        if [[ $driver =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 580)); then echo cuda13; else echo cuda; fi
    elif [[ -e /dev/accel0 || -e /dev/vfio/0 ]] && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
        echo tpu # a Google PCI device behind an accelerator driver
    fi
}

# For a program on the CPU: glibc gives the memory of every large array back to the system when it is freed, and asks
# for it again at the next step. Thresholds above any array that a CPU run makes (in bytes) keep it; in one arena, since
# those of all threads but the first hold no more than 64 MiB, and what is larger goes to the system and back whatever
# the thresholds. A program on a GPU or TPU has its arrays there; its threads keep glibc's arenas, and the host its
# memory. What the user has set stays.
set_malloc() {
    case ${JAX_PLATFORMS:-$(accelerator)} in
        "" | cpu*) ;;
        *) return 0 ;;
    esac
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_-8589934592}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_-8589934592}
    export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_-67108864}
    export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX-1}
}

find_python() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    fail "no Python >= 3.11 with its venv module found; install one (on Debian or Ubuntu: python3 and python3-venv)"
}

make_venv() {
    local python
    if [[ -f $QSHARP_VENV/.unfinished ]]; then
        echo "setup.sh: an earlier set-up of $QSHARP_VENV was interrupted; starting it again"
        rm -rf "$QSHARP_VENV"
    fi
    if [[ ! -e $QSHARP_VENV || -z $(ls -A "$QSHARP_VENV") ]]; then
        python=$(find_python)
        mkdir -p "$QSHARP_VENV"
        touch "$QSHARP_VENV/.unfinished"
        "$python" -m venv "$QSHARP_VENV"
    fi
    "$QSHARP_VENV/bin/python" -m pip --version >/dev/null 2>&1 ||
        fail "$QSHARP_VENV is not a working virtual environment; remove it, or set QSHARP_VENV to another folder"
}

install_package() {
    local extras=$1 sum stamp
    stamp=$QSHARP_VENV/.qsharp-installed-$extras
    sum=$({ echo "$repo" && cat "$repo/requirements.txt" "$repo/setup.py"; } | cksum)
    if [[ ! -f $stamp || $(cat "$stamp") != "$sum" ]]; then
        echo "setup.sh: installing into $QSHARP_VENV (extras: ${extras:-none}); the first time takes a few minutes"
        # Python compiles what is imported when it is; pip would compile all of PyTorch and libtpu, which takes longer.
        "$QSHARP_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
            --editable "$repo${extras:+[$extras]}"
        echo "$sum" >"$stamp"
    fi
    rm -f "$QSHARP_VENV/.unfinished"
}

# The extras to install, joined by commas: those given, and the one for the accelerator. There is one JAX plugin in an
# environment, which is the machine's, or the one that another machine put there (login nodes share it with GPU nodes).
extras() { # ACCELERATOR [EXTRA...]
    local accelerator=$1 cuda=cuda word words=()
    shift
    if [[ $accelerator == cuda13 ]]; then cuda=cuda13; fi
    if has_plugin cuda12; then cuda=cuda; elif has_plugin cuda13; then cuda=cuda13; fi
    for word in ${accelerator:+"$accelerator"} "$@"; do
        if [[ $word == cuda* ]]; then word=$cuda; fi
        [[ " ${words[*]-} " == *" $word "* ]] || words+=("$word")
    done
    (IFS=, && echo "${words[*]-}")
}

has_plugin() { compgen -G "$QSHARP_VENV/lib/python*/site-packages/jax_$1_plugin-*" >/dev/null; }

set_up() {
    local accelerator=""
    [[ ${JAX_PLATFORMS-} == cpu* ]] || accelerator=$(accelerator)
    # The tests' libtpu compiles for TPUs, but would look for one at every start.
    [[ -n $accelerator ]] || export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
    set_malloc
    mkdir -p "$(dirname "$QSHARP_VENV")"
    (
        if command -v flock >/dev/null && ! flock --nonblock 9; then
            echo "setup.sh: waiting for another set-up of $QSHARP_VENV to end"
            flock 9
        fi
        make_venv
        install_package "$(extras "$accelerator" "$@")"
    ) 9>"$QSHARP_VENV.lock"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then set_up "$@"; fi
