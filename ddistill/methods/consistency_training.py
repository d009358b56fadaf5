"""Consistency training: consistency without a teacher, by the data's own noise (Song et al. 2023; iCT; ECT)."""

import math
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.losses.times import bounded_rho
from ddistill.methods.base import Decay, Method, Progress, Sampling, from_teacher
from ddistill.methods.consistency import doubled, node, per_interval, position, renoising_times
from ddistill.process import Process


class Neighbours(Protocol):
    """A law of neighbouring times that tightens as training goes on; a frozen dataclass."""

    def __call__(self, process: Process, progress: Progress, key: Array, count: int) -> tuple[Array, Array]:
        """Draw `count` pairs of times t > s ≥ 0."""


@dataclass(frozen=True)
class Doubling:
    """iCT: neighbours on Karras' grid of N intervals, N doubling from `first` to `last`, log ρ_t ~ N(mean, std²).

    Song & Dhariwal 2023, sec. 3.4 and 3.5. The normal falls into the interval [ρ_{i+1}, ρ_i] with their probability
    p(i) ∝ erf((log ρ_i − mean)/(√2 std)) − erf((log ρ_{i+1} − mean)/(√2 std)); it is cut off at t_max. between: t is
    where it fell and s one interval below, instead of both at the nodes.
    """

    first: int = 10
    last: int = 1280
    mean: float = -1.1
    std: float = 2.0
    between: bool = False
    rho: float = 7.0

    def __call__(self, process: Process, progress: Progress, key: Array, count: int) -> tuple[Array, Array]:
        """Draw `count` pairs of times."""
        n = doubled(progress, self.first, self.last)
        i = position(process, _lognormal(process, self.mean, self.std, key, count), n, self.rho)
        i = jnp.minimum(i, n - 1) if self.between else jnp.minimum(jnp.floor(i), n - 1)
        return node(process, i, n, self.rho), node(process, i + 1, n, self.rho)


@dataclass(frozen=True)
class Growing:
    """CT: neighbours on Karras' grid of N nodes, uniform in their index, N growing from `first` to last + 1.

    Song et al. 2023, alg. 3 and app. C. With the data's end for a node the grid of N nodes has N − 1 intervals.
    """

    first: int = 2
    last: int = 150
    rho: float = 7.0

    def nodes(self, progress: Progress) -> Array:
        """N(k) = ⌈√(k/K ((s1 + 1)² − s0²) + s0²) − 1⌉ + 1."""
        grown = progress.share * ((self.last + 1) ** 2 - self.first**2) + self.first**2
        return jnp.ceil(jnp.sqrt(grown) - 1) + 1

    def target_decay(self, progress: Progress, start: float = 0.9) -> Array:
        """μ(k) = exp(s0 log μ0/N(k)), CT's decay of the target's average, μ0 = `start` at N = s0."""
        return jnp.exp(self.first * math.log(start) / self.nodes(progress))

    def __call__(self, process: Process, progress: Progress, key: Array, count: int) -> tuple[Array, Array]:
        """Draw `count` pairs of times."""
        n = self.nodes(progress) - 1
        i = jnp.floor(jax.random.uniform(key, (count,)) * n)
        return node(process, i, n, self.rho), node(process, i + 1, n, self.rho)


@dataclass(frozen=True)
class Shrinking:
    """ECT: log ρ_t ~ N(mean, std²), ρ_s = ρ_t max(0, 1 − q^{−(k + 1)} (1 + 8 sigmoid(−ρ_t))) in stage k of `stages`.

    Geng et al. 2024, sec. 3. s = 0, plain denoising, gives way to neighbours; small ρ stays the longest with s = 0.
    """

    q: float = 2.0
    stages: int = 8
    mean: float = -1.1
    std: float = 2.0

    def __call__(self, process: Process, progress: Progress, key: Array, count: int) -> tuple[Array, Array]:
        """Draw `count` pairs of times."""
        t = jnp.maximum(_lognormal(process, self.mean, self.std, key, count), process.t_min)
        stage = jnp.minimum(jnp.floor(self.stages * progress.share), self.stages - 1)
        rho = bounded_rho(process, t)
        share = 1 - self.q ** -(stage + 1) * (1 + 8 * jax.nn.sigmoid(-rho))
        s = process.time_of(-jnp.log(jnp.maximum(share, 1e-6) * rho))
        return t, jnp.where(share <= 0, 0.0, s)


@dataclass(frozen=True)
class ConsistencyTraining:
    """E λ d(f_θ(x_t, t), f_θ⁻(x_s, s)), the same x0 and noise in x_t and x_s, f(x, 0) = x (Song et al. 2023, eq. 10).

    x_s = α_s x0 + σ_s ε is the DDIM step from x_t with x0 for the denoiser, and on average the teacher's step. No
    teacher is asked, and for a price: where x_t leaves x0 uncertain x_s scatters, and so do the loss, which stays above
    0, and its gradient. neighbours: how t and s are drawn: `Doubling` (iCT), `Growing` (CT) or `Shrinking` (ECT).
    λ = 1/(ρ_t − ρ_s) where weighted. target_ema: decay of the average that is the target; 0 is the student itself
    behind a stop-gradient (Song & Dhariwal 2023, sec. 3.2), and CT's schedule μ(k) is `Growing().target_decay`. rate:
    of the optimiser's learning rate, small since the gradient scatters: in many dimensions samples are noise otherwise.
    """

    neighbours: Neighbours = field(default_factory=Doubling)
    distance: Distance = field(default_factory=PseudoHuber)
    weighted: bool = True
    target_ema: Decay = 0.0
    rate: float = 0.1
    ema: float = 0.99

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        target = "student" if self.target_ema == 0 else "target"

        def loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_n, k_noise, k_net = jax.random.split(key, 3)
            t, s = self.neighbours(process, progress, k_n, x0.shape[0])
            noise = jax.random.normal(k_noise, x0.shape)
            x_t, x_s = process.diffuse(x0, noise, t), process.diffuse(x0, noise, s)
            # One key for both branches: dropout must not differ between them.
            f_t = nets["student"].jump(process, x_t, t, jnp.zeros_like(t), cond, key=k_net)
            f_s = nets[target].jump(process, x_s, s, jnp.zeros_like(s), cond, key=k_net)
            weight = per_interval(process, t, s) if self.weighted else 1.0
            distance = self.distance(f_t, jax.lax.stop_gradient(f_s))
            return jnp.mean(weight * distance), {"distance": jnp.mean(distance)}

        averages = {} if target == "student" else {"target": ("student", self.target_ema)}
        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            rate={"student": self.rate},
            ema={"ema": ("student", self.ema), **averages},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: renoising_times(process, steps), gamma=1.0),
        )


def _lognormal(process: Process, mean: float, std: float, key: Array, count: int) -> Array:
    """Times with log ρ ~ N(mean, std²) up to t_max; below t_min there is no bound."""
    top = (jnp.log(bounded_rho(process, jnp.asarray(process.t_max))) - mean) / std
    log_rho = mean + std * jax.random.truncated_normal(key, -jnp.inf, top, (count,))
    return process.time_of(-log_rho)
