"""Several processes train, make pairs and sample as one does, and end together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import CUT, STEPS, commands, losses

from ddistill.data.pair_store import open_pairs

HERE = Path(__file__).parent


def started(folder: Path, processes: int, *tasks: str) -> None:
    """Let so many processes of two devices each do the tasks of peers.py."""
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
    assert [process.returncode for process in running] == [0] * processes, "\n\n".join(told)


def cut(folder: Path, to: Path) -> None:
    """A copy of trainings, without what is after the cut: as if they had been killed there."""
    shutil.copytree(folder, to)
    for name in ("consistency", "dmd"):
        shutil.rmtree(to / name / "checkpoints" / "student" / str(STEPS))
    shutil.rmtree(to / "progressive" / "checkpoints" / "student-1-steps")


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    """Losses by the name of a training: in two and in four processes, and what went on in others after the cut."""
    folder = tmp_path_factory.mktemp("processes")
    started(folder, 2, "two", "commands")
    cut(folder / "two", folder / "two-then-four")
    started(folder, 4, "four", "two-then-four")
    told = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("two", "four", "two-then-four")}
    cut(folder / "four", folder / "four-then-one")
    told["four-then-one"] = losses(folder / "four-then-one")
    told["one"] = losses(folder / "one")
    return folder, told


@pytest.mark.parametrize("method", ["consistency", "dmd", "progressive"])
@pytest.mark.parametrize("name", ["two", "four", "two-then-four", "four-then-one"])
def test_the_losses_are_those_of_one_process_with_eight_devices(curves, method, name):
    told = dict(map(tuple, curves[1][name][method]))
    one = dict(map(tuple, curves[1]["one"][method]))
    assert sorted(one) == list(range(1, STEPS + 1))
    first = CUT if "then" in name else 0
    assert sorted(told) == list(range(first + 1, STEPS + 1))
    np.testing.assert_allclose([told[s] for s in sorted(told)], [one[s] for s in sorted(told)], rtol=1e-6)
    assert len(set(one.values())) > STEPS / 2


def test_commands_in_two_processes_give_what_one_gives(curves, tmp_path):
    folder = curves[0] / "commands-2"
    commands(tmp_path, [])
    for name in ("x.npz", "teacher.npz"):
        two, one = np.load(folder / name), np.load(tmp_path / name)
        assert len(two["x"]) == 11
        np.testing.assert_array_equal(two["labels"], one["labels"])
        np.testing.assert_allclose(two["x"], one["x"], rtol=1e-5, atol=1e-5)
    two, one = open_pairs(folder / "pairs").arrays(), open_pairs(tmp_path / "pairs").arrays()
    assert len(two["x"]) == 20
    for name in ("noise", "x", "path"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-5)
    rows = [(r["stage"], r["step"]) for r in map(json.loads, (folder / "run" / "metrics.jsonl").open()) if "step" in r]
    assert sorted(set(rows)) == [("student", 1), ("student", 2), ("teacher", 1), ("teacher", 2)]
    assert len(list((folder / "run" / "events").iterdir())) == 1, "one process writes the log"
