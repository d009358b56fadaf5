"""Training a teacher: denoising score matching and flow matching, one regression under different weights."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from ddistill import grids
from ddistill.losses.times import LogNormal, TimeLaw
from ddistill.losses.weightings import EDMWeight, Weighting
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.process import Process, expand


@dataclass(frozen=True)
class Denoising:
    """E w(t) ‖D_θ(x_t, t) − x0‖², averaged over coordinates (Vincent 2011; Karras et al. 2022, eq. 8).

    The weight decides which output is regressed with unit weight: EDM's F, ε, v, or the velocity of flow matching
    (Lipman et al. 2023), which is VelocityWeight with times uniform. With `exact` the target is the teacher's own
    denoiser instead of x0: the same minimum with less noise, for fitting a network to a teacher in closed form.
    """

    times: TimeLaw = field(default_factory=LogNormal)
    weighting: Weighting = field(default_factory=EDMWeight)
    exact: bool = False
    ema: float = 0.99

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def loss(nets, batch, progress, key):
            x0 = batch["x"]
            k_t, k_noise, k_net = jax.random.split(key, 3)
            t = self.times(process, k_t, x0.shape[0])
            x = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)
            cond = batch.get("cond")
            target = nets["teacher"](x, t, cond) if self.exact else x0
            error = (nets["student"](x, t, cond, key=k_net) - target) ** 2
            return jnp.mean(expand(self.weighting(process, t), x) * error), {}

        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda n: grids.karras(process, n)),
        )
