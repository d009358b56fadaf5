#!/usr/bin/env bash
# Install ddistill on a Cloud TPU VM, or on every worker of a slice, and check that JAX sees the TPUs.
set -euo pipefail

usage() {
    cat <<'END'
Install ddistill with JAX for TPUs into a virtual environment, and check that JAX sees the TPUs.

  bash tpu_setup.sh --here [OPTIONS]
      on the TPU VM itself, from a checkout of ddistill

  bash tpu_setup.sh --name NAME --zone ZONE [--project PROJECT] [OPTIONS]
      from your own machine, on every worker of a slice that exists: copies this checkout to each and installs it
      there, through `gcloud compute tpus tpu-vm`, which must be installed and logged in

Options
  --venv DIR          the virtual environment on the TPU VM, ~/ddistill-venv by default; it is kept if it is there
  --python PYTHON     the interpreter on the TPU VM; by default the newest of python3.13, 3.12, 3.11 and python3
  --install-python    where there is no Python 3.11 or later, install python3.11 with apt-get and sudo
  --slice             with --here: this VM is one of several workers, which all run this at the same time
  --dry-run           print the commands and run none
  --help              this text

Then, on the VM:   source ~/ddistill-venv/bin/activate && ddistill quickstart
On a slice the same command has to run on all workers at once:
  gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command "..."

What this script does not do yet: create, start, resize or delete TPUs; wait for queued resources; restart runs that
stop or are preempted; copy data or results. `ddistill` itself does not yet join the workers of a slice into one run: use
one VM. The script was tested with a stand-in for gcloud and on machines without TPUs, not yet on a TPU VM.
END
}

fail() {
    printf 'tpu_setup.sh: %s\n' "$1" >&2
    exit 2
}

# run COMMAND...: print a command and, unless this is a dry run, carry it out.
run() {
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    if ((dry == 0)); then "$@"; fi
}

here=0 several=0 dry=0 install_python=0
name='' zone='' project='' python='' venv=''
while (($#)); do
    case $1 in
        --name | --zone | --project | --python | --venv)
            if (($# < 2)) || [[ $2 == --* || -z $2 ]]; then fail "$1 needs a value; see --help"; fi
            case $1 in
                --name) name=$2 ;;
                --zone) zone=$2 ;;
                --project) project=$2 ;;
                --python) python=$2 ;;
                --venv) venv=$2 ;;
            esac
            shift
            ;;
        --here) here=1 ;;
        --slice) several=1 ;;
        --install-python) install_python=1 ;;
        --dry-run) dry=1 ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
    shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[[ -f $root/pyproject.toml ]] || fail "$root is not a checkout of ddistill: it has no pyproject.toml"

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
    run "$venv/bin/pip" install --upgrade "${root}[tpu]"
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
        printf '+ %q -c "jax.devices(%s)"  # must find at least one\n' "$venv/bin/python" "'tpu'"
    else
        env -u JAX_PLATFORMS "$venv/bin/python" -c "$code" "$several"
    fi
}

install_on_workers() {
    local where=(--zone "$zone" --worker=all) remote archive temporary
    if [[ -n $project ]]; then where+=(--project "$project"); fi
    if ((dry == 0)) && ! command -v gcloud >/dev/null; then
        fail "gcloud is not installed here: install the Google Cloud CLI and run 'gcloud auth login', or use --here on the VM"
    fi
    temporary=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of now
    trap "rm -rf '$temporary'" EXIT
    archive=$temporary/ddistill-source.tar.gz
    remote="rm -rf ddistill-source && mkdir ddistill-source && tar -xzf ddistill-source.tar.gz -C ddistill-source"
    remote+=" && bash ddistill-source/tpu_setup.sh --here --slice"
    if ((install_python)); then remote+=" --install-python"; fi
    if [[ -n $python ]]; then remote+=$(printf ' --python %q' "$python"); fi
    if [[ -n $venv ]]; then remote+=$(printf ' --venv %q' "$venv"); fi

    run tar -czf "$archive" --exclude=__pycache__ -C "$root" \
        pyproject.toml README.md LICENSE tpu_setup.sh ddistill experiments
    run gcloud compute tpus tpu-vm scp "$archive" "$name:ddistill-source.tar.gz" "${where[@]}"
    run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "$remote"
}

if ((here)); then
    [[ -z $name$zone$project ]] || fail "--here installs on this machine: leave --name, --zone and --project out"
    install_here
else
    if [[ -z $name && -z $zone ]]; then
        fail "say where to install: --here on a TPU VM, or --name NAME --zone ZONE for the workers of a slice; see --help"
    fi
    [[ -n $name ]] || fail "--name is missing: the name of the TPU slice ('gcloud compute tpus tpu-vm list --zone $zone')"
    [[ -n $zone ]] || fail "--zone is missing: the zone of the slice, us-central2-b for example"
    ((several == 0)) || fail "--slice belongs to --here"
    install_on_workers
fi
