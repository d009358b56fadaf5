"""Teacher pairs: noise, and where the teacher's integrator takes it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.integrators import dpmpp_3m
from ddistill.net import Net
from ddistill.process import Process


def teacher_pairs(
    teacher: Net,
    process: Process,
    key: Array,
    count: int,
    shape: tuple[int, ...],
    *,
    steps: int = 64,
    num_classes: int = 0,
    integrator: Callable = dpmpp_3m,
    batch_size: int = 4096,
) -> dict[str, np.ndarray]:
    """Make `count` pairs: noise [count, ...] at t_max, x [count, ...] at 0, and cond [count] where there are classes.

    Pair i depends on the key and i alone, whatever the batch size and the number of devices. Labels are uniform.
    """

    @jax.jit
    def make(teacher, indices):
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(indices)
        noise = jax.vmap(lambda k: process.prior(k, shape))(keys[:, 0])
        cond = jax.vmap(lambda k: jax.random.randint(k, (), 0, num_classes))(keys[:, 1]) if num_classes else None
        return noise, integrator(teacher.bind(cond), process, grids.karras(process, steps), noise).x, cond

    parts = []
    for start in range(0, count, batch_size):
        # The last batch is filled up and cut, so that one compilation serves all.
        noise, x, cond = jax.device_get(make(teacher, start + jnp.arange(min(batch_size, count))))
        parts.append((noise, x) if cond is None else (noise, x, cond))
    names = ("noise", "x", "cond")
    return {n: np.concatenate(a)[:count] for n, a in zip(names, zip(*parts, strict=True), strict=False)}
