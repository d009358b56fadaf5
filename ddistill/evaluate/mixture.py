"""How far samples are from a mixture whose density and modes are known exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.special import gammaincinv

from ddistill.evaluate.metrics import sliced_wasserstein_to
from ddistill.mixture import Mixture
from ddistill.process import edm

SCALE = 0.5
"""The data's root-mean-square per coordinate, the unit of all distances here."""


@dataclass(frozen=True)
class Judge:
    """A mixture, exact samples of it to compare with, and the log-density that 99 % of true samples exceed.

    Densities and modes are those of the mixture with a little noise, so that a narrow mode does not turn a small error
    into an infinite one: standard deviation .025 in up to two dimensions, .1 in more.
    """

    mixture: Mixture
    sw2: Callable[[np.ndarray], float]
    threshold: float
    mean_log_density: float
    noise: float

    def __call__(self, x: Array | np.ndarray, exact: Array | None = None) -> dict[str, float | None]:
        """Metrics of samples x [N, d], N as the judge was made for; `exact`: where the exact flow takes their noise.

        endpoint: root-mean-square distance to `exact`, endpoint_median: its median over samples, sw2: sliced
        Wasserstein-2 to the exact samples, all over the data's scale; precision: share of samples above the threshold,
        over .99; recall: share of modes that hold more than a fifth of their weight among such samples; weights: KL of
        the samples' mode weights from the true ones; spread: width of the samples within the modes found over the true
        one, both with the noise, 1 for exact samples and less where modes have shrunk, None where none is found;
        ll_gap: mean log-density of true samples minus that of x. Samples that are not finite count as infinitely far.
        """
        x, density, mode, distance2 = self._judged(x)
        good = density > self.threshold
        true = np.asarray(self.mixture.weights, np.float64)
        count = np.bincount(mode, minlength=len(true)) / len(x)
        seen, found = count > 0, self._found(density, mode)
        distance = None if exact is None else (np.asarray(x, np.float64) - np.asarray(exact, np.float64)) / SCALE
        return {
            "endpoint": None if distance is None else float(np.sqrt(np.mean(distance**2))),
            "endpoint_median": None if distance is None else float(np.median(np.sqrt(np.mean(distance**2, axis=1)))),
            "sw2": self.sw2(x) / SCALE,
            "precision": float(np.mean(good)) / 0.99,
            "recall": float(np.mean(found)),
            "weights": float(np.sum(count[seen] * np.log(count[seen] / true[seen]))),
            "spread": _spread(distance2, mode, np.flatnonzero(found), self.mixture.d),
            "ll_gap": self.mean_log_density - float(np.mean(density, dtype=np.float64)),
        }

    def found(self, x: Array | np.ndarray) -> np.ndarray:
        """Which modes x [N, d] found, bool [K]: those that `recall` counts."""
        _, density, mode, _ = self._judged(x)
        return self._found(density, mode)

    def _found(self, density: np.ndarray, mode: np.ndarray) -> np.ndarray:
        true = np.asarray(self.mixture.weights, np.float64)
        return np.bincount(mode[density > self.threshold], minlength=len(true)) / len(mode) > 0.2 * true

    def _judged(self, x: Array | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x [N, d] without NaN and infinity, log-density, most responsible components, distances² to their means."""
        x = np.asarray(x, np.float32).reshape(len(x), -1)
        x = np.where(np.isfinite(x), x, 1e6)
        judged = _judge(self.mixture, _noised(jnp.asarray(x), self.noise, jax.random.key(1)), self.noise)
        density, mode, distance2 = (np.asarray(a) for a in judged)
        return x, density, mode, distance2


def judge(mixture: Mixture, n: int = 10_000, seed: int = 0) -> Judge:
    """A judge of n samples, fixed by the seed; ten times as many exact ones, so that their own noise adds little."""
    noise = 0.025 if mixture.d <= 2 else 0.1
    k_sample, k_noise = jax.random.split(jax.random.fold_in(jax.random.key(20260), seed))
    true = mixture.sample(k_sample, 10 * n)
    density, _, _ = _judge(mixture, _noised(true, noise, k_noise), noise)
    threshold = float(np.quantile(np.asarray(density), 0.01))
    return Judge(mixture, sliced_wasserstein_to(true, n), threshold, float(np.mean(np.asarray(density))), noise)


def floor(judge: Judge, n: int = 10_000, repeats: int = 5) -> dict[str, float]:
    """Mean metrics of independent exact samples: what a perfect student would score.

    sw2_std is the standard deviation of sw2 over the repeats.
    """
    keys = [jax.random.fold_in(jax.random.key(31337), i) for i in range(repeats)]
    rows = [judge(judge.mixture.sample(key, n)) for key in keys]
    names = ("sw2", "precision", "recall", "weights", "spread", "ll_gap")
    values = {name: np.asarray([row[name] for row in rows], np.float64) for name in names}
    return {**{name: float(v.mean()) for name, v in values.items()}, "sw2_std": float(values["sw2"].std())}


def _noised(x: Array, noise: float, key: Array) -> Array:
    return x + noise * jax.random.normal(key, x.shape)


def _spread(distance2: np.ndarray, mode: np.ndarray, found: np.ndarray, d: int) -> float | None:
    """Mean over the modes found of √(median of the squared Mahalanobis distance to it / median of χ²_d).

    For Gaussian samples of c times the width it is c, as with means in place of medians; but a mean would follow the
    few samples that lie between modes, ten widths from either, and hide that the rest has shrunk.
    """
    widths = [np.sqrt(np.median(distance2[mode == k]) / (2 * gammaincinv(d / 2, 0.5))) for k in found]
    return float(np.mean(widths)) if widths else None


@jax.jit
def _judge(mixture: Mixture, x: Array, noise: float) -> tuple[Array, Array, Array]:
    """Log-density, most responsible component and squared Mahalanobis distance to its mean, at noise level `noise`.

    In blocks that bound the memory.
    """
    process = edm()

    def block(x):
        mode = jnp.argmax(mixture.responsibilities(process, x, noise), axis=1)
        means, scales, bases = (jnp.asarray(a, x.dtype) for a in (mixture.means, mixture.scales, mixture.bases))
        along = jnp.einsum("bi,bij->bj", x - means[mode], bases[mode], precision="highest")
        distance2 = jnp.sum(along**2 / (scales[mode] + noise**2), axis=1)
        return mixture.log_density(process, x, noise), mode, distance2

    blocks = x.reshape(-1, math.gcd(len(x), 1000), x.shape[1])
    return jax.tree.map(lambda a: a.reshape(-1), jax.lax.map(block, blocks))
