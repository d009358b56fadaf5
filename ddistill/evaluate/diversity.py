"""How varied samples are: density and coverage against data, and the spread of the samples of one condition."""

import numpy as np

from ddistill.evaluate import sets


def density_coverage(real, fake, k: int = 5) -> tuple[float, float]:
    """Density, at least 0, and coverage, in [0, 1], with balls of `real` reaching to the k-th neighbour, not itself.

    Density: the balls that a sample of `fake` lies in, on average, over k; unlike precision it does not let one
    outlier of `real` vouch for many samples, and may pass 1 where samples crowd. Coverage: the share of `real` with a
    sample of `fake` in its ball; unlike recall it is not fooled by an outlier of `fake` with a wide ball. Of two sets
    of one distribution density is 1 on average, and coverage 1 - Π_i (N - 1 - i)/(N + M - 1 - i) over i = 0 … k - 1.
    Memory is a few blocks of 32 MiB. Raises ValueError for NaN or Inf, unequal dimensions, k below 1, sets of k samples
    or fewer. Naeem et al. 2020, eq. 3 and 4, lemmas 1 and 2.
    """
    real, fake, slack = sets.centred_pair(real, fake, k)
    radii = sets.neighbour_distance2(real, k) + slack
    inside, covered = 0, np.zeros(len(real), bool)
    for rows in sets.blocks(len(fake), len(real)):
        balls = sets.distance2(fake[rows], real) <= radii
        inside += int(balls.sum())
        covered |= balls.any(0)
    return inside / (k * len(fake)), float(covered.mean())


def condition_diversity(x, labels) -> float:
    """Mean over conditions of the mean distance between two samples of the same one: x [N, ...], labels [N].

    A distance is the root-mean-square difference of coordinates, |x - y|/√d, so that values compare across dimensions:
    for N(μ, s² I) its square is 2 s² on average, whatever d. Conditions count alike, whatever their number of samples.
    Raises ValueError for NaN or Inf, another number of labels than samples, a condition with fewer than two samples.
    """
    x, labels = sets.flat(x), np.asarray(labels)
    if labels.shape != (len(x),):
        raise ValueError(f"{len(x)} samples and labels of shape {labels.shape}; expected one label for each sample.")
    sets.check(x, "given", least=2)
    conditions, counts = np.unique(labels, return_counts=True)
    if counts.min() < 2:
        alone = conditions[counts.argmin()]
        raise ValueError(f"Condition {alone} has 1 sample; each needs at least 2 for a distance.")
    return float(np.mean([_mean_distance(x[labels == condition]) for condition in conditions]))


def _mean_distance(x: np.ndarray) -> float:
    """Mean of |x_i - x_j|/√d over the pairs i ≠ j."""
    x = x - x.mean(0)
    n, total = len(x), 0.0
    for rows in sets.blocks(n, n):
        squares = sets.distance2(x[rows], x)
        own = np.arange(len(squares))
        squares[own, rows.start + own] = 0
        total += float(np.sqrt(np.maximum(squares, 0)).sum())
    return total / (n * (n - 1) * np.sqrt(x.shape[1]))
