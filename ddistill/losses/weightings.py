"""Weights w(t) that turn ‖x̂0 − x0‖² into the squared error of what a network outputs, [B] like t.

Each equality below is exact, since every output is linear in x̂0 at fixed x_t (SNR = α²/σ² = e^{2λ}).
"""

from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import Array

from ddistill.process import Process


class Weighting(Protocol):
    """A weight of the squared x0-error at time t; a frozen dataclass."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""


def snr(process: Process, t: Array) -> Array:
    """Signal-to-noise ratio α²/σ²."""
    return jnp.exp(process.log_snr(t))


@dataclass(frozen=True)
class DataWeight:
    """1: the x0-error itself."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return jnp.ones_like(t)


@dataclass(frozen=True)
class EpsWeight:
    """SNR: ‖ε̂ − ε‖² = SNR ‖x̂0 − x0‖² (DDPM's simple loss)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return snr(process, t)


@dataclass(frozen=True)
class TruncatedSNRWeight:
    """max(SNR, 1): the larger of the ε- and the x0-error of each sample (Salimans & Ho 2022, sec. 4)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return jnp.maximum(snr(process, t), 1.0)


@dataclass(frozen=True)
class VWeight:
    """‖v̂ − v‖² = ((α² + σ²)/σ)² ‖x̂0 − x0‖², which is 1 + SNR where α² + σ² = 1."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        alpha, sigma = process.alpha(t), process.sigma(t)
        return ((alpha**2 + sigma**2) / sigma) ** 2


@dataclass(frozen=True)
class VelocityWeight:
    """((α' σ − α σ')/σ)²: ‖û − u‖² of the flow's velocity, 1/t² for rectified flow (flow matching)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        sigma = process.sigma(t)
        return ((process.alpha_prime(t) * sigma - process.alpha(t) * process.sigma_prime(t)) / sigma) ** 2


@dataclass(frozen=True)
class EDMWeight:
    """(ρ² + σ_d²)/(ρ σ_d)², ρ = σ/α: unit weight on F of the EDM preconditioning (Karras et al. 2022, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return snr(process, t) + self.sigma_data**-2
