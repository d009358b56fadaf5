"""Whole distillation steps beside PyTorch's on the same networks, in one run, as ratios.

    python experiments/bench/step.py --page experiments/results/step.md       # small networks on one CPU core, float32
    python experiments/bench/step.py --device gpu --page experiments/results/step_gpu.md

Consistency and DMD steps, with AdamW, clipped gradients and an average of the student, of EDM's DDPM++ and of DiT;
images per second of samplers of 1 and 4 steps; the step over more and more devices; and what the loop around it costs.
PyTorch's steps are those of `torch_steps.py`, in eager mode, on a GPU compiled too. Contenders take turns, and the
fastest call of each counts. On a CPU both are kept to the same cores (--threads), and a call's time is the process's
CPU time, which other processes on the machine disturb least; on a GPU it is the clock's, ours in bfloat16 with float32
parameters, theirs under autocast. Ratios are ours over theirs: below 1 ours is faster.

FLOPs of a step are counted by hand, in forward passes: a consistency step takes 5 (student 1, and 2 backwards; target;
teacher), DMD 8 (generator 3, teacher 1, fake score 1 for the generator and 3 for itself).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from networks import DIT, DIT_XL, clock, flops, matrix_rate, prepare, race

PASSES = {"consistency": 5, "dmd": 8, "sample 1": 1, "sample 4": 4}
"""Forward passes of the network, a backward pass counted as two."""


@dataclass(frozen=True)
class Case:
    """A network by its configuration, and its images: [batch, side, side, channels]."""

    name: str
    options: Mapping[str, Any]
    batch: int
    side: int
    channels: int
    classes: int = 0
    remat: bool = False


SONG = {"img_resolution": 32, "dropout": 0.0}
CASES = {
    "cpu": (
        Case("SongUNet", {**SONG, "model_channels": 32, "num_blocks": 1}, 8, 32, 3),
        Case("DiT", DIT, 4, 32, 4, 1000),
    ),
    "gpu": (
        Case("SongUNet", SONG, 128, 32, 3),
        Case("DiT", {**DIT_XL, "num_layers": 28}, 256, 32, 4, 1000, remat=True),
    ),
}


@dataclass
class Row:
    """Seconds of one call of one network, per contender: "ours", "eager", "compiled"."""

    network: str
    parameters: int
    input: tuple[int, ...]
    call: str
    flops: float
    seconds: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--networks", default="SongUNet,DiT", help="names, with commas")
    parser.add_argument("--against", default="", help="eager, compiled, or both with a comma; eager on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="CPU cores, for both")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each contender")
    parser.add_argument("--parts", default="steps,devices,loop", help="what is measured, with commas")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--page", type=Path, help="file for tables of them, in Markdown")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    known = {
        "networks": [case.name for case in CASES[given.device]],
        "parts": ["steps", "devices", "loop"],
        "against": ["", "eager", "compiled"],
    }
    for flag, names in known.items():
        if unknown := sorted({*getattr(given, flag).split(",")} - {*names}):
            parser.error(f"--{flag}: no {', '.join(map(repr, unknown))}; there are {', '.join(filter(None, names))}")
    prepare(given.device, given.threads)
    if given.child:
        print(json.dumps(over_devices(given.device, given.child, given.rounds)))
        return
    against = [c for c in (given.against or ("eager" if given.device == "cpu" else "eager,compiled")).split(",") if c]
    parts, names = given.parts.split(","), given.networks.split(",")
    rate = matrix_rate(given.device)
    product = matrix_rate_of_torch(given.device, given.threads) if "steps" in parts and against else 0.0
    rows: list[Row] = []
    for case in CASES[given.device]:
        if "steps" in parts and case.name in names:
            for row in measure(case, given.device, against, given.rounds, given.threads):
                print(line(row, rate), flush=True)
                rows.append(row)
    devices = [child(given, n) for n in (1, 2, 4, 8)] if "devices" in parts else []
    devices = [row for row in devices if row]
    loop = of_loop(given.device, given.rounds) if "loop" in parts else {}
    real = of_real_loop(given.device) if "loop" in parts else {}
    text = page(rows, devices, loop, real, rate, product, given)
    print(text)
    if given.json:
        rates = {"ours": rate, "torch": product}
        found = {"matrix_flops_per_second": rates, "rows": [asdict(r) for r in rows], "devices": devices, "loop": loop}
        found["real loop"] = real
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.page:
        given.page.write_text(text, encoding="utf-8")


def measure(case: Case, device: str, against: list[str], rounds: int, threads: int) -> Iterator[Row]:
    """Time our calls of one network and its contenders', one after the other."""
    rows, ours = build(case, device)
    contenders = {"ours": ours, **{name: theirs(case, device, name == "compiled", threads) for name in against}}
    for row in rows:
        calls = {name: made[row.call] for name, made in contenders.items() if row.call in made}
        row.seconds.update(race(calls, device, rounds, {}, row.call))
        yield row


