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
    part: tuple[int, int] = (0, 1),
) -> Source:
    """Batches of teacher pairs, a share of whose rows has x from the data and its noise by the teacher's inversion.

    Students then see real data, and not only what the teacher makes of noise (Lee et al. 2024, rf++). made, data:
    batches with x, noise and perhaps cond, and with x and perhaps cond. share, in (0, 1]: rounded to rows of a batch,
    which lie in it at equal distances; share · count rows are inverted now, and go round. integrator: a deterministic
    one, over Karras' grid of `steps` from t_min, where the data are taken to be, up to t_max. part: (p, P) says that
    both sources give part p of P of each batch. Raises ValueError where the integrator leads to NaN or infinity.
    """
    here = len(made(0)["x"])
    whole = here * part[1]
    rows = max(1, round(share * whole))
    before = np.arange(whole + 1) * rows // whole  # of the rows of a batch, so many are inverted before each
    mine = np.flatnonzero(np.diff(before)[part[0] * here : (part[0] + 1) * here])
    if not len(mine):
        return made
    up = grids.karras(process, steps, final=None)[::-1]
    teacher = gathered(teacher)

    @jax.jit
    def invert(teacher, x, cond):
        return integrator(teacher.bind(cond), process, up, x).x

    parts = []
    for step in range(math.ceil(share * count / rows)):
        some = jax.tree.map(lambda a: a[mine], {n: v for n, v in data(step).items() if n in ("x", "cond")})
        some["noise"] = np.asarray(invert(teacher, some["x"], some.get("cond")))
        if not np.isfinite(some["noise"]).all():
            raise ValueError(
                f"{getattr(integrator, '__name__', integrator)} with {steps} steps led data to NaN or infinity: "
                "take more steps or another integrator, or look at the teacher"
            )
        parts.append(some)

    def put(array: np.ndarray, some: np.ndarray) -> np.ndarray:
        changed = np.array(array)
        changed[mine] = some
        return changed

    def source(step: int) -> dict:
        batch, some = made(step), parts[step % len(parts)]
        return {name: jax.tree.map(put, batch[name], some[name]) for name in batch}

    return source
