"""Pairs that begin at the data: the noise that a teacher's flow takes it to."""

import math
from collections.abc import Callable

import jax
import numpy as np

from ddistill import grids
from ddistill.data.arrays import Source
from ddistill.data.pairs import gathered, whole
from ddistill.gathering import Place
from ddistill.net import Net, laid_out
from ddistill.process import Process
from ddistill.sharding import batch_parts, batch_sharding, put_batch, spread


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
    place: Place | None = None,
) -> Source:
    """Batches of teacher pairs, a share of whose rows has x from the data and its noise by the teacher's inversion.

    Students then see real data, and not only what the teacher makes of noise (Lee et al. 2024, rf++). made, data:
    batches with x, noise and perhaps cond, and with x and perhaps cond. share, in (0, 1]: rounded to rows of a batch,
    which lie in it at equal distances; share · count rows are inverted now, and go round. integrator: a deterministic
    one, over Karras' grid of `steps` from t_min, where the data are taken to be, up to t_max. part: (p, P) says that
    both sources give part p of P of each batch. place: the mesh over which the rows are inverted, whose processes all
    call this, each with its part, and the rule by which the teacher lies there; without one the teacher is whole in
    each process. Raises ValueError where the integrator leads to NaN or infinity.
    """
    here = len(made(0)["x"])
    size = here * part[1]
    rows = max(1, round(share * size))
    before = np.arange(size + 1) * rows // size  # of the rows of a batch, so many are inverted before each
    mine = np.flatnonzero(np.diff(before)[part[0] * here : (part[0] + 1) * here])
    # Processes that invert together do as many rows each; what one has not it takes twice, and leaves.
    each = -(-rows // part[1])
    taken = np.resize(mine, each) if len(mine) else np.zeros(each, int)
    up = grids.karras(process, steps, final=None)[::-1]
    teacher = gathered(teacher) if place is None else spread(place.mesh, teacher, place.rule)

    @jax.jit
    def invert(teacher, x, cond):
        z = integrator(laid_out(teacher, place).bind(cond), process, up, x).x
        return z if place is None else jax.lax.with_sharding_constraint(z, batch_sharding(place.mesh))

    def noise_of(x, cond) -> np.ndarray:
        first, given = 0, (x, cond)
        if place is not None:
            more = -each % max(1, batch_parts(place.mesh) // jax.process_count())  # so that the devices divide them
            given = put_batch(
                place.devices, jax.tree.map(lambda a: np.concatenate([a, np.repeat(a[-1:], more, axis=0)]), given)
            )
            first = 0 if jax.process_count() == 1 else jax.process_index() * (each + more)
        noise = np.asarray(whole(invert(teacher, *given)))
        if not np.isfinite(noise).all():
            raise ValueError(
                f"{getattr(integrator, '__name__', integrator)} with {steps} steps led data to NaN or infinity: "
                "take more steps or another integrator, or look at the teacher"
            )
        return noise[first : first + each]

    parts = []
    for step in range(math.ceil(share * count / rows)):
        some = jax.tree.map(lambda a: a[taken], {n: v for n, v in data(step).items() if n in ("x", "cond")})
        some["noise"] = noise_of(some["x"], some.get("cond"))
        parts.append(jax.tree.map(lambda a: a[: len(mine)], some))

    def put(array: np.ndarray, some: np.ndarray) -> np.ndarray:
        changed = np.array(array)
        changed[mine] = some
        return changed

    def source(step: int) -> dict:
        batch, some = made(step), parts[step % len(parts)]
        return {name: jax.tree.map(put, batch[name], some[name]) for name in batch}

    return source
