import numpy as np
import pytest
from scipy import linalg, stats
from scipy.spatial.distance import cdist

from ddistill.data import load_digits
from ddistill.evaluate import (
    classifier_accuracy,
    fit_digit_classifier,
    frechet,
    frechet_gaussians,
    manifold,
    precision_recall,
    sliced_wasserstein,
)
from ddistill.evaluate.metrics import frechet_parts


def covariance(rng, d: int, rank: int) -> np.ndarray:
    factor = rng.standard_normal((d, rank))
    return factor @ factor.T


def test_frechet_of_commuting_covariances_is_closed_form():
    rng = np.random.default_rng(0)
    axes = linalg.qr(rng.standard_normal((6, 6)))[0]
    s1, s2 = rng.uniform(0, 2, 6), rng.uniform(0, 2, 6)
    mu1, mu2 = rng.standard_normal((2, 6))
    # With common axes the optimal map scales each of them: |mu1 - mu2|² + Σ (s1 - s2)².
    expected = ((mu1 - mu2) ** 2).sum() + ((s1 - s2) ** 2).sum()
    got = frechet_gaussians(mu1, (axes * s1**2) @ axes.T, mu2, (axes * s2**2) @ axes.T)
    assert got == pytest.approx(expected, rel=1e-12)


def test_frechet_of_any_covariances_agrees_with_scipy():
    rng = np.random.default_rng(1)
    c1, c2 = covariance(rng, 5, 8), covariance(rng, 5, 8)
    mu1, mu2 = rng.standard_normal((2, 5))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet_gaussians(mu1, c1, mu2, c2) == pytest.approx(expected, rel=1e-10)
    assert frechet_gaussians(mu2, c2, mu1, c1) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_singular_covariances():
    rng = np.random.default_rng(2)
    u, v, zero = rng.standard_normal(7), rng.standard_normal(7), np.zeros(7)
    # Rank one: tr (u uᵀ v vᵀ)^½ = |u·v|.
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_gaussians(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-7)
    low = covariance(rng, 40, 3)
    assert frechet_gaussians(np.ones(40), low, np.ones(40), low) == pytest.approx(0, abs=1e-10)
    assert frechet_gaussians(zero, np.zeros((7, 7)), u, np.zeros((7, 7))) == pytest.approx(u @ u)


def test_frechet_of_samples_moves_as_the_samples_do():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 2, 2, 1)) @ np.array([[2.0]])
    total_variance = x.reshape(300, 4).var(0, ddof=1).sum()
    shift = np.array([1.0, -2, 0, 0.5]).reshape(2, 2, 1)
    assert frechet(x, x + shift) == pytest.approx(5.25, rel=1e-10)
    middle = x.mean(0)
    assert frechet(x, middle + 1.5 * (x - middle)) == pytest.approx(0.25 * total_variance, rel=1e-10)
    assert frechet(3 * x, 3 * (x + shift)) == pytest.approx(9 * 5.25, rel=1e-10)
    assert frechet(x, x[::-1]) == pytest.approx(0, abs=1e-10)


def test_negative_eigenvalues_are_clipped_and_told():
    # Roots diag(2, 0) and diag(1, 3): tr = 3 + 10, the cross term 2, and 1 of the traces' 13 was negative.
    got = frechet_parts(np.zeros(2), np.diag([4.0, -1.0]), np.zeros(2), np.diag([1.0, 9.0]))
    assert got == pytest.approx((3 + 10 - 2 * 2, 1 / 13), rel=1e-12)
    rng = np.random.default_rng(12)
    assert frechet_parts(np.zeros(9), covariance(rng, 9, 4), np.ones(9), covariance(rng, 9, 9)).clipped < 1e-12
    with pytest.raises(ValueError, match="NaN or Inf"):
        frechet_parts(np.zeros(2), np.diag([np.nan, 1]), np.zeros(2), np.eye(2))


def test_sliced_wasserstein_of_a_shift_is_its_projected_length():
    rng = np.random.default_rng(4)
    a = rng.standard_normal((200, 5))
    shift = rng.standard_normal(5)
    # The same |cos|² as for two single points, which need no sorting.
    projected = sliced_wasserstein(np.zeros((1, 5)), shift[None])
    assert sliced_wasserstein(a, rng.permutation(a) + shift) == pytest.approx(projected, rel=1e-10)
    # The directions are unit vectors, so squared distances over an orthonormal frame of shifts add up to 1 ...
    frame = [sliced_wasserstein(a, a + axis, directions=7) ** 2 for axis in np.eye(5)]
    assert sum(frame) == pytest.approx(1, rel=1e-10)
    # ... and isotropic: E cos² = 1/d with variance 2 (d - 1) / (d² (d + 2)), five standard errors.
    error = 5 * np.sqrt(2 * 4 / (25 * 7) / 4000)
    assert sliced_wasserstein(a, a + np.eye(5)[0], directions=4000) ** 2 == pytest.approx(1 / 5, abs=error)


def test_sliced_wasserstein_of_two_normals_in_one_dimension():
    z = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)[:, None]
    for s in (0.3, 1.7):
        assert sliced_wasserstein(z, s * z[::-1]) == pytest.approx(abs(s - 1), rel=1e-3)


