#!/usr/bin/env bash
# A host's side of a launch: tpu.sh and cuda.sh call it there by ssh, in the copy of the code. Beside that copy lie
# venv/ and what a run leaves: LOG (all it printed), ID (which run it was), PID, and EXIT (its exit code) at the end.
#
#   host.sh install [EXTRA]     a Python >= 3.11 where there is none, then launch/setup.sh
#   host.sh start ID ARGUMENTS  `qsharp run ARGUMENTS` under nohup, with the variables of the file ENV, which it
#                               removes; ends what ran before
#   host.sh state [ID]          running, other (another ID is running), ended CODE, none
#   host.sh stop                ends it: SIGTERM, half a minute later SIGKILL
#   host.sh log                 the log's last lines, and those that follow while it runs
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
place=$PWD
export QSHARP_VENV=$place/venv
# shellcheck source=launch/setup.sh
source "$place/code/launch/setup.sh"

# The program and all it starts hold the lock, whatever becomes of process ids at a reboot. To look is to share it.
running() { ! flock --shared --nonblock "$place/LOCK" true; }

install() {
    local uv=$place/uv/uv
    # Images of Ubuntu 22.04 have Python 3.10. uv's own is whole, with venv and ensurepip, and needs no root.
    export UV_PYTHON_PREFERENCE=only-managed UV_PYTHON_INSTALL_DIR=$place/uv/python
    if ! (find_python) >/dev/null 2>&1; then
        [[ -x $uv ]] || curl -LsSf https://astral.sh/uv/install.sh |
            env UV_INSTALL_DIR="$place/uv" UV_NO_MODIFY_PATH=1 sh
        "$uv" python install 3.12
        PATH=$(dirname "$("$uv" python find 3.12)"):$PATH
    fi
    set_up "$@"
}

start() {
    local id=$1
    shift
    stop
    exec 9>"$place/LOCK"
    flock --timeout 10 9 || fail "what ran in $place before does not end"
    rm -f "$place/EXIT"
    echo "$id" >"$place/ID"
    echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) qsharp run $*" >>"$place/LOG"
    if [[ -e $place/ENV ]]; then
        # shellcheck source=/dev/null
        source "$place/ENV"
        rm "$place/ENV"
    fi
    set_malloc
    # shellcheck disable=SC2016 # the inner shell's variables
    nohup setsid bash -c 'code=0; "$@" || code=$?; echo "$code" >EXIT.new; mv EXIT.new EXIT' \
        bash "$QSHARP_VENV/bin/qsharp" run "$@" </dev/null >>"$place/LOG" 2>&1 &
    echo $! >"$place/PID"
}

state() {
    if running; then
        if [[ $# -eq 0 || $(cat "$place/ID") == "$1" ]]; then echo "qsharp: running"; else echo "qsharp: other"; fi
    elif [[ -e $place/EXIT ]]; then
        echo "qsharp: ended $(cat "$place/EXIT")"
    else
        echo "qsharp: none"
    fi
}

stop() {
    local signal
    # Where a launcher waits for this run, it shall not take it for one that a reboot ended.
    if running; then echo 143 >"$place/EXIT"; fi
    for signal in TERM KILL; do
        if running; then kill "-$signal" -- "-$(cat "$place/PID")" || true; fi
        for _ in {1..300}; do
            running || return 0
            sleep 0.1
        done
    done
}

log() {
    local follower
    tail -n 100 -F "$place/LOG" &
    follower=$!
    flock --shared "$place/LOCK" sleep 1 # once the program has ended, its last lines follow
    kill "$follower"
}

command -v flock >/dev/null || fail "there is no flock on $(hostname); install util-linux"
"$@"
