"""Phased consistency models: consistency at the edges of phases (Wang et al. 2024)."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.methods.base import Method
from ddistill.methods.consistency import per_interval
from ddistill.methods.intervals import Segments, interval_method, landing, solved
from ddistill.process import Process


@dataclass(frozen=True)
class PhasedConsistency:
    """E 1/(ρ_t − ρ_s) d(f_θ(x_t, t → e), f_θ⁻(x_s, s → e)), f the student's jump to the edge e of t's phase.

    Wang et al. 2024, phased consistency models, sec. 3. x_s is the teacher's step from x_t.
    """

    segments: Segments = field(default_factory=Segments)
    distance: Distance = field(default_factory=PseudoHuber)
    weighted: bool = True
    ema: float = 0.99

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def loss(nets, batch, progress, key):
            step = solved(self.segments, process, nets, batch)
            pair, x_t, estimate, y = landing(self.segments, process, nets, batch, progress, key, step)
            distance = self.distance(process.step(estimate, x_t, pair.t, pair.edge), y)
            weight = per_interval(process, pair.t, pair.s) if self.weighted else 1.0
            return jnp.mean(weight * distance), {"distance": jnp.mean(distance)}

        return interval_method(self.segments, process, loss, self.ema)
