"""A student against a discriminator, alone or beside any other method's loss (Goodfellow et al. 2014)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.methods.consistency import renoising_times
from ddistill.methods.sharing import once
from ddistill.net import Net
from ddistill.process import Process, expand


@dataclass(frozen=True)
class GAN:
    """The student's samples against a discriminator: x̂ = G_θ(x_τ, τ, 0) with x_τ = α_τ x0 + σ_τ ε of data x0.

    Alone, or for any method: `Together(Consistency(), GAN(), 0.1)`. τ is one of `steps` times, `renoising_times`, the
    first of which, t_max, takes the share `first` of the samples, and has pure noise, as when it is sampled: what of x0
    is left there would be seen by the student too (ADD's schedule ends without signal, sec. 3.1). Of these times the
    student is sampled in any number of steps that divides theirs. inner: the times after the first, if they are others.
    rate: the student's learning rate as a multiple of the optimiser's. every: the student is updated in one step of so
    many.
    """

    adversary: Adversary = field(default_factory=Adversary)
    steps: int = 4
    first: float = 0.7
    rate: float = 1.0
    every: int = 1
    ema: float = 0.99
    inner: tuple[float, ...] = ()

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def student(nets, batch, progress, key):
            fake, origin, k_gan = self.fakes(process, nets, batch, key)
            return self.adversary.generator(process, nets, fake, batch.get("cond"), k_gan, origin), {}

        def discriminator(nets, batch, progress, key):
            fake, origin, k_gan = self.fakes(process, nets, batch, key)
            return self.adversary.discriminator(process, nets, batch["x"], fake, batch.get("cond"), k_gan, origin)

        return Method(
            losses={"student": student, "discriminator": discriminator},
            init={"student": from_teacher, "discriminator": self.adversary.start(process)},
            every={"student": self.every},
            rate={"student": self.rate, "discriminator": self.adversary.rate},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: self.times(process, steps), gamma=1.0),
        )

    def fakes(
        self, process: Process, nets: Mapping[str, Net], batch: Mapping[str, Any], key: Array
    ) -> tuple[Array, Array, Array]:
        """x̂ [B, ...], τ [B] and a key that is left; the same for all losses of a step, and computed once."""
        return once(nets, "student", key, lambda: self._drawn(process, nets["student"], batch, key))

    def _drawn(self, process: Process, student: Net, batch: Mapping[str, Any], key: Array) -> tuple[Array, ...]:
        k_first, k_other, k_noise, k_net, k_left = jax.random.split(key, 5)
        x0, nodes = batch["x"], renoising_times(process, self.steps, self.inner)[:-1]
        other = jax.random.randint(k_other, x0.shape[:1], 1, max(self.steps, 2)) % self.steps
        node = jnp.where(jax.random.uniform(k_first, x0.shape[:1]) < self.first, 0, other)
        tau = nodes[node]
        renoised = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), tau)
        x_t = jnp.where(expand(node == 0, x0), process.prior(k_noise, x0.shape), renoised)
        return student.jump(process, x_t, tau, jnp.zeros_like(tau), batch.get("cond"), key=k_net), tau, k_left

    def times(self, process: Process, steps: int) -> Array:
        """Times of the sampler: every so many of the student's, then 0."""
        if steps < 1 or self.steps % steps:
            raise ValueError(
                f"this student knows {self.steps} times and samples in a divisor of it; given {steps} steps"
            )
        nodes = renoising_times(process, self.steps, self.inner)
        return jnp.append(nodes[: -1 : self.steps // steps], nodes[-1])
