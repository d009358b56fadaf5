"""Several processes train, make pairs and sample as one does, and end together."""

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import CUT, STEPS, commands, losses
from PIL import Image

from ddistill import hosts, launchers
from ddistill.data.pair_store import open_pairs
from ddistill.goodput import read_starts
from ddistill.hosts import join
from ddistill.launchers import Cluster, Peers, found
from ddistill.seals import is_sealed

HERE = Path(__file__).parent


def started(folder: Path, processes: int, *tasks: str, status: int | tuple = 0) -> list[str]:
    """Let so many processes of two devices each do the tasks of peers.py; answers what each of them printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    environment = {**os.environ, "XLA_FLAGS": flags}
    commands = [
        [sys.executable, str(HERE / "peers.py"), str(folder), str(processes), str(i), str(port), *tasks]
        for i in range(processes)
    ]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    told = [process.communicate()[0] for process in running]
    statuses = list(status) if isinstance(status, tuple) else [status] * processes
    assert [process.returncode for process in running] == statuses, "\n\n".join(told)
    return told


def cut(folder: Path, to: Path) -> None:
    """A copy of trainings, without what is after the cut: as if they had been killed there."""
    shutil.copytree(folder, to)
    for name in ("consistency", "dmd"):
        shutil.rmtree(to / name / "checkpoints" / "student" / str(STEPS))
    shutil.rmtree(to / "progressive" / "checkpoints" / "student-1-steps")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same commands in one process."""
    folder = tmp_path_factory.mktemp("alone")
    commands(folder, [])
    return folder


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Losses by the name of a training: in two and in four processes, and of two that went on in one after the cut."""
    folder, every = tmp_path_factory.mktemp("processes"), ("consistency", "dmd", "progressive")
    words = started(folder, 2, f"two:{','.join(every)}", "commands", "bucket", "preempted", status=75)
    cut(folder / "two", folder / "two-then-one")
    started(folder, 4, f"four:{','.join(every)}")
    told = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("two", "four")}
    told["two-then-one"] = losses(folder / "two-then-one", *every)
    told["one"] = losses(None, *every)
    return folder, told, words


@pytest.mark.parametrize("method", ["consistency", "dmd", "progressive"])
@pytest.mark.parametrize("name", ["two", "four", "two-then-one"])
def test_the_losses_are_those_of_one_process_with_eight_devices(curves, name, method):
    told = dict(map(tuple, curves[1][name][method]))
    one = dict(map(tuple, curves[1]["one"][method]))
    assert sorted(one) == list(range(1, STEPS + 1))
    assert sorted(told) == list(range(1 + CUT * ("then" in name), STEPS + 1))
    largest = max(one.values())  # DMD's loss begins at zero, where the fake score is the teacher's
    steps = sorted(told)
    np.testing.assert_allclose([told[s] for s in steps], [one[s] for s in steps], rtol=1e-6, atol=1e-6 * largest)
    assert len(set(one.values())) > STEPS / 2


def test_commands_in_two_processes_give_what_one_gives(curves, alone):
    folder = curves[0] / "commands-2"
    two, one = np.load(folder / "x.npz"), np.load(alone / "x.npz")
    assert len(two["x"]) == 11
    np.testing.assert_array_equal(two["labels"], one["labels"])
    np.testing.assert_allclose(two["x"], one["x"], rtol=1e-5, atol=1e-5)
    two, one = open_pairs(folder / "pairs").arrays(), open_pairs(alone / "pairs").arrays()
    assert len(two["x"]) == 20
    for name in ("noise", "x", "path"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)
    rows = list(map(json.loads, (folder / "run" / "metrics.jsonl").open()))
    steps = [(row["stage"], row["step"]) for row in rows if "spent" not in row]
    assert steps == [("teacher", 1), ("teacher", 2), ("student", 1), ("student", 2)]
    starts = read_starts(folder / "run" / "metrics.jsonl")
    assert {stage: len(of) for stage, of in starts.items()} == {"teacher": 1, "student": 1}
    assert len(list((folder / "run" / "events").iterdir())) == 1, "one process writes the log"


def test_the_first_of_two_processes_writes_previews_which_are_those_of_one(curves, alone):
    folder, (first, second) = curves[0] / "commands-2" / "run" / "previews", curves[2]
    pictures = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert pictures == [f"{name}.png" for name in (
        "student/00000001-1-step", "student/00000002-1-step", "teacher/00000001-8-steps", "teacher/00000002-8-steps",
    )]  # fmt: skip
    written = set(re.findall(r"^writes (.*)$", first, re.MULTILINE))
    assert written == {str(folder / name) for name in (*pictures, "numbers.jsonl")}
    assert "writes " not in second
    one = alone / "run" / "previews"
    for name in pictures:
        a, b = (np.asarray(Image.open(of / name)) for of in (folder, one))
        assert np.count_nonzero(a != b) <= 4 < np.count_nonzero(a == 0)  # a point may lie at the edge of a pixel
    two, one = (list(map(json.loads, (of / "numbers.jsonl").open())) for of in (folder, one))
    assert len(two) == len(one) == 4
    for a, b in zip(two, one, strict=True):
        assert a.pop("stage") == b.pop("stage") and a == pytest.approx(b, rel=1e-4)


def test_one_process_that_is_preempted_lets_all_save_the_same_step_and_leave_with_75(curves):
    folder, _, words = curves
    (first,), (second,) = (re.findall(r"stage 's' is stopped and saved at step (\d+) of 1000000", w) for w in words)
    assert first == second and int(first) >= 10
    (step,) = (path for path in (folder / "preempted" / "checkpoints" / "s").iterdir() if path.is_dir())
    assert step.name == first and is_sealed(step)


def test_one_process_that_is_told_while_data_is_loaded_leaves_with_75_and_the_others_as_well(tmp_path):
    first, second = started(tmp_path, 2, "TOLD_TO_LEAVE", status=75)
    assert "stopped at once; what was saved before is there. The same command goes on" in second
    assert "another process of this run is gone" in first
    assert not (tmp_path / "TOLD_TO_LEAVE" / "checkpoints").exists()


def test_one_process_that_fails_ends_with_its_words_and_status_and_lets_the_others_end(tmp_path):
    """With 2, which no supervisor begins again; in JAX's own barrier all would end with 134, as if preempted."""
    first, second = started(tmp_path, 2, "FAILS", status=(75, 2))
    assert "ddistill: this host does not see the data" in second
    assert "another process of this run is gone" in first


