#!/usr/bin/env bash
# A run on GPUs under SLURM: submit it, let it go on after preemptions and time limits, read its log, stop it.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#
# One task for each GPU: every process then feeds one GPU, host work (data, logs, checkpoints) is shared out, a process
# that dies takes one GPU's work with it, and it is what JAX and ddistill make of a step with several tasks on a node.
# GPUs are asked for per node, not per task: bound to tasks, SLURM may hide the neighbours' GPUs, which NCCL wants to see.
# One task on a node, --tasks-per-node 1, drives all GPUs of it as well.
set -euo pipefail

usage() {
    cat <<'END'
Run experiments on GPUs under SLURM.

  bash experiments/slurm.sh submit [OPTIONS] EXPERIMENT --workdir FOLDER [FLAGS OF ddistill distill]
      one job, which is queued again when it is preempted, reaches its time limit (two minutes before it SLURM tells it,
      and it saves) or crashes, and goes on in its folder
        --nodes N            1 by default
        --gpus-per-node N    1 by default; 0 asks for none
        --tasks-per-node N   as many as GPUs, or 1
        --sbatch OPTION      one more option of sbatch, repeatable: --sbatch=--partition=gpu, --sbatch=--time=24:00:00,
                             --sbatch=--cpus-per-task=8 (one for each task by default, which is few for images)
        --restarts N         crashes in a row after which it gives up, 3 by default
        --dry-run            print the command and run none
  bash experiments/slurm.sh log FOLDER [--no-follow]
  bash experiments/slurm.sh status FOLDER
  bash experiments/slurm.sh stop FOLDER
      it saves and leaves, and is not queued again; submitted again it goes on

FOLDER is the run's, on a file system that all nodes see, or in a bucket. The job's number and log are beside it, in
FOLDER.slurm/, or in the folder where you are. The job has the environment of the shell that submits it: activate the
one with ddistill first. `sbatch OPTIONS experiments/slurm.sh job EXPERIMENT --workdir FOLDER ...` is what submit does.
END
}

fail() {
    printf 'slurm.sh: %s\n' "$*" >&2
    exit 2
}

note() {
    printf 'slurm.sh: %s  %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"
}

# workdir_of FLAGS...: the value of --workdir.
workdir_of() {
    local found=''
    while (($#)); do
        case $1 in
            --workdir=*) found=${1#*=} ;;
            --workdir) found=${2:-} ;;
        esac
        shift
    done
    [[ -n $found ]] || fail "--workdir FOLDER is missing after the experiment"
    printf '%s' "$found"
}

# Where a run's job number and log are.
notes_of() {
    local folder=${1%/}
    if [[ $folder == *://* ]]; then folder=${folder##*/}; fi
    printf '%s.slurm' "$folder"
}

number_of() {
    local file
    file=$(notes_of "$1")/job
    [[ -f $file ]] || fail "there is no $file: nothing was submitted for $1 from here"
    printf '%s' "$(<"$file")"
}

# queued NUMBER: the state of a job, and why it waits, or nothing where it has left the queue.
queued() {
    squeue --noheader --jobs "$1" --format '%T %r' 2>/dev/null || true
}

submit() {
    local nodes=1 gpus=1 tasks='' restarts=3 dry=0 more=() experiment workdir notes words number
    while (($#)); do
        if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
        case $1 in
            --nodes | --gpus-per-node | --tasks-per-node | --restarts)
                [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 needs a number; see --help"
                case $1 in
                    --nodes) nodes=$2 ;;
                    --gpus-per-node) gpus=$2 ;;
                    --tasks-per-node) tasks=$2 ;;
                    --restarts) restarts=$2 ;;
                esac
                shift
                ;;
            --sbatch)
                [[ ${2:-} == -* ]] || fail "--sbatch needs an option: --sbatch=--partition=gpu for example"
                more+=("$2")
                shift
                ;;
            --dry-run) dry=1 ;;
            -h | --help)
                usage
                exit
                ;;
            -*) fail "unknown argument '$1' before the experiment; see --help" ;;
            *) break ;;
        esac
        shift
    done
    (($#)) || fail "say which experiment: submit [OPTIONS] EXPERIMENT.py --workdir FOLDER"
    experiment=$1
    [[ -f $experiment ]] || fail "there is no experiment $experiment; an experiment is a Python file"
    workdir=$(workdir_of "$@")
    if [[ -z $tasks ]]; then tasks=$((gpus > 0 ? gpus : 1)); fi
    notes=$(notes_of "$workdir")
    words=(
        sbatch --parsable --job-name "$(basename "$workdir")" --output "$notes/log"
        --nodes "$nodes" --ntasks-per-node "$tasks"
    )
    if ((gpus > 0)); then words+=(--gpus-per-node "$gpus"); fi
    words+=(--export "ALL,DDISTILL_CRASHES=$restarts" ${more[@]+"${more[@]}"} "${BASH_SOURCE[0]}" job "$@")
    if ((dry)); then
        printf '+'
        printf ' %q' "${words[@]}"
        printf '\n'
        return
    fi
    command -v sbatch >/dev/null || fail "there is no sbatch here: submit from a login node of the cluster"
    if [[ -f $notes/job && -n $(queued "$(<"$notes/job")") ]]; then
        fail "job $(<"$notes/job") works on $workdir already: 'status' or 'stop' it"
    fi
    mkdir -p "$notes"
    rm -f "$notes/crashes"
    : >>"$notes/log"
    number=$("${words[@]}")
    printf '%s\n' "${number%%;*}" >"$notes/job"
    printf 'job %s, log in %s\n' "${number%%;*}" "$notes/log"
}

# task EXPERIMENT FLAGS...: one process. srun answers the highest status of all, and one that fails should not hide behind
# the 75 of those that leave because of it: 1 and 2 become 101 and 102. JAX may abort those instead, which is 75 as well,
# and so is 143, SIGTERM before ddistill hears it.
task() {
    local status=0 said
    said=$(mktemp)
    trap : TERM
    ddistill distill "$@" 2> >(trap '' TERM; exec tee "$said" >&2) || status=$?
    if ((status == 134)); then
        sleep 1 # tee may be behind; it does not end while what the process left behind can write
        if grep -q 'Terminating process because the JAX distributed service detected fatal errors' "$said"; then status=75; fi
    fi
    rm -f "$said"
    case $status in
        1 | 2) status=$((status + 100)) ;;
        143) status=75 ;;
    esac
    exit "$status"
}

