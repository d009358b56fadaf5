"""tpu_setup.sh and the supervisor on workers, without a TPU: with a stand-in for gcloud, whose workers are folders."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from ddistill import cli
from ddistill.cli import commands

ROOT = Path(__file__).parents[1]
SCRIPT, SUPERVISE = ROOT / "tpu_setup.sh", ROOT / "experiments" / "supervise.sh"
BASH = shutil.which("bash")
PLACE = ("--name", "pod", "--zone", "z")

# What the workers' programs do: an interpreter that makes environments, pip that puts a ddistill there, and a ddistill
# that counts tenths of seconds in its work folder until the folder holds `enough`, saves on SIGTERM, and goes on.
PYTHON = """#!/bin/bash
here=$(dirname "$(readlink -f "$0")")
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin"
    ln -s "$here/python3.13" "$3/bin/python"
    ln -s "$here/pip" "$3/bin/pip"
elif [[ $2 == *jax.devices* ]]; then
    echo "worker sees its TPUs, slice $3"
fi
"""
PIP = """#!/bin/bash
echo "$@" >>"$HOME/pip"
cp "$(dirname "$(readlink -f "$0")")/training" "$(dirname "$0")/ddistill"
"""
TRAINING = """#!/bin/bash
read -r what <"$2"
case $what in *crash*) exit 1 ;; *impossible*) echo "impossible: in words"; exit 2 ;; esac
counter=$4/${HOME##*/}
mkdir -p "$4"
n=$(cat "$counter" 2>/dev/null || echo 0)
echo "$WORD begins at $n" | tee -a "$counter.log"
trap 'echo $n >"$counter"; exit 75' TERM
until [[ -e $4/enough ]]; do sleep 0.1; n=$((n + 1)); done
echo $n >"$counter"
"""


def run(*words, path=None, home=None, script=SCRIPT, **more):
    env = {**os.environ, **({"PATH": path} if path else {}), **({"HOME": str(home)} if home else {}), **more}
    return subprocess.run(
        [BASH, str(script), *map(str, words)], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def until(true):
    for _ in range(1200):
        if true():
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within a minute")


def write(path, text):
    path.write_text(text)
    path.chmod(0o755)


def kill_all(folder):
    """What supervisors and their runs below a folder are, ends, as when machines are taken away."""
    for file in [*folder.glob("**/supervisor"), *folder.glob("**/pid")]:
        for kill in (os.kill, os.killpg):
            try:
                kill(int(file.read_text()), signal.SIGKILL)
            except (ProcessLookupError, ValueError):
                continue


@pytest.fixture
def tools(tmp_path):
    """A folder with the few programs that the script calls, and no gcloud."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cat", "dirname", "mktemp", "rm", "tar", "gzip", "bash"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


class Cloud:
    """The stand-in for gcloud and what its workers have installed; `run` runs tpu_setup.sh there."""

    def __init__(self, folder):
        self.state, self.work, programs = folder / "cloud", folder / "bucket", folder / "programs"
        for made in (self.state, self.work, programs):
            made.mkdir()
        write(programs / "gcloud", (ROOT / "tests" / "fake_gcloud.py").read_text())
        write(programs / "python3.13", PYTHON)
        write(programs / "pip", PIP)
        write(programs / "training", TRAINING)
        self.path = f"{programs}:{os.environ['PATH']}"
        self.experiment = folder / "mine.py"
        self.experiment.write_text("# an experiment\n")
        self.more = {"FAKE_GCLOUD": str(self.state)}
        self.watches = []

    def run(self, command, *words):
        return run(command, *PLACE, "--every", "0.1", *words, path=self.path, **self.more)

    def watch(self, command, *words):
        line = [BASH, str(SCRIPT), command, *PLACE, "--every", "0.1", *map(str, words)]
        env = {**os.environ, "PATH": self.path, **self.more}
        self.watches.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True))
        return self.watches[-1]

    def calls(self):
        return (self.state / "calls").read_text().splitlines()

    def begun(self):
        return [(self.work / f"worker-{n}.log").read_text().splitlines() for n in range(2)]

    def distil(self):
        return (self.experiment, "--workdir", self.work)

    def preempt(self):
        kill_all(self.state)
        (self.state / "nodes" / "pod").unlink()
        (self.state / "requests" / "pod").write_text("SUSPENDING SUSPENDED")
        shutil.rmtree(self.state / "pod")


