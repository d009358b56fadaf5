"""Pairs that begin at the data: the noise that a teacher's flow takes it to."""

import math
from collections.abc import Callable

import jax
import numpy as np

from ddistill import grids
from ddistill.data.arrays import Source
from ddistill.data.pairs import gathered
from ddistill.net import Net
from ddistill.process import Process


def beside_inverted(
    made: Source,
    data: Source,
    teacher: Net,
    process: Process,
    *,
    share: float,
    count: int,
    steps: int,
    integrator: Callable,
) -> Source:
    """Batches of teacher pairs, a share of whose rows has x from the data and its noise by the teacher's inversion.

    Students then see real data, and not only what the teacher makes of noise (Lee et al. 2024, rf++). made, data:
    batches with x, noise and perhaps cond, and with x and perhaps cond. share, in (0, 1]: rounded to rows of a batch;
    share · count rows are inverted now, and go round. integrator: a deterministic one, over Karras' grid of `steps`
    from t_min, where the data are taken to be, up to t_max. Raises ValueError where it leads to NaN or infinity.
    """
    rows = max(1, round(share * len(made(0)["x"])))
    up = grids.karras(process, steps, final=None)[::-1]
    teacher = gathered(teacher)

    @jax.jit
    def invert(teacher, x, cond):
        return integrator(teacher.bind(cond), process, up, x).x

    parts = []
    for step in range(math.ceil(share * count / rows)):
        part = jax.tree.map(lambda a: a[:rows], {n: v for n, v in data(step).items() if n in ("x", "cond")})
        part["noise"] = np.asarray(invert(teacher, part["x"], part.get("cond")))
        if not np.isfinite(part["noise"]).all():
            raise ValueError(
                f"{getattr(integrator, '__name__', integrator)} with {steps} steps led data to NaN or infinity: "
                "take more steps or another integrator, or look at the teacher"
            )
        parts.append(part)

    def source(step: int) -> dict:
        batch, part = made(step), parts[step % len(parts)]
        return {
            name: jax.tree.map(lambda a, b: np.concatenate([a[: len(a) - rows], b]), batch[name], part[name])
            for name in batch
        }

    return source
