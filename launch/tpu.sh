#!/usr/bin/env bash
# Runs `qsharp run` on a Cloud TPU slice from its creation to the end, through pre-emptions; `--help` has it all.
set -euo pipefail
# shellcheck source=launch/remote.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote.sh"

usage() {
    cat <<'HELP'
bash launch/tpu.sh COMMAND --name NAME --zone ZONE [options] [-- ARGUMENTS of `qsharp run`]

Commands
  run      makes the TPU VM or takes the one that is there, copies and installs the code, starts the program on every
           host, and waits. A slice that is pre-empted is deleted, made again, and the program resumes from its workdir.
           Ends with the program's exit code; the TPU stays. Interrupted or typed again, it finds the program running.
  attach   shows the log of the first host, as it grows
  status   what the TPU and the program on each host are doing
  stop     ends the program on every host; the TPU stays
  delete   deletes the TPU

Options
  --name NAME      of the TPU VM, and with --queued of the queued resource
  --zone ZONE      for example us-central1-a
  --type TYPE      for `run`: v2-8, v3-8, v4-N, v5p-N (N cores), v5litepod-N (also v5e-N), v6e-N (N chips), ...
  --version V      of the TPU's software; else the one that Google names for the type
  --spot           cheaper, and may be pre-empted
  --queued         by a queued resource: waits until there are TPUs; give it to the other commands too
  --project P      else gcloud's
  --env NAME       gives the program this variable of your shell, such as HF_TOKEN, WANDB_API_KEY or QSHARP_DATA; may be
                   repeated. It is in no command line, but in a file that only you can read, which each host removes
                   as it reads it; a slice that is made again gets it again, from the shell that waits
  --repo URL       the hosts clone this; else git's HEAD here is copied to them, without changes not committed
  --dry-run        prints the commands and runs none
  --help           this

ARGUMENTS are --config FILE --workdir DIR [--config.KEY=VALUE ...]. FILE is a path in the repository. A slice of
several hosts needs --config.mesh=NAME, from configs/meshes.py: v5e_16 for a v5e-16. There DIR has to be one folder for
all: gs://BUCKET/FOLDER, which the TPU's service account may write to, or the absolute path of a network folder. On one
host a relative DIR is under ~/qsharp there, and lost with the TPU.

On each host ~/qsharp has code/, venv/, LOG, PID and EXIT (the exit code). Where the image has no Python >= 3.11, uv
brings one. The program runs with JAX_PLATFORMS=tpu,cpu: it fails where it finds no TPU, and does not fall back to CPU.

  QSHARP_POLL_SECONDS   between two looks (60)
  QSHARP_ATTEMPTS       failures and pre-emptions in a row, without the program seen running in between, until it
                        gives up (30); a bad request or missing permission ends it at once

  bash launch/tpu.sh run --name q --zone us-central1-a --type v5e-16 --spot \
      -- --config configs/star_graph_g5_5.py --config.mesh=v5e_16 --workdir gs://bucket/g5_5
HELP
}

