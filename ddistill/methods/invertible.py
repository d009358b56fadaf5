"""Bidirectional integrators: invertible consistency distillation (Starodubcev et al. 2024, sec. 3).

Two students of one teacher, `reverse` from the noise to the data and `forward` from the data to the noise, each
consistent along the teacher's trajectory within every phase of time, and each taught to undo the other. Encoding and
decoding then take one call per phase; decoding under another condition than encoding is editing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators import dpmpp_3s
from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.losses.times import karras_time
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.methods.consistency import per_interval
from ddistill.methods.intervals import Edges
from ddistill.process import Process, expand


class Phase(NamedTuple):
    """A phase of time for each sample, all [B]: its ends, its intervals, and whether it ends at t_min above the data.

    Such a lowest phase lands at 0 on the way down and starts at t_min, taken for the data, on the way up: no jump
    starts at σ = 0.
    """

    lower: Array
    upper: Array
    intervals: Array
    lowest: Array

    @property
    def landing(self) -> Array:
        """Where the reverse student lands."""
        return jnp.where(self.lowest, 0.0, self.lower)


@dataclass(frozen=True)
class Invertible:
    """Consistency downwards and upwards on phases of time, and preservation of points by the pair (sec. 3.1 to 3.3).

    phases: the numbers of phases that the students serve, one drawn for each sample; the time that they jump to tells
    them which. K phases are crossed in about `intervals` intervals in all, at least two each, uniform in ρ^{1/rho} and
    each in solver_steps steps of the solver; t is drawn between the nodes as well. Distances are relative to the size
    of points, √(σ² + α² σ_data²), where they are taken. The reverse consistency has the weight 1/(ρ_t − ρ_s) of
    `Consistency`, the forward one none. preserve: the weight of the preservation (1.5 in the paper, which is too much
    here: it makes the pair hold on to maps that are not yet the teacher's).
    """

    phases: tuple[int, ...] = (1, 2, 4, 8)
    edges: Callable[[Process, int], Array] = field(default_factory=Edges)
    intervals: int = 16
    solver: Callable = dpmpp_3s
    solver_steps: int = 1
    distance: Distance = field(default_factory=PseudoHuber)
    preserve: float = 0.3
    sigma_data: float = 0.5
    ema: float = 0.99
    rho: float = 7.0

    def __post_init__(self):
        if not self.phases or min(self.phases) < 1:
            raise ValueError(f"phases = {self.phases}: give numbers of phases of at least 1, such as (4,)")

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def reverse_loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_phase, k_p, k_noise, k_edge, k_net = jax.random.split(key, 5)
            phase = self.draw(process, k_phase, len(x0))
            # Not within a hundredth of an interval of the edge, where the weight is one over a rounding error.
            p = jnp.minimum(jax.random.uniform(k_p, x0.shape[:1]) * phase.intervals, phase.intervals - 0.01)
            nodes = self.nodes(process, phase, p, jnp.minimum(p + 1, phase.intervals))
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), nodes[0])
            x_s = self.solver(nets["teacher"].bind(cond), process, nodes, x_t).x
            f_t = nets["reverse"].jump(process, x_t, nodes[0], phase.landing, cond, key=k_net)
            f_s = nets["reverse"].jump(process, x_s, nodes[-1], phase.landing, cond, key=k_net)
            weight = per_interval(process, nodes[0], nodes[-1])
            consistency = jnp.mean(weight * self.apart(process, f_t, jax.lax.stop_gradient(f_s), phase.landing))

            z = process.diffuse(x0, jax.random.normal(k_edge, x0.shape), phase.upper)
            down = nets["reverse"].jump(process, z, phase.upper, phase.landing, cond, key=k_net)
            up = nets["forward"].jump(process, down, phase.lower, phase.upper, cond, key=k_net)
            preserve = jnp.mean(self.apart(process, up, z, phase.upper))
            return consistency + self.preserve * preserve, {"consistency": consistency, "preserve": preserve}

        def forward_loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_phase, k_p, k_noise, k_edge, k_net = jax.random.split(key, 5)
            phase = self.draw(process, k_phase, len(x0))
            p = (1 - jax.random.uniform(k_p, x0.shape[:1])) * phase.intervals
            p = jnp.minimum(p, phase.intervals - phase.lowest)  # t_min at the lowest
            nodes = self.nodes(process, phase, p, jnp.maximum(p - 1, 0))
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), nodes[0])
            x_s = self.solver(nets["teacher"].bind(cond), process, nodes, x_t).x
            f_t = nets["forward"].jump(process, x_t, nodes[0], phase.upper, cond, key=k_net)
            f_s = nets["forward"].jump(process, x_s, nodes[-1], phase.upper, cond, key=k_net)
            consistency = jnp.mean(self.apart(process, f_t, jax.lax.stop_gradient(f_s), phase.upper))

            z = process.diffuse(x0, jax.random.normal(k_edge, x0.shape), phase.lower)
            up = nets["forward"].jump(process, z, phase.lower, phase.upper, cond, key=k_net)
            down = nets["reverse"].jump(process, up, phase.upper, phase.landing, cond, key=k_net)
            preserve = jnp.mean(self.apart(process, down, z, phase.landing))
            return consistency + self.preserve * preserve, {"consistency": consistency, "preserve": preserve}

        def times(steps: int) -> Array:
            if steps not in self.phases:
                served = ", ".join(map(str, self.phases))
                raise ValueError(f"this invertible student serves {served} steps, one per phase; given {steps} steps")
            return self.edges(process, steps)

        return Method(
            losses={"reverse": reverse_loss, "forward": forward_loss},
            init={"reverse": from_teacher, "forward": from_teacher},
            ema={"reverse_ema": ("reverse", self.ema), "forward_ema": ("forward", self.ema)},
            needs=frozenset({"x"}),
            result="reverse_ema",
            inverse="forward_ema",
            sampling=Sampling(times),
        )

    def draw(self, process: Process, key: Array, n: int) -> Phase:
        """A number of phases and one of these phases for each of n samples, both uniform."""
        k_count, k_phase = jax.random.split(key)
        most = max(self.phases)
        edges = jnp.stack([jnp.pad(self.edges(process, count), (0, most - count)) for count in self.phases])
        which = jax.random.randint(k_count, (n,), 0, len(self.phases))
        count = jnp.asarray(self.phases)[which]
        m = jnp.floor(jax.random.uniform(k_phase, (n,)) * count).astype(int)
        lowest = (m == count - 1) & (process.t_min > 0)
        lower = jnp.where(lowest, process.t_min, edges[which, m + 1])
        return Phase(lower, edges[which, m], jnp.maximum(2, self.intervals // count), lowest)

    def nodes(self, process: Process, phase: Phase, p: Array, q: Array) -> Array:
        """Nodes [solver_steps + 1, B] from position p to q, in intervals from the phase's upper end."""
        shares = (k / self.solver_steps for k in range(self.solver_steps + 1))
        return jnp.stack([self.node(process, phase, p + share * (q - p)) for share in shares])

    def node(self, process: Process, phase: Phase, p: Array) -> Array:
        """The time at position p of phase.intervals; the last interval of the lowest phase is that from t_min to 0."""
        time = karras_time(process, p / (phase.intervals - phase.lowest), self.rho, phase.upper, phase.lower)
        return jnp.where(p >= phase.intervals, phase.landing, time)

    def apart(self, process: Process, a: Array, b: Array, t: Array) -> Array:
        """Distance [B] of points at time t, relative to the size of points there."""
        size = expand(jnp.hypot(process.sigma(t), process.alpha(t) * self.sigma_data), a)
        return self.distance(a / size, b / size)
