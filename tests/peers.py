"""What each process of a run of several does, for test_processes.py.

python tests/peers.py FOLDER PROCESSES PROCESS PORT TASK...
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

STEPS = 50
CUT = 25
"""Where runs that go on elsewhere are cut off: the middle, where a checkpoint is."""


@dataclass(frozen=True)
class Plane:
    """64 points of a plane in two classes; what the environment says of a process happens to it meanwhile."""

    def load(self):
        import jax
        import numpy as np

        from ddistill.config import Data

        if os.environ.get("FAILS") == str(jax.process_index()):
            raise ValueError("this host does not see the data")
        if os.environ.get("TOLD_TO_LEAVE") == str(jax.process_index()):
            os.kill(os.getpid(), signal.SIGTERM)
        x = np.random.default_rng(0).standard_normal((64, 2)).astype(np.float32) / 2
        return Data({"x": x, "cond": (x[:, 0] > 0).astype(np.int32)}, (2,), 2)


def experiments():
    """Methods whose losses are compared, without the training of a teacher."""
    from ddistill.config import Experiment, MLPNetwork, Optimizer
    from ddistill.integrators import euler
    from ddistill.losses.distances import L2
    from ddistill.methods import DMD, Consistency, Progressive

    methods = {
        "consistency": Consistency(intervals=4, max_intervals=8, solver=euler, distance=L2()),
        "dmd": DMD(),
        "progressive": Progressive(start=4, stop=1, solver=euler),
    }
    common = {
        "data": Plane(), "network": MLPNetwork(width=8, blocks=1), "steps": STEPS, "batch_size": 16,
        "optimizer": Optimizer(learning_rate=2e-4),  # small steps, which do not multiply rounding errors
    }  # fmt: skip
    # Of one, parameters lie in parts, over two processes and more.
    parts = {"consistency": {"fsdp": 4, "layout": {"blocks*.kernel": (None, "fsdp")}}}
    return {name: Experiment(name, method, **common, **parts.get(name, {})) for name, method in methods.items()}


def experiment():
    """The experiment of the commands, with a method that learns from pairs."""
    from ddistill.config import Experiment, MLPNetwork, Teacher
    from ddistill.integrators import euler
    from ddistill.methods import KD

    return Experiment(
        "pairs", KD(steps=(1,), pairs=40, teacher_steps=2, integrator=euler), Plane(),
        network=MLPNetwork(width=8, blocks=1), teacher=Teacher(steps=2), steps=2, batch_size=16, log_every=1,
    )  # fmt: skip


def losses(folder: Path | None, *names: str) -> dict[str, list[list[float]]]:
    """Train methods, in folders of their names from where they are; answers (step in all rounds, loss) of each step."""
    import jax

    from ddistill.log import Silent
    from ddistill.net import Net
    from ddistill.runs import student_stages
    from ddistill.sharding import make_mesh, rule_of
    from ddistill.stages import run

    told = {}
    for name in names:
        e = experiments()[name]
        data = e.data.load()
        teacher: Net = e.network.build(data, e.process, jax.random.key(1))
        noise = iter(jax.random.split(jax.random.key(2), 100))
        teacher = teacher.replace(  # a fresh network answers c_skip x, from which nothing is learned
            params=jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(noise), p.shape), teacher.params)
        )
        log, stages, workdir = Silent(), student_stages(e, data), None if folder is None else folder / name
        *_, student = run(
            stages, teacher, jax.random.key(3), mesh=make_mesh(e.fsdp), rule=rule_of(e.layout), log=log,
            workdir=workdir, log_every=1, checkpoint_every=CUT,
        )  # fmt: skip
        assert (e.fsdp > 1) != all(leaf.is_fully_replicated for leaf in jax.tree.leaves(student.params))
        before = {s.name: sum(other.steps for other in stages[:i]) for i, s in enumerate(stages)}
        told[name] = [[before[row["stage"]] + row["step"], row["student/loss"]] for row in log.rows]
    return told


def told_of_writing(part: str) -> None:
    """Print the names of files below folders of this name that the process opens to write, from now on."""

    def tell(event, args):
        if event == "open" and f"/{part}/" in str(args[0]) and set(str(args[1])) & set("wax+"):
            print(f"writes {args[0]}", flush=True)

    sys.addaudithook(tell)


def commands(folder: Path, flags: list[str]) -> None:
    """The commands of a run, in processes that are joined."""
    from ddistill.cli import main

    run = str(folder / "run")
    seen = ["--preview-every", "1", "--preview-samples", "10"]
    assert main(["distill", __file__, "--workdir", run, *seen, *flags]) == 0
    for rest in (
        ["pairs", run, "--out", str(folder / "pairs"), "--count", "20", "--shard-size", "6", "--steps", "3"],
        ["sample", run, "--out", str(folder / "x.npz"), "--n", "11", "--steps", "1"],
    ):
        assert main([*rest, *flags]) == 0


def preempted(folder: Path) -> None:
    """Train without an end, until one of the processes is told that its machine is taken away."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from ddistill.log import Silent
    from ddistill.methods.base import Method, Sampling
    from ddistill.net import Net
    from ddistill.signals import on_signals
    from ddistill.stages import Stage, run

    def net(w):
        return Net({"w": jnp.asarray(w)}, {}, lambda params, rest, x, t, cond, *, s, key: params["w"] * x)

    def loss(nets, batch, progress, key):
        return jnp.mean((nets["student"](batch["x"], 1.0) - nets["teacher"](batch["x"], 1.0)) ** 2), {}

    def batches(step):
        if step == 10 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"x": np.random.default_rng(step).normal(size=(4, 2)).astype(np.float32)}

    method = Method({"student": loss}, {"student": lambda *_: net([0.0, 1.0])}, Sampling(lambda n: [1, 0]))
    stage = Stage("s", method, 10**6, lambda teacher: batches, lambda steps: optax.sgd(1e-3))
    with on_signals() as stop:
        run(
            [stage], net([2.0, 3.0]), jax.random.key(0), workdir=folder, log=Silent(), stop=stop,
            checkpoint_every=10**6,
        )  # fmt: skip


