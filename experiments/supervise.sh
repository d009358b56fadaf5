#!/usr/bin/env bash
# Keep one named run going on this machine: start it in the background, and again when it was preempted or crashed.
# tpu_setup.sh calls this on every worker of a slice; it serves any machine with bash, flock and setsid as well.
set -euo pipefail

usage() {
    cat <<'END'
Keep a run going on this machine.

  bash experiments/supervise.sh start RUN [--restarts N] [--pause SECONDS] -- COMMAND...
      run COMMAND in the background, here, with its output in a log, and begin it anew when it ends before it is done:
        exit status 0      it is done
        75 (EX_TEMPFAIL)   it was told to leave and has saved, or others of its run are gone: begun again, however often;
                           134 is the same where JAX says in the log that it ends the process since others are gone,
                           and 143, SIGTERM before ddistill hears it
        2                  it was asked for something impossible: its words are in the log, and it is not begun again
        130                it was interrupted by hand: not begun again
        any other          it crashed: begun again after a pause of 5 s, then 10, 20, ... at most 300 s, until it has
                           crashed --restarts times (10) in a row; one that lasted ten minutes counts as the first
  bash experiments/supervise.sh state RUN
      one word: running, finished, failed, stopped, lost (it was running when this machine or its processes were
      killed), or absent
  bash experiments/supervise.sh status RUN
      what runs, since when, how often it was begun, and the last lines of its log
  bash experiments/supervise.sh log RUN [--lines N] [--follow]
  bash experiments/supervise.sh stop RUN [--wait SECONDS]
      SIGTERM, upon which ddistill saves and leaves, and SIGKILL if it has not left after 120 s
  bash experiments/supervise.sh list

  COMMAND is `ddistill distill EXPERIMENT --workdir FOLDER` for example: begun again with the same folder it goes on
  from its last checkpoint. Logs and states are in ~/ddistill-runs/RUN/, or in $DDISTILL_RUNS/RUN/.
END
}

runs=${DDISTILL_RUNS:-$HOME/ddistill-runs}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")

fail() {
    printf 'supervise.sh: %s\n' "$1" >&2
    exit 2
}

note() {
    printf 'supervise.sh: %s  %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1"
}

is_count() {
    [[ $1 =~ ^[0-9]+$ ]]
}

# A supervisor holds a lock, which the kernel drops when it is gone, however it went.
alive() {
    [[ -e $runs/$1/lock ]] && ! flock --shared --nonblock "$runs/$1/lock" true
}

state_of() {
    local word=''
    if [[ ! -d $runs/$1 ]]; then
        printf 'absent\n'
    elif alive "$1"; then
        printf 'running\n'
    else
        if [[ -f $runs/$1/state ]]; then read -r word <"$runs/$1/state" || true; fi
        case $word in
            finished | failed | stopped) printf '%s\n' "$word" ;;
            *) printf 'lost\n' ;;
        esac
    fi
}

