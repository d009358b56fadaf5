"""Consistency on intervals of the trajectory: what `multistep` and `phased` consistency share.

The way from the noise to the data is cut at K − 1 edges. In each segment the student is a consistency model of its own:
from wherever on a trajectory it starts, it lands at the same point of the segment's lower edge, and K deterministic
jumps from edge to edge sample. One network serves several K, as it is told the edge it jumps to, net(x, t, s=edge).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.integrators import dpmpp_3s
from ddistill.methods.base import Batch, Loss, Method, Progress, Sampling, from_teacher
from ddistill.methods.consistency import doubled, node, position
from ddistill.net import Net
from ddistill.process import Process


@dataclass(frozen=True)
class Edges:
    """K + 1 times from t_max to 0, between them those at which log ρ ~ N(log median, std²) has its quantiles k/K.

    Edges of K are edges of 2K. The defaults put them where a trajectory bends: between the noise levels at which
    nothing of the sample is decided and those at which all is.
    """

    median: float = 0.8
    std: float = 1.2

    def __call__(self, process: Process, steps: int) -> Array:
        """Times [steps + 1]."""
        quantiles = jax.scipy.special.ndtri(1 - jnp.arange(1, steps) / steps)
        inner = process.time_of(-(math.log(self.median) + self.std * quantiles))
        return jnp.concatenate([jnp.asarray([process.t_max]), inner, jnp.zeros(1)])


class Pair(NamedTuple):
    """Neighbours t > s of a segment and its lower edge ≤ s, all [B]; nodes [solver_steps + 1, B] from t to s."""

    t: Array
    s: Array
    edge: Array
    nodes: Array


@dataclass(frozen=True)
class Segments:
    """Draws neighbouring times within segments, and takes the teacher's step between them.

    phases: the numbers K of segments to serve; a K is drawn with probability ∝ its entry in `shares` (none: all alike),
    then one of its segments, then t uniformly in the segment, in the position on Karras' grid of N intervals. s is one
    interval below t, or the segment's edge where that comes first. N doubles from `intervals` to `max_intervals`.
    """

    phases: tuple[int, ...] = (1, 2, 4, 8)
    shares: tuple[float, ...] = ()
    edges: Callable[[Process, int], Array] = field(default_factory=Edges)
    intervals: int = 10
    max_intervals: int = 20
    solver: Callable = dpmpp_3s
    solver_steps: int = 1
    rho: float = 7.0

    def __post_init__(self):
        if not self.phases or min(self.phases) < 1:
            raise ValueError(f"phases = {self.phases}: numbers of segments, 1 or more each")
        if self.shares and (len(self.shares) != len(self.phases) or min(self.shares) <= 0):
            raise ValueError(f"shares = {self.shares}: one above 0 for each of phases = {self.phases}, or none")

    def draw(self, process: Process, progress: Progress, key: Array, count: int) -> Pair:
        """Draw `count` pairs of times."""
        n = doubled(progress, self.intervals, self.max_intervals)
        times = [self.edges(process, k) for k in self.phases]
        upper, lower = (jnp.concatenate([t[cut] for t in times]) for cut in (slice(0, -1), slice(1, None)))
        shares = np.asarray(self.shares or np.ones(len(self.phases)), np.float64) / np.asarray(self.phases)
        ends = jnp.asarray(np.cumsum(np.repeat(shares, self.phases)) / np.sum(shares * self.phases), jnp.float32)
        u = jax.random.uniform(key, (count,))
        k = jnp.minimum(jnp.searchsorted(ends, u, side="right"), len(ends) - 1)
        begins = jnp.concatenate([jnp.zeros(1), ends])[k]
        within = (u - begins) / (ends[k] - begins)  # what is left of u is uniform in the segment
        edge, above = lower[k], position(process, upper[k], n, self.rho)
        below = position(process, edge, n, self.rho)
        # Not nearer to the edge than a hundredth of the segment, where differences drown in rounding.
        i = above + jnp.minimum(within, 0.99) * (below - above)
        i_s = jnp.minimum(i + 1, below)
        inner = [node(process, i + j / self.solver_steps * (i_s - i), n, self.rho) for j in range(self.solver_steps)]
        s = jnp.where(i_s >= below, edge, node(process, i_s, n, self.rho))
        return Pair(inner[0], s, edge, jnp.stack([*inner, s]))

    def times(self, process: Process, steps: int) -> Array:
        """The edges at which a student samples; raises ValueError for a number of steps it was not trained for."""
        if steps not in self.phases:
            raise ValueError(f"this student samples in {list(self.phases)} steps; asked for {steps}: add it to phases")
        return self.edges(process, steps)


class Landing(NamedTuple):
    """A pair, its x_t, the student's estimate of x0 there, and the point of the edge where it should land."""

    pair: Pair
    x_t: Array
    estimate: Array
    target: Array


Step = Callable[[Pair, Array], Array]
"""step(pair, x_t) -> x_s, the teacher's."""


def solved(segments: Segments, process: Process, nets: Mapping[str, Net], batch: Batch) -> Step:
    """The teacher's step by its solver."""
    teacher = nets["teacher"].bind(batch.get("cond"))
    return lambda pair, x_t: segments.solver(teacher, process, pair.nodes, x_t).x


def landing(
    segments: Segments,
    process: Process,
    nets: Mapping[str, Net],
    batch: Batch,
    progress: Progress,
    key: Array,
    step: Step,
) -> Landing:
    """Draw x_t; its target is where the student lands from x_s, behind a stop-gradient."""
    x0, cond = batch["x"], batch.get("cond")
    k_t, k_noise, k_net = jax.random.split(key, 3)
    pair = segments.draw(process, progress, k_t, x0.shape[0])
    x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), pair.t)
    x_s = step(pair, x_t)
    estimate = nets["student"](x_t, pair.t, cond, s=pair.edge, key=k_net)
    # At s = edge the jump returns x_s bit for bit: the boundary condition, from which all is learnt.
    target = nets["student"].jump(process, x_s, pair.s, pair.edge, cond, key=k_net)
    return Landing(pair, x_t, estimate, jax.lax.stop_gradient(target))


def interval_method(segments: Segments, process: Process, loss: Loss, ema: float) -> Method:
    """The method of a loss on segments: a student from the teacher, sampled from edge to edge."""
    return Method(
        losses={"student": loss},
        init={"student": from_teacher},
        ema={"ema": ("student", ema)},
        needs=frozenset({"x"}),
        result="ema",
        sampling=Sampling(lambda steps: segments.times(process, steps)),
    )
