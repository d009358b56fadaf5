"""Adversarial diffusion distillation: a discriminator and the teacher's opinion of the samples (Sauer et al. 2023)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.times import KarrasRamp, TimeLaw
from ddistill.losses.weightings import Weighting
from ddistill.methods.adversarial import Adversary
from ddistill.methods.base import Method
from ddistill.methods.gan import GAN
from ddistill.net import Net
from ddistill.process import Process, expand


@dataclass(frozen=True)
class Exponential:
    """c(t) = α_t/√(α_t² + σ_t²), the α_t of variance-preserving processes: noisy answers count less (sec. 3.3)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return jnp.sqrt(jax.nn.sigmoid(process.log_snr(t)))


@dataclass(frozen=True)
class ScoreDistillation:
    """c(t) = α_t w(t)/(2 σ_t): the gradient by x̂ is SDS's, w(t) (ε̂(x_t, t) − ε), with w = σ²/(α² + σ²) (app. A)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        w = jax.nn.sigmoid(-process.log_snr(t))
        return 0.5 * w * jnp.exp(process.half_log_snr(t))


@dataclass(frozen=True)
class ADD:
    """L_adv + λ L_distill with x̂ = G_θ(x_τ, τ, 0), the samples of `GAN` (Sauer et al. 2023, eq. 1), and

        L_distill = E_t,ε c(t) ‖x̂ − sg D_φ(sg x̂_t, t)‖²,   x̂_t = α_t x̂ + σ_t ε                       (eq. 4)

    averaged over coordinates. distill: λ. The teacher's answer is a mean of what may have been: a large λ draws all
    samples to few modes, the adversary holds them apart. The paper takes λ = 2.5, τ of four times and a discriminator
    of heads on the features of DINOv2 (`FeatureHeads`); with `TeacherHeads` and λ = 0 this is LADD (Sauer et al. 2024).
    weighting: c; that of the paper's last model, which it calls NFSD, is not told in it. times: the law of t. rate:
    small, so that the discriminator can follow the student. Guidance is the teacher's alone. Others: see `GAN`.
    """

    adversary: Adversary = field(default_factory=Adversary)
    distill: float = 0.1
    weighting: Weighting = field(default_factory=Exponential)
    times: TimeLaw = field(default_factory=KarrasRamp)
    steps: int = 4
    first: float = 0.5
    rate: float = 0.1
    every: int = 1
    ema: float = 0.99
    inner: tuple[float, ...] = ()

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        gan = GAN(self.adversary, self.steps, self.first, self.rate, self.every, self.ema, self.inner)

        def loss(nets, batch, progress, key):
            cond = batch.get("cond")
            x, tau, k_left = gan.fakes(process, nets, batch, key)
            adversarial = self.adversary.generator(process, nets, x, cond, k_left, tau)
            distillation = self.distillation(process, nets["teacher"], x, cond, jax.random.fold_in(k_left, 1))
            total = adversarial + self.distill * distillation
            return total, {"adversarial": adversarial, "distillation": distillation}

        made = gan(process)
        return dataclasses.replace(made, losses={**made.losses, "student": loss})

    def distillation(self, process: Process, teacher: Net, x: Array, cond: Any, key: Array) -> Array:
        """L_distill of samples x [B, ...]."""
        k_t, k_noise = jax.random.split(key)
        t = self.times(process, k_t, x.shape[0])
        x_t = process.diffuse(jax.lax.stop_gradient(x), jax.random.normal(k_noise, x.shape), t)
        goal = jax.lax.stop_gradient(teacher(x_t, t, cond))
        return jnp.mean(expand(self.weighting(process, t), x) * (x - goal).astype(jnp.float32) ** 2)
