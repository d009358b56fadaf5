"""Laws of training times: frozen dataclasses called as law(process, key, n), answering times [n] in [t_min, t_max]."""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.process import LARGEST_RHO, Process


class TimeLaw(Protocol):
    """A distribution of times on which networks are trained."""

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""


def bounded_rho(process: Process, t: Array) -> Array:
    """The noise-to-signal ratio σ/α, bounded where there is no signal."""
    return jnp.exp(-jnp.maximum(process.half_log_snr(t), -math.log(LARGEST_RHO)))


def karras_time(
    process: Process, share: Array, rho: float = 7.0, start: Array | None = None, end: Array | None = None
) -> Array:
    """The time at a share in [0, 1] of the way from start to end, ρ^{1/rho} being linear (Karras et al. 2022, eq. 5).

    start, end: t_max and t_min by default. Shares outside [0, 1] are those ends, which are met exactly.
    """
    start, end = (jnp.asarray(d if t is None else t) for t, d in ((start, process.t_max), (end, process.t_min)))
    high, low = bounded_rho(process, start) ** (1 / rho), bounded_rho(process, end) ** (1 / rho)
    inner = process.time_of(-rho * jnp.log(high + jnp.clip(share, 0, 1) * (low - high)))
    return jnp.where(share <= 0, start, jnp.where(share >= 1, end, inner))


@dataclass(frozen=True)
class KarrasRamp:
    """Uniform in the place on Karras' ramp from t_max (0) to t_min (1), between `low` and `high` of it.

    (.02, .98) is the law of DMD (Yin et al. 2024, app. B), whose scores are not asked at the very ends.
    """

    low: float = 0.02
    high: float = 0.98
    rho: float = 7.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low = {self.low}, high = {self.high} must be places on the ramp, 0 <= low < high <= 1")

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        return _on_ramp(process, key, n, self.low, self.high, self.rho)


def _on_ramp(process: Process, key: Array, n: int, low: float, high: Array | float, rho: float) -> Array:
    return karras_time(process, jax.random.uniform(key, (n,), minval=low, maxval=high), rho)


@dataclass(frozen=True)
class Descending:
    """`KarrasRamp` whose low-noise end comes down: from the place `start` to `high` over the share `until` of training.

    High noise moves mass between modes and low noise shapes them, holding fast what is there: asked together from the
    beginning the low levels win, and the weights of modes stay as they happen to be.
    """

    low: float = 0.02
    high: float = 0.98
    start: float = 0.65
    until: float = 0.5
    rho: float = 7.0

    def __post_init__(self):
        if not 0 <= self.low < self.start <= self.high <= 1 or not 0 < self.until <= 1:
            raise ValueError(
                f"places on the ramp fall, 0 <= low < start <= high <= 1, over a share 0 < until <= 1; given "
                f"low = {self.low}, start = {self.start}, high = {self.high}, until = {self.until}"
            )

    def at(self, share: Array | float) -> TimeLaw:
        """The law when a share in [0, 1] of the training is done."""
        high = self.start + (self.high - self.start) * jnp.minimum(share / self.until, 1.0)
        return functools.partial(_on_ramp, low=self.low, high=high, rho=self.rho)


def law_at(law: TimeLaw | Descending, share: Array | float) -> TimeLaw:
    """A law of times at a share of the training, which most do not depend on."""
    return law.at(share) if isinstance(law, Descending) else law


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
    """Uniform in t between the shares `low` and `high` of the way from t_min (0) to t_max (1).

    (.02, .98) is the law of DMD2's scores on discrete processes (Yin et al. 2024b; its code's min_ and
    max_step_percent).
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low = {self.low}, high = {self.high} must be shares of the way, 0 <= low < high <= 1")

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        low, high = (process.t_min + share * (process.t_max - process.t_min) for share in (self.low, self.high))
        return jax.random.uniform(key, (n,), minval=low, maxval=high)


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
