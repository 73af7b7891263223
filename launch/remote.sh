#!/usr/bin/env bash
# What tpu.sh and cuda.sh share: they source it. A host's side is host.sh.
# shellcheck disable=SC2034 # variables for those two
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
program=$(basename "$0")
dry_run=
poll=${QSHARP_POLL_SECONDS:-60}
variables=() # those of --env

say() { echo "$program: $*" >&2; }

fail() {
    say "$*"
    exit 2
}

# Sets $value to that of an option: `take "$@"`, with the option first.
take() {
    [[ $# -ge 2 && $2 != --* ]] || fail "$1 needs a value; see $program --help"
    value=$2
}

# --env NAME: one of this shell's variables, for the program on the hosts.
take_variable() {
    if ! [[ $1 =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]] || ! printenv "$1" >/dev/null; then
        fail "--env takes the name of a variable that is exported in this shell, not '$1'"
    fi
    variables+=("$1")
}

# The lines of a host's file ENV, which host.sh reads.
exports() {
    local name
    for name in "${variables[@]}"; do echo "export $(quoted "$name=${!name}")"; done
}

# The words as a shell reads them: what needs no quotes stands without.
quoted() {
    local word line=
    for word; do
        case $word in
            "" | *[!A-Za-z0-9_@%+=:,./-]*) word=\'$(printf %s "$word" | sed "s/'/'\\\\''/g")\' ;;
        esac
        line+=${line:+ }$word
    done
    printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
call() { if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi; }

# Sets config, workdir and, for the command on a host, `run_arguments` from what the user gave after `--`.
read_run_arguments() {
    local word
    run_arguments=() config="" workdir=""
    while (($#)); do
        word=$1
        case $word in
            --config | --workdir)
                take "$@"
                word=$1=$2
                shift
                ;;
        esac
        case $word in
            --config=*) config=${word#*=} ;;
            --workdir=*) workdir=${word#*=} ;;
            *) run_arguments+=("$word") ;;
        esac
        shift
    done
    [[ -n $config && -n $workdir ]] ||
        fail "give the arguments of \`qsharp run\` after --, with --config FILE and --workdir DIR"
}

# On a host the program runs in the folder that holds code/, so that a relative workdir outlives a new copy of the code.
host_arguments() {
    local on_host=$config
    [[ $config == /* ]] || on_host=code/${config#./}
    run_arguments=(--config "$on_host" --workdir "$workdir" ${run_arguments[@]+"${run_arguments[@]}"})
    run_id=$(printf '%s\n' "${run_arguments[@]}" | cksum | cut -d " " -f 1)
}

check_shared_workdir() { # HOSTS
    [[ $workdir != gs://* ]] || return 0
    [[ $workdir != *://* ]] || fail "--workdir $workdir is neither a folder nor of the form gs://BUCKET/FOLDER"
    (($1 == 1)) || [[ $workdir == /* ]] ||
        fail "--workdir $workdir would be another folder on each of the $1 hosts; give the absolute path of a network" \
            "folder"
}

# A config that names no mesh has `single`, which several hosts would refuse once they are made and installed.
check_mesh() { # HOSTS
    local word
    for word in "${run_arguments[@]}"; do
        if [[ $word == --config.mesh || $word == --config.mesh[=.]* ]]; then return; fi
    done
    (($1 == 1)) ||
        fail "$1 hosts need --config.mesh=NAME among the arguments after --; see $program --help and configs/meshes.py"
}

# What is copied is HEAD: a config file that is not in it would be missing on the hosts.
check_head() {
    git -C "$repo" rev-parse --quiet --verify HEAD >/dev/null 2>&1 ||
        fail "$repo is not a git checkout, so there is no HEAD to copy; give --repo URL"
    # configs/ is a link to the package's recipes.
    [[ $config == /* ]] ||
        [[ $(git -C "$repo" cat-file --batch-check --follow-symlinks <<<"HEAD:${config#./}") == *" blob "* ]] ||
        fail "--config $config is not in HEAD, which is what is copied; commit it, and give its path in the repository"
    git -C "$repo" diff --quiet HEAD || say "changes that are not committed are not copied"
}

# Commands for a host, whose files are under PLACE.
unpack_command() { # PLACE: the archive comes by standard input
    echo "rm -rf $1/code && mkdir -p $1/code && tar -xzf - -C $1/code"
}
clone_command() { # PLACE URL
    echo "rm -rf $1/code && mkdir -p $1 && git clone --quiet --depth 1 $(quoted "$2") $1/code"
}
host_command() { # PLACE WORDS...
    local place=$1
    shift
    echo "bash $place/code/launch/host.sh $(quoted "$@")"
}
state_command() { # PLACE
    echo "if [ -e $1/code ]; then $(host_command "$1" state ${run_id:+"$run_id"}); else echo 'qsharp: none'; fi"
}

# One word for what the hosts' state commands said, and the first exit code that is not 0: other, ended CODE (on one
# host at least), none (on one host at least), running, ended 0 (on all), unknown.
verdict() {
    local line running="" none="" code=0
    while read -r line; do
        case $line in
            "qsharp: running") running=yes ;;
            "qsharp: none") none=yes ;;
            "qsharp: ended "*) if ((code == 0)); then code=${line##* }; fi ;;
            "qsharp: other") echo other && return ;;
            *) echo unknown && return ;;
        esac
    done <<<"$1"
    if ((code)); then
        echo "ended $code"
    elif [[ -n $none ]]; then
        echo none
    elif [[ -n $running ]]; then
        echo running
    else
        echo "ended 0"
    fi
}
