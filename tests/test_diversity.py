"""Density, coverage and the diversity of a condition, against closed forms and scikit-learn's neighbours."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from sklearn.neighbors import NearestNeighbors

from ddistill.evaluate import condition_diversity, density_coverage, manifold, sets


def by_neighbours(real, fake, k):
    """Naeem et al. 2020, eq. 3 and 4, word for word."""
    radii = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, k]  # the first neighbour is itself
    tree = NearestNeighbors().fit(fake)
    counts = [len(tree.radius_neighbors(x[None], r)[1][0]) for x, r in zip(real, radii, strict=True)]
    return sum(counts) / (k * len(fake)), float(np.mean(np.array(counts) > 0))


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_agree_with_scikit_learn(k):
    rng = np.random.default_rng(0)
    real, fake = 100 + rng.standard_normal((60, 3)), 100.7 + 0.6 * rng.standard_normal((45, 3))
    expected = by_neighbours(real, fake, k)
    assert density_coverage(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert 0.2 < expected[1] < 0.9 and abs(expected[0] - 1) > 0.03  # it can tell them apart
    assert manifold(real, fake, k, limit=60 * 8)[2:] == pytest.approx(expected, abs=1e-12)  # six blocks, one filled up


def test_points_on_a_line_counted_by_hand():
    real = np.array([[0.0], [1.0], [3.0], [7.0]])  # with k = 1 the balls are [-1, 1], [0, 2], [1, 5] and [3, 11]
    # 0.5 is in two balls, 4 in two, 20 in none: 4 hits; each ball holds one of them.
    assert density_coverage(real, [[0.5], [4.0], [20.0]], k=1) == pytest.approx((4 / 3, 1))
    # All at 10 lie in the last ball alone.
    assert density_coverage(real, [[10.0], [10.0]], k=1) == pytest.approx((1, 1 / 4))


def test_a_set_covers_itself_and_nothing_far_away():
    x = np.random.default_rng(1).standard_normal((50, 4))
    # A sample lies in its own ball as well as in k others on average.
    assert density_coverage(x, x, k=5) == pytest.approx((6 / 5, 1))
    assert density_coverage(x, x + 100) == (0, 0)
    # Balls of radius 0, each with eight copies of its centre; a matrix product may round the shifted set otherwise.
    copies = np.repeat(1e3 + np.random.default_rng(0).standard_normal((101, 17)), 8, 0)
    assert density_coverage(copies, copies[3:-2]) == pytest.approx((8 / 5, 1))


def test_two_sets_of_one_distribution_score_what_the_lemmas_say():
    rng, n, m, k, repeats = np.random.default_rng(3), 40, 30, 3, 300
    scores = np.array([density_coverage(*np.split(rng.standard_normal((n + m, 2)), [n]), k) for _ in range(repeats)])
    missed = math.prod((n - 1 - i) / (n + m - 1 - i) for i in range(k))
    error = scores.std(0, ddof=1) / np.sqrt(repeats)
    assert np.all(np.abs(scores.mean(0) - [1, 1 - missed]) < 4 * error) and np.all(error < 0.02)


def test_crowding_is_dense_and_covers_little():
    rng = np.random.default_rng(4)
    real = rng.standard_normal((400, 2))
    density, coverage = density_coverage(real, 0.05 * rng.standard_normal((400, 2)))
    # Only balls that reach the middle are hit: density counts what precision would call 1.
    assert density > 1.2 and coverage < 0.1


@pytest.mark.parametrize("d", [1, 3, 300])
def test_the_mean_distance_of_gaussian_samples(d):
    rng, s, n = np.random.default_rng(5), 0.7, 4000
    x = rng.standard_normal((n, d)) * s + 10 * rng.standard_normal(d)
    # |x − y|/(√2 s) is χ with d degrees of freedom; its square is d on average.
    chi = math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))
    got = condition_diversity(x, np.zeros(n))
    assert got == pytest.approx(s * math.sqrt(2 / d) * chi, abs=4 * s / math.sqrt(n * d))
    assert got <= math.sqrt(2) * s * (1 + 4 / math.sqrt(n * d))


def test_diversity_agrees_with_scipy_and_counts_conditions_alike(monkeypatch):
    rng = np.random.default_rng(6)
    labels = np.array([3] * 40 + [1] * 9)
    x = 50 + rng.standard_normal((49, 2, 5)) * np.where(labels == 3, 1.0, 4.0)[:, None, None]
    order = rng.permutation(49)
    flat = x.reshape(49, 10)
    expected = np.mean([pdist(flat[labels == c]).mean() for c in (1, 3)]) / np.sqrt(10)
    assert condition_diversity(x[order], labels[order]) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(sets, "blocks", lambda rows, columns: [slice(i, i + 7) for i in range(0, rows, 7)])
    assert condition_diversity(x[order], labels[order]) == pytest.approx(expected, rel=1e-12)
    # 0 and 1 in one condition, 0, 0 and 3 in the other: 1 and (0 + 3 + 3)/3.
    assert condition_diversity([[0.0], [1], [0], [0], [3]], [0, 0, 1, 1, 1]) == pytest.approx(1.5)


def test_a_collapsed_condition_has_none():
    points = np.repeat(1e3 * np.random.default_rng(7).standard_normal((4, 6)), 10, 0)
    assert condition_diversity(points, np.repeat(np.arange(4), 10)) == pytest.approx(0, abs=1e-9)


def test_sets_that_cannot_be_judged():
    x = np.ones((10, 3))
    bad = x.copy()
    bad[4, 1] = np.nan
    with pytest.raises(ValueError, match="3 and 4 coordinates"):
        density_coverage(x, np.ones((10, 4)))
    with pytest.raises(ValueError, match="second set has NaN or Inf in 1 of 10 samples, the first at index 4"):
        density_coverage(x, bad)
    with pytest.raises(ValueError, match="at least 6 are needed"):
        density_coverage(x[:5], x)
    with pytest.raises(ValueError, match="k is 0"):
        density_coverage(x, x, k=0)
    with pytest.raises(ValueError, match="NaN or Inf in 1 of 10 samples"):
        condition_diversity(bad, np.zeros(10))
    with pytest.raises(ValueError, match=r"labels of shape \(9,\); expected one"):
        condition_diversity(x, np.zeros(9))
    with pytest.raises(ValueError, match="Condition 7 has 1 sample"):
        condition_diversity(x, [0] * 9 + [7])
