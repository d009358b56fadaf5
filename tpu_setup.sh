#!/usr/bin/env bash
# Cloud TPU VMs and pod slices for ddistill: create one, install on every worker, start a run that survives preemption,
# watch it, stop it, delete the slice. experiments/pods.md goes through it in the order in which one types it.
set -euo pipefail

usage() {
    cat <<'END'
Run experiments on Cloud TPU VMs and pod slices.

  bash tpu_setup.sh COMMAND --name NAME --zone ZONE [--project PROJECT] [OPTIONS]
      from your own machine, through `gcloud compute tpus`, which must be installed and logged in

  create      create the slice, or find it, and wait until it is ready
  install     copy this checkout to every worker, install it there, and check that JAX sees the TPUs; the default
  start EXPERIMENT --workdir gs://BUCKET/FOLDER [FLAGS]
              run `ddistill distill EXPERIMENT ...` on all workers in the background: begun again after preemption and
              crashes, see experiments/supervise.sh; what follows EXPERIMENT is passed on as it is
  up EXPERIMENT ...         create, install, start
  supervise EXPERIMENT ...  whatever of create, install and start is missing, and again after the slice was preempted,
              until the run is done; it may be ended and repeated at any time
  log         the run's log on one worker, as it grows
  status      of the slice, and of the run on every worker
  stop        let the run save and leave, on all workers
  delete      stop the run and delete the slice, which ends its costs

  bash tpu_setup.sh --here [OPTIONS]
      install on this machine, a TPU VM, from a checkout of ddistill

Options of create, up and supervise
  --accelerator-type TYPE   v5litepod-16, v5p-32, v6e-256, ...
  --version VERSION         the TPU VM's software; the one for JAX if it is left out
  --spot                    cheaper, and may be preempted at any time
  --reserved                from your reservation
  --queued                  as a queued resource, which waits for its turn; --valid-until 6h: give up after that
  --create-flag FLAG        one more flag for gcloud's create, --create-flag=--network=NAME for example; repeatable
Options of start, up and supervise
  --env NAME=VALUE          in the run's environment; repeatable
  --restarts N              crashes in a row after which a worker gives up, 10 by default
Options of supervise
  --recreate N              preemptions after which it gives up, 100 by default
  --then-delete             delete the slice when the run is done, or has failed
Options of several
  --run RUN                 the name of the run, NAME by default (start, log, status, stop, supervise)
  --worker N                whose log, 0 by default
  --lines N, --no-follow    how much of the log, and not what comes
  --wait SECONDS            until stop uses force, 120 by default
  --every SECONDS           between looks at a slice, 30 by default
  --internal-ip, --tunnel-through-iap   how gcloud reaches workers without public addresses; the second is gcloud alpha's
  --dry-run                 print the commands and run none
Options of install, up, supervise and --here
  --extras LIST       of the package, beside tpu: images,text where the data asks for them
  --prepare COMMAND   after the installation, on every worker in its home folder: to fetch data, for example (not --here)
  --venv DIR          the virtual environment on the TPU VM, ~/ddistill-venv by default; it is kept if it is there
  --python PYTHON     the interpreter on the TPU VM; by default the newest of python3.13, 3.12, 3.11 and python3
  --install-python    where there is no Python 3.11 or later, install python3.11 with apt-get and sudo
  --slice             with --here: this VM is one of several workers, which all run this at the same time

A slice is one node of one or more workers: multislice is not handled. The commands were tested with a stand-in for
gcloud that knows the flags of Google Cloud CLI 528, and not yet on TPUs.
END
}

# Exit status 2: what was asked for cannot be done as it is written. 1: it was tried, and did not work.
fail() {
    printf 'tpu_setup.sh: %s\n' "$*" >&2
    exit 2
}

give_up() {
    printf 'tpu_setup.sh: %s\n' "$*" >&2
    exit 1
}

# run COMMAND...: print a command and, unless this is a dry run, carry it out.
run() {
    printf '+%s\n' "$(quoted "$@")"
    if ((dry == 0)); then "$@"; fi
}

# quoted WORDS...: each after a space, as a shell reads it; printf's %q escapes character by character, which nobody reads.
quoted() {
    local word
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_@%+=:,./~-]+$ ]]; then
            printf ' %s' "$word"
        else
            printf " '%s'" "${word//\'/\'\\\'\'}"
        fi
    done
}

