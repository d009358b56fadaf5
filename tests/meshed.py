"""A tiny DiT trained for some steps on meshes of several shapes, compiled once for each: losses, states, programs.

Losses are not weighted: weights that grow without bound at low noise would magnify the rounding of float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from ddistill import sharding
from ddistill.integrators import euler
from ddistill.lora import LoRA
from ddistill.methods.consistency import Consistency
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Auxiliary
from ddistill.net import EDMPrecondition, Net, from_nnx
from ddistill.networks.dit import DiT, DiTConfig
from ddistill.networks.layers import rngs_of
from ddistill.process import edm
from ddistill.train import State, make_trainer

DEPTH, CLASSES, BATCH, STEPS = 3, 4, 16, 3
ONE, DATA, FSDP, ALL = (1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)
PROCESS = edm()
RULE = sharding.Rule(smallest=256)
METHODS = {
    "consistency": Consistency(intervals=4, max_intervals=4, solver=euler, weighted=False),
    "dmd": DMD(Auxiliary(lora=LoRA(rank=2, layers=("*.attn1.*.kernel", "*.ff.*.kernel")))),
}


def mesh(shape=FSDP):
    """A mesh of the first of the eight devices."""
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, sharding.AXES, devices=jax.devices()[: int(np.prod(shape))], axis_types=auto)


def network(key, *, width=16, depth=DEPTH, **options) -> Net:
    """A DiT none of whose outputs is 0."""
    config = DiTConfig(
        2, width // 2, 4, num_layers=depth, sample_size=4, num_embeds_ada_norm=CLASSES, shared_embedding=True
    )
    net = from_nnx(DiT(config, rngs=rngs_of(key), **options), PROCESS, EDMPrecondition())
    keys = dict(zip(net.params, jax.random.split(jax.random.key(7), len(net.params)), strict=True))
    return net.replace(params={n: p + 0.05 * jax.random.normal(keys[n], p.shape) for n, p in net.params.items()})


def batches():
    """One for each step."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        x = rng.normal(size=(BATCH, 4, 4, 4)).astype(np.float32)
        yield {"x": x, "cond": rng.integers(0, CLASSES, BATCH).astype(np.int32)}


class Trained(NamedTuple):
    """What a training gave; its step's program, before and after compilation, and the shapes that it was given."""

    losses: dict[str, list[float]]
    state: State
    text: str
    traced: Any
    given: tuple[Any, Any, Any]


@functools.cache
def trained(name: str, shape: tuple[int, int, int]) -> Trained:
    """STEPS steps of one of METHODS on a mesh."""
    over, method = mesh(shape), METHODS[name](PROCESS)
    optimizers = {n: optax.sgd(0.01, momentum=0.9) for n in method.losses}
    trainer = make_trainer(method, optimizers, mesh=over, rule=RULE)
    first = sharding.spread(over, network(jax.random.key(0)), RULE)
    teacher = first.replace(params={n: 1.5 * p for n, p in first.params.items()})  # so that distillation has a gradient
    nets, state = trainer.begin(first, jax.random.key(1))
    nets = sharding.spread(over, {"teacher": teacher, **nets}, RULE)
    turn, losses = method.turn(0), {f"{n}/loss": [] for n in method.losses}
    program = None
    for batch in batches():
        given = state, nets, sharding.put_batch(over, batch)
        if program is None:
            shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), given)
            traced = trainer.step.trace(*given, turn, STEPS, 0)
            program = traced.lower().compile()
        state, metrics = program(*given, STEPS, 0)
        for n in losses:
            losses[n].append(float(metrics[n]))
    return Trained(losses, state, program.as_text(), traced, shapes)
