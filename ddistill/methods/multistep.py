"""Multistep consistency models: a consistency model in each of K segments of the way (Heek et al. 2024)."""

from dataclasses import dataclass, field

import jax.numpy as jnp
from jax import Array

from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.losses.weightings import EpsWeight, Weighting
from ddistill.methods.base import Method
from ddistill.methods.intervals import Segments, interval_method, landing, solved
from ddistill.process import Process, expand


@dataclass(frozen=True)
class MultistepConsistency:
    """E √w(t) d(x̂_θ(x_t, t, e), x̃): the target is the x0 whose DDIM step from x_t to the edge e lands where x_s leads.

    Heek et al. 2024, alg. 1: x_s is the teacher's step from x_t, x̃ = invDDIM_{t→e}(DDIM_{s→e}(x̂_θ⁻(x_s, s, e), x_s)).
    d is an un-squared norm and w weights squared ones. The teacher's step is its solver's; with addim = η > 0 one aDDIM
    step that supposes η times the data's variance about the teacher's estimate; from_data: a DDIM step with x0 for the
    teacher's estimate (no teacher is asked then).
    """

    segments: Segments = field(default_factory=Segments)
    distance: Distance = field(default_factory=PseudoHuber)
    weighting: Weighting = field(default_factory=EpsWeight)
    addim: float = 0.0
    from_data: bool = False
    ema: float = 0.99

    def __post_init__(self):
        if self.from_data and self.addim:
            raise ValueError(f"addim = {self.addim} is of the teacher's step, and from_data takes none: leave one out")

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def loss(nets, batch, progress, key):
            step = self._step(process, nets, batch)
            pair, x_t, estimate, y = landing(self.segments, process, nets, batch, progress, key, step)
            distance = self.distance(estimate, process.destination(x_t, pair.t, y, pair.edge))
            weight = jnp.sqrt(self.weighting(process, pair.t))
            return jnp.mean(weight * distance), {"distance": jnp.mean(distance)}

        return interval_method(self.segments, process, loss, self.ema)

    def _step(self, process, nets, batch):
        x0 = batch["x"]
        if self.from_data:
            return lambda pair, x_t: process.step(x0, x_t, pair.t, pair.s)
        if not self.addim:
            return solved(self.segments, process, nets, batch)

        def step(pair, x_t):
            estimate = nets["teacher"](x_t, pair.t, batch.get("cond"))
            x_var = self.addim * jnp.mean((estimate - x0) ** 2, axis=range(1, x0.ndim))
            return addim(process, estimate, x_t, pair.t, pair.s, x_var)

        return step


def addim(process: Process, x0: Array, x: Array, t: Array, s: Array, x_var: Array) -> Array:
    """A DDIM step whose noise is scaled up by what the estimate x0 lacks in variance (Heek et al. 2024, alg. 3).

    x_var: [B], variance per coordinate of the data about x0. Where x0 and the noise estimate are orthogonal, x_s has
    the second moment that it has on average with samples of the data for x0.
    """
    alpha_s, sigma_s = process.alpha(expand(s, x)), process.sigma(expand(s, x))
    decay = sigma_s / process.sigma(expand(t, x))
    z_var = (alpha_s - process.alpha(expand(t, x)) * decay) ** 2 * expand(x_var, x)
    eps = process.eps(x0, x, t)
    power = jnp.mean(eps**2, axis=range(1, x.ndim), keepdims=True)
    return alpha_s * x0 + jnp.sqrt(sigma_s**2 + z_var / power) * eps