read_options() {
    name="" zone="" type="" version="" spot="" queued="" project="" url="" command="" config="" workdir=""
    run_arguments=()
    case ${1-} in
        run | attach | status | stop | delete) command=$1 && shift ;;
        --help | -h) usage && exit ;;
        *) fail "give one of run, attach, status, stop, delete first; see $program --help" ;;
    esac
    while (($#)); do
        case $1 in
            --name) take "$@" && name=$value && shift ;;
            --zone) take "$@" && zone=$value && shift ;;
            --type) take "$@" && type=$value && shift ;;
            --version) take "$@" && version=$value && shift ;;
            --project) take "$@" && project=$value && shift ;;
            --env) take "$@" && take_variable "$value" && shift ;;
            --repo) take "$@" && url=$value && shift ;;
            --spot) spot=yes ;;
            --queued) queued=yes ;;
            --dry-run) dry_run=yes ;;
            --help | -h) usage && exit ;;
            --) shift && break ;;
            *) fail "unknown option $1; see $program --help" ;;
        esac
        shift
    done
    [[ -n $name ]] || fail "give the TPU's name: --name NAME"
    [[ -n $zone ]] || fail "give the TPU's zone: --zone ZONE"
    [[ -n $dry_run ]] || command -v gcloud >/dev/null ||
        fail "there is no gcloud on the PATH; install it: https://cloud.google.com/sdk/docs/install"
    run_id=""
    if [[ $command == run ]]; then
        read_type
        read_run_arguments "$@"
        host_arguments
        check_shared_workdir "$hosts"
        [[ -n $url ]] || check_head
        check_mesh "$hosts"
        [[ -z $spot || $workdir == /* || $workdir == gs://* ]] ||
            say "--workdir $workdir is on the TPU VM: after a pre-emption the run begins anew"
    fi
}

# What gcloud says when there is no use in trying again.
not_again="INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|gcloud auth login"

# Sets type, version, and hosts. A host has 4 chips; one of 8 makes a whole v5e-8 or v6e-8. Until v5p types count cores,
# 8 a host. https://cloud.google.com/tpu/docs/runtimes, .../v5e, .../v6e, .../v4
read_type() {
    local size=${type##*-} default
    type=${type/#v5e-/v5litepod-}
    [[ $type =~ ^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]] ||
        fail "unknown --type '$type'; give one such as v4-8, v5p-8, v5litepod-16 (or v5e-16) or v6e-4"
    case $type in
        v5litepod-*) default=v2-alpha-tpuv5-lite ;;
        v6e-*) default=v2-alpha-tpuv6e ;;
        v5p-*) default=v2-alpha-tpuv5 ;;
        *) default=tpu-ubuntu2204-base ;;
    esac
    version=${version:-$default}
    case $type in
        v5litepod-* | v6e-*)
            [[ " 1 4 8 16 32 64 128 256 " == *" $size "* ]] ||
                fail "there is no --type $type: ${type%-*} comes with 1, 4, 8, 16, 32, 64, 128 or 256 chips"
            hosts=$((size <= 8 ? 1 : size / 4))
            ;;
        *)
            ((size % 8 == 0)) || fail "there is no --type $type: ${type%-*} comes in multiples of 8 cores"
            hosts=$((size / 8))
            ;;
    esac
}

# gcloud's part: `tpus GROUP VERB WORDS...`
tpus() {
    local group=$1 verb=$2
    shift 2
    call gcloud compute tpus "$group" "$verb" "$@" --zone "$zone" ${project:+--project "$project"} --quiet
}

describe() {
    if [[ -n $queued ]]; then
        tpus queued-resources describe "$name" "--format=value(state.state)"
    else
        tpus tpu-vm describe "$name" "--format=value(state)"
    fi
}

create() {
    if [[ -n $queued ]]; then
        tpus queued-resources create "$name" --node-id "$name" --accelerator-type "$type" \
            --runtime-version "$version" ${spot:+--spot}
    else
        tpus tpu-vm create "$name" --accelerator-type "$type" --version "$version" ${spot:+--spot}
    fi
}

delete() {
    if [[ -n $queued ]]; then
        tpus queued-resources delete "$name" --force # with its TPU VM
    else
        tpus tpu-vm delete "$name"
    fi
}

on_hosts() { # all|NUMBER COMMAND
    tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2"
}

host_states() { on_hosts all "$(state_command qsharp)"; }

pack() { call git -C "$repo" archive --format=tar.gz --output "$scratch/qsharp.tar.gz" HEAD; }

upload() { tpus tpu-vm scp "$scratch/qsharp.tar.gz" "$name:qsharp.tar.gz" --worker=all; }

install() {
    local get_code
    if [[ -n $url ]]; then
        get_code=$(clone_command qsharp "$url")
    else
        get_code="$(unpack_command qsharp) <qsharp.tar.gz"
    fi
    on_hosts all "$get_code && $(host_command qsharp install tpu)"
}

put_code() {
    if [[ -z $url ]]; then
        step pack && step upload || return
    fi
    step install || return
    if ((${#variables[@]})); then step put_variables; fi
}

# By scp, for the standard input of gcloud's ssh does not reach several hosts. It keeps the file's mode.
put_variables() {
    [[ -n $dry_run ]] || (umask 077 && exports >"$scratch/ENV")
    tpus tpu-vm scp "$scratch/ENV" "$name:qsharp/ENV" --worker=all
}

start() {
    local words=("${run_arguments[@]}" --coordinator tpu)
    on_hosts all "JAX_PLATFORMS=tpu,cpu $(host_command qsharp start "$run_id" "${words[@]}")"
}

stop() { on_hosts all "$(host_command qsharp stop)"; }

last_lines() { on_hosts all "tail -n 20 qsharp/LOG"; }

# One step of `run`; its messages are kept, for it may fail. 1: worth another attempt; 2: not, it is the user's to mend.
step() {
    local code=0
    if [[ -n $dry_run ]]; then
        "$@"
        return
    fi
    "$@" 2>"$scratch/messages" || code=$?
    if ((code == 0)); then return; fi
    if ((code == 2)) || grep -qE "$not_again" "$scratch/messages"; then
        return 2
    fi
    return 1
}

resource_state() {
    local code=0
    step describe || code=$?
    if ((code)) && grep -q NOT_FOUND "$scratch/messages"; then
        echo ABSENT
    else
        return "$code"
    fi
}

# After a failure, whose code is given: waits for another attempt, or gives up.
again() {
    cat "$scratch/messages" >&2
    if (($1 == 2)); then fail "that fails again however often it is tried; see above"; fi
    failures=$((failures + 1))
    if ((failures >= attempts)); then
        say "giving up after $failures failures in a row; \`$program delete\` deletes what there is of $name"
        exit 1
    fi
    say "failure $failures of $attempts in a row; trying again in $poll s"
    sleep "$poll"
}

# Every turn of the loop looks at what there is, and takes the next step from there.
run() {
    local state seen="" words outcome started="" doubtful=""
    attempts=${QSHARP_ATTEMPTS:-30} failures=0
    while true; do
        state=$(resource_state) || { again $? && continue; }
        [[ $state == "$seen" ]] || say "$name is $state"
        seen=$state
        case $state in
            READY | ACTIVE) ;;
            ABSENT)
                say "creating $name ($type, $version)"
                started=""
                step create || again $?
                continue
                ;;
            PREEMPTED | TERMINATED | SUSPENDED | FAILED)
                say "deleting $name, to make it again"
                started=""
                step delete || { again $? && continue; }
                say "$name was $state" 2>"$scratch/messages"
                again 1
                continue
                ;;
            STOPPED | HIDDEN) fail "$name is $state, by hand; start it, or delete it" ;;
            *) # being created, repaired, deleted, or waiting in the queue: that takes the time that it takes
                sleep "$poll"
                continue
                ;;
        esac

        words=$(step host_states) || { again $? && continue; }
        outcome=$(verdict "$words")
        case $outcome in
            other) fail "another run is under way on $name; \`$program stop\` ends it" ;;
            unknown) say "the hosts said: $words" 2>"$scratch/messages" && again 1 && continue ;;
            running)
                [[ -n $started && $failures == 0 ]] ||
                    say "running on $hosts host(s); \`$program attach\` shows the log"
                started=yes doubtful="" failures=0
                sleep "$poll"
                continue
                ;;
        esac
        if [[ -z $started ]]; then
            say "installing on $hosts host(s)"
            put_code || { again $? && continue; }
            say "starting qsharp run $(quoted "${run_arguments[@]}")"
            step start || { again $? && continue; }
            started=yes
            continue
        fi
        case $outcome in
            none)
                say "the program is gone from a host, without an exit code; was it rebooted?" 2>"$scratch/messages"
                started=""
                again 1
                ;;
            "ended 0")
                say "done; $name is still there, and costs: \`$program delete\` deletes it"
                exit 0
                ;;
            *)
                # A host that is being pre-empted fails, or makes the others fail, a little before its state says so.
                if [[ -z $doubtful ]]; then
                    doubtful=yes
                    sleep "$poll"
                    continue
                fi
                step stop || true
                step last_lines >&2 || true
                say "the program ended with exit code ${outcome##* }; $name is still there, and costs"
                exit "${outcome##* }"
                ;;
        esac
    done
}

show_run() {
    echo "# what there is:"
    describe
    echo "# if there is nothing:"
    create
    echo "# until it is ready, every $poll s:"
    describe
    echo "# once it is ready, what its $hosts host(s) are doing:"
    host_states
    echo "# unless this run is under way there:"
    put_code
    start
    echo "# until the program has ended on every host, every $poll s:"
    describe
    host_states
    echo "# if it was pre-empted, and then from the top:"
    delete
    echo "# if the program failed on a host:"
    stop
    last_lines
}

read_options "$@"
scratch=${TMPDIR:-/tmp}/qsharp-$$
if [[ -n $dry_run && $command == run ]]; then
    show_run
    exit
fi
[[ -n $dry_run ]] || scratch=$(mktemp -d "$scratch-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
case $command in
    run) run ;;
    attach) on_hosts 0 "$(host_command qsharp log)" ;;
    status) describe && host_states ;;
    stop) stop ;;
    delete) delete ;;
esac