command=install
case ${1:-} in
    create | install | start | up | supervise | log | status | stop | delete)
        command=$1
        shift
        ;;
    '' | -*) ;;
    *) fail "unknown command '$1': it is one of create, install, start, up, supervise, log, status, stop, delete" ;;
esac

here=0 several=0 dry=0 install_python=0 queued=0 follow=1 then_delete=0
name='' zone='' project='' python='' venv='' extras='' prepare='' type='' version='' until='' job='' tunnel=''
restarts=10 recreate=100 every=30 patience=120 worker=0 lines=100
create_flags=() environment=() ssh_flags=()
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
        --create-flag | --env)
            (($# > 1)) || fail "$1 needs a value; see --help"
            if [[ $1 == --env ]]; then
                [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env needs NAME=VALUE, and got '$2'"
                environment+=("$2")
            else
                create_flags+=("$2")
            fi
            shift
            ;;
        --name | --zone | --project | --python | --venv | --extras | --prepare | --accelerator-type | --version | \
            --valid-until | --run)
            if (($# < 2)) || [[ $2 == --* || -z $2 ]]; then fail "$1 needs a value; see --help"; fi
            case $1 in
                --name) name=$2 ;;
                --zone) zone=$2 ;;
                --project) project=$2 ;;
                --python) python=$2 ;;
                --venv) venv=$2 ;;
                --extras) extras=$2 ;;
                --prepare) prepare=$2 ;;
                --accelerator-type) type=$2 ;;
                --version) version=$2 ;;
                --valid-until) until=$2 queued=1 ;;
                --run) job=$2 ;;
            esac
            shift
            ;;
        --restarts | --recreate | --every | --wait | --worker | --lines)
            if (($# < 2)) || [[ ! $2 =~ ^[0-9]+$ && ! ($1 == --every && $2 =~ ^[0-9.]+$) ]]; then
                fail "$1 needs a number; see --help"
            fi
            case $1 in
                --restarts) restarts=$2 ;;
                --recreate) recreate=$2 ;;
                --every) every=$2 ;;
                --wait) patience=$2 ;;
                --worker) worker=$2 ;;
                --lines) lines=$2 ;;
            esac
            shift
            ;;
        --here) here=1 ;;
        --slice) several=1 ;;
        --install-python) install_python=1 ;;
        --spot | --reserved) create_flags+=("$1") ;;
        --queued) queued=1 ;;
        --then-delete) then_delete=1 ;;
        --no-follow) follow=0 ;;
        --internal-ip) ssh_flags+=("$1") ;;
        --tunnel-through-iap) ssh_flags+=("$1") tunnel=alpha ;;
        --dry-run) dry=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) fail "unknown argument '$1'; see --help" ;;
        *) break ;;
    esac
    shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $root/pyproject.toml ]] || fail "$root is not a checkout of ddistill: it has no pyproject.toml"

# --- on a TPU VM

suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3)
    if [[ -n $python ]]; then candidates=("$python"); fi
    for candidate in "${candidates[@]}"; do
        if suitable "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
}

install_here() {
    local found
    venv=${venv:-$HOME/ddistill-venv}
    found=$(find_python)
    if [[ -z $found && -n $python ]]; then
        fail "$python is not Python 3.11 or later with venv and ensurepip"
    fi
    if [[ -z $found ]] && ((install_python)); then
        run sudo apt-get update
        run sudo apt-get install --yes python3.11 python3.11-venv
        found=python3.11
    fi
    if [[ -z $found ]]; then
        fail "no Python 3.11 or later with venv here; repeat with --install-python, or name one with --python"
    fi
    if [[ ! -x $venv/bin/python ]]; then run "$found" -m venv "$venv"; fi
    run "$venv/bin/pip" install --upgrade "${root}[tpu${extras:+,$extras}]"
    check_devices
}

check_devices() {
    local code='
import sys
import jax
if sys.argv[1] == "1":
    jax.distributed.initialize()  # waits for the other workers
try:
    devices = jax.devices("tpu")
except RuntimeError as error:
    sys.exit(f"tpu_setup.sh: JAX {jax.__version__} sees no TPU on this machine ({error})")
print(f"worker {jax.process_index()} of {jax.process_count()}: {len(jax.local_devices())} of {len(devices)} "
      f"devices of kind {devices[0].device_kind}, JAX {jax.__version__}")
'
    if ((dry)); then
        printf '+%s -c "jax.devices(%s)"  # must find at least one\n' "$(quoted "$venv/bin/python")" "'tpu'"
    else
        env -u JAX_PLATFORMS "$venv/bin/python" -c "$code" "$several"
    fi
}