def teacher_of(case: Case, device: str) -> Any:
    """The network as a denoiser with random parameters."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ddistill.net import EDMPrecondition, from_nnx
    from ddistill.networks import dit, edm
    from ddistill.process import edm as process

    module = edm if case.name == "SongUNet" else dit
    config = getattr(module, f"{case.name}Config")(**case.options)
    dtype = jnp.bfloat16 if device == "gpu" else jnp.float32

    def make():
        return getattr(module, case.name)(config, dtype=dtype, remat=case.remat, rngs=nnx.Rngs(0))

    net = from_nnx(nnx.eval_shape(make), process(), EDMPrecondition())
    # Numbers of any kind do; compiling all of a UNet's initialisation takes longer than measuring it.
    return jax.tree.map(lambda p: 0.02 * jax.random.normal(jax.random.key(0), p.shape, p.dtype), net)


def methods() -> dict[str, Any]:
    """The two methods, as PyTorch's steps have them."""
    from ddistill.integrators import euler
    from ddistill.losses.times import KarrasRamp
    from ddistill.methods import DMD, Consistency
    from ddistill.methods.fake_scores import Auxiliary
    from ddistill.process import edm

    fake = Auxiliary(stable=False)
    made: dict[str, Callable[[Any], Any]] = {
        "consistency": Consistency(intervals=18, max_intervals=18, solver=euler),
        "dmd": DMD(fake=fake, times=KarrasRamp(), rate=1.0),
    }
    return {name: method(edm()) for name, method in made.items()}


def started(case: Case, device: str, name: str, mesh: Any = None) -> tuple[Any, dict[str, Any], Any, dict[str, Any]]:
    """A trainer, its networks, its state at step 0, and a batch."""
    import jax
    import numpy as np
    import optax

    from ddistill.methods.base import Space
    from ddistill.sharding import local_mesh
    from ddistill.stages import prepare as prepared
    from ddistill.train import make_trainer

    method, mesh = methods()[name], mesh or local_mesh(jax.local_devices()[:1])
    adam = optax.chain(optax.clip_by_global_norm(10.0), optax.adamw(1e-4, weight_decay=0.01))
    trainer = make_trainer(method, dict.fromkeys(method.losses, adam), mesh=mesh)
    shape, draw = (case.side, case.side, case.channels), np.random.default_rng(0)
    batch: dict[str, Any] = {"x": 0.5 * draw.normal(size=(case.batch, *shape)).astype(np.float32)}
    if case.classes:
        batch["cond"] = np.arange(case.batch, dtype=np.int32) % case.classes
    teacher = teacher_of(case, device)
    nets, state = prepared(trainer, teacher, teacher, jax.random.key(1), Space(shape, case.classes))
    return trainer, nets, state, batch


def times_of_samplers() -> dict[str, list[float]]:
    from ddistill.methods.consistency import renoising_times
    from ddistill.process import edm

    return {f"sample {n}": [float(t) for t in renoising_times(edm(), n)] for n in (1, 4)}


