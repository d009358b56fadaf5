"""The programs that a run compiles, with shapes for arrays: a train step for each distinct turn, and the sampler."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from ddistill import sharding
from ddistill.config import Experiment
from ddistill.dry_run import Built, build
from ddistill.gathering import Place
from ddistill.methods.base import Method, Pairs, home, sampling_of
from ddistill.net import Net, Scaled, laid_out
from ddistill.plan.chips import GIB
from ddistill.sample import sample

PyTree = Any
SAMPLER = "sampler"


@dataclass(frozen=True)
class Program:
    """One program: a step of a stage in which `turn` is updated, or the sampler, whose stage has that name.

    steps, share: its stage's, and the share of them that are such. images: what one call trains on or makes. trace: to
    the traced program, on the mesh that it was built for.
    """

    stage: str
    turn: tuple[str, ...]
    steps: int
    share: float
    images: int
    trace: Callable[[], Any]

    @property
    def name(self) -> str:
        """Its name in tables."""
        return self.stage if self.stage == SAMPLER else f"{self.stage}, step of {' and '.join(self.turn)}"


def programs(
    experiment: Experiment, mesh: Mesh | None = None, *, sample_steps: int = 1, samples: int | None = None
) -> tuple[list[Program], list[Built], list[str]]:
    """The programs of a `resolved` experiment, its stages, and what stood in for what is not there.

    mesh: by default of one device that is here, and each network is traced once for all of its calls. sample_steps,
    samples: of the sampler, by default as many samples as a batch has. Raises as `dry_run.build`.
    """
    built, notes = build(experiment, mesh=mesh, once=mesh is None)
    found = []
    for part in built:
        pairs = part.stage.method.pairs
        if pairs is not None:
            notes.append(_of_pairs(pairs, part))
        for turn, share in turns(part.stage.method).items():
            found.append(
                Program(part.stage.name, turn, part.stage.steps, share, experiment.batch_size, _step(part, turn, mesh))
            )
    count = experiment.batch_size if samples is None else samples
    draw = _sampler(experiment, built[-1], mesh, sample_steps, count)
    return [*found, Program(SAMPLER, (), sample_steps, 1.0, count, draw)], built, notes


def _of_pairs(pairs: Pairs, part: Built) -> str:
    what = f"what makes the pairs of {part.stage.name}, {pairs.steps} steps of the teacher for each"
    if not pairs.count:
        return f"{what} batch, which may take most of its time"
    row = sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in jax.tree.leaves(part.batch))
    return (
        f"{what} of {pairs.count:,} before its first step, by the teacher in the same parts; unless `ddistill pairs` "
        f"has stored them, each process then keeps all of them in its memory, {pairs.count * row / GIB:.2g} GiB"
    )


def turns(method: Method) -> dict[tuple[str, ...], float]:
    """The distinct turns of a method's steps, and the share of the steps that each has."""
    cycle = math.lcm(*(method.every.get(name, 1) for name in method.losses))
    return {turn: n / cycle for turn, n in Counter(method.turn(step) for step in range(cycle)).items()}


def mesh_of(devices: list[Any], experiment: Experiment) -> Mesh:
    """The mesh of a run on these devices, which need not be here. Raises ValueError as `sharding.mesh_over`."""
    return sharding.mesh_over(devices, experiment.fsdp, experiment.tensor)


def placed(tree: PyTree, mesh: Mesh | AbstractMesh | None, rule: sharding.Rule | None) -> PyTree:
    """Shapes with where they lie on a mesh: as the rule for states says, or without one as batches."""
    if mesh is None:
        return tree
    if rule is None:
        where = jax.tree.map(lambda _: sharding.batch_sharding(mesh), tree)
    else:
        where = sharding.state_shardings(mesh, tree, rule)
    return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, where)


def _step(part: Built, turn: tuple[str, ...], mesh: Mesh | None) -> Callable[[], Any]:
    def trace():
        state, nets = placed((part.state, part.nets), mesh, part.trainer.rule)
        batch = placed(part.batch, mesh, None)
        return part.trainer.step.trace(state, nets, batch, turn, part.stage.steps, part.stage.round)  # type: ignore[attr-defined]

    return trace


def _sampler(experiment: Experiment, last: Built, mesh: Mesh | None, steps: int, count: int) -> Callable[[], Any]:
    made = experiment.method(experiment.process)
    sampling, process = sampling_of(made), home(made, experiment.process)
    times = sampling.times(steps)
    x = last.batch["x"]
    noise = jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype)
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype), last.batch.get("cond"))

    def draw(net: Net, noise, cond, key):
        w = sampling.guidance
        given = cond if w is None else Scaled(cond, jnp.full(noise.shape[:1], w))
        return sample(net, process, times, noise, key, gamma=sampling.gamma, cond=given).x

    def trace():
        at: dict[str, Any] = {} if mesh is None else {"out_shardings": sharding.batch_sharding(mesh)}
        rule = last.trainer.rule
        place = None if mesh is None else Place(mesh, rule)
        net, key = placed((laid_out(last.result, place), jax.eval_shape(lambda: jax.random.key(0))), mesh, rule)
        z, c = placed((noise, cond), mesh, None)
        return jax.jit(draw, **at).trace(net, z, c, key)

    return trace