# --- from your own machine; functions that supervise calls answer a status, for in its conditions set -e is off

# on WORKER COMMAND: run a command on a worker, or on all.
on() {
    run gcloud ${tunnel:+"$tunnel"} compute tpus tpu-vm ssh "$name" "${where[@]/%=all/=$1}" \
        ${ssh_flags[@]+"${ssh_flags[@]}"} --command "$2"
}

# send FILE PATH: copy a file to all workers.
send() {
    run gcloud ${tunnel:+"$tunnel"} compute tpus tpu-vm scp "$1" "$name:$2" "${where[@]}" \
        ${ssh_flags[@]+"${ssh_flags[@]}"}
}

# look KIND FIELD: a field of the node (tpu-vm) or of the request for it (queued-resources); ABSENT where it is not
# there, and UNREACHABLE where that could not be found out.
look() {
    local answer
    if answer=$(gcloud compute tpus "$1" describe "$name" "${place[@]}" --format "value($2)" 2>"$temporary/error"); then
        printf '%s' "${answer:-UNKNOWN}"
    elif [[ $(<"$temporary/error") == *NOT_FOUND* ]]; then
        printf 'ABSENT'
    else
        cat "$temporary/error" >&2
        printf 'UNREACHABLE'
    fi
}

# The state of the node, or, before it is there and after it was taken away, that of the request for it.
state_of_slice() {
    local request node
    request=$(look queued-resources state.state)
    node=$request
    if [[ $request == ABSENT || $request == ACTIVE ]]; then node=$(look tpu-vm state); fi
    if [[ $request == ACTIVE && $node == ABSENT ]]; then node=PROVISIONING; fi
    printf '%s' "$node"
}

create_slice() {
    local flags=(--accelerator-type "$type")
    if ((queued)); then
        flags+=(--node-id "$name" --runtime-version "$version")
        if [[ -n $until ]]; then flags+=(--valid-until-duration "$until"); fi
        run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${flags[@]}" \
            ${create_flags[@]+"${create_flags[@]}"}
    else
        run gcloud compute tpus tpu-vm create "$name" "${place[@]}" "${flags[@]}" --version "$version" \
            ${create_flags[@]+"${create_flags[@]}"}
    fi
}

delete_slice() {
    if ((dry)); then
        printf '# that of the two which is there:\n'
        run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
        run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    elif [[ $(look queued-resources state.state) != ABSENT ]]; then
        run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
    fi
}

why_failed() {
    printf 'the request for %s failed: %s; delete it before you try again' "$name" \
        "$(look queued-resources state.failedData.error.message)"
}

create() {
    local state before='' found created=0
    if ((dry)); then
        run gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format "value(state.state)"
        run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format "value(state)"
        printf '# where neither is there:\n'
        create_slice
        return
    fi
    while :; do
        state=$(state_of_slice)
        if [[ $state != "$before" ]]; then printf '%s: %s\n' "$name" "$state"; fi
        case $state in
            READY)
                found=$(look tpu-vm acceleratorType)
                [[ $found == "${type,,}" ]] ||
                    fail "$name is there, and is $found, not $type: take another --name or delete it"
                return
                ;;
            ABSENT)
                ((created == 0)) || give_up "$name was created, and is not there"
                create_slice || give_up "$name could not be created: gcloud's words are above"
                created=1
                ;;
            FAILED) give_up "$(why_failed)" ;;
            SUSPENDED | PREEMPTED | TERMINATED | STOPPED | HIDDEN)
                give_up "$name was taken away or stopped; 'delete' it and create it anew, or let 'supervise' do that"
                ;;
            UNREACHABLE) give_up "the state of $name could not be read: gcloud's words are above" ;;
        esac
        before=$state
        sleep "$every"
    done
}

install() {
    local remote archive=$temporary/ddistill-source.tar.gz
    remote="rm -rf ddistill-source && mkdir ddistill-source && tar -xzf ddistill-source.tar.gz -C ddistill-source"
    remote+=" && bash ddistill-source/tpu_setup.sh --here --slice"
    if ((install_python)); then remote+=" --install-python"; fi
    if [[ -n $python ]]; then remote+=" --python$(quoted "$python")"; fi
    if [[ -n $venv ]]; then remote+=" --venv$(quoted "$venv")"; fi
    if [[ -n $extras ]]; then remote+=" --extras$(quoted "$extras")"; fi
    if [[ -n $prepare ]]; then remote+=" && bash -c$(quoted "$prepare")"; fi

    run tar -czf "$archive" --exclude=__pycache__ -C "$root" \
        pyproject.toml README.md LICENSE tpu_setup.sh ddistill experiments &&
        send "$archive" ddistill-source.tar.gz && on all "$remote"
}

