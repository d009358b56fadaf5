"""experiments/slurm.sh: its words, and its life under a real SLURM of one machine, which is started for the tests."""

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "experiments" / "slurm.sh"
BASH = shutil.which("bash")

# In place of ddistill: it counts in its work folder until that holds `enough`, and saves on SIGTERM.
TRAINING = """#!/bin/bash
counter=$4/$SLURM_PROCID
mkdir -p "$4"
n=$(cat "$counter" 2>/dev/null || echo 0)
echo "$SLURM_PROCID of $SLURM_STEP_NUM_TASKS begins at $n" >>"$counter.log"
trap 'echo $((n + 1)) >"$counter"; exit 75' TERM
until [[ -e $4/enough ]]; do sleep 0.1 & wait $!; done
"""

# In place of srun: one task after the other; it answers the highest status.
SRUN = """while [[ $1 == --* ]]; do shift; done
most=0
for end in $STATUSES; do
    status=0
    END=$end "$@" || status=$?
    if ((status > most)); then most=$status; fi
done
exit $most"""
# In place of ddistill: it ends with a status, or as JAX 0.10 ends a process whose connection to another one broke.
ENDING = """if [[ $END != gone ]]; then exit $END; fi
echo "client.h:80] Terminating process because the JAX distributed service detected fatal errors." >&2
exit 134"""

# The smallest training.
EXPERIMENT = """
from dataclasses import dataclass

import numpy as np

from ddistill import Experiment
from ddistill.config import Data, MLPNetwork, Teacher
from ddistill.methods import KD


@dataclass(frozen=True)
class Points:
    def load(self):
        x = np.random.default_rng(0).normal(size=(2, 8, 2)).astype(np.float32)
        return Data({"x": x[0], "noise": x[1]}, (2,), 0)


def experiment():
    return Experiment(
        name="points",
        data=Points(),
        network=MLPNetwork(width=8, blocks=1),
        teacher=Teacher(steps=1500),
        method=KD(steps=(1,)),
        steps=1,
        batch_size=8,
    )
"""


def run(*words, cwd=None, **environment):
    return subprocess.run(
        [BASH, str(SCRIPT), *map(str, words)],
        env={**os.environ, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def until(true, seconds=120):
    for _ in range(10 * seconds):
        if true():
            return
        time.sleep(0.1)
    pytest.fail(f"it did not happen within {seconds} s")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["launch"], "unknown command 'launch'"),
        (["submit"], "say which experiment"),
        (["submit", "nothing.py", "--workdir", "r"], "no experiment nothing.py"),
        (["submit", str(SCRIPT)], "--workdir FOLDER is missing"),
        (["submit", "--nodes", "two", str(SCRIPT)], "--nodes needs a number"),
        (["submit", "--sbatch", "gpu", str(SCRIPT)], "--sbatch needs an option"),
        (["submit", "--speed", "9"], "unknown argument '--speed'"),
        (["status"], "status needs the run's folder"),
        (["status", "nowhere"], "nothing was submitted for nowhere"),
        (["log", "nowhere"], "no log nowhere.slurm/log"),
        (["job", str(SCRIPT)], "job is what sbatch runs"),
    ],
)
def test_wrong_arguments_are_met_with_words(words, message, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    done = subprocess.run(
        [BASH, str(SCRIPT), *words], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        (["--nodes", "2", "--gpus-per-node", "8"], "--nodes 2 --ntasks-per-node 8 --gpus-per-node 8"),
        (["--gpus-per-node", "4", "--tasks-per-node=1"], "--nodes 1 --ntasks-per-node 1 --gpus-per-node 4"),
        (["--gpus-per-node", "0", "--tasks-per-node", "2"], "--nodes 1 --ntasks-per-node 2"),
    ],
)
def test_one_task_for_each_gpu(options, asked, tmp_path):
    flags = (SCRIPT, "--workdir", "gs://b/digits", "--seed", "1")
    done = run("submit", *options, "--sbatch=--time=1:00:00", "--dry-run", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        f"+ sbatch --parsable --job-name digits --output digits.slurm/log {asked} "
        f"--export ALL\\,DDISTILL_CRASHES=3 --time=1:00:00 {SCRIPT} job {SCRIPT} --workdir gs://b/digits --seed 1"
    )
    assert not list(tmp_path.iterdir())