def test_sliced_wasserstein_of_unequal_counts_is_exact():
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((4, 3)), rng.standard_normal((6, 3)) + 1
    # Repeating samples leaves the distribution as it is, and makes the counts equal.
    expected = sliced_wasserstein(np.repeat(a, 3, 0), np.repeat(b, 2, 0))
    assert sliced_wasserstein(a, b) == pytest.approx(expected, rel=1e-12)
    assert sliced_wasserstein(b, a) == pytest.approx(expected, rel=1e-12)
    # One point against two, on a line: the plan moves half of the mass each way.
    assert sliced_wasserstein([[0.0]], [[-1.0], [3.0]]) == pytest.approx(np.sqrt(5), rel=1e-12)


def test_sliced_wasserstein_is_fixed_by_its_seed():
    rng = np.random.default_rng(6)
    a, b = rng.standard_normal((2, 50, 4))
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b, 256, 0) != sliced_wasserstein(a, b, seed=1)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(a[::-1], b), rel=1e-12)


def brute_force(real, fake, k):
    def inside(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]  # column 0 is the point itself
        return np.mean([any(cdist(p[None], centres)[0] <= radii) for p in points])

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_agrees_with_brute_force(k):
    rng = np.random.default_rng(7)
    real, fake = 100 + rng.standard_normal((60, 3)), 100.7 + 0.6 * rng.standard_normal((45, 3))
    expected = brute_force(real, fake, k)
    assert precision_recall(real, fake, k) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < min(expected) < max(expected) < 1 and expected[0] != expected[1]  # it can tell them apart


@pytest.mark.parametrize("k", [3, 5])
def test_all_four_agree_with_the_program_of_naeem_et_al(k):
    compute_prdc = pytest.importorskip("prdc").compute_prdc
    rng = np.random.default_rng(11)
    real = rng.standard_normal((90, 12)).astype(np.float32)
    fake = (0.8 * rng.standard_normal((70, 12)) + 0.1).astype(np.float32)
    assert manifold(real, fake, k)._asdict() == pytest.approx(compute_prdc(real, fake, k), abs=1e-12)


def test_precision_recall_in_blocks():
    rng = np.random.default_rng(8)
    real, fake = rng.standard_normal((60, 3)), 0.8 * rng.standard_normal((45, 3)) + 0.5
    # A block of 60 distances for each of 8 devices: 45 rows in 6 blocks, the last of them filled up.
    assert manifold(real, fake, 3, limit=60 * 8)[:2] == pytest.approx(brute_force(real, fake, 3), abs=1e-12)


def test_precision_recall_at_its_limits():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((80, 6))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)
    # Balls of radius 0; the shifted copy is rounded otherwise by the matrix product.
    copies = np.repeat(1e3 + np.random.default_rng(0).standard_normal((101, 17)), 8, 0)
    assert precision_recall(copies, copies[3:-2]) == (1, 1)


def test_precision_recall_sees_dropped_and_invented_modes():
    rng = np.random.default_rng(10)
    modes = [centre + 0.1 * rng.standard_normal((100, 2)) for centre in ([0, 0], [9, 0], [0, 9], [9, 9])]
    every, three = np.concatenate(modes), np.concatenate(modes[:3])
    assert precision_recall(every, three) == (1, 0.75)
    assert precision_recall(three, every) == (0.75, 1)


@pytest.mark.parametrize("metric", [frechet, sliced_wasserstein, precision_recall])
def test_sets_that_cannot_be_compared(metric):
    x = np.ones((10, 3))
    with pytest.raises(ValueError, match="3 and 4 coordinates"):
        metric(x, np.ones((10, 4)))
    bad = x.copy()
    bad[4, 1] = np.nan
    with pytest.raises(ValueError, match="second set has NaN or Inf in 1 of 10 samples, the first at index 4"):
        metric(x, bad)
    with pytest.raises(ValueError, match="first set has 0 samples"):
        metric(x[:0], x)


def test_numbers_out_of_range():
    x = np.ones((5, 3))
    with pytest.raises(ValueError, match="at least 6 are needed"):
        precision_recall(x, x, k=5)
    with pytest.raises(ValueError, match="k is 0"):
        precision_recall(x, x, k=0)
    with pytest.raises(ValueError, match="directions is 0"):
        sliced_wasserstein(x, x, directions=0)
    with pytest.raises(ValueError, match="expected"):
        frechet_gaussians(np.ones(3), np.eye(2), np.ones(3), np.eye(3))


def test_digits_classifier_and_floor():
    digits = load_digits()
    classify = fit_digit_classifier(digits.train_x, digits.train_labels)
    assert classifier_accuracy(classify, digits.held_out_x, digits.held_out_labels) > 0.98
    assert classifier_accuracy(classify, digits.held_out_x, (digits.held_out_labels + 1) % 10) < 0.02
    # Real against real, over the data's variance: the floor of every table, the same for every affine scaling.
    floor = frechet(digits.held_out_x, digits.train_x) / digits.variance
    assert floor == pytest.approx(0.99, abs=0.15)
    unit = frechet(digits.to_unit(digits.held_out_x), digits.to_unit(digits.train_x))
    assert unit / digits.to_unit(digits.train_x).var(0).mean() == pytest.approx(floor, rel=1e-4)


def test_accuracy_counts_matches():
    labels = np.array([0, 1, 2, 3])
    assert classifier_accuracy(lambda x: np.array([0, 1, 0, 0]), np.zeros((4, 2)), labels) == 0.5
    with pytest.raises(ValueError, match="one label for each"):
        classifier_accuracy(lambda x: x, np.zeros((3, 2)), labels)