# start EXPERIMENT FLAGS...: every worker gets the file as it is here, unless the run is going.
start() {
    local words file=ddistill-runs/$job/${1##*/} arrived=ddistill-experiment-$job.py remote
    words=$(quoted "${venv:-ddistill-venv}/bin/ddistill" distill "$file" "${@:2}")
    if ((${#environment[@]})); then words=" env$(quoted "${environment[@]}")$words"; fi
    remote="if [ \"\$($supervisor state $job)\" != running ]; then mkdir -p ddistill-runs/$job &&"
    remote+=" mv $arrived$(quoted "$file"); fi && $supervisor start $job --restarts $restarts --$words"
    send "$1" "$arrived" && on all "$remote"
}

log() {
    local follows=''
    if ((follow)); then follows=' --follow'; fi
    on "$worker" "$supervisor log $job --lines $lines$follows"
}

status() {
    local state=READY
    if ((dry == 0)); then
        state=$(state_of_slice)
        printf '%s: %s\n' "$name" "$state"
    fi
    if [[ $state == READY ]]; then on all "$supervisor status $job"; fi
}

stop() {
    on all "$supervisor stop $job --wait $patience"
}

delete() {
    if ((dry)) || [[ $(state_of_slice) == READY ]]; then
        stop || printf 'tpu_setup.sh: the run could not be stopped; the slice is deleted nevertheless\n' >&2
    fi
    delete_slice || give_up "$name could not be deleted: gcloud's words are above; it costs money until it is"
}

# The states of the run on all workers, each once; UNREACHABLE where a worker does not answer.
states_of_run() {
    local file=ddistill-source/experiments/supervise.sh answer state
    answer=$(on all "printf 'run-is %s\\n' \"\$(if [ -f $file ]; then $supervisor state $job; else echo uninstalled; fi)\"") ||
        printf 'UNREACHABLE '
    for state in uninstalled absent lost running stopped failed finished; do
        if [[ $answer == *$'\n'"run-is $state"* ]]; then printf '%s ' "$state"; fi
    done
}

# ended WORDS STATUS: of supervise.
ended() {
    printf 'tpu_setup.sh: %s\n' "$1"
    if ((then_delete)); then delete_slice || give_up "$name could not be deleted: it costs money until it is"; fi
    exit "$2"
}

supervise() {
    local state before='' created=0 troubles=0 seen=0
    if ((dry)); then
        create
        install
        start "$@"
        printf '# every %s s, until the run is done; after a preemption the slice is deleted, and all begins again:\n' "$every"
        states_of_run >/dev/null
        on all "$supervisor state $job"
        delete_slice
        return
    fi
    while :; do
        state=$(state_of_slice)
        if [[ $state == READY ]]; then state="READY, run: $(states_of_run)"; fi
        if [[ $state != "$before" ]]; then printf '%(%Y-%m-%dT%H:%M:%S)T  %s: %s\n' -1 "$name" "$state"; fi
        before=$state
        case $seen$state in
            *UNREACHABLE*) troubles=$((troubles + 1)) ;;
            ?READY*uninstalled*)
                if install && start "$@"; then troubles=0; else troubles=$((troubles + 1)); fi
                ;;
            0READY*failed* | 0READY*stopped* | ?READY*absent* | ?READY*lost*)
                # Typed anew after a stop or a failure, it goes on; what happens under its eyes ends it.
                if start "$@"; then troubles=0; else troubles=$((troubles + 1)); fi
                ;;
            ?READY*failed*)
                stop || true
                ended "the run failed on a worker; see 'log' and, on each worker, ddistill-runs/$job/log" 1
                ;;
            ?READY*stopped*) ended 'the run was stopped' 0 ;;
            ?READY*running*) troubles=0 ;;
            ?READY*finished*) ended 'the run is done' 0 ;;
            ?FAILED) give_up "$(why_failed)" ;;
            ?SUSPENDED | ?PREEMPTED | ?TERMINATED) if ! delete_slice; then troubles=$((troubles + 1)); fi ;;
            ?ABSENT)
                ((created <= recreate)) || give_up "$name was taken away $created times: given up; see --recreate"
                # What could be created once is wanted for as long as nothing is free.
                if create_slice; then
                    created=$((created + 1)) troubles=0
                else
                    troubles=$((troubles + (created + seen == 0)))
                fi
                ;;
            ?STOPPED | ?HIDDEN) give_up "$name is $state: 'gcloud compute tpus tpu-vm start' or 'delete' it" ;;
            *) troubles=0 ;;
        esac
        if [[ $state == READY* ]] && ((troubles == 0)); then seen=1; fi
        ((troubles < 20)) || give_up 'twenty attempts in a row did not work: given up; gcloud and the workers say why above'
        sleep "$every"
    done
}

