"""Exact likelihoods along the probability flow, against densities in closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddistill.integrators.likelihood import log_likelihood
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net, diagonal
from ddistill.process import edm, flow, vp, vp_cosine

MIXTURE = Mixture.from_covariances(
    [0.6, 0.4],
    [[0.5, 0.1, -0.4], [-0.6, 0.3, 0.2]],
    [np.diag([0.04, 0.09, 0.05]), 0.06 * np.eye(3) + 0.02],
    labels=[0, 1],
)


@pytest.mark.parametrize("process", [edm(), flow()], ids=lambda p: type(p.schedule).__name__)
def test_the_density_of_a_mixture(x64, process):
    x = MIXTURE.sample(jax.random.key(0), 6, dtype=jnp.float64)
    # The mixture's own marginal at t_max as prior: the flow map then makes exactly the mixture.
    prior = functools.partial(MIXTURE.log_density, process, t=process.t_max)
    teacher = as_teacher(MIXTURE, process)
    got = log_likelihood(teacher.bind(), process, x, prior=prior)
    np.testing.assert_allclose(got, MIXTURE.log_density(process, x, 0.0), atol=1e-5, rtol=0)


def test_the_density_of_a_class_and_at_a_later_time(x64):
    process, teacher = vp(), as_teacher(MIXTURE, vp())
    labels = jnp.asarray([0, 1, 1, 0])
    x = MIXTURE.sample(jax.random.key(0), 4, labels, dtype=jnp.float64)
    prior = functools.partial(MIXTURE.log_density, process, t=process.t_max, cond=labels)
    got = log_likelihood(teacher.bind(labels), process, x, prior=prior)
    np.testing.assert_allclose(got, MIXTURE.log_density(process, x, 0.0, labels), atol=1e-5, rtol=0)
    noisy = process.diffuse(x, jax.random.normal(jax.random.key(1), x.shape, x.dtype), 0.3)
    got = log_likelihood(teacher.bind(labels), process, noisy, t=0.3, prior=prior)
    np.testing.assert_allclose(got, MIXTURE.log_density(process, noisy, 0.3, labels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("process", [edm(), vp_cosine()], ids=lambda p: type(p.schedule).__name__)
def test_the_density_that_sampling_from_the_prior_makes_of_a_gaussian(x64, process):
    # The flow of N(0, c²) scales x_T by c/√(α² c² + σ²): from N(0, σ²), what it makes has this variance.
    c, t = 0.7, process.t_max
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    std = sigma * c / np.sqrt((alpha * c) ** 2 + sigma**2)

    def denoise(x, t):
        a, s = (f(t).reshape(-1, *(1,) * (x.ndim - 1)) for f in (process.alpha, process.sigma))
        return a * c**2 * x / (a**2 * c**2 + s**2)

    x = jax.random.normal(jax.random.key(0), (5, 2, 2), jnp.float64)
    got = log_likelihood(lambda x, t: denoise(x, jnp.broadcast_to(t, x.shape[:1])), process, x)
    np.testing.assert_allclose(got, stats.norm(0, std).logpdf(x).sum((1, 2)), atol=1e-5, rtol=0)


def test_random_signs_estimate_the_trace():
    process, copies = edm(), 128
    x = jnp.asarray([[0.4, 0.2, -0.3], [-0.5, 0.3, 0.4]])

    def estimates(mixture):  # every sample of a batch has signs of its own
        bound, key = as_teacher(mixture, process).bind(), jax.random.key(1)
        made = log_likelihood(bound, process, jnp.repeat(x, copies, 0), probes=2, key=key, rtol=1e-3, atol=1e-3)
        return np.asarray(made).reshape(2, copies)

    exact = np.asarray(MIXTURE.log_density(process, x, 0.0))
    prior = np.asarray(MIXTURE.log_density(process, jnp.zeros((1, 3)), 80.0)) + 1.5 * np.log(2 * np.pi * 80**2)
    got = estimates(MIXTURE)
    spread = got.std(1, ddof=1)
    assert np.all(spread > 0.05) and abs(prior) < 1e-3  # covariances that are not diagonal; a prior that is as good
    np.testing.assert_allclose(got.mean(1), exact, atol=4 * spread.max() / np.sqrt(copies) + 0.01)
    # Where the Jacobian is diagonal every sign is exact.
    round_ = Mixture.from_covariances([0.6, 0.4], np.zeros((2, 3)), [0.25 * np.eye(3)] * 2, labels=[0, 1])
    expected = np.repeat(stats.norm(0, 0.5).logpdf(x).sum(1)[:, None], copies, 1)
    np.testing.assert_allclose(estimates(round_), expected, atol=0.01)


def test_single_precision_and_the_diagonal_of_a_student():
    process = edm()

    def student(params, rest, x, t, cond, *, s, key):
        return as_teacher(MIXTURE, process)(x, t) + (t - s)[:, None]  # off its diagonal it is no denoiser

    x = MIXTURE.sample(jax.random.key(0), 5)
    prior = functools.partial(MIXTURE.log_density, process, t=process.t_max)
    got = log_likelihood(diagonal(Net({}, {}, student)).bind(), process, x, prior=prior)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, MIXTURE.log_density(process, x, 0.0), atol=2e-3)


def test_wrong_arguments_are_met_with_words():
    teacher, x = as_teacher(MIXTURE, edm()).bind(), jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="come with key="):
        log_likelihood(teacher, edm(), x, probes=2)
    with pytest.raises(ValueError, match="probes = 0 must be at least 1"):
        log_likelihood(teacher, edm(), x, probes=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="before the prior's; given 80"):
        log_likelihood(teacher, edm(), x, t=80.0)
    with pytest.raises(ValueError, match="likelihood at time"):
        log_likelihood(teacher, edm(), x, t=-1.0)