start() {
    local run=$1 restarts=10 pause=5 words i
    shift
    while (($#)) && [[ $1 != -- ]]; do
        case $1 in
            --restarts | --pause)
                if (($# < 2)) || ! is_count "$2"; then fail "$1 needs a number"; fi
                if [[ $1 == --restarts ]]; then restarts=$2; else pause=$2; fi
                shift 2
                ;;
            *) fail "unknown argument '$1' before --; see --help" ;;
        esac
    done
    (($# > 1)) || fail "say what to run: start $run -- ddistill distill EXPERIMENT --workdir FOLDER"
    shift
    words=$(printf '%q ' "$@")
    if alive "$run"; then
        [[ $words == "$(<"$runs/$run/command")" ]] ||
            fail "$run is running with another command; stop it first, or take another name"
        printf '%s is running already\n' "$run"
        return
    fi
    mkdir -p "$runs/$run"
    rm -f "$runs/$run/stop" "$runs/$run/state"
    printf '%s\n' "$words" >"$runs/$run/command"
    : >>"$runs/$run/lock"
    setsid nohup bash "$here" loop "$run" "$restarts" "$pause" "$@" >>"$runs/$run/log" 2>&1 </dev/null &
    for ((i = 0; i < 200; i++)); do
        if alive "$run" || [[ -f $runs/$run/state ]]; then break; fi
        sleep 0.05
    done
    printf 'started %s, log in %s\n' "$run" "$runs/$run/log"
}

# loop RUN RESTARTS PAUSE COMMAND...: the supervisor, in the foreground.
loop() {
    local folder=$runs/$1 restarts=$2 pause=$3 crashes=0 begun=0 wait_for=0 since before status heard pid
    local lost='Terminating process because the JAX distributed service detected fatal errors' # slurm.sh has it as well
    shift 3
    exec 9>>"$folder/lock"
    flock --timeout 10 9 || { note 'another supervisor runs this already'; exit 1; }
    # SIGTERM of a machine that is shut down reaches the run as well, and ddistill takes a second one as "at once": it
    # is not passed on.
    export PYTHONUNBUFFERED=1
    leaving=0 heard=0
    trap 'leaving=1 heard=1' TERM
    printf '%s\n' "$BASHPID" >"$folder/supervisor"
    while :; do
        begun=$((begun + 1))
        since=$SECONDS before=$(wc -c <"$folder/log")
        printf 'running\n%s\n%s\n' "$begun" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$folder/state"
        note "begin $begun: $*"
        setsid "$@" 9>&- &
        pid=$!
        printf '%s\n' "$pid" >"$folder/pid"
        while :; do
            heard=0 status=0
            wait "$pid" || status=$?
            ((heard)) || break
        done
        kill -KILL -- "-$pid" 2>/dev/null || true # what it left behind would hold the accelerators
        note "ended with status $status after $((SECONDS - since)) s"
        if [[ $status == 0 ]]; then ending finished 'the run is done' 0; fi
        if [[ -e $folder/stop || $status == 130 ]]; then ending stopped 'stopped; start it again to go on' 0; fi
        if [[ $status == 2 ]]; then ending failed 'not begun again: the command cannot be carried out' 1; fi
        if ((leaving)); then note 'this machine goes down; not begun again'; exit 75; fi
        if [[ $status == 143 ]]; then
            status=75
        elif [[ $status == 134 ]] && grep -q "$lost" < <(tail -c "+$((before + 1))" "$folder/log"); then
            note 'JAX has ended it, since others of its run are gone'
            status=75
        fi
        if [[ $status == 75 ]]; then
            crashes=0 wait_for=$((SECONDS - since < 30 ? pause : 0))
        else
            if ((SECONDS - since >= 600)); then crashes=0; fi
            crashes=$((crashes + 1))
            if ((crashes > restarts)); then ending failed "crashed $crashes times in a row: given up" 1; fi
            if ((crashes == 1)); then wait_for=$pause; else wait_for=$((2 * wait_for)); fi
            if ((wait_for > 300)); then wait_for=300; fi
            note "crash $crashes of at most $restarts in a row: begun again in $wait_for s"
        fi
        sleep "$wait_for" 9>&- &
        wait "$!" || true
        if [[ -e $folder/stop ]]; then ending stopped 'stopped; start it again to go on' 0; fi
        if ((leaving)); then exit 75; fi
    done
}

# ending WORD WHY STATUS: of the supervisor.
ending() {
    note "$2"
    printf '%s\n' "$1" >"$folder/state"
    exit "$3"
}

status() {
    local word begun='' since=''
    word=$(state_of "$1")
    if [[ $word == absent ]]; then
        printf '%s: absent\n' "$1"
        return
    fi
    if [[ $word == running ]]; then { read -r _; read -r begun; read -r since; } <"$runs/$1/state" || true; fi
    printf '%s: %s%s\n' "$1" "$word" "${begun:+, begun $begun times, the last time at $since}"
    printf '  command: %s\n' "$(<"$runs/$1/command")"
    tail -n 3 "$runs/$1/log" | sed 's/^/  | /'
}

log() {
    local file=$runs/$1/log lines=100 follow=()
    shift
    while (($#)); do
        case $1 in
            --lines)
                if (($# < 2)) || ! is_count "$2"; then fail '--lines needs a number'; fi
                lines=$2
                shift
                ;;
            --follow) follow=(-F) ;;
            *) fail "unknown argument '$1'; see --help" ;;
        esac
        shift
    done
    [[ -f $file ]] || fail "there is no log $file; 'list' names the runs"
    exec tail -n "$lines" ${follow[@]+"${follow[@]}"} "$file"
}

stop() {
    local run=$1 patience=120 i pid
    shift
    while (($#)); do
        [[ $1 == --wait ]] || fail "unknown argument '$1'; see --help"
        if (($# < 2)) || ! is_count "$2"; then fail '--wait needs a number of seconds'; fi
        patience=$2
        shift 2
    done
    if ! alive "$run"; then
        printf '%s is not running: %s\n' "$run" "$(state_of "$run")"
        return
    fi
    : >"$runs/$run/stop"
    pid=$(<"$runs/$run/pid")
    kill -TERM "$pid" 2>/dev/null || true
    kill -TERM "$(<"$runs/$run/supervisor")" 2>/dev/null || true
    for ((i = 0; i < patience * 10; i++)); do
        if ! alive "$run"; then break; fi
        sleep 0.1
    done
    if alive "$run"; then
        printf '%s has not left after %s s: killed; it loses what it did since its last checkpoint\n' "$run" "$patience"
        kill -KILL -- "-$(<"$runs/$run/pid")" 2>/dev/null || true
        for ((i = 0; i < 100; i++)); do
            if ! alive "$run"; then break; fi
            sleep 0.1
        done
    fi
    printf '%s: %s\n' "$run" "$(state_of "$run")"
}

list() {
    local folder
    for folder in "$runs"/*/; do
        if [[ -d $folder ]]; then printf '%s %s\n' "$(basename "$folder")" "$(state_of "$(basename "$folder")")"; fi
    done
}

action=${1:-}
case $action in
    '' | -h | --help) usage ;;
    list) list ;;
    start | state | status | log | stop | loop)
        run=${2:-}
        [[ $run =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
            fail "$action needs the name of a run, of letters, digits, '.', '_' and '-', and got '$run'"
        shift 2
        if [[ $action == state ]]; then action=state_of; fi
        "$action" "$run" "$@"
        ;;
    *) fail "unknown command '$action'; it is one of start, state, status, log, stop, list; see --help" ;;
esac