def test_what_one_process_raises_all_raise_as_what_it_is(monkeypatch):
    for letter, kind in (("O", OSError), ("B", hosts.Busy), ("V", ValueError)):
        said = []
        monkeypatch.setattr(hosts, "said_by_all", lambda text: said.append(text) or ["", f"{letter}in words"])
        with pytest.raises(kind, match="^in words$"):
            hosts.checked_by_all(lambda: None)
        with pytest.raises(kind, match="^of this one$"):
            hosts.checked_by_all(functools.partial(raised, kind("of this one")))
        assert said == ["", f"{letter}of this one"]


def raised(error):
    raise error


def test_what_processes_share_out_is_saved_to_a_bucket_whole_and_restored_by_each(curves):
    steps = curves[0] / "bucket" / "bucket" / "c"  # each process has compared what it restored
    assert sorted(path.name for path in steps.iterdir() if path.is_dir()) == ["2", "3"] and is_sealed(steps / "3")


def test_a_process_whose_peers_are_missing_ends_with_words(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = f"localhost:{free.getsockname()[1]}"
    flags = ["--processes", "3", "--process", "1", "--coordinator", where, "--join-timeout", "1"]
    command = [sys.executable, "-m", "ddistill", "distill", str(HERE / "peers.py"), *flags, "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert f"after 1 s process 1 of 3 waits for process 0 at {where}, which is not there" in done.stderr


SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[007-009,12],big1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
URI6 = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:4"}
TWO = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
ALONE = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("environment", "cluster"),
    [
        ({}, None),
        (SLURM, Cluster("SLURM", "gpu007:62344", 8, 5, [1])),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "3"}, Cluster("SLURM", "gpu007:62344", 8, 5)),  # srun bound it to one
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Cluster("SLURM", "gpu007:62344", 8, 5)),  # all GPUs
        ({**SLURM, "SLURM_STEP_NODELIST": "a-1,b2", "SLURM_STEP_ID": "2"}, Cluster("SLURM", "a-1:62538", 8, 5, [1])),
        (
            {**SLURM, "SLURM_STEP_NODELIST": "x[10,12]c0s[0-3]b0n0,z", "SLURM_STEP_ID": "2"},
            Cluster("SLURM", "x10c0s0b0n0:62538", 8, 5, [1]),
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell
        ({k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_NTASKS": "8"}, None),  # a batch script
        ({**MPI, **URI}, Cluster("Open MPI", "10.96.0.1:62624", 4, 3, [1])),
        ({**MPI, **URI6}, Cluster("Open MPI", "[fe80::1]:61441", 4, 3, [1])),
        ({**MPI, **TWO}, Cluster("Open MPI", "localhost:61440", 2, 1, [1])),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod, of no job whose pods are numbered
        ({**POD, "DDISTILL_PROCESSES": "4", "DDISTILL_COORDINATOR": "j-0.s:1"}, Cluster("the flags", "j-0.s:1", 4, 2)),
        ({**SLURM, "DDISTILL_PROCESSES": "1"}, None),
        ({**SLURM, "DDISTILL_COORDINATOR": "10.1.1.1:99"}, Cluster("SLURM", "10.1.1.1:99", 8, 5, [1])),
    ],
)  # fmt: skip
def test_processes_are_found_by_what_launchers_tell(environment, cluster):
    assert found(Peers(), {**ALONE, **environment}) == cluster


def test_flags_go_before_the_environment():
    environment = {**ALONE, "DDISTILL_PROCESSES": "2", "DDISTILL_PROCESS": "0", "DDISTILL_COORDINATOR": "a:1"}
    assert found(Peers(), environment) == Cluster("the flags", "a:1", 2, 0)
    assert found(Peers(3, 2, "[::1]:8"), environment) == Cluster("the flags", "[::1]:8", 3, 2)
    assert found(Peers(1), environment) is None
    assert not join(Peers(1), environment)


@pytest.mark.parametrize(
    ("peers", "environment", "words"),
    [
        (Peers(2), {}, "missing: --process, --coordinator"),
        (Peers(2, 2, "a:1"), {}, "--process 2 of --processes 2: processes are numbered from 0"),
        (Peers(2, 1, "a"), {}, "--coordinator a: give HOST:PORT"),
        (Peers(0), {}, "--processes 0: at least 1"),
        (Peers(), {"DDISTILL_PROCESSES": "two"}, "DDISTILL_PROCESSES=two: a whole number"),
        (Peers(), MPI, "Open MPI started 4 processes and does not say where the first one is: give --coordinator"),
    ],
)
def test_what_is_not_enough_to_find_the_others_gets_words(peers, environment, words):
    with pytest.raises(ValueError, match=words):
        found(peers, {**ALONE, **environment})


def test_a_numbered_pod_without_the_package_gets_words(monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jax\[k8s\]"; or give --processes'):
        found(Peers(), {**ALONE, **POD})
    monkeypatch.setattr(launchers, "find_spec", lambda name: name == "kubernetes")
    assert found(Peers(), {**ALONE, **POD}) == Cluster("the Kubernetes job")


def test_a_tpu_is_asked_by_jax_where_there_is_one(monkeypatch):
    monkeypatch.setattr(launchers, "find_spec", lambda name: name == "libtpu")
    assert found(Peers(), {}) == Cluster("the TPU pod")
    assert found(Peers(), {"TPU_SKIP_MDS_QUERY": "1"}) is None  # JAX sets it where there are no chips
    assert found(Peers(), {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "a,b"}) == Cluster("the TPU pod")
    assert found(Peers(), {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "a,b"}) is None
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    assert found(Peers(), {"TPU_WORKER_HOSTNAMES": "a,b"}) is None
