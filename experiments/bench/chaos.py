"""Kill a training again and again, and see that nothing is lost.

python experiments/bench/chaos.py --kills 50

A tiny teacher is trained and distilled, undisturbed, and then in processes that are killed: half of them at any moment,
half while a checkpoint is being written; by SIGKILL, one in five by SIGTERM. Each time the same call is made again.
Whenever a run comes to its end, its parameters and the metrics of every step must have the bits of the undisturbed one.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LIMIT = 300.0  # seconds without an end or a save mean that something hangs


def train(folder: Path) -> None:
    """The training that is killed; leaves the parameters' digest in folder/ended when it ends."""
    import jax
    import numpy as np

    from ddistill import Experiment
    from ddistill.config import Data, MLPNetwork, Teacher
    from ddistill.integrators import euler
    from ddistill.methods import Consistency
    from ddistill.runs import distil
    from ddistill.signals import Stopped, on_signals

    class Plane:
        def load(self) -> Data:
            return Data({"x": np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32) / 2}, (2,), 0)

    experiment = Experiment(
        name="chaos",
        method=Consistency(intervals=4, max_intervals=8, solver=euler),
        data=Plane(),
        network=MLPNetwork(width=8, blocks=1),
        teacher=Teacher(steps=30),
        steps=50,
        batch_size=8,
        log_every=1,
        checkpoint_every=5,
    )
    os.dup2(os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        with on_signals() as stop:
            result = distil(experiment, folder, stop=stop)
    except Stopped as stopped:
        sys.exit(stopped.status)
    leaves = jax.tree.leaves((result.teacher.params, result.student.params))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    part = folder / ".ended.part"
    part.write_text(digest)
    part.replace(folder / "ended")


def until_saving(folder: Path, process, draw: random.Random) -> None:
    """Wait for a checkpoint to be begun, and a moment more."""
    begin = time.monotonic()
    known = set(folder.glob("checkpoints/*/*"))
    while process.is_alive() and time.monotonic() - begin < LIMIT:
        if set(folder.glob("checkpoints/*/*")) - known:
            time.sleep(draw.uniform(0, 0.15))
            return
        time.sleep(0.001)


def saved(folder: Path) -> dict[str, int]:
    """The newest complete step of each stage."""
    steps: dict[str, int] = {}
    for sums in folder.glob("checkpoints/*/*/checksums.0-of-1.json"):
        stage, step = sums.parts[-3], int(sums.parts[-2])
        steps[stage] = max(steps.get(stage, 0), step)
    return steps


def rows(folder: Path) -> list[str]:
    """The whole rows of metrics.jsonl."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off by a kill
            continue
        if "spent" not in row:  # time differs
            found.append(line)
    return found


def chaos(where: Path, kills: int, seed: int, say: Callable[[str], None] = print) -> dict[str, int]:
    """Counts of kills, of those within a save, of resumes, ends, steps done twice, and of what was lost."""
    # What a kill leaves half written in a cache of compilations is not for others to find.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(where / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddistill.runs", "ddistill.methods", "orbax.checkpoint", "tensorboardX"])

    def start(folder: Path):
        process = context.Process(target=train, args=(folder,))
        process.start()
        return process

    def undisturbed(name: str) -> float:
        begin = time.monotonic()
        start(where / name).join()
        return time.monotonic() - begin

    undisturbed("undisturbed")
    whole = undisturbed("again")  # compiled already
    expected, told = (where / "undisturbed" / "ended").read_text(), rows(where / "undisturbed")
    if (where / "again" / "ended").read_text() != expected:
        raise SystemExit("two undisturbed runs differ: nothing can be told")

    draw, attempts = random.Random(seed), 0
    count = dict.fromkeys(("kills", "in a save", "preemptions", "resumes", "ends", "steps redone", "lost"), 0)
    while count["kills"] + count["preemptions"] < kills or not count["ends"]:
        folder = where / f"run{count['ends']}"
        before = saved(folder)
        count["resumes"] += bool(before)
        process, attempts = start(folder), attempts + 1
        if count["kills"] + count["preemptions"] < kills:
            if attempts % 2:
                until_saving(folder, process, draw)
            else:
                process.join(draw.uniform(0, whole))
            number = signal.SIGTERM if attempts % 5 == 0 else signal.SIGKILL
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(LIMIT)
        if process.exitcode == -signal.SIGKILL:
            count["kills"] += 1
            names = [path.name for path in folder.glob("checkpoints/*/*")]
            open_ones = [
                path for path in folder.glob("checkpoints/*/[0-9]*") if not list(path.glob("checksums.0-of-1.json"))
            ]
            count["in a save"] += any("tmp" in name for name in names) or bool(open_ones)
        elif process.exitcode in (75, -signal.SIGTERM):
            count["preemptions"] += 1
        elif process.exitcode:
            raise SystemExit(f"a run ended with {process.exitcode}: {folder.with_suffix('.txt').read_text()[-2000:]}")
        after = saved(folder)
        count["lost"] += any(after.get(stage, 0) < step for stage, step in before.items())
        if process.exitcode == 0:
            there = rows(folder)
            count["ends"] += 1
            count["steps redone"] += len(there) - len(set(there))
            count["lost"] += (folder / "ended").read_text() != expected or sorted(set(there)) != sorted(told)
            say(f"{count['kills']} kills, {count['preemptions']} preemptions: run {count['ends']} has ended")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a training again and again, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=50, help="how often, SIGTERM included")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = chaos(Path(folder), args.kills, args.seed)
    print(", ".join(f"{name}: {number}" for name, number in counts.items()))
    print("something was lost" if counts["lost"] else "nothing was lost: all runs have the bits of the undisturbed one")
    sys.exit(bool(counts["lost"]))
