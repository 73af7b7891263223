#!/usr/bin/env bash
# Runs `qsharp run` on the GPUs of this machine, of several by ssh, or of SLURM's nodes; `--help` has it all.
set -euo pipefail
# shellcheck source=launch/remote.sh
source "$(dirname "${BASH_SOURCE[0]}")/remote.sh"

usage() {
    cat <<'HELP'
bash launch/cuda.sh [COMMAND] [options] -- ARGUMENTS of `qsharp run`

  without --hosts or --slurm   sets up .venv, then runs the program here, in the foreground
  --hosts A,B,...              copies git's HEAD to each box by ssh, installs, starts one process a box under nohup,
                               and waits; where one fails the others are ended. Interrupted or typed again, it finds
                               the program running. Ends with the program's exit code
  --slurm NODES                sets up .venv, writes a batch script under runs/slurm/ and submits it: one process a
                               node. The nodes share the checkout's file system. SLURM requeues what it pre-empts, and
                               the program resumes. sbatch itself reads SBATCH_PARTITION, SBATCH_ACCOUNT and the like

Commands, with --hosts: run (this is meant where none is given)
  attach   shows the log of the first box, as it grows
  status   what the program on each box is doing
  stop     ends the program on every box

Options
  --gpus N      the first N GPUs of each machine; else all (--slurm needs it)
  --port PORT   of the first box, where the processes of several meet (8476)
  --env NAME    with --hosts: gives the program this variable of your shell, such as HF_TOKEN, WANDB_API_KEY or
                QSHARP_DATA; may be repeated. It is in no command line, but goes by ssh's standard input to a file that
                only you can read, which the box removes as it reads it
  --repo URL    with --hosts: the boxes clone this in place of the copy
  --dry-run     prints the commands and runs none
  --help        this

ARGUMENTS are --config FILE --workdir DIR [--config.KEY=VALUE ...]. With --hosts FILE is a path in the repository, and
on several boxes DIR has to be one folder for all: the absolute path of a network folder, or gs://BUCKET/FOLDER. On one
box a relative DIR is under ~/qsharp/BOX there. The boxes reach each other under the names given here.
Several boxes or nodes need --config.mesh=NAME, from configs/meshes.py, with their number and the axes: below for two of
eight GPUs each, and a model of twelve heads, which eight GPUs do not divide.
On each box ~/qsharp/BOX has code/, venv/, LOG, PID and EXIT (the exit code).

The environment of the program, in every case; what is set here wins:
  JAX_PLATFORMS                    cuda,cpu: it fails where it finds no GPU, and never falls back to the CPU
  XLA_FLAGS                        --xla_gpu_enable_latency_hiding_scheduler=true, then those set here. XLA moves
                                   communication between GPUs behind computation; nothing to gain on one GPU
  XLA_PYTHON_CLIENT_MEM_FRACTION   0.9: the part of a GPU's memory that JAX takes at its start (JAX alone: 0.75)

  QSHARP_POLL_SECONDS   between two looks at the boxes (60)
  QSHARP_ATTEMPTS       looks in a row at which a box may be out of reach (30)

  bash launch/cuda.sh -- --config configs/star_graph_g5_5.py --workdir runs/g5_5
  bash launch/cuda.sh --hosts gpu1,gpu2 -- --config configs/star_graph_g5_5.py --workdir /nfs/g5_5 \
      --config.mesh=cuda_8 --config.mesh.hosts=2 --config.mesh.fit.fsdp=16 \
      --config.mesh.decode.data=8 --config.mesh.decode.tensor=1
  bash launch/cuda.sh --slurm 2 --gpus 8 -- --config configs/star_graph_g5_5.py --workdir /nfs/g5_5 \
      --config.mesh=cuda_8 --config.mesh.hosts=2 --config.mesh.fit.fsdp=16 \
      --config.mesh.decode.data=8 --config.mesh.decode.tensor=1
HELP
}

