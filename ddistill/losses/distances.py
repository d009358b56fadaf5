"""Distances between two batches: frozen dataclasses called as distance(a, b) with a, b [B, ...], answering [B]."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
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
class CoordinateHuber:
    """Mean over coordinates of √((a − b)² + c²) − c, the pseudo-Huber loss of diffusers' script of LCM.

    (a − b)²/(2c) for small differences and |a − b| for large ones, each coordinate by itself.
    """

    c: float = 0.001

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, ...] -> [B]."""
        squared = _flat(a - b) ** 2
        return jnp.mean(squared / (jnp.sqrt(squared + self.c**2) + self.c), axis=1)


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


LPIPS_MEAN, LPIPS_SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What LPIPS' networks see is (x − mean)/spread: ImageNet's, of images in [−1, 1]."""


@dataclass(frozen=True, eq=False)  # two of them are equal only as one object: arrays have no hash
class LPIPS:
    """Learned perceptual distance of images [B, H, W, 3] in [−1, 1] (Zhang et al. 2018, eq. 1; its version 0.1).

    At every pixel of every map of `features` the channels become unit vectors, whose squared differences are summed
    with the weights of `heads`; pixels are averaged and maps summed. features: a pure function from normalised images
    to maps [B, h, w, C]. heads: [C] for each. size: images are brought to size × size first, as small ones need it (224
    in Song et al. 2023). `hub.features.load_lpips` makes one of published weights.
    """

    features: Callable[[Array], tuple[Array, ...]]
    heads: tuple[Array, ...]
    size: int | None = None

    def __call__(self, a: Array, b: Array) -> Array:
        """a, b: [B, H, W, 3] -> [B]. Raises ValueError for other shapes."""
        if a.shape != b.shape or a.ndim != 4 or a.shape[3] != 3:
            raise ValueError(f"LPIPS compares images [B, H, W, 3]; given {list(a.shape)} and {list(b.shape)}")
        total = jnp.zeros(len(a))
        for f, g, head in zip(self._maps(a), self._maps(b), self.heads, strict=True):
            total = total + jnp.mean((_unit(f) - _unit(g)) ** 2 @ head, axis=(1, 2))
        return total

    def _maps(self, x: Array) -> tuple[Array, ...]:
        x = x.astype(jnp.float32)
        if self.size is not None:
            x = jax.image.resize(x, (len(x), self.size, self.size, 3), "linear", antialias=False)
        return self.features((x - jnp.asarray(LPIPS_MEAN)) / jnp.asarray(LPIPS_SPREAD))


def _unit(x: Array) -> Array:
    """Vectors along the last axis as unit vectors; 0, with no gradient, where all channels are."""
    squared = jnp.sum(x**2, axis=-1, keepdims=True)
    some = squared > 0
    return jnp.where(some, x / (jnp.sqrt(jnp.where(some, squared, 1.0)) + 1e-10), 0.0)
