"""How varied the samples of one condition are."""

import numpy as np

from ddistill.evaluate import sets


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