read_options() {
    local option="" names=""
    command=run hosts=() nodes="" gpus="" port=8476 url="" config="" workdir="" run_arguments=()
    case ${1-} in run | attach | status | stop) command=$1 && shift ;; esac
    while (($#)); do
        option=$1
        case $option in
            --hosts) take "$@" && names=$value && shift ;;
            --slurm) take "$@" && nodes=$value && shift ;;
            --gpus) take "$@" && gpus=$value && shift ;;
            --port) take "$@" && port=$value && shift ;;
            --env) take "$@" && take_variable "$value" && shift ;;
            --repo) take "$@" && url=$value && shift ;;
            --dry-run) dry_run=yes ;;
            --help | -h) usage && exit ;;
            --) shift && break ;;
            *) fail "unknown option $option; see $program --help" ;;
        esac
        shift
    done
    IFS=, read -r -a hosts <<<"$names"
    for option in --slurm:"$nodes" --gpus:"$gpus" --port:"$port"; do
        [[ ${option#*:} =~ ^([1-9][0-9]*)?$ ]] || fail "${option%%:*} takes a number from 1 up, not '${option#*:}'"
    done
    [[ -z $nodes || -z $names ]] || fail "give --hosts or --slurm, not both"
    [[ -z $nodes || -n $gpus ]] || fail "say how many GPUs a node has: --gpus N"
    [[ -z $url || -n $names ]] || fail "--repo goes with --hosts: here and under SLURM the checkout itself is run"
    [[ ${#variables[@]} -eq 0 || -n $names ]] ||
        fail "--env goes with --hosts: here and under SLURM the program has this shell's environment"
    [[ $command == run || -n $names ]] ||
        fail "\`$program $command\` goes with --hosts; under SLURM see squeue, scancel and the log in runs/slurm/"
    run_id=""
    if [[ $command == run ]]; then
        read_run_arguments "$@"
        if [[ -z $names ]]; then
            [[ -f $config ]] || fail "there is no config file $config"
            run_arguments=(--config "$config" --workdir "$workdir" ${run_arguments[@]+"${run_arguments[@]}"})
            check_mesh "${nodes:-1}"
        else
            host_arguments
            check_shared_workdir "${#hosts[@]}"
            [[ -n $url ]] || check_head
            check_mesh "${#hosts[@]}"
        fi
    fi
}

# The program's environment, and the extra of setup.py that goes with it.
read_environment() {
    platforms=${JAX_PLATFORMS:-cuda,cpu}
    environment=(
        "JAX_PLATFORMS=$platforms"
        "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
        "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"
    )
    extra=()
    if [[ $platforms == *cuda* || $platforms == *gpu* ]]; then extra=(cuda); fi
    if [[ $workdir == gs://* ]]; then extra+=(gcs); fi
}

# Sets QSHARP_VENV too, and the variables for glibc.
set_up_here() {
    # shellcheck source=launch/setup.sh
    source "$repo/launch/setup.sh"
    JAX_PLATFORMS=$platforms set_malloc
    call bash "$repo/launch/setup.sh" ${extra[@]+"${extra[@]}"}
}

first_gpus() { seq -s , 0 $((gpus - 1)); }

here() {
    [[ -z $gpus ]] || environment+=("CUDA_VISIBLE_DEVICES=$(first_gpus)")
    if [[ -z $dry_run && ${extra[*]-} == cuda* ]] && ! nvidia-smi -L >/dev/null 2>&1; then
        fail "there is no NVIDIA GPU here (nvidia-smi -L fails); JAX_PLATFORMS=cpu runs on the CPU"
    fi
    set_up_here
    call exec env "${environment[@]}" "$QSHARP_VENV/bin/qsharp" run "${run_arguments[@]}"
}

slurm() {
    local folder=$repo/runs/slurm id
    id=$(printf '%s\n' "${run_arguments[@]}" | cksum | cut -d " " -f 1)
    [[ -n $dry_run ]] || command -v sbatch >/dev/null ||
        fail "there is no sbatch on the PATH; is this a SLURM login node?"
    # SLURM's tasks each take the one GPU of their rank unless JAX is told which are theirs.
    environment+=("JAX_LOCAL_DEVICE_IDS=$(first_gpus)")
    set_up_here
    call mkdir -p "$folder"
    if [[ -n $dry_run ]]; then
        echo "cat >$folder/$id.sbatch <<'END'"
        batch_script "$folder/$id.log"
        echo END
    else
        batch_script "$folder/$id.log" >"$folder/$id.sbatch"
    fi
    call sbatch "$folder/$id.sbatch"
    [[ -n $dry_run ]] || say "log: $folder/$id.log"
}

batch_script() { # LOG
    local words=("${run_arguments[@]}")
    ((nodes == 1)) || words+=(--coordinator slurm)
    cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=qsharp
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=$gpus
#SBATCH --output="$1"
#SBATCH --open-mode=append
#SBATCH --requeue
srun --kill-on-bad-exit=1 env $(quoted "${environment[@]}" "$QSHARP_VENV/bin/qsharp" run "${words[@]}")
END
}

# By ssh: `on NUMBER COMMAND` for the box of that number.
on() { call ssh -o BatchMode=yes -o ConnectTimeout=20 "${hosts[$1]}" "$2"; }

# Where a box's files are; a name of its own, for boxes may share a home folder.
place() { echo "qsharp/${hosts[$1]#*@}"; }

# Runs a function for every box at once, with its number; fails if one of them does.
everywhere() {
    local i code=0 jobs=()
    for i in "${!hosts[@]}"; do
        if [[ -n $dry_run ]]; then "$1" "$i" && continue; fi
        "$1" "$i" &
        jobs+=($!)
    done
    for i in ${jobs[@]+"${jobs[@]}"}; do wait "$i" || code=$?; done
    return "$code"
}

put_code() {
    local folder install pack=(git -C "$repo" archive --format=tar.gz HEAD)
    folder=$(place "$1")
    install=$(host_command "$folder" install ${extra[@]+"${extra[@]}"})
    if [[ -n $url ]]; then
        on "$1" "$(clone_command "$folder" "$url") && $install"
    elif [[ -n $dry_run ]]; then
        echo "$(quoted "${pack[@]}") | $(on "$1" "$(unpack_command "$folder") && $install")"
    else
        "${pack[@]}" | on "$1" "$(unpack_command "$folder") && $install"
    fi
}

put_variables() {
    local save
    save="umask 077 && cat >$(place "$1")/ENV"
    if [[ -n $dry_run ]]; then
        echo "# by standard input: ${variables[*]}"
        on "$1" "$save"
    else
        exports | on "$1" "$save"
    fi
}

start() {
    local words=("${run_arguments[@]}") settings=("${environment[@]}")
    [[ -z $gpus ]] || settings+=("CUDA_VISIBLE_DEVICES=$(first_gpus)")
    if ((${#hosts[@]} > 1)); then
        words+=(--coordinator "${hosts[0]#*@}:$port" --processes "${#hosts[@]}" --process "$1")
    fi
    if ((${#variables[@]})); then put_variables "$1" || return; fi
    on "$1" "env $(quoted "${settings[@]}") $(host_command "$(place "$1")" start "$run_id" "${words[@]}")"
}

state() { on "$1" "$(state_command "$(place "$1")")"; }

stop() { on "$1" "$(host_command "$(place "$1")" stop)"; }

last_lines() { on "$1" "tail -n 20 $(place "$1")/LOG"; }

by_ssh() {
    local words outcome started="" failures=0 attempts=${QSHARP_ATTEMPTS:-30}
    while true; do
        if ! words=$(everywhere state); then
            failures=$((failures + 1))
            ((started && failures < attempts)) ||
                fail "a box is out of reach by ssh, or has no login without a password; see above"
            say "a box is out of reach ($failures of $attempts in a row); trying again in $poll s"
            sleep "$poll"
            continue
        fi
        failures=0
        outcome=$(verdict "$words")
        case $outcome in
            other) fail "another run is under way on a box; \`$program stop\` with the same --hosts ends it" ;;
            unknown) fail "the boxes said something else than their program's state: $words" ;;
            running)
                ((started)) || say "running on ${#hosts[@]} box(es); \`$program attach\` shows the log"
                started=1
                sleep "$poll"
                continue
                ;;
        esac
        if ! ((started)); then
            say "installing on ${#hosts[@]} box(es)"
            everywhere put_code || { say "that failed on a box; see above" && exit 1; }
            say "starting qsharp run $(quoted "${run_arguments[@]}")"
            everywhere start || { everywhere stop && exit 1; }
            started=1
            continue
        fi
        if [[ $outcome == "ended 0" ]]; then
            say "done"
            exit 0
        fi
        everywhere stop || true
        everywhere last_lines >&2 || true
        [[ $outcome != none ]] || {
            say "the program is gone from a box, without an exit code; was it rebooted? Typed again, it resumes"
            exit 1
        }
        say "the program ended with exit code ${outcome##* }"
        exit "${outcome##* }"
    done
}

show_by_ssh() {
    echo "# what the boxes are doing:"
    everywhere state
    echo "# unless this run is under way there:"
    everywhere put_code
    everywhere start
    echo "# until the program has ended on every box, every $poll s:"
    everywhere state
    echo "# if it failed on a box:"
    everywhere stop
    everywhere last_lines
}

read_options "$@"
read_environment
if [[ $command == attach ]]; then
    on 0 "$(host_command "$(place 0)" log)"
elif [[ $command == status ]]; then
    everywhere state
elif [[ $command == stop ]]; then
    everywhere stop
elif [[ -n $nodes ]]; then
    slurm
elif ((${#hosts[@]} == 0)); then
    here
elif [[ -n $dry_run ]]; then
    show_by_ssh
else
    by_ssh
fi
