"""Distances between two batches: frozen dataclasses called as distance(a, b) with a, b [B, ...], answering [B]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
from jax import Array


class Distance(Protocol):
    """A distance per sample, computed in float32 and 0 exactly where a = b."""

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""


def _flat(a: Array) -> Array:
    return a.astype(jnp.float32).reshape(a.shape[0], -1)


@dataclass(frozen=True)
class L2:
    """Mean over coordinates of the squared difference."""

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""
        return jnp.mean(_flat(a - b) ** 2, axis=1)


@dataclass(frozen=True)
class L1:
    """Mean over coordinates of the absolute difference."""

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""
        return jnp.mean(jnp.abs(_flat(a - b)), axis=1)


@dataclass(frozen=True)
class PseudoHuber:
    """√(‖a − b‖² + c²) − c over all D coordinates, c = scale · D^power (Song & Dhariwal 2023, eq. 7; .00054 and 1/2).

    ‖·‖²/(2c) for small differences and ‖·‖ for large ones. rf++ has power 1 (Lee et al. 2024).
    """

    scale: float = 0.00054
    power: float = 0.5

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""
        difference = _flat(a - b)
        c = self.scale * difference.shape[1] ** self.power
        # √(r + c²) − c = r / (√(r + c²) + c), which keeps its digits where r ≪ c².
        squared = jnp.sum(difference**2, axis=1)
        return squared / (jnp.sqrt(squared + c**2) + c)


@dataclass(frozen=True)
class Perceptual:
    """Distance of features: the sum over feature maps of the mean squared difference, plus `pixel` times that of x.

    features: a pure function [B, ...] -> sequence of [B, ...], LPIPS' backbone for example. It needs pixel > 0, or
    features that separate points, to have its only zero at a = b.
    """

    features: Callable[[Array], tuple[Array, ...]]
    pixel: float = 1.0

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""
        l2 = L2()
        maps = zip(self.features(a), self.features(b), strict=True)
        return self.pixel * l2(a, b) + sum((l2(f, g) for f, g in maps), jnp.zeros(a.shape[0]))
