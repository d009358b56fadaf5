"""How varied the images of one condition look: LPIPS between them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.sharding import batch_sharding, local_mesh

Distance = Callable[[Array, Array], Array]


def perceptual_diversity(
    distance: Distance, images: np.ndarray, labels: np.ndarray, *, pairs: int = 100, batch: int = 32, seed: int = 0
) -> float:
    """Mean over conditions of the mean distance of two images of the same one, at least 0; 0 where all are alike.

    distance: [B, H, W, 3], [B, H, W, 3] -> [B], such as `LPIPS`, of images [N, H, W, 3] in its range or of bytes, which
    stand for [−1, 1]. labels: [N]. batch: pairs at a time, over all devices of this process, rounded up to be even.
    Each condition counts alike, with all its pairs or, of more than `pairs`, as many drawn without repetition from the
    seed. Raises ValueError for another number of labels than images, for a condition with one image alone, and for
    pairs or batch below 1. Zhu et al. 2017 (BicycleGAN), sec. 4.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images and labels of shape {labels.shape}; expected one label for each image.")
    if pairs < 1 or batch < 1:
        raise ValueError(f"pairs is {pairs} and batch {batch}; at least 1 is needed.")
    mesh = local_mesh()
    batch = -(-batch // mesh.size) * mesh.size

    def put(numbers: np.ndarray) -> Array:
        return jax.device_put(images[numbers], batch_sharding(mesh))

    measure = jax.jit(lambda a, b: distance(_in_range(a), _in_range(b)))
    rng = np.random.default_rng(seed)
    means = []
    for condition in np.unique(labels):
        (own,) = np.nonzero(labels == condition)
        if len(own) < 2:
            raise ValueError(f"Condition {condition} has 1 image; each needs at least 2 for a distance.")
        first, second = own[_pairs(len(own), pairs, rng)].T
        # Batches of one size are one program: the last is filled with its last pair.
        filled = -(-len(first) // batch) * batch - len(first)
        where = (np.pad(part, (0, filled), mode="edge").reshape(-1, batch) for part in (first, second))
        values = [measure(put(a), put(b)) for a, b in zip(*where, strict=True)]
        means.append(np.concatenate([np.asarray(v, np.float64) for v in values])[: len(first)].mean())
    return float(np.mean(means))


def _in_range(x: Array) -> Array:
    """Bytes as floats in [−1, 1]; floats as they are."""
    return x.astype(jnp.float32) / 127.5 - 1 if x.dtype == jnp.uint8 else x


def _pairs(count: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Pairs [n, 2] of different numbers below count, the first below the second, at most `most` of them."""
    total = count * (count - 1) // 2
    drawn = np.arange(total) if total <= most else np.sort(rng.choice(total, most, replace=False))
    # Pairs are numbered by their second member: those of j begin at j (j − 1)/2.
    second = ((1 + np.sqrt(1 + 8.0 * drawn)) // 2).astype(np.int64)
    second -= second * (second - 1) // 2 > drawn  # where the root was rounded up
    return np.stack([drawn - second * (second - 1) // 2, second], axis=1)
