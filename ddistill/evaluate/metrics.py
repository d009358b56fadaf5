"""Metrics of sample sets. Sets are [N, ...], flattened to [N, d]; arithmetic is float64, randomness comes from a seed.

Distances are in the units of the data, squared for Fréchet. To compare data sets, divide by the standard deviation of
the data, squared for Fréchet.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ddistill.evaluate import sets
from ddistill.evaluate.moments import moments_of


class Frechet(NamedTuple):
    """A Fréchet distance, and the share of the covariances' traces that negative eigenvalues were, which were clipped.

    Rounding leaves a share of 1e-15; one above 1e-6 means that a matrix is no covariance, or was stored in few digits.
    """

    distance: float
    clipped: float


def frechet_gaussians(mu1, cov1, mu2, cov2) -> float:
    """The distance of `frechet_parts` alone."""
    return frechet_parts(mu1, cov1, mu2, cov2).distance


def frechet_parts(mu1, cov1, mu2, cov2) -> Frechet:
    """Fréchet distance (squared 2-Wasserstein) of N(mu1, cov1) and N(mu2, cov2): mu [d], cov [d, d], may be singular.

    |mu1 - mu2|² + tr(cov1 + cov2 - 2 (cov1^½ cov2 cov1^½)^½), at least 0, of symmetric roots. Dowson & Landau 1982,
    eq. 4; Heusel et al. 2017, eq. 6. Raises ValueError where shapes disagree, and for NaN or Inf.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    (d,) = mu1.shape if mu1.ndim == 1 else (-1,)
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = f"{mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}"
        raise ValueError(f"mu1, cov1, mu2, cov2 have shapes {shapes}; expected (d,), (d, d), (d,), (d, d).")
    if not all(np.isfinite(a).all() for a in (mu1, cov1, mu2, cov2)):
        raise ValueError("mu1, cov1, mu2 or cov2 holds NaN or Inf.")
    (root1, negative1), (root2, negative2) = _square_root(cov1), _square_root(cov2)
    # tr (A B² A)^½ is the sum of the singular values of AB. Eigenvalues of A B² A would be their squares, and rounding
    # would be felt at 1e-8 instead of 1e-16.
    cross = np.linalg.svd(root1 @ root2, compute_uv=False).sum()
    traces = np.trace(cov1) + np.trace(cov2)
    distance = max(0.0, float(np.sum((mu1 - mu2) ** 2) + traces - 2 * cross))
    return Frechet(distance, float((negative1 + negative2) / traces) if traces > 0 else 0.0)


def frechet(a, b) -> float:
    """Fréchet distance of the Gaussians fitted to two sample sets (unbiased covariances); counts may differ.

    Raises ValueError for NaN or Inf, unequal dimensions, fewer than 2 samples. Heusel et al. 2017, eq. 6, with the
    coordinates given in place of Inception features.
    """
    a, b = sets.pair(a, b, least=2)
    of_a, of_b = moments_of(a), moments_of(b)
    return frechet_gaussians(of_a.mean, of_a.covariance, of_b.mean, of_b.covariance)


def sliced_wasserstein(a, b, directions: int = 256, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: the root of the mean, over fixed random directions, of the squared 1-D distance.

    Exact in each direction, also for unequal counts: the integral of (F⁻¹ - G⁻¹)² over the merged steps of the two
    quantile functions. Raises ValueError for NaN or Inf, unequal dimensions, no samples, `directions` below 1.
    Rabin et al. 2012, eq. 3; Bonneel et al. 2015, eq. 9.
    """
    a, b = sets.pair(a, b, least=1)
    if directions < 1:
        raise ValueError(f"directions is {directions}; at least 1 is needed.")
    lines = _directions(a.shape[1], directions, seed)
    n, m = len(a), len(b)
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)  # where either quantile steps, times n m
    widths = np.diff(steps, prepend=0) / (n * m)
    quantiles_a = np.sort(lines @ a.T, axis=1)[:, (steps - 1) // m]
    quantiles_b = np.sort(lines @ b.T, axis=1)[:, (steps - 1) // n]
    return float(np.sqrt(np.mean((quantiles_a - quantiles_b) ** 2 @ widths)))


def sliced_wasserstein_to(b, n: int, directions: int = 256, seed: int = 0) -> Callable[[np.ndarray], float]:
    """`sliced_wasserstein(·, b)` for many sets of n samples, with b [N, d] sorted once; n must divide N.

    Each of n quantiles meets N/n of b: their mean and variance are all that the distance needs of them.
    Raises ValueError where n does not divide N.
    """
    b = sets.flat(b)
    if len(b) % n:
        raise ValueError(f"{n} samples do not divide the {len(b)} of the reference; take a multiple.")
    lines = _directions(b.shape[1], directions, seed)
    blocks = np.sort(lines @ b.T, axis=1).reshape(directions, n, -1)
    mean, variance = blocks.mean(2), blocks.var(2)

    def distance(a) -> float:
        a, _ = sets.pair(a, b[:1], least=1)
        if len(a) != n:
            raise ValueError(f"{len(a)} samples given; this reference was prepared for {n}.")
        return float(np.sqrt(np.mean((np.sort(lines @ a.T, axis=1) - mean) ** 2 + variance)))

    return distance


def fit_digit_classifier(x, labels) -> Callable[[np.ndarray], np.ndarray]:
    """Fit an RBF support vector machine to x [N, ...] and labels [N]; gives a function x [M, ...] -> labels [M].

    Raises ValueError (from scikit-learn) for NaN or unequal counts.
    """
    from sklearn.svm import SVC

    machine = SVC(C=10.0, kernel="rbf", gamma="scale").fit(sets.flat(x), np.asarray(labels))
    return lambda x: machine.predict(sets.flat(x))


def classifier_accuracy(classify: Callable[[np.ndarray], np.ndarray], x, labels) -> float:
    """Share of x [N, ...] to which `classify` gives the label [N] it was sampled for.

    Raises ValueError for unequal counts and for no samples.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(x),) or not len(x):
        raise ValueError(f"{len(x)} samples and labels of shape {labels.shape}; expected one label for each sample.")
    return float(np.mean(classify(x) == labels))


def _square_root(covariance: np.ndarray) -> tuple[np.ndarray, float]:
    """The symmetric root, and the sum of the negative eigenvalues' sizes, which were set to 0."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T, float(-np.minimum(values, 0).sum())


def _directions(d: int, count: int, seed: int) -> np.ndarray:
    lines = np.random.default_rng(seed).standard_normal((count, d))
    return lines / np.linalg.norm(lines, axis=1, keepdims=True)