@pytest.fixture
def cloud(tmp_path):
    made = Cloud(tmp_path)
    yield made
    for watch in made.watches:
        watch.kill()
    kill_all(made.state)


def test_help_names_every_command_and_what_is_not_handled():
    done = run("--help")
    assert done.returncode == 0
    for word in ("create", "install", "start", "up", "supervise", "log", "status", "stop", "delete", "not handled"):
        assert f" {word}" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say where to install"),
        (["status"], "say which slice"),
        (["launch", *PLACE], "unknown command 'launch'"),
        (["--name", "pod"], "--zone is missing"),
        (["--zone", "z"], "--name is missing"),
        (["--name"], "--name needs a value"),
        (["--name", "--zone", "z"], "--name needs a value"),
        (["--speed", "9"], "unknown argument '--speed'"),
        (["--here", "--name", "pod"], "leave --name"),
        (["start", "--here"], "takes no command"),
        ([*PLACE, "--slice"], "--slice belongs to --here"),
        (["--here", "--dry-run", "--python", "false"], "false is not Python 3.11"),
        (["create", *PLACE], "--accelerator-type is missing"),
        (["create", *PLACE, "--accelerator-type", "v9-8"], "--version is missing"),
        (["create", *PLACE, "--every", "soon"], "--every needs a number"),
        (["start", *PLACE], "say which experiment"),
        (["start", *PLACE, "nothing.py"], "no experiment nothing.py"),
        (["start", *PLACE, str(SCRIPT), "--seed", "1"], "--workdir is missing"),
        (["start", *PLACE, "--env", "WORD", str(SCRIPT)], "--env needs NAME=VALUE"),
        (["start", *PLACE, "--run", "a b", str(SCRIPT)], "--run takes letters"),
        (["stop", *PLACE, "pod"], "stop takes no further words"),
    ],
)
def test_wrong_arguments_are_met_with_words(words, message):
    done = run(*words)
    assert done.returncode == 2
    assert message in done.stderr


def test_missing_gcloud_and_missing_python_say_what_to_do(tools, tmp_path):
    done = run(*PLACE, path=str(tools))
    assert done.returncode == 2 and "install the Google Cloud CLI" in done.stderr
    done = run("--here", path=str(tools), home=tmp_path)
    assert done.returncode == 2 and "--install-python" in done.stderr
    done = run("--here", "--dry-run", "--install-python", path=str(tools), home=tmp_path)
    assert done.returncode == 0 and "+ sudo apt-get install --yes python3.11 python3.11-venv" in done.stdout


def test_dry_run_prints_the_commands_and_runs_none(tools, tmp_path):
    where = "--zone us-central2-b --worker=all --project p"
    done = run("--name", "pod", "--zone", "us-central2-b", "--project", "p", "--dry-run", path=str(tools))
    assert done.returncode == 0
    copy, install = (line for line in done.stdout.splitlines() if line.startswith("+ gcloud"))
    assert copy.startswith("+ gcloud compute tpus tpu-vm scp ") and copy.endswith(where)
    assert install.startswith(f"+ gcloud compute tpus tpu-vm ssh pod {where} --command ")
    venv = tmp_path / "with space" / "venv"
    done = run("--here", "--dry-run", "--venv", str(venv))
    assert done.returncode == 0 and "[tpu]" in done.stdout and not venv.exists()


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_the_whole_life_is_printed_for_every_kind_of_chip(tools, kind, version):
    made = ("--accelerator-type", kind, "--valid-until=6h", "--spot", "--create-flag=--network=n")
    mine = (SCRIPT, "--workdir", "gs://b/r", "--seed", "1")
    done = run("supervise", *PLACE, *made, "--env", "WORD=a'b c", "--dry-run", *mine, path=str(tools))
    assert done.returncode == 0, done.stderr
    assert (
        f"+ gcloud compute tpus queued-resources create pod --zone z --accelerator-type {kind} --node-id pod "
        f"--runtime-version {version} --valid-until-duration 6h --spot --network=n\n"
    ) in done.stdout
    assert "queued-resources delete pod --zone z --force --quiet" in done.stdout
    (line,) = (line for line in done.stdout.splitlines() if "supervise.sh start" in line)
    (remote,) = as_a_shell_reads(line.split("--command ")[1])
    given = ["env", "WORD=a'b c", "ddistill-venv/bin/ddistill", "distill", "ddistill-runs/pod/tpu_setup.sh"]
    assert as_a_shell_reads(remote.split(" -- ")[1]) == [*given, "--workdir", "gs://b/r", "--seed", "1"]


