"""Embeddings of scalars."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import Array


class Fourier(nnx.Module):
    """Sines and cosines of a scalar of order one, at `size`/2 frequencies from `low` to `high` turns per unit, geometric."""

    def __init__(self, size: int, low: float = 0.125, high: float = 8.0):
        self.size, self.low, self.high = size, low, high

    def __call__(self, c: Array) -> Array:
        """c: [B] -> [B, size], float32."""
        frequencies = jnp.geomspace(self.low, self.high, self.size // 2) * 2 * math.pi
        angles = c.astype(jnp.float32)[:, None] * frequencies
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