default_version() {
    case ${type,,} in
        v6e-*) printf 'v2-alpha-tpuv6e' ;;
        v5p-*) printf 'v2-alpha-tpuv5' ;;
        v5litepod-*) printf 'v2-alpha-tpuv5-lite' ;;
        v2-* | v3-* | v4-*) printf 'tpu-ubuntu2204-base' ;;
        *) fail "--version is missing: which software $type needs is not known here; those that there are:" \
            "'gcloud compute tpus tpu-vm versions list --zone $zone'" ;;
    esac
}

# What start needs, checked before anything is created.
check_experiment() {
    local i word workdir=''
    (($#)) || fail "say which experiment: $command --name $name ... EXPERIMENT.py --workdir gs://BUCKET/FOLDER"
    [[ -f $1 ]] || fail "there is no experiment $1; an experiment is a Python file"
    for ((i = 2; i <= $#; i++)); do
        word=${!i}
        if [[ $word == --workdir=* ]]; then workdir=${word#*=}; fi
        if [[ $word == --workdir ]] && ((i < $#)); then i=$((i + 1)) workdir=${!i}; fi
    done
    [[ -n $workdir ]] || fail "--workdir is missing after the experiment: a folder that outlives the slice, gs://BUCKET/FOLDER"
    if [[ $workdir != *://* ]]; then
        printf 'tpu_setup.sh: note: %s is a folder on the workers: checkpoints in it go with the slice, and workers %s\n' \
            "$workdir" "do not share it, unless it is on a network file system" >&2
    fi
}

((BASH_VERSINFO[0] >= 4)) || fail "bash 4 or later is needed, and this is $BASH_VERSION (on macOS: brew install bash)"
if ((here)); then
    [[ $command == install && $# == 0 ]] || fail "--here installs on this machine, and takes no command and no experiment"
    [[ -z $name$zone$project$prepare ]] || fail "--here installs on this machine: leave --name, --zone, --project and --prepare out"
    install_here
    exit
fi
if [[ -z $name && -z $zone ]]; then
    if [[ $command == install ]]; then
        fail "say where to install: --here on a TPU VM, or --name NAME --zone ZONE for the workers of a slice; see --help"
    fi
    fail "say which slice: --name NAME --zone ZONE; see --help"
fi
[[ -n $name ]] || fail "--name is missing: the name of the TPU slice ('gcloud compute tpus tpu-vm list --zone $zone')"
[[ -n $zone ]] || fail "--zone is missing: the zone of the slice, us-central2-b for example"
((several == 0)) || fail "--slice belongs to --here"
job=${job:-$name}
[[ $job =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "--run takes letters, digits, '.', '_' and '-', and got '$job'"
case $command in
    create | up | supervise)
        [[ -n $type ]] || fail "--accelerator-type is missing: v5litepod-16 for example; those that there are:" \
            "'gcloud compute tpus accelerator-types list --zone $zone'"
        if [[ -z $version ]]; then version=$(default_version); fi
        ;;
esac
case $command in
    start | up | supervise) check_experiment "$@" ;;
    *) (($# == 0)) || fail "$command takes no further words, and got '$1'; see --help" ;;
esac
if ((dry == 0)) && ! command -v gcloud >/dev/null; then
    fail "gcloud is not installed here: install the Google Cloud CLI and run 'gcloud auth login', or use --here on the VM"
fi
place=(--zone "$zone")
where=(--zone "$zone" --worker=all)
if [[ -n $project ]]; then place+=(--project "$project") where+=(--project "$project"); fi
supervisor='bash ddistill-source/experiments/supervise.sh'
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
case $command in
    up)
        create
        install || give_up "the installation did not work on all workers: their words are above"
        start "$@" || give_up "the run was not started on all workers: their words are above"
        printf 'Next: bash tpu_setup.sh log --name %s --zone %s; and status, stop, delete\n' "$name" "$zone"
        ;;
    *) "$command" "$@" ;;
esac