def as_a_shell_reads(text):
    return subprocess.run([BASH, "-c", f"printf '%s\\n' {text}"], capture_output=True, text=True).stdout.splitlines()


def test_the_source_that_workers_get_installs_itself(tools, tmp_path):
    # A gcloud that keeps what it is given: the archive must hold a checkout whose script plans its installation.
    write(
        tools / "gcloud",
        f'#!/bin/bash\nif [[ $4 == scp ]]; then cat "$5" > {tmp_path}/sent.tar.gz; fi\necho "$@" >> {tmp_path}/log\n',
    )
    done = run(*PLACE, "--venv", "v", path=str(tools))
    assert done.returncode == 0, done.stderr
    assert "--here --slice --venv v" in (tmp_path / "log").read_text()
    with tarfile.open(tmp_path / "sent.tar.gz") as archive:
        archive.extractall(tmp_path / "there", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    there = tmp_path / "there"
    assert (there / "ddistill" / "mixtures" / "ring8.npz").is_file() and (there / "README.md").is_file()
    assert (there / "experiments" / "supervise.sh").is_file()
    plan = subprocess.run(
        ["bash", str(there / "tpu_setup.sh"), "--here", "--slice", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "pip install --upgrade" in plan.stdout


def test_a_slice_lives_is_preempted_and_comes_back_until_its_run_is_done(cloud):
    made = ("--accelerator-type", "v5litepod-16", "--spot", "--queued", "--extras", "images")
    started = (*made, "--prepare", "echo 'it is' there >data; cd /", "--env", "WORD=it", *cloud.distil())
    done = cloud.run("up", *started)
    assert done.returncode == 0, done.stdout + done.stderr
    states = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("pod: ")]
    assert states == ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert done.stdout.count("worker sees its TPUs, slice 1") == 2
    for home in (cloud.state / "pod").iterdir():
        assert (home / "pip").read_text() == f"install --upgrade {home}/ddistill-source[tpu,images]\n"
        assert (home / "data").read_text() == "it is there\n"
    until(lambda: all((cloud.work / f"worker-{n}.log").exists() for n in range(2)))

    done = cloud.run("create", "--accelerator-type", "v6e-16")
    assert done.returncode == 2 and "is v5litepod-16, not v6e-16" in done.stderr
    assert cloud.run("start", "--env", "WORD=it", *cloud.distil()).stdout.count("is running already") == 2
    assert cloud.run("start", "--env", "WORD=other", *cloud.distil()).returncode != 0
    done = cloud.run("status")
    assert done.stdout.startswith("pod: READY\n") and done.stdout.count("pod: running, begun 1 times") == 2
    assert "it begins at 0" in cloud.run("log", "--worker", "1", "--no-follow").stdout
    assert cloud.run("stop").stdout.count("pod: stopped") == 2
    saved = [int((cloud.work / f"worker-{n}").read_text()) for n in range(2)]

    # Begun again by supervise, preempted under its eyes, and begun once more where it was saved.
    watch = cloud.watch("supervise", *started)
    until(lambda: all(len(lines) == 2 for lines in cloud.begun()))
    cloud.preempt()
    until(lambda: all(len(lines) == 3 for lines in cloud.begun()))
    (cloud.work / "enough").touch()
    said, _ = watch.communicate(timeout=120)
    assert watch.returncode == 0 and said.splitlines()[-1] == "tpu_setup.sh: the run is done"
    assert "pod: READY, run: stopped" in said and "pod: SUSPENDED" in said and "pod: READY, run: uninstalled" in said
    for lines, steps in zip(cloud.begun(), saved, strict=True):
        assert lines[1:] == [f"it begins at {steps}"] * 2
    assert all((home / "data").exists() for home in (cloud.state / "pod").iterdir())

    assert cloud.run("stop").stdout.count("is not running: finished") == 2
    assert cloud.run("delete").returncode == 0
    assert not (cloud.state / "pod").exists() and not (cloud.state / "requests" / "pod").exists()
    assert sum("queued-resources delete pod --zone z --force --quiet" in call for call in cloud.calls()) == 2


def test_a_run_that_fails_ends_the_watch_and_the_slice(cloud):
    cloud.experiment.write_text("# crash\n")
    made = ("--accelerator-type", "v6e-16", "--restarts", "0", "--then-delete")
    done = cloud.run("supervise", *made, *cloud.distil())
    assert done.returncode == 1 and "the run failed on a worker" in done.stdout
    create, delete = (call for call in cloud.calls() if " create " in call or " delete " in call)
    assert create == "compute tpus tpu-vm create pod --zone z --accelerator-type v6e-16 --version v2-alpha-tpuv6e"
    assert delete == "compute tpus tpu-vm delete pod --zone z --quiet"


def test_what_the_cloud_refuses_is_said(cloud):
    made = ("--accelerator-type", "v6e-16", "--valid-until", "1h")
    (cloud.state / "requests").mkdir()
    (cloud.state / "type").write_text("v6e-16")
    (cloud.state / "requests" / "pod").write_text("ACTIVE PROVISIONING ACTIVE")  # the first without a node
    done = cloud.run("create", *made)
    assert done.returncode == 0 and done.stdout == "pod: PROVISIONING\npod: READY\n"
    (cloud.state / "requests" / "pod").write_text("PROVISIONING FAILED")
    done = cloud.run("create", *made)
    assert done.returncode == 1 and "no capacity before the deadline; delete it" in done.stderr
    (cloud.state / "requests" / "pod").write_text("SUSPENDED")
    done = cloud.run("create", *made)
    assert done.returncode == 1 and "taken away or stopped" in done.stderr
    (cloud.state / "refuse").touch()
    done = cloud.run("create", *made)
    assert done.returncode == 1 and "UNAVAILABLE: the service" in done.stderr and "could not be read" in done.stderr
    done = cloud.run("supervise", "--every", "0", *made, *cloud.distil())
    assert done.returncode == 1 and "twenty attempts" in done.stderr
    assert not any(" create " in call for call in cloud.calls())


# What JAX 0.10 says before it aborts a process whose connection to another one broke.
GONE = "client.h:80] Terminating process because the JAX distributed service detected fatal errors."


def supervise(folder, *words):
    return run(*words, script=SUPERVISE, DDISTILL_RUNS=str(folder))


@pytest.fixture
def runs(tmp_path):
    yield tmp_path / "runs"
    kill_all(tmp_path)


@pytest.mark.parametrize(
    ("statuses", "end", "begun"),
    [
        ((75, 75, 75, 0), "finished", 4),  # preemptions do not count
        ((1, 1, 75, 1, 1, 0), "finished", 6),  # nor crashes before them
        ((1, 134, 137), "failed", 3),
        (("gone", "gone", "gone", 0), "finished", 4),  # JAX's abort of those that are left
        ((143, 143, 143, 0), "finished", 4),  # told to leave before ddistill hears it
        (("gone", 134, 1, 134), "failed", 4),  # any other abort is a crash
        ((2,), "failed", 1),
        ((130,), "stopped", 1),
    ],
)
def test_a_supervisor_begins_again_what_may_succeed(runs, tmp_path, statuses, end, begun):
    write(tmp_path / "command", f'#!/bin/bash\nset -- {" ".join(map(str, statuses))}\nn=$(cat {tmp_path}/n || echo 0)\n'
          f'echo $((n + 1)) >{tmp_path}/n\nshift $n\n'
          f'if [[ $1 == gone ]]; then echo "{GONE}" >&2; exit 134; fi\nexit $1\n')  # fmt: skip
    supervise(runs, "start", "r", "--restarts", "2", "--pause", "0", "--", tmp_path / "command")
    until(lambda: supervise(runs, "state", "r").stdout != "running\n")
    assert supervise(runs, "state", "r").stdout == f"{end}\n"
    assert (tmp_path / "n").read_text() == f"{begun}\n"
    log = supervise(runs, "log", "r").stdout
    assert [int(line.split("status ")[1].split()[0]) for line in log.splitlines() if "status" in line] == [
        134 if status == "gone" else status for status in statuses[:begun]
    ]


def test_pauses_between_crashes_double_up_to_five_minutes(runs, tmp_path):
    # A sleep that answers at once, and notes what it was asked for.
    write(tmp_path / "sleep", f'#!/bin/bash\n[[ $1 == 0.* ]] || echo "$1" >>{tmp_path}/slept\n')
    path = f"{tmp_path}:{os.environ['PATH']}"
    run("start", "r", "--restarts", "9", "--", "false", script=SUPERVISE, DDISTILL_RUNS=str(runs), PATH=path)
    until(lambda: supervise(runs, "state", "r").stdout == "failed\n")
    assert (tmp_path / "slept").read_text().split() == ["5", "10", "20", "40", "80", "160", "300", "300", "300"]


def test_a_run_that_does_not_leave_is_killed_and_one_that_was_killed_is_lost(runs, tmp_path):
    ready = tmp_path / "ready"
    stubborn = ("bash", "-c", f"trap '' TERM; sleep 100 & touch {ready}; while :; do wait; done")
    assert supervise(runs, "state", "r").stdout == "absent\n"
    supervise(runs, "start", "r", "--", *stubborn)
    until(ready.exists)
    pid = int((runs / "r" / "pid").read_text())
    assert supervise(runs, "state", "r").stdout == "running\n"
    assert "killed; it loses" in supervise(runs, "stop", "r", "--wait", "0").stdout
    assert supervise(runs, "list").stdout == "r stopped\n"
    until(lambda: not any_of_group(pid))  # what it had started is gone as well
    ready.unlink()
    supervise(runs, "start", "r", "--", *stubborn)
    until(ready.exists)
    kill_all(runs)
    until(lambda: supervise(runs, "state", "r").stdout == "lost\n")


def any_of_group(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_machine_that_goes_down_begins_nothing_again(runs, tmp_path):
    told = tmp_path / "told"
    saving = tmp_path / "saving"  # takes a second, in which another signal would be heard
    saving.write_text(
        f"trap 'echo x >>{told}' TERM\ntouch {told}\nuntil [[ -s {told} ]]; do sleep 0.1; done\nsleep 1\nexit 75\n"
    )
    supervise(runs, "start", "r", "--", "bash", saving)
    until(told.exists)
    os.kill(int((runs / "r" / "pid").read_text()), signal.SIGTERM)
    until(lambda: told.stat().st_size)
    os.kill(int((runs / "r" / "supervisor").read_text()), signal.SIGTERM)
    until(lambda: supervise(runs, "state", "r").stdout == "lost\n")
    assert told.read_text() == "x\n"  # a second signal would be taken as "at once"
    assert "not begun again" in supervise(runs, "log", "r").stdout


def test_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [SCRIPT, *sorted((ROOT / "experiments").glob("*.sh"))]
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def typed():
    """The commands of the page for pods, each a list of words."""
    text = (ROOT / "experiments" / "pods.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from (shlex.split(command) for command in re.split(r"\n| && ", block) if command.strip())


@pytest.mark.parametrize("words", [w for w in typed() if w[0] == "bash"], ids=" ".join)
def test_scripts_take_what_the_page_for_pods_types(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, action, *rest = words[1:]
    if script == "tpu_setup.sh" or action == "submit":
        assert run(action, "--dry-run", *rest, script=ROOT / script).returncode == 0
    else:
        assert f"{script} {action} " in run("--help", script=ROOT / script).stdout


def test_ddistill_takes_what_the_page_for_pods_types(monkeypatch):
    monkeypatch.chdir(ROOT)
    seen = []
    monkeypatch.setattr(cli, "join", lambda peers: None)
    monkeypatch.setattr(commands, "run", lambda command, flags, *_: seen.append((type(command).__name__, flags)))
    mine = [words for words in typed() if words[0] == "ddistill"]
    for words in mine:
        assert cli.main(words[1:]) == 0, words
    assert [flags for _, flags in seen] == [[]] * len(mine)  # no flag is left for the experiment
    assert {"Plan", "Import", "Encode", "Distill", "Sample", "Export"} == {name for name, _ in seen}
    assert {words[0] for words in typed()} == {"bash", "ddistill", "gcloud", "kubectl", "mkdir", "pip", "tensorboard"}
