"""Precision, recall, density and coverage: which samples lie in the balls around others, on all devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.evaluate import sets
from ddistill.evaluate.blocks import BYTES, distance2, in_blocks


class Manifold(NamedTuple):
    """Precision, recall and coverage in [0, 1]; density, at least 0 and about 1 for two sets of one distribution."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real, fake, k: int = 5, *, limit: int = BYTES) -> Manifold:
    """All four numbers of two sample sets, with balls reaching to the k-th neighbour, the sample itself not counted.

    Precision: the share of `fake` inside a ball of `real`. Recall: the share of `real` inside a ball of `fake`.
    Density: the balls of `real` that a sample of `fake` lies in, on average, over k. Coverage: the share of `real` with
    a sample of `fake` in its ball. limit: bytes that the distances of one block take on a device.
    Raises ValueError for NaN or Inf, unequal dimensions, k below 1, sets of k samples or fewer.
    Kynkäänniemi et al. 2019, eq. 1 and 2; Naeem et al. 2020, eq. 3 and 4.
    """
    real, fake, slack = sets.centred_pair(real, fake, k)
    radii_real, radii_fake = (
        in_blocks(_radii2, x, x, columns=len(x), limit=limit, k=k)[: len(x)] + slack for x in (real, fake)
    )
    inside, recalled, balls, covered = in_blocks(
        _hits, fake, real, radii_real, radii_fake, columns=len(real), limit=limit
    )
    return Manifold(
        float(inside) / len(fake), float(recalled.mean()), float(balls) / (k * len(fake)), float(covered.mean())
    )


def _radii2(blocks: Array, own: Array, x: Array, *, k: int) -> Array:
    """Squared distance of every row to its k-th nearest other one of x."""

    def radii(block):
        rows, own = block
        number = jnp.arange(len(x))
        others = jnp.where(number == own[:, None], jnp.inf, distance2(rows, x))

        def without_nearest(_, far):
            return jnp.where(number == jnp.argmin(far, axis=1)[:, None], jnp.inf, far)

        return jnp.min(jax.lax.fori_loop(0, k - 1, without_nearest, others), axis=1)

    return jax.lax.map(radii, (blocks, own)).reshape(-1)


def _hits(
    blocks: Array, own: Array, real: Array, radii_real: Array, radii_fake: Array
) -> tuple[Array, Array, Array, Array]:
    """Rows in a ball, which of `real` are in a ball of a row, (row, ball) pairs, and which balls have a row."""

    def count(carry, block):
        inside, recalled, balls, covered = carry
        rows, own = block
        there = own[:, None] >= 0
        squares = distance2(rows, real)
        hits = there & (squares <= radii_real)
        recall = there & (squares <= radii_fake[own][:, None])
        return (
            inside + jnp.sum(jnp.any(hits, axis=1)),
            recalled | jnp.any(recall, axis=0),
            balls + jnp.sum(hits),
            covered | jnp.any(hits, axis=0),
        ), None

    none, nowhere = jnp.zeros((), jnp.int64), jnp.zeros(len(real), bool)
    return jax.lax.scan(count, (none, nowhere, none, nowhere), (blocks, own))[0]


def precision_recall(real, fake, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall, each in [0, 1]; `manifold` tells what they are and what is raised."""
    return manifold(real, fake, k)[:2]


def density_coverage(real, fake, k: int = 5) -> tuple[float, float]:
    """Density, at least 0, and coverage, in [0, 1]; `manifold` tells what they are and what is raised.

    Density, unlike precision, does not let one outlier of `real` vouch for many samples, and may pass 1 where samples
    crowd; coverage, unlike recall, is not fooled by an outlier of `fake` with a wide ball. Of two sets of one
    distribution density is 1 on average, and coverage 1 - Π_i (N - 1 - i)/(N + M - 1 - i) over i = 0 … k - 1.
    Naeem et al. 2020, lemmas 1 and 2.
    """
    return manifold(real, fake, k)[2:]
