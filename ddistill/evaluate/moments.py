"""Mean and covariance of any number of features, gathered in double precision over batches and processes."""

from dataclasses import dataclass
from functools import reduce

import jax
import numpy as np

from ddistill.evaluate import sets


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of a set of features: its count, mean [d], and scatter Σ (x − mean)(x − mean)ᵀ [d, d], float64."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance [d, d]. Raises ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"{self.count} samples have no covariance; at least 2 are needed.")
        return self.scatter / (self.count - 1)

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets together. Chan et al. 1979, eq. 2.1."""
        if not self.count or not other.count:
            return self if self.count else other
        count, between = self.count + other.count, other.mean - self.mean
        share = other.count / count
        scatter = self.scatter + other.scatter + np.outer(between, between) * (self.count * share)
        return Moments(count, self.mean + share * between, scatter)

    def __sub__(self, part: "Moments") -> "Moments":
        """Of what is left of a set without a part of it."""
        count = self.count - part.count
        if not count or not part.count:
            return self if count else Moments(0, np.zeros_like(self.mean), np.zeros_like(self.scatter))
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        between = mean - part.mean
        scatter = self.scatter - part.scatter - np.outer(between, between) * (part.count * count / self.count)
        return Moments(count, mean, scatter)


def moments_of(x) -> Moments:
    """Moments of features [N, ...]. Raises ValueError for NaN or Inf."""
    x = sets.flat(x)
    sets.check(x, "given", least=0)
    if not len(x):
        return Moments(0, np.zeros(x.shape[1]), np.zeros((x.shape[1],) * 2))
    mean = x.mean(axis=0)
    x = x - mean
    return Moments(len(x), mean, x.T @ x)


def of_all_processes(moments: Moments) -> Moments:
    """The moments of what all processes hold together, the same bits in each; every process must call it."""
    if jax.process_count() == 1:
        return moments
    d = len(moments.mean)
    packed = np.concatenate([[float(moments.count)], moments.mean, moments.scatter.reshape(-1)])
    parts = [
        Moments(round(float(row[0])), row[1 : d + 1], row[d + 1 :].reshape(d, d)) for row in gathered(packed[None])
    ]
    return reduce(Moments.__add__, parts)


def gathered(x: np.ndarray) -> np.ndarray:
    """The rows [n, ...] of each process one after another, in all of them; all must have equally many, of one kind."""
    if jax.process_count() == 1:
        return x
    from jax.experimental.multihost_utils import process_allgather

    x = np.ascontiguousarray(x)
    # As bytes: JAX would make float32 of float64.
    raw = process_allgather(x.reshape(len(x), -1).view(np.uint8), tiled=True)
    return np.ascontiguousarray(raw).view(x.dtype).reshape(-1, *x.shape[1:])