def one_leaves(folder: Path, why: str) -> int:
    """The status of a run of which process 1 is told to leave, or fails, in loading data, while process 0 waits."""
    from ddistill.cli import main
    from ddistill.hosts import said_by_all

    said_by_all("")  # which connects them
    os.environ[why] = "1"
    return main(["distill", __file__, "--workdir", str(folder)])


def bucket(folder: Path) -> None:
    """Save a state that the processes share out to s3://, which is a folder here, and restore it."""
    import fsspec
    import jax
    import numpy as np
    from fsspec.implementations.local import LocalFileSystem
    from jax.sharding import NamedSharding, PartitionSpec

    from ddistill.checkpoint import Checkpoints
    from ddistill.sharding import make_mesh

    class OnDisk(LocalFileSystem):
        protocol = ("s3",)

        @classmethod
        def _strip_protocol(cls, path):
            path = str(path).removeprefix("s3://")
            return path if path.startswith(str(folder)) else f"{folder}/{path.strip('/')}"

    fsspec.register_implementation("s3", OnDisk, clobber=True)
    shared = NamedSharding(make_mesh(jax.device_count()), PartitionSpec("fsdp"))

    def tree(value):
        whole = np.arange(80, dtype=np.float32) * value
        return {"w": jax.make_array_from_callback(whole.shape, shared, lambda index: whole[index])}

    with Checkpoints("s3://bucket/c") as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree(step))
    with Checkpoints("s3://bucket/c") as checkpoints:
        restored = checkpoints.restore(tree(0))["w"]
    assert restored.sharding == shared and not restored.is_fully_addressable
    for shard in restored.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(80)[shard.index] * 3)


def peer(folder: Path, processes: int, process: int, port: int, tasks: list[str]) -> None:
    """Join the others, and do the tasks: NAME:METHODS, in a folder of that name, or the others here."""
    from ddistill.hosts import first, join
    from ddistill.launchers import Peers

    assert join(Peers(processes, process, f"localhost:{port}", join_timeout=120, heartbeat=30))
    for task in tasks:
        if task == "commands":
            told_of_writing("previews")
            os.environ.update(DDISTILL_PROCESSES=str(processes), DDISTILL_PROCESS=str(process))
            commands(folder / f"commands-{processes}", ["--coordinator", f"localhost:{port}"])
            continue
        if task == "bucket":
            bucket(folder / task)
            continue
        if task in ("TOLD_TO_LEAVE", "FAILS"):
            sys.exit(one_leaves(folder / task, task))
        if task == "preempted":
            try:
                preempted(folder / task)
            except KeyboardInterrupt as stopped:
                print(f"{stopped}", flush=True)
                sys.exit(stopped.status)
        name, methods = task.split(":")
        told = losses(None if name == "four" else folder / name, *methods.split(","))
        if first():
            (folder / f"{name}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    peer(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