# job EXPERIMENT FLAGS...: the batch script itself, on the first node.
job() {
    local crashes status heard=0 stopping=0 notes
    [[ -n ${SLURM_JOB_ID:-} ]] || fail "job is what sbatch runs; use submit"
    notes=$(notes_of "$(workdir_of "$@")")
    mkdir -p "$notes"
    note "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} tasks, queued again ${SLURM_RESTART_COUNT:-0} times: $*"
    # To the tasks of all nodes; ddistill ends its step, saves, and leaves with status 75.
    trap 'heard=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
    trap 'heard=1 stopping=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
    export PYTHONUNBUFFERED=1
    # Unlike the rest of what sbatch was asked for, srun does not take this over.
    if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    # One process that ends does not end the others, which may be saving; ten minutes after the first one they are.
    srun --kill-on-bad-exit=0 --wait=600 --label bash -c "$(declare -f task); task \"\$@\"" task "$@" &
    while :; do
        heard=0 status=0
        wait "$!" || status=$?
        ((heard)) || break
    done
    case $status in 101 | 102) status=$((status - 100)) ;; esac
    note "ended with status $status"
    if ((status == 0)); then
        rm -f "$notes/crashes"
        exit 0
    fi
    if ((stopping)); then
        note 'stopped; submit it again to go on'
        exit 0
    fi
    case $status in
        75) rm -f "$notes/crashes" ;;
        2 | 130)
            note 'not queued again: the command cannot be carried out, or was interrupted by hand'
            exit "$status"
            ;;
        *)
            crashes=$(($(cat "$notes/crashes" 2>/dev/null || printf 0) + 1))
            printf '%s\n' "$crashes" >"$notes/crashes"
            if ((crashes > ${DDISTILL_CRASHES:-3})); then
                note "crashed $crashes times in a row: given up"
                exit "$status"
            fi
            ;;
    esac
    note 'queued again'
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
}

log() {
    local file
    file=$(notes_of "$1")/log
    [[ -f $file ]] || fail "there is no log $file: nothing was submitted for $1 from here"
    if [[ ${2:-} == --no-follow ]]; then tail -n 100 "$file"; else exec tail -n 100 -F "$file"; fi
}

status() {
    local number state
    number=$(number_of "$1")
    state=$(queued "$number")
    printf 'job %s: %s\n' "$number" "${state:-has left the queue}"
    if [[ -f $(notes_of "$1")/log ]]; then tail -n 5 "$(notes_of "$1")/log" | sed 's/^/  | /'; fi
}

stop() {
    local number state
    number=$(number_of "$1")
    state=$(queued "$number")
    case $state in
        '') printf 'job %s has left the queue\n' "$number" ;;
        RUNNING*)
            scancel --signal=USR1 --batch "$number"
            printf 'job %s saves and leaves; see status and log\n' "$number"
            ;;
        *)
            scancel "$number"
            printf 'job %s was waiting, and is cancelled\n' "$number"
            ;;
    esac
}

action=${1:-}
case $action in
    '' | -h | --help) usage ;;
    submit | job)
        shift
        "$action" "$@"
        ;;
    log | status | stop)
        [[ -n ${2:-} ]] || fail "$action needs the run's folder"
        "$action" "${@:2}"
        ;;
    *) fail "unknown command '$action'; it is one of submit, log, status, stop; see --help" ;;
esac