def build(case: Case, device: str) -> tuple[list[Row], dict[str, Callable[[int], None]]]:
    """Our calls, and a row for each."""
    import jax
    import jax.numpy as jnp

    from ddistill.process import edm
    from ddistill.sample import sample
    from ddistill.sharding import put_batch

    made: dict[str, Callable[[int], None]] = {}
    for name in ("consistency", "dmd"):
        trainer, nets, state, batch = started(case, device, name)
        made[name] = stepping(trainer, nets, state, put_batch(trainer.mesh, batch))
    student, cond, x = teacher_of(case, device), batch.get("cond"), jnp.asarray(batch["x"])

    def sampling(times: list[float]) -> Callable[[int], None]:
        @jax.jit
        def draw(net, key, cond):
            first, rest = jax.random.split(key)
            noise = edm().prior(first, x.shape)
            return sample(net, edm(), times, noise, rest, gamma=1.0, cond=cond).x

        def run(count: int) -> None:
            for i in range(count):
                out = draw(student, jax.random.key(i), cond)
            jax.block_until_ready(out)

        return run

    made |= {name: sampling(times) for name, times in times_of_samplers().items()}
    t = jnp.ones(case.batch)
    with jax.default_device(jax.devices("cpu")[0]):
        forward = flops(jax.make_jaxpr(lambda net, x, cond: net(x, t, cond))(student, x, cond).jaxpr)
    count = sum(p.size for path, p in student.params.items() if not path.startswith(("target.", "guidance.")))
    return [Row(case.name, count, x.shape, name, n * forward) for name, n in PASSES.items()], made


def stepping(trainer: Any, nets: Any, state: Any, batch: Any) -> Callable[[int], None]:
    """Steps of a trainer, one after the other."""
    import jax

    held = [state]

    def run(count: int) -> None:
        for _ in range(count):
            held[0], metrics = trainer.step(held[0], nets, batch, trainer.method.turn(0), 1000, 0)
        jax.block_until_ready((held[0].params, metrics))

    return run


def theirs(case: Case, device: str, compiled: bool, threads: int) -> dict[str, Callable[[int], None]]:
    """PyTorch's calls."""
    import torch
    import torch_steps

    torch.set_num_threads(threads if device == "cpu" else torch.get_num_threads())
    where = torch.device("cuda" if device == "gpu" else "cpu")
    if device == "gpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    network = getattr(torch_steps, case.name)(**case.options).to(where)
    x = 0.5 * torch.randn(case.batch, case.channels, case.side, case.side, device=where)
    if device == "gpu":
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    labels = torch.arange(case.batch, device=where) % case.classes if case.classes else None
    steps = torch_steps.Steps(network, half=device == "gpu", compiled=compiled)
    return torch_steps.calls(steps, x, labels, times_of_samplers())


def matrix_rate_of_torch(device: str, threads: int) -> float:
    """FLOP/s of PyTorch's matrix product of the size and type of `networks.matrix_rate`."""
    import torch

    torch.set_num_threads(threads if device == "cpu" else torch.get_num_threads())
    n, kind = (8192, torch.bfloat16) if device == "gpu" else (1024, torch.float32)
    a = torch.ones((n, n), dtype=kind, device="cuda" if device == "gpu" else "cpu")

    def products(count: int) -> None:
        for _ in range(count):
            a @ a
        if device == "gpu":
            torch.cuda.synchronize()

    return 2 * n**3 / race({"torch": products}, device, 10, {}, "product")["torch"]


