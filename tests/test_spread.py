"""The width of samples within the modes of a mixture, in cases where it is known."""

import jax
import numpy as np
import pytest
from scipy import stats

from ddistill.evaluate.mixture import SCALE, floor, judge
from ddistill.mixture import Mixture

N = 3000
MEANS = [[3.0, 0.0], [-2.0, 2.0], [0.0, -2.0]]
WEIGHTS = [0.5, 0.3, 0.2]
ROUND = Mixture.from_covariances(WEIGHTS, MEANS, [v * np.eye(2) for v in (0.01, 0.04, 0.02)]).standardised(SCALE)
# In two dimensions a matrix of eigenvectors may be symmetric, and as good as its transpose.
ROOTS = np.random.default_rng(0).standard_normal((3, 3, 3)) * [1.0, 0.5, 0.2]
OBLIQUE = Mixture.from_covariances(
    WEIGHTS, [[9.0, 0, 0], [-6, 6, 0], [0, -6, 9]], ROOTS @ ROOTS.swapaxes(1, 2)
).standardised(SCALE)


def error(mixture):
    """Standard error of the spread of N samples, the mean over modes of independent errors.

    A sample median of n strays by 1/(2 f √n) about the median m, and the root of its ratio to m by half of that over m.
    """
    chi2 = stats.chi2(mixture.d)
    one = 1 / (2 * chi2.pdf(chi2.median())) / chi2.median() / 2
    return one * np.sqrt(np.sum(1 / (N * np.asarray(mixture.weights)))) / len(mixture.weights)


@pytest.fixture(scope="module")
def by():
    return judge(ROUND, N)


@pytest.fixture(scope="module")
def drawn():
    """Samples of the round mixture, the means of their modes, and their modes' variances."""
    x, modes = (np.asarray(a) for a in ROUND.sample_with_modes(jax.random.key(2), N))
    return x, np.asarray(ROUND.means)[modes], np.asarray(ROUND.scales)[:, 0]


@pytest.mark.parametrize("mixture", [ROUND, OBLIQUE], ids=["round", "oblique"])
def test_exact_samples_have_the_width_of_the_modes(mixture):
    by = judge(mixture, N)
    assert abs(by(mixture.sample(jax.random.key(1), N))["spread"] - 1) < 4 * error(mixture)
    assert abs(floor(by, N)["spread"] - 1) < 4 * error(mixture) / np.sqrt(5)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.5])
def test_modes_shrunk_by_c_have_c_of_the_width_but_for_the_noise(by, drawn, c):
    x, centres, variances = drawn
    # With the judge's noise ν a mode of variance λ has c² λ + ν² where λ + ν² is expected; a point, c = 0, has ν².
    expected = np.mean(np.sqrt((c**2 * variances + by.noise**2) / (variances + by.noise**2)))
    assert by(centres + c * (x - centres))["spread"] == pytest.approx(expected, abs=4 * expected * error(ROUND))


def test_samples_between_modes_do_not_hide_that_the_rest_has_shrunk(by, drawn):
    x, centres, variances = drawn
    x = np.array(centres + 0.3 * (x - centres))
    x[::25] = 0.5 * (np.asarray(ROUND.means)[0] + np.asarray(ROUND.means)[1])
    expected = np.mean(np.sqrt((0.09 * variances + by.noise**2) / (variances + by.noise**2)))
    # A share of 4 % far away, at most a tenth in one mode, shifts the median to the quantile ½/.9 at most.
    upper = expected * np.sqrt(stats.chi2(2).ppf(0.5 / 0.9) / stats.chi2(2).median())
    assert expected * (1 - 4 * error(ROUND)) < by(x)["spread"] < upper * (1 + 4 * error(ROUND))


def test_modes_that_were_not_found_have_no_width(by):
    first, second, _ = np.asarray(ROUND.means)
    x = np.tile(first, (N, 1))
    x[:5] = second + 0.1  # strays
    scores = by(x)
    assert scores["recall"] == pytest.approx(1 / 3)
    expected = by.noise / np.sqrt(ROUND.scales[0, 0] + by.noise**2)
    assert scores["spread"] == pytest.approx(expected, abs=4 * expected * error(ROUND))
    assert by(np.full((N, 2), 50.0))["spread"] is None
