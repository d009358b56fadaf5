"""Distances of distributions by kernels: KID on Inception features, CMMD on CLIP embeddings."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.evaluate import sets
from ddistill.evaluate.blocks import BYTES, distance2, in_blocks


class KID(NamedTuple):
    """Mean and standard deviation over subsets of the squared kernel distance, and the size of a subset."""

    mean: float
    std: float
    size: int


def kid(a, b, subsets: int = 100, size: int = 1000, seed: int = 0) -> KID:
    """Kernel Inception distance of features [N, d] and [M, d]: unbiased, so that it is 0 on average for equal sets.

    The mean over random subsets of `size`, or of all samples where there are fewer, of the unbiased estimate of MMD²
    with the kernel (x·y/d + 1)³. Subsets are fixed by the seed, drawn without replacement, for both sets.
    Raises ValueError for NaN or Inf, unequal dimensions, fewer than 2 samples, numbers below 1 and subsets of 1.
    Bińkowski et al. 2018, sec. 3; Gretton et al. 2012, eq. 3.
    """
    a, b = sets.pair(a, b, least=2)
    if subsets < 1 or size < 2:
        raise ValueError(f"subsets = {subsets} of size = {size}: at least 1 of at least 2 samples is needed.")
    of_a, of_b = subsets_of(len(a), len(b), subsets, size, seed)
    chosen = np.concatenate([of_a, of_b], axis=1)
    # Each row of a block is a subset, so that they are shared out among the devices.
    size = of_a.shape[1]
    values = in_blocks(_mmd2, chosen.astype(np.float64), a, b, columns=size * (size + 2 * a.shape[1]))[:subsets]
    return KID(float(values.mean()), float(values.std()), size)


def subsets_of(n: int, m: int, subsets: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers [subsets, size] of the samples of each subset of n and of m samples; size is at most n and m."""
    rng, size = np.random.default_rng(seed), min(size, n, m)
    pairs = [(rng.choice(n, size, replace=False), rng.choice(m, size, replace=False)) for _ in range(subsets)]
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])


def _mmd2(blocks: Array, own: Array, a: Array, b: Array) -> Array:
    size = blocks.shape[2] // 2

    def kernel(x, y):
        return (jnp.matmul(x, y.T, precision="highest") / x.shape[1] + 1) ** 3

    def one(chosen):
        chosen = chosen.astype(jnp.int64)
        x, y = a[chosen[:size]], b[chosen[size:]]
        within = sum(jnp.sum(k) - jnp.trace(k) for k in (kernel(x, x), kernel(y, y)))
        return within / (size * (size - 1)) - 2 * jnp.mean(kernel(x, y))

    return jax.lax.map(jax.vmap(one), blocks).reshape(-1)


SCALE = 1000.0
"""CMMD is told in thousandths of the kernel's unit."""


def cmmd(a, b, sigma: float = 10.0, *, limit: int = BYTES) -> float:
    """CLIP maximum mean discrepancy of embeddings [N, d] and [M, d], which are brought to length 1, times 1000.

    MMD² with the kernel exp(−|x − y|²/(2 σ²)), means over all pairs, a sample with itself too: at least 0, and 0 for
    equal sets. limit: bytes that the distances of one block take on a device.
    Raises ValueError for NaN or Inf, unequal dimensions, no samples, embeddings of length 0 and σ that is not positive.
    Jayasumana et al. 2024, eq. 4, and sec. 4 for σ = 10; their program has the scale.
    """
    a, b = sets.pair(a, b, least=1)
    if not sigma > 0:
        raise ValueError(f"sigma is {sigma}; it must be positive.")
    a, b = unit(a), unit(b)

    def mean(x, y):
        total = in_blocks(_gaussian_sum, x, y, 1 / (2 * sigma**2), columns=len(y), limit=limit)
        return float(total) / (len(x) * len(y))

    # Kernels are nearly 1: what is left of the sum below is of the size of 1 − k, which is summed in place of k.
    return max(0.0, SCALE * (2 * mean(a, b) - mean(a, a) - mean(b, b)))


def unit(x: np.ndarray) -> np.ndarray:
    """Rows [N, d] over their length. Raises ValueError for rows of length 0."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"Embedding {int(np.argmin(lengths))} has length 0, and no direction.")
    return x / lengths


def _gaussian_sum(blocks: Array, own: Array, y: Array, gamma: Array) -> Array:
    """The sum over pairs of 1 − exp(−γ |x − y|²)."""

    def add(total, block):
        rows, own = block
        missing = -jnp.expm1(-gamma * jnp.maximum(distance2(rows, y), 0))
        return total + jnp.sum(jnp.where(own[:, None] >= 0, missing, 0)), None

    return jax.lax.scan(add, jnp.zeros((), y.dtype), (blocks, own))[0]


def inception_score(logits, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception score of logits [N, classes]: mean and standard deviation over splits of exp E KL(p(y|x) ‖ p(y)).

    At least 1, at most the number of classes. p(y) is the mean of p(y|x) over a split; the samples are shuffled by the
    seed first, since those of one class may stand together. Splits are of N/splits samples, fewer than `splits` of them
    only where there are fewer samples. Raises ValueError for NaN or Inf, no samples, and fewer than 1 split.
    Salimans et al. 2016, sec. 4.
    """
    logits = sets.flat(logits)
    sets.check(logits, "given", least=1)
    if splits < 1:
        raise ValueError(f"splits is {splits}; at least 1 is needed.")
    logits = np.random.default_rng(seed).permutation(logits)
    log_p = logits - logits.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    scores = []
    for part in np.array_split(log_p, min(splits, len(log_p))):
        p = np.exp(part)
        marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
        scores.append(np.exp(np.mean(np.sum(p * (part - marginal), axis=1))))
    return float(np.mean(scores)), float(np.std(scores))


def clip_score(images, texts) -> float:
    """Mean over pairs of 100 max(cos(image, text), 0), of embeddings [N, d] of images and of their prompts.

    Raises ValueError for NaN or Inf, other shapes, no samples and embeddings of length 0. Hessel et al. 2021, eq. 1,
    with 100 in place of their 2.5, as the field tells it.
    """
    images, texts = sets.pair(images, texts, least=1)
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} prompts were given; one prompt for each is needed.")
    return float(100 * np.mean(np.maximum(np.sum(unit(images) * unit(texts), axis=1), 0)))