def child(given: argparse.Namespace, count: int) -> dict[str, Any]:
    """The step over so many devices, in a process of its own, as a CPU is split before JAX starts."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    environment = {**os.environ, "NPROC": "64", **({"XLA_FLAGS": flags} if given.device == "cpu" else {})}
    command = [sys.executable, __file__, "--device", given.device, "--child", str(count)]
    command += ["--threads", str(given.threads), "--rounds", str(given.rounds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def over_devices(device: str, count: int, rounds: int) -> dict[str, Any]:
    """Seconds of DiT's consistency step over the first devices, the global batch and one device's share the same."""
    import jax

    from ddistill.sharding import local_mesh, put_batch

    if len(jax.local_devices()) < count:
        return {}
    case = next(c for c in CASES[device] if c.name == "DiT")
    if device == "cpu":
        case = Case(case.name, {**case.options, "num_layers": 2}, 8, case.side, case.channels, case.classes)
    mesh = local_mesh(jax.local_devices()[:count])
    trainer, nets, state, batch = started(case, device, "consistency", mesh)
    best = race({"ours": stepping(trainer, nets, state, put_batch(mesh, batch))}, device, rounds, {}, "step")
    return {"devices": count, "batch": case.batch, "seconds": best["ours"]}


def of_loop(device: str, rounds: int, steps: int = 200) -> dict[str, Any]:
    """Seconds that a step costs inside the loop and bare, for an MLP whose step takes about as long as its call."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from ddistill.data import ArraySource
    from ddistill.log import Silent
    from ddistill.loop import Pace, fit
    from ddistill.net import EDMPrecondition, from_nnx
    from ddistill.networks import MLP
    from ddistill.process import edm
    from ddistill.sharding import local_mesh, put_batch
    from ddistill.stages import prepare as prepared
    from ddistill.train import make_trainer

    method = methods()["consistency"]
    mesh = local_mesh(jax.local_devices()[:1])
    teacher = from_nnx(MLP(64, 64, 2, rngs=nnx.Rngs(0)), edm(), EDMPrecondition())
    trainer = make_trainer(method, {"student": optax.adam(1e-4)}, mesh=mesh)
    source = ArraySource({"x": np.random.default_rng(0).normal(size=(4096, 64)).astype(np.float32)}, 64)
    nets, state = prepared(trainer, teacher, teacher, jax.random.key(1))
    now, fixed = clock(device), put_batch(mesh, source(0))

    def bare(_: int) -> None:
        current = jax.tree.map(jax.numpy.copy, state)
        for _ in range(steps):
            current, metrics = trainer.step(current, nets, fixed, ("student",), steps, 0)
        jax.block_until_ready((current, metrics))

    def looped(per: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            current = jax.tree.map(jax.numpy.copy, state)
            fit(
                trainer, current, nets, source,
                stage="loop", steps=steps, pace=Pace(log_every=50, steps_per_dispatch=per), log=Silent(),
            )  # fmt: skip

        return run

    calls = {"bare": bare, **{str(per): looped(per) for per in (1, 8, 32)}}
    best: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first compiles
        for name, call in calls.items():
            start = now()
            call(1)
            seconds = (now() - start) / steps
            best[name] = min(best.get(name, seconds), seconds)
    return best


def of_real_loop(device: str, steps: int = 30) -> dict[str, Any]:
    """Seconds of a step of about 100 ms bare and inside the loop, `steps` of each in turn.

    The consistency step of a small DiT on images [8, 32, 32, 3].
    """
    import jax

    from ddistill.data import ArraySource
    from ddistill.log import Silent
    from ddistill.loop import Pace, fit
    from ddistill.sharding import put_batch

    layers = {"cpu": 2, "gpu": 28}[device]
    options = {**DIT, "num_layers": layers, "attention_head_dim": 32, "in_channels": 3}
    case = Case("DiT", options, 8, 32, 3, 1000)
    trainer, nets, state, batch = started(case, device, "consistency")
    source, fixed = (
        ArraySource({name: array.repeat(8, axis=0) for name, array in batch.items()}, 8),
        put_batch(trainer.mesh, batch),
    )

    def bare(count: int) -> None:
        current = jax.tree.map(jax.numpy.copy, state)
        for _ in range(count):
            current, metrics = trainer.step(current, nets, fixed, trainer.method.turn(0), count, 0)
        jax.block_until_ready((current, metrics))

    def looped(count: int) -> None:
        current = jax.tree.map(jax.numpy.copy, state)
        fit(trainer, current, nets, source, stage="loop", steps=count, pace=Pace(log_every=10), log=Silent())

    now, found = clock(device), dict[str, list[float]](bare=[], loop=[])
    for turn in range(4):  # the first compiles
        for name, call in (("bare", bare), ("loop", looped)):
            start = now()
            call(steps if turn else 2)
            if turn:
                found[name].append((now() - start) / steps)
    return {"layers": layers, "steps": steps, **{name: min(seconds) for name, seconds in found.items()}}


def line(row: Row, rate: float) -> str:
    """A line of the table of calls: ours in ms, images per second, ratios, share of the matrix rate."""
    ours = row.seconds["ours"]
    ratios = [f"{ours / row.seconds[c]:.2f}" if c in row.seconds else "–" for c in ("eager", "compiled")]
    shape = "×".join(map(str, row.input))
    cells = (
        row.network, f"{row.parameters / 1e6:.3g} M", shape, row.call, f"{1e3 * ours:.4g} ms",
        f"{row.input[0] / ours:.3g}", *ratios, f"{row.flops / ours / rate:.0%}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def target(row: Row, rate: float, gpu: bool) -> str:
    """A line on what a step is to reach: PyTorch eager's time on a CPU; on a GPU 1.3 times as fast as compiled."""
    against, most = ("compiled", 1 / 1.3) if gpu else ("eager", 1.0)
    if against not in row.seconds:
        return f"- {row.network}, {row.call}: not measured against {against}"
    ratio, share = row.seconds["ours"] / row.seconds[against], row.flops / row.seconds["ours"] / rate
    said = f"{ratio:.2f} of {against}'s time, at most {most:.2g}: {'met' if ratio <= most else 'missed'}"
    more = f"; {share:.0%} of the matrix rate, at least 50 %: {'met' if share >= 0.5 else 'missed'}"
    return f"- {row.network}, {row.call}: {said}{more if gpu and row.network == 'DiT' else ''}"


def page(
    rows: list[Row],
    devices: list[dict[str, Any]],
    loop: Mapping[str, float],
    real: Mapping[str, float],
    rate: float,
    product: float,
    given: argparse.Namespace,
) -> str:
    """The results as a page, with the machine, versions and the date."""
    import jax

    gpu = given.device == "gpu"
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "flax", "optax"))
    where = jax.devices()[0].device_kind if gpu else f"{_processor()}, {given.threads} of {os.cpu_count()} cores"
    kind = "the clock's time" if gpu else "CPU time"
    head = [
        "# Distillation steps beside PyTorch's", "",
        f"`python experiments/bench/step.py {' '.join(_flags())}` on {datetime.date.today()}: {where}, "
        f"Python {platform.python_version()}, {versions}, {'bfloat16' if gpu else 'float32'}. Times are {kind} of the "
        f"fastest of {given.rounds} calls, contenders taking turns. Ratios are ours over PyTorch's: below 1 ours is "
        f"faster. The rate is the share of the {rate / 1e12:.3g} TFLOP/s of a matrix product, measured in this run"
        + (f"; PyTorch's has {product / 1e12:.3g}." if product else "."),
        "",
    ]  # fmt: skip
    text = list(head)
    if rows:
        text += [
            "| network | parameters | batch | call | ours | images/s | ours/eager | ours/compiled | rate |",
            "|---|---|---|---|---|---|---|---|---|", *(line(row, rate) for row in rows), "",
        ]  # fmt: skip
    if devices:
        one = devices[0]["seconds"]
        text += [
            f"DiT's consistency step, a batch of {devices[0]['batch']}"
            + ("" if gpu else ", over virtual devices of the same cores: what splitting a step costs in itself"),
            "", "| devices | step | over one device |", "|---|---|---|",
            *(f"| {d['devices']} | {1e3 * d['seconds']:.4g} ms | {d['seconds'] / one:.2f} |" for d in devices), "",
        ]  # fmt: skip
    if loop:
        extra = loop["1"] - loop["bare"]
        text += [
            "What the loop costs (batches from memory put ahead, reports, the clock) beside a bare step, an MLP's:", "",
            "| | per step | over the bare step |", "|---|---|---|",
            f"| bare | {1e6 * loop['bare']:.0f} µs | |",
            *(
                f"| {n} step{'s' * (n > 1)} in a call | {1e6 * loop[str(n)]:.0f} µs | "
                f"{1e6 * (loop[str(n)] - loop['bare']):+.0f} µs |"
                for n in (1, 8, 32)
            ),
            "", f"Of a step of 100 ms the loop's {1e6 * extra:.0f} µs are {extra / 0.1:.2%}.", "",
        ]  # fmt: skip
    if steps := [row for row in rows if row.call in ("consistency", "dmd")]:
        text += ["Targets:", "", *(target(row, rate, gpu) for row in steps), ""]
    if real:
        text += [
            f"The consistency step of a DiT of {real['layers']} layers on 8×32×32×3, the fastest "
            f"of three turns of {real['steps']} steps each: {1e3 * real['bare']:.2f} ms bare, "
            f"{1e3 * real['loop']:.2f} ms in the loop, {real['loop'] / real['bare'] - 1:+.2%} (target: under 2 %).",
            "",
        ]
    return "\n".join(text)


def _flags() -> list[str]:
    """The command's flags, but for where the page goes."""
    return [a for a, before in zip(sys.argv[1:], sys.argv, strict=False) if "--page" not in (a, before)]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "a CPU"


if __name__ == "__main__":
    main()
