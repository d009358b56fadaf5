"""Laws of training times: frozen dataclasses called as law(process, key, n), answering times [n] in [t_min, t_max]."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.process import Process


class TimeLaw(Protocol):
    """A distribution of times on which networks are trained."""

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""


@dataclass(frozen=True)
class LogNormal:
    """log ρ ~ N(mean, std²), ρ = σ/α (Karras et al. 2022, table 1).

    On rectified flow, where t = ρ/(1 + ρ), it is the logit-normal law of SD3.
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times, clipped to the process's range."""
        log_rho = self.mean + self.std * jax.random.normal(key, (n,))
        return jnp.clip(process.time_of(-log_rho), process.t_min, process.t_max)


@dataclass(frozen=True)
class Uniform:
    """Uniform in t on [t_min, t_max]."""

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        return jax.random.uniform(key, (n,), minval=process.t_min, maxval=process.t_max)


@dataclass(frozen=True)
class UniformLogSNR:
    """Uniform in log-SNR between the ends of the process, which must be finite there."""

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        ends = process.half_log_snr(jnp.asarray([process.t_max, process.t_min]))
        half_log_snr = jax.random.uniform(key, (n,), minval=ends[0], maxval=ends[1])
        return jnp.clip(process.time_of(half_log_snr), process.t_min, process.t_max)


@dataclass(frozen=True)
class UShaped:
    """p(u) ∝ e^{a u} + e^{a (1 − u)}, u the share of [t_min, t_max] below t: both ends more often than the middle.

    Lee et al. 2024 (rf++), sec. 4: on straight couplings the ends are where regression is hard.
    """

    a: float = 4.0

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        k_u, k_flip = jax.random.split(key)
        u = jnp.log1p(jax.random.uniform(k_u, (n,)) * math.expm1(self.a)) / self.a  # inverse of ∫ a e^{a u}/(e^a − 1)
        u = jnp.where(jax.random.bernoulli(k_flip, shape=(n,)), u, 1 - u)
        return process.t_min + u * (process.t_max - process.t_min)


@dataclass(frozen=True)
class Nodes:
    """t_max with probability `first`, and else one of the other nodes t_max j/k, 0 < j < k, all alike."""

    k: int = 1
    first: float = 0.5

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        if self.k == 1:
            return jnp.full((n,), float(process.t_max))
        k_first, k_other = jax.random.split(key)
        other = process.t_max / self.k * jax.random.randint(k_other, (n,), 1, self.k)
        return jnp.where(jax.random.uniform(k_first, (n,)) < self.first, process.t_max, other)
