"""Kill a training of two processes again and again, and see that nothing is lost.

python experiments/bench/chaos.py --kills 50 --page experiments/results/chaos.md

A tiny teacher is trained and distilled, undisturbed, and then in processes that are killed: half of the times at any
moment, half while a checkpoint is being written; both of them or one, by SIGKILL, one time in five by SIGTERM. Those
that are left have to end by themselves; then all are started again, as a supervisor does. Whenever a run comes to its
end, its parameters and the metrics of every step must have the bits of the undisturbed one.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

LIMIT = 300.0  # seconds without an end or a save mean that something hangs
HEARTBEAT = 10  # seconds after which a process that is gone is missed, where nothing else shows it


def train(folder: Path, process: int, processes: int, port: int) -> None:
    """The training that is killed; leaves the parameters' digest in folder/ended when it ends."""
    os.dup2(os.open(folder.with_suffix(f".{process}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    import jax
    import numpy as np

    from ddistill import Experiment
    from ddistill.config import Data, MLPNetwork, Teacher
    from ddistill.hosts import first, join, leave, leaving_lost_peers
    from ddistill.integrators import euler
    from ddistill.launchers import Peers
    from ddistill.methods import Consistency
    from ddistill.runs import distil
    from ddistill.signals import Stopped, on_signals

    class Plane:
        def load(self) -> Data:
            return Data({"x": np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32) / 2}, (2,), 0)

    join(Peers(processes, process, f"localhost:{port}", join_timeout=int(LIMIT), heartbeat=HEARTBEAT))
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
    try:
        with on_signals() as stop, leaving_lost_peers():
            result = distil(experiment, folder, stop=stop)
    except Stopped as stopped:
        sys.exit(leave(stopped, stopped.status))
    leaves = jax.tree.leaves((result.teacher.params, result.student.params))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    if first():
        part = folder / ".ended.part"
        part.write_text(digest)
        part.replace(folder / "ended")


def until_saving(folder: Path, group: Sequence, draw: random.Random) -> None:
    """Wait for a checkpoint to be begun, and a moment more."""
    begin = time.monotonic()
    known = set(folder.glob("checkpoints/*/*"))
    while all(process.is_alive() for process in group) and time.monotonic() - begin < LIMIT:
        if set(folder.glob("checkpoints/*/*")) - known:
            time.sleep(draw.uniform(0, 0.15))
            return
        time.sleep(0.001)


def saved(folder: Path) -> dict[str, int]:
    """The newest complete step of each stage."""
    from ddistill.seals import is_sealed

    steps: dict[str, int] = {}
    for step in folder.glob("checkpoints/*/*"):
        if step.name.isdigit() and is_sealed(step):
            steps[step.parent.name] = max(steps.get(step.parent.name, 0), int(step.name))
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


def ended(group: Sequence, folder: Path) -> float:
    """Wait for all processes; answers how many seconds the last took. Whatever is none of the ways to end, is told."""
    begin = time.monotonic()
    for process in group:
        process.join(LIMIT)
    seconds = time.monotonic() - begin
    hung = [process for process in group if process.is_alive()]
    for process in hung:
        process.kill()
    # JAX aborts a process whose peer it misses.
    fine = {0, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGABRT if len(group) > 1 else 0}
    if hung or {process.exitcode for process in group} - fine:
        told = [path.read_text()[-3000:] for path in sorted(folder.parent.glob(f"{folder.name}.*.txt"))]
        codes = [process.exitcode for process in group]
        raise SystemExit("\n".join([f"{len(hung)} processes hang, the others ended with {codes}", *told]))
    return seconds


def chaos(
    where: Path, kills: int, seed: int, processes: int = 2, say: Callable[[str], None] = print
) -> dict[str, int | float]:
    """Counts of kills, of those within a save, of resumes, ends, steps done twice, and of what was lost."""
    # What a kill leaves half written in a cache of compilations is not for others to find.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(where / "cache")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddistill.runs", "ddistill.methods", "orbax.checkpoint", "tensorboardX"])

    def start(folder: Path) -> list:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        group = [context.Process(target=train, args=(folder, i, processes, port)) for i in range(processes)]
        for process in group:
            process.start()
        return group

    def undisturbed(name: str) -> float:
        begin = time.monotonic()
        ended(start(where / name), where / name)
        return time.monotonic() - begin

    undisturbed("undisturbed")
    whole = undisturbed("again")  # compiled already
    expected, told = (where / "undisturbed" / "ended").read_text(), rows(where / "undisturbed")
    if (where / "again" / "ended").read_text() != expected:
        raise SystemExit("two undisturbed runs differ: nothing can be told")

    draw, attempts = random.Random(seed), 0
    names = ("kills", "of both", "in a save", "preemptions", "resumes", "ends", "steps redone", "lost")
    count: dict[str, int | float] = {**dict.fromkeys(names, 0), "slowest survivor (s)": 0.0}
    while count["kills"] + count["preemptions"] < kills or not count["ends"]:
        folder = where / f"run{count['ends']}"
        before = saved(folder)
        count["resumes"] += bool(before)
        group, attempts, aim = start(folder), attempts + 1, []
        if count["kills"] + count["preemptions"] < kills:
            if attempts % 2:
                until_saving(folder, group, draw)
            else:
                group[0].join(draw.uniform(0, whole))
            number = signal.SIGTERM if attempts % 5 == 0 else signal.SIGKILL
            aim = draw.choice([group, *([process] for process in group)])
            for process in aim:
                if process.is_alive():
                    os.kill(process.pid, number)
        seconds = ended(group, folder)
        codes = [process.exitcode for process in group]
        if -signal.SIGKILL in codes:
            count["kills"] += 1
            count["of both"] += codes.count(-signal.SIGKILL) > 1
            count["slowest survivor (s)"] = max(count["slowest survivor (s)"], round(seconds, 1))
            left = [path for path in folder.glob("checkpoints/*/*") if path.is_dir()]
            count["in a save"] += any("tmp" in path.name or not list(path.glob("checksums.*.json")) for path in left)
        elif aim and any(codes):
            count["preemptions"] += 1
        elif any(codes):
            raise SystemExit(f"nobody was killed, and processes ended with {codes}")
        after = saved(folder)
        count["lost"] += any(after.get(stage, 0) < step for stage, step in before.items())
        if not any(codes):
            there = rows(folder)
            count["ends"] += 1
            count["steps redone"] += len(there) - len(set(there))
            count["lost"] += (folder / "ended").read_text() != expected or sorted(set(there)) != sorted(told)
            say(f"{count['kills']} kills, {count['preemptions']} preemptions: run {count['ends']} has ended")
    return count


def page(counts: dict[str, int | float], args: argparse.Namespace, seconds: float) -> str:
    """The result as a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "orbax-checkpoint"))
    command = f"python experiments/bench/chaos.py --kills {args.kills} --seed {args.seed} --processes {args.processes}"
    return "\n".join(
        [
            "# A training that is killed again and again",
            "",
            f"`{command}`, {time.strftime('%Y-%m-%d')}, {platform.machine()} with {os.cpu_count()} CPU cores, shared "
            f"with other work, Python {platform.python_version()}, {versions}; {seconds / 60:.0f} minutes.",
            "",
            f"A teacher of 30 steps and a student of 50, a checkpoint each 5 steps, in {args.processes} processes with "
            f"gloo between them, a heartbeat timeout of {HEARTBEAT} s. Undisturbed, the run gives the same bits twice.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {number} |" for name, number in counts.items()),
            "",
            "Kills are by SIGKILL, of one process or of both; preemptions are by SIGTERM. Lost counts checkpoints that "
            "were there before a kill and not after it, and runs whose final parameters or metrics of any step differ "
            "in a bit from those of the undisturbed run.",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Kill a training again and again, and see that nothing is lost.")
    parser.add_argument("--kills", type=int, default=50, help="how often, SIGTERM included")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--processes", type=int, default=2, help="that train together")
    parser.add_argument("--page", type=Path, help="write the counts there as well")
    args = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = chaos(Path(folder), args.kills, args.seed, args.processes)
    print(", ".join(f"{name}: {number}" for name, number in counts.items()))
    print("something was lost" if counts["lost"] else "nothing was lost: all runs have the bits of the undisturbed one")
    if args.page is not None:
        args.page.write_text(page(counts, args, time.monotonic() - begin), encoding="utf-8")
    sys.exit(bool(counts["lost"]))