def test_sbatch_reads_what_the_script_asks_of_it():
    asked = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert asked == ["--requeue", "--signal=B:TERM@120", "--open-mode=append"]


@pytest.mark.parametrize(
    ("statuses", "ends", "requeued"),
    [
        ((0,), (0,), 0),
        ((75, 75, 0), (75, 75, 0), 2),
        ((1, 134, 75, 137, 1, 1), (1, 134, 75, 137, 1, 1), 5),  # two crashes in a row are allowed, three are not
        ((2,), (2,), 0),
        ((130,), (130,), 0),
        (("gone 75", "75 gone", "gone gone", "75 gone", "75 0"), (75,) * 5, 5),  # JAX's abort of those that are left
        (("143 75", "143 143", "143 143", "0 0"), (75, 75, 75, 0), 3),  # told to leave before ddistill hears it
        (("1 gone", "75 1", "134 gone"), (1, 1, 134), 2),  # which does not hide what it follows from
        (("143 137",), (137,), 1),
        (("75 2",), (2,), 0),
    ],
)
def test_what_a_batch_script_does_with_the_statuses_of_its_tasks(tmp_path, statuses, ends, requeued):
    for name, text in {"srun": SRUN, "ddistill": ENDING, "scontrol": f'echo "$@" >>{tmp_path}/asked'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "DDISTILL_CRASHES": "2"}
    seen = []
    for status in statuses:
        environment = {**job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "STATUSES": str(status)}
        seen.append(run("job", SCRIPT, "--workdir", tmp_path / "r", **environment).returncode)
    assert tuple(seen) == ends
    asked = (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []
    assert asked == ["requeue 7"] * requeued


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def slurm():
    """A SLURM with one node of four CPUs, in a folder of its own: its environment."""
    programs = {}
    for name in ("munged", "slurmctld", "slurmd", "sbatch"):
        programs[name] = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        if programs[name] is None:
            pytest.skip(f"SLURM is not installed: there is no {name}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets have short names
    folder.chmod(0o755)
    key = folder / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, me = socket.gethostname().split(".")[0], subprocess.check_output(["id", "-un"], text=True).strip()
    conf = folder / "slurm.conf"
    conf.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser={me}
SlurmdUser={me}
AuthType=auth/munge
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=off
""")
    environment = {"SLURM_CONF": str(conf)}
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    commands = [
        [programs["munged"], "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge", *munge],
        [programs["slurmctld"], "-D"],
        [programs["slurmd"], "-D"],
    ]
    (folder / "state").mkdir()
    started, said = [], folder / "said"
    try:
        with said.open("w") as out:
            for command in commands:
                env = {**os.environ, **environment}
                started.append(subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL))
                time.sleep(0.3)
        for _ in range(100):
            if ask(environment, "sinfo", "--noheader", "--format=%T", "--partition=low").strip() == "idle":
                break
            time.sleep(0.2)
        else:
            pytest.skip(f"SLURM does not start here: {said.read_text()[-500:]}")
        yield environment
        ask(environment, "scancel", "--signal=KILL", f"--user={me}")
        for number in ask(environment, "squeue", "--noheader", "--format=%i").split():
            ask(environment, "scancel", number)
        until(lambda: not ask(environment, "squeue", "--noheader"))
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def ask(environment, *words):
    return subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=False).stdout


class Job:
    """A run of two tasks, with a stand-in for ddistill."""

    def __init__(self, slurm, folder):
        programs = folder / "bin"
        programs.mkdir()
        (programs / "ddistill").write_text(TRAINING)
        (programs / "ddistill").chmod(0o755)
        self.environment = {**slurm, "PATH": f"{programs}:{os.environ['PATH']}"}
        self.experiment, self.run = folder / "mine.py", folder / "run"
        self.experiment.write_text("# an experiment\n")

    def submit(self, *options):
        done = run(
            *("submit", "--gpus-per-node", "0", "--tasks-per-node", "2", *options),
            *(self.experiment, "--workdir", self.run),
            **self.environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(",")

    def begun(self):
        files = [self.run / f"{n}.log" for n in range(2)]
        return [file.read_text().splitlines() if file.exists() else [] for file in files]

    def log(self):
        return run("log", self.run, "--no-follow", **self.environment).stdout

    def gone(self, number):
        return not ask(self.environment, "squeue", "--noheader", f"--jobs={number}").strip()


def test_a_job_goes_on_after_notices_and_preemption_and_ends(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    number = job.submit()
    until(lambda: all(len(lines) == 1 for lines in job.begun()))
    again = run("submit", job.experiment, "--workdir", job.run, **job.environment)
    assert again.returncode == 2 and f"job {number} works on" in again.stderr
    assert f"job {number}: RUNNING" in run("status", job.run, **job.environment).stdout
    # The notice before a time limit, to the batch script alone.
    ask(job.environment, "scancel", "--signal=TERM", "--batch", number)
    until(lambda: all(len(lines) == 2 for lines in job.begun()))
    # A job of a partition that goes before.
    other = tmp_path / "other"
    ask(job.environment, "sbatch", "--partition=high", "--ntasks=4", "--output=/dev/null", f"--wrap=touch {other}")
    until(other.exists)
    until(lambda: all(len(lines) == 3 for lines in job.begun()))
    (job.run / "enough").touch()
    until(lambda: job.gone(number))
    for n, lines in enumerate(job.begun()):
        assert lines == [f"{n} of 2 begins at {steps}" for steps in range(3)]
    said = job.log()
    assert re.findall(r"ended with status (\d+)", said) == ["75", "75", "0"]
    assert re.findall(r"queued again (\d) times", said) == ["0", "1", "2"]


def test_a_job_is_stopped_and_is_not_queued_again(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    number = job.submit()
    until(lambda: all(len(lines) == 1 for lines in job.begun()))
    assert "saves and leaves" in run("stop", job.run, **job.environment).stdout
    until(lambda: job.gone(number))
    assert [(job.run / str(n)).read_text() for n in range(2)] == ["1\n", "1\n"]
    assert "stopped; submit it again" in job.log()
    assert "has left the queue" in run("stop", job.run, **job.environment).stdout
    number = job.submit("--sbatch=--hold")
    assert "was waiting, and is cancelled" in run("stop", job.run, **job.environment).stdout
    until(lambda: job.gone(number))


def test_two_processes_of_a_training_join_are_told_to_leave_and_go_on(slurm, tmp_path):
    folder, experiment, log = tmp_path / "run", tmp_path / "points.py", tmp_path / "run.slurm" / "log"
    experiment.write_text(EXPERIMENT)
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    environment = {**slurm, "XLA_FLAGS": flags}
    two = ("--gpus-per-node", "0", "--tasks-per-node", "2")
    done = run("submit", *two, experiment, "--workdir", folder, **environment)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[1].rstrip(",")

    def statuses():
        return re.findall(r"ended with status (\d+)", log.read_text())

    # Before they train they would leave at once, with nothing to save.
    metrics = folder / "metrics.jsonl"
    until(lambda: (metrics.exists() and 'loss"' in metrics.read_text()) or statuses(), 300)
    ask(environment, "scancel", "--signal=TERM", "--batch", number)
    until(statuses, 300)
    assert statuses() == ["75"], log.read_text()
    # Both say so, of the same step.
    (saved,) = set(told := re.findall(r"stopped and saved at step (\d+) of 1500", log.read_text()))
    assert len(told) == 2 and 0 < int(saved) < 1500
    until(lambda: len(statuses()) > 1, 300)
    assert statuses() == ["75", "0"], log.read_text()
    assert log.read_text().count("0: Done: ") == 1
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"teacher", "student"}
