"""Embeddings of scalars."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array


class Fourier(nnx.Module):
    """Sines and cosines of a scalar of order one, at size/2 geometric frequencies, `low` to `high` turns per unit."""

    def __init__(self, size: int, low: float = 0.125, high: float = 8.0):
        self.size, self.low, self.high = size, low, high

    def __call__(self, c: Array) -> Array:
        """c: [B] -> [B, size], float32."""
        frequencies = jnp.geomspace(self.low, self.high, self.size // 2) * 2 * math.pi
        angles = c.astype(jnp.float32)[:, None] * frequencies
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Waves(nnx.Module):
    """Sines and cosines of `count` fixed random projections of a vector of unit variance (Tancik et al. 2020, eq. 5).

    They let a small network draw the sharp borders between the basins of a probability flow.
    """

    def __init__(self, size: int, count: int):
        # Part of the architecture, not of its initialisation: the same for every key.
        self.size, self.count = size, count

    def __call__(self, x: Array) -> Array:
        """x: [B, size] -> [B, 2 count], float32."""
        turns = np.random.default_rng(0).standard_normal((self.size, self.count)) / math.sqrt(self.size)
        angles = x.astype(jnp.float32) @ jnp.asarray(2 * math.pi * turns, jnp.float32)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
