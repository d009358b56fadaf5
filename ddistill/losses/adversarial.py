"""Losses of a generator and its discriminator on logits [B, n], high where a sample is taken for real.

n counts heads and, where these judge every place of a feature map, its places. All are averaged: the Σ_k over heads of
ADD (Sauer et al. 2023, eq. 2, 3) is n times as much, so that no weight depends on the number of heads (StyleGAN-T's
code does the same).
"""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array


class GANLoss(Protocol):
    """What discriminator and generator lose; a frozen dataclass whose methods answer scalars in float32."""

    def real(self, logits: Array) -> Array:
        """The discriminator's loss on data."""

    def fake(self, logits: Array) -> Array:
        """The discriminator's loss on the generator's samples."""

    def generator(self, logits: Array) -> Array:
        """The generator's loss on its samples."""


def _mean(logits: Array) -> Array:
    return jnp.mean(logits.astype(jnp.float32))


@dataclass(frozen=True)
class Hinge:
    """E max(0, 1 − D(x0)) + E max(0, 1 + D(x̂)) against −E D(x̂) (Lim & Ye 2017; ADD, eq. 2, 3).

    At the best D, which is ±1 where one of the densities is the larger, the discriminator loses 2 − 2 TV(real, fake).
    """

    def real(self, logits: Array) -> Array:
        """E max(0, 1 − D)."""
        return _mean(jax.nn.relu(1 - logits))

    def fake(self, logits: Array) -> Array:
        """E max(0, 1 + D)."""
        return _mean(jax.nn.relu(1 + logits))

    def generator(self, logits: Array) -> Array:
        """−E D."""
        return -_mean(logits)


@dataclass(frozen=True)
class Logistic:
    """E softplus(−D(x0)) + E softplus(D(x̂)) against E softplus(−D(x̂)) (Goodfellow et al. 2014; DMD2).

    At the best D = log(p_real/p_fake) the discriminator loses 2 log 2 − 2 JS(real, fake).
    """

    def real(self, logits: Array) -> Array:
        """E softplus(−D)."""
        return _mean(jax.nn.softplus(-logits))

    def fake(self, logits: Array) -> Array:
        """E softplus(D)."""
        return _mean(jax.nn.softplus(logits))

    def generator(self, logits: Array) -> Array:
        """E softplus(−D), which does not vanish where the discriminator is sure."""
        return _mean(jax.nn.softplus(-logits))
