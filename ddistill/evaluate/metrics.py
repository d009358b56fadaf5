"""Metrics of sample sets. Sets are [N, ...], flattened to [N, d]; arithmetic is float64, randomness comes from a seed.

Distances are in the units of the data, squared for Fréchet. To compare data sets, divide by the standard deviation of
the data, squared for Fréchet.
"""

from collections.abc import Callable

import numpy as np

from ddistill.evaluate import sets


def frechet_gaussians(mu1, cov1, mu2, cov2) -> float:
    """Fréchet distance (squared 2-Wasserstein) of N(mu1, cov1) and N(mu2, cov2): mu [d], cov [d, d], may be singular.

    |mu1 - mu2|² + tr(cov1 + cov2 - 2 (cov1^½ cov2 cov1^½)^½), at least 0. Dowson & Landau 1982, eq. 4; Heusel et al.
    2017, eq. 6. Raises ValueError where shapes disagree.
    """
    mu1, cov1, mu2, cov2 = (np.asarray(a, np.float64) for a in (mu1, cov1, mu2, cov2))
    (d,) = mu1.shape if mu1.ndim == 1 else (-1,)
    if mu2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = f"{mu1.shape}, {cov1.shape}, {mu2.shape}, {cov2.shape}"
        raise ValueError(f"mu1, cov1, mu2, cov2 have shapes {shapes}; expected (d,), (d, d), (d,), (d, d).")
    # tr (A B² A)^½ is the sum of the singular values of AB. Eigenvalues of A B² A would be their squares, and rounding
    # would be felt at 1e-8 instead of 1e-16.
    cross = np.linalg.svd(_square_root(cov1) @ _square_root(cov2), compute_uv=False).sum()
    return max(0.0, float(np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def frechet(a, b) -> float:
    """Fréchet distance of the Gaussians fitted to two sample sets (unbiased covariances); counts may differ.

    Raises ValueError for NaN or Inf, unequal dimensions, fewer than 2 samples. Heusel et al. 2017, eq. 6, with the
    coordinates given in place of Inception features.
    """
    a, b = sets.pair(a, b, least=2)
    mu_a, mu_b = a.mean(0), b.mean(0)
    cov_a, cov_b = ((x - mu).T @ (x - mu) / (len(x) - 1) for x, mu in ((a, mu_a), (b, mu_b)))
    return frechet_gaussians(mu_a, cov_a, mu_b, cov_b)


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


def precision_recall(real, fake, k: int = 5) -> tuple[float, float]:
    """Improved precision and recall, each in [0, 1], with balls reaching to the k-th neighbour (itself not counted).

    Precision: the share of `fake` inside a ball of `real`. Recall: the share of `real` inside a ball of `fake`. Memory
    is a few blocks of 32 MiB, whatever the counts. Raises ValueError for NaN or Inf, unequal dimensions, k below 1,
    sets of k samples or fewer. Kynkäänniemi et al. 2019, eq. 1 and 2.
    """
    real, fake, slack = sets.centred_pair(real, fake, k)
    radii_real, radii_fake = (sets.neighbour_distance2(x, k) + slack for x in (real, fake))
    inside_real, inside_fake = [], np.zeros(len(real), bool)
    for rows in sets.blocks(len(fake), len(real)):
        distance2 = sets.distance2(fake[rows], real)
        inside_real.append((distance2 <= radii_real).any(1))
        inside_fake |= (distance2 <= radii_fake[rows, None]).any(0)
    return float(np.concatenate(inside_real).mean()), float(inside_fake.mean())


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


def _square_root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _directions(d: int, count: int, seed: int) -> np.ndarray:
    lines = np.random.default_rng(seed).standard_normal((count, d))
    return lines / np.linalg.norm(lines, axis=1, keepdims=True)
