"""Scores of samples and gradients of divergences, where all are known: Gaussians, point masses, quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddistill.losses.distances import L1, L2, CoordinateHuber, PseudoHuber
from ddistill.losses.score import (
    Likelihood,
    NoisePrediction,
    Normalised,
    directed,
    divergence_gradient,
    multi_sample_denoiser,
)
from ddistill.mixture import Mixture, as_teacher
from ddistill.process import edm, flow, vp

PROCESSES = [edm(), vp(), flow()]


def name_of(process):
    return type(process.schedule).__name__


def nodes(n=8):
    """Gauss-Hermite nodes and weights for N(0, 1): exact for polynomials of degree 2n - 1."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return x, w / w.sum()


def gaussian_denoiser(process, x_t, t, mean, std):
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    return mean + gain * (x_t - alpha * mean)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_one_sample_gives_the_score_of_score_distillation(process):
    key = jax.random.key(0)
    t = jnp.asarray([0.3, 0.6, 0.9])
    x, noise = jax.random.normal(key, (3, 4)), jax.random.normal(jax.random.fold_in(key, 1), (3, 4))
    x_t = process.diffuse(x, noise, t)
    for i in range(3):
        one = multi_sample_denoiser(process, x_t[i : i + 1], t[i : i + 1], x[i : i + 1])
        score = process.score(one, x_t[i : i + 1], t[i : i + 1])
        np.testing.assert_allclose(score, -noise[i : i + 1] / process.sigma(t[i]), rtol=1e-4, atol=1e-5)


def test_the_estimate_is_exact_for_a_distribution_of_points():
    process, key = edm(), jax.random.key(1)
    points = jax.random.normal(key, (5, 3))
    world = Mixture.from_covariances([0.2] * 5, points, [1e-12 * np.eye(3)] * 5)
    t = jnp.asarray([0.05, 0.3, 1.0, 4.0])
    x_t = points[:4] + t[:, None] * jax.random.normal(jax.random.fold_in(key, 1), (4, 3))
    estimate = multi_sample_denoiser(process, x_t, t, points)
    np.testing.assert_allclose(estimate, as_teacher(world, process)(x_t, t), atol=2e-5)


def test_the_error_falls_with_the_number_of_samples_as_one_over_n():
    process = edm()
    world = Mixture.from_covariances([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.5]], [0.05 * np.eye(2)] * 2)
    x = world.sample(jax.random.key(0), 512)
    t = jnp.full(512, 0.7)
    x_t = process.diffuse(x, jax.random.normal(jax.random.key(1), x.shape), t)
    exact = as_teacher(world, process)(x_t, t)

    def error(n):
        found = [
            multi_sample_denoiser(process, x_t, t, world.sample(jax.random.key(100 + i), n)) - exact for i in range(4)
        ]
        return float(jnp.mean(jnp.stack(found) ** 2))

    few, many = error(64), error(4096)
    assert few / many == pytest.approx(64, rel=0.35)


def test_bias_and_variance_fall_with_the_constants_of_the_quotient_of_means():
    # References 0 and 1 with probability p of a 1: an average over the binomial law of how many are 1.
    process, p, x_t, sigma = edm(), 0.3, 0.8, 0.6
    w = np.exp(-((x_t - np.asarray([0.0, 1.0])) ** 2) / (2 * sigma**2))
    law, r = np.asarray([1 - p, p]), np.asarray([0.0, 1.0])
    mean = law @ (w * r) / (law @ w)
    bias = -(law @ (w**2 * (r - mean))) / (law @ w) ** 2  # the delta method for Σ w r/Σ w, times n
    variance = law @ (w**2 * (r - mean) ** 2) / (law @ w) ** 2
    for n, near in ((64, 0.05), (256, 0.0125)):
        ones = np.arange(n + 1)
        place = np.arange(n)
        mine = np.concatenate([place < (n - ones)[:, None], place < ones[:, None]], axis=1)
        references = jnp.asarray(np.repeat(r, n)[:, None], jnp.float32)
        x, t = jnp.full((n + 1, 1), x_t), jnp.full(n + 1, sigma)
        found = np.asarray(multi_sample_denoiser(process, x, t, references, jnp.asarray(mine)), np.float64)[:, 0]
        weight = stats.binom.pmf(ones, n, p)
        assert n * (weight @ found - mean) == pytest.approx(bias, rel=near)
        assert n * (weight @ (found - weight @ found) ** 2) == pytest.approx(variance, rel=near)


def test_weights_keep_their_digits_at_small_noise(x64):
    process = edm()
    rng = np.random.default_rng(0)
    references = 0.5 + 0.003 * rng.standard_normal((64, 2))
    x_t = 0.5 + 0.004 * rng.standard_normal((8, 2))
    log_weight = -((x_t[:, None] - references[None]) ** 2).sum(-1) / (2 * 0.002**2)
    weight = np.exp(log_weight - log_weight.max(1, keepdims=True))
    exact = weight / weight.sum(1, keepdims=True) @ references
    single = [jnp.asarray(a, jnp.float32) for a in (x_t, references)]
    found = multi_sample_denoiser(process, single[0], jnp.full(8, 0.002, jnp.float32), single[1])
    np.testing.assert_allclose(found, exact, atol=3e-6)


def test_only_my_references_count_and_none_is_differentiated():
    process = edm()
    references = jnp.asarray([[0.0], [1.0], [5.0]])
    mine = jnp.asarray([[True, True, False], [False, False, True]])
    x_t, t = jnp.asarray([[0.5], [0.5]]), jnp.asarray([1.0, 1.0])
    found = multi_sample_denoiser(process, x_t, t, references, mine)
    np.testing.assert_allclose(found, [[0.5], [5.0]], rtol=1e-6)
    gradient = jax.grad(lambda r: multi_sample_denoiser(process, x_t + r[:2], t, r).sum())(references)
    assert not np.any(gradient)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_the_gradient_is_that_of_the_divergence(process, x64):
    """KL(N(α m, α² s² + σ²) ‖ N(0, α² c² + σ²)) by m and s, against quadrature over z and ε."""
    m, s, c, t0 = 0.4, 0.3, 0.8, 0.6
    alpha, sigma = float(process.alpha(t0)), float(process.sigma(t0))

    def divergence(m, s):
        fake, real = alpha**2 * s**2 + sigma**2, alpha**2 * c**2 + sigma**2
        return 0.5 * (fake / real + (alpha * m) ** 2 / real - 1 - jnp.log(fake / real))

    expected = jax.grad(divergence, argnums=(0, 1))(m, s)
    (z, wz), (e, we) = nodes(), nodes()
    z, e, w = (a.reshape(-1, 1) for a in (*np.meshgrid(z, e, indexing="ij"), np.outer(wz, we)))
    t = jnp.full(len(z), t0)
    x = jnp.asarray(m + s * z)
    x_t = process.diffuse(x, jnp.asarray(e), t)
    fake, real = (gaussian_denoiser(process, x_t, t, *known) for known in ((m, s), (0.0, c)))
    gradient = divergence_gradient(process, t, x, fake, real, Likelihood())
    np.testing.assert_allclose([jnp.sum(w * gradient), jnp.sum(w * gradient * z)], expected, rtol=1e-5)

    # s_fake = −ε/σ has the same mean, and lacks the entropy's part of the spread's gradient.
    without = divergence_gradient(process, t, x, x, real, Likelihood())
    entropy = alpha**2 * s / (alpha**2 * s**2 + sigma**2)
    np.testing.assert_allclose(jnp.sum(w * without), expected[0], rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(w * (without - gradient) * z), entropy, rtol=1e-5)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
@pytest.mark.parametrize(
    ("weight", "law"),
    [
        (NoisePrediction(), lambda a: 1 - a),
        (NoisePrediction(0.0), jnp.ones_like),
        (NoisePrediction(1.0, 0.5), lambda a: jnp.sqrt(a) * (1 - a)),
    ],
    ids=["dreamfusion", "one", "fantasia3d"],
)
def test_noise_prediction_weighs_the_difference_of_predicted_noise(process, weight, law):
    key = jax.random.key(2)
    x, real, noise = (jax.random.normal(k, (4, 3)) for k in jax.random.split(key, 3))
    t = jnp.asarray([0.2, 0.4, 0.7, 0.9])
    x_t = process.diffuse(x, noise, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    w = law(alpha**2 / (alpha**2 + sigma**2))[:, None]
    expected = w * (process.eps(real, x_t, t) - noise)
    np.testing.assert_allclose(divergence_gradient(process, t, x, x, real, weight), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("process", PROCESSES, ids=name_of)
def test_the_normaliser_does_not_see_the_scale_of_the_data(process):
    t = jnp.asarray([0.3, 0.8])
    x, fake, real = (jax.random.normal(k, (2, 6)) for k in jax.random.split(jax.random.key(3), 3))
    here = divergence_gradient(process, t, x, fake, real, Normalised(0.0))
    there = divergence_gradient(process, t, 7 * x, 7 * fake, 7 * real, Normalised(0.0))
    np.testing.assert_allclose(here, there, rtol=1e-5)
    # Eq. 8 is of α_t (s_fake − s_real), (α_t/σ_t)² times the difference of denoisers; its last α_t is dropped.
    paper = process.sigma(t) ** 2 / process.alpha(t) / np.abs(x - real).mean(1)
    of_denoisers = paper * (process.alpha(t) / process.sigma(t)) ** 2
    np.testing.assert_allclose(process.alpha(t) * Normalised(0.0)(process, t, x, real), of_denoisers, rtol=1e-5)
    np.testing.assert_allclose(Normalised(10.0)(process, t, x, real), [0.1, 0.1], rtol=1e-6)


def test_the_normalised_gradient_is_that_of_the_same_teacher_on_another_process():
    # The same noise-to-signal ratio means the same denoiser, so the step by x is the same as well.
    x, fake, real = (jax.random.normal(k, (2, 6)) for k in jax.random.split(jax.random.key(3), 3))
    steps = [
        divergence_gradient(p, jnp.full(2, t), x, fake, real, Normalised()) for p, t in ((edm(), 9.0), (flow(), 0.9))
    ]
    np.testing.assert_allclose(steps[0], steps[1], rtol=1e-6)
    apart = np.abs(x - real).mean(1)
    np.testing.assert_allclose(np.abs(steps[0]).mean(1), np.abs(fake - real).mean(1) / apart, rtol=1e-5)


def test_the_means_of_the_samples_are_taken_in_full_precision():
    x, t = jnp.ones((3, 2)), jnp.full(3, 0.1)
    made = jax.make_jaxpr(lambda r: multi_sample_denoiser(edm(), x, t, r))(jnp.ones((4, 2)))
    (asked,) = [line for line in str(made).splitlines() if "precision=" in line]
    assert "HIGHEST" in asked


def test_the_surrogate_has_the_given_gradient_also_where_it_is_small():
    x = 1000 + jax.random.normal(jax.random.key(4), (3, 5))
    gradient = 1e-6 * jax.random.normal(jax.random.key(5), (3, 5))
    np.testing.assert_allclose(jax.grad(directed)(x, gradient), gradient / 15, rtol=1e-5)
    assert float(directed(x, gradient)) == pytest.approx(0.5 * float(jnp.mean(gradient**2)), rel=1e-5)
    assert not np.any(jax.grad(directed, argnums=1)(x, gradient))


@pytest.mark.parametrize(
    "of",
    [
        L1(), L2(), PseudoHuber(), CoordinateHuber(), directed,
        lambda a, b: Normalised()(edm(), jnp.ones(3), a, b),
        lambda a, b: divergence_gradient(edm(), jnp.ones(3), a, b, a, Normalised()),
    ],
    ids=["l1", "l2", "huber", "coordinates", "surrogate", "normaliser", "gradient"],
)  # fmt: skip
def test_what_is_of_half_precision_is_summed_in_float32(of):
    """Sums of 4000 terms in bfloat16, which has 8 bits, end where a term is half of the last one."""
    a, b = (jax.random.normal(jax.random.key(i), (3, 4000)).astype(jnp.bfloat16) for i in range(2))
    found = of(a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, of(a.astype(jnp.float32), b.astype(jnp.float32)), rtol=5e-3, atol=5e-3)


def test_the_denoiser_of_samples_is_computed_in_float32_and_is_of_its_inputs_kind():
    x, references = (jax.random.normal(jax.random.key(i), (4, 400)).astype(jnp.bfloat16) for i in range(2))
    found, exact = (
        multi_sample_denoiser(edm(), x.astype(kind), jnp.full(4, 20.0), references.astype(kind))
        for kind in (jnp.bfloat16, jnp.float32)
    )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=1e-2)


def test_what_is_not_finite_moves_nothing():
    process, t = edm(), jnp.asarray([1.0])
    bad = jnp.asarray([[np.nan, np.inf, 0.5]])
    gradient = divergence_gradient(process, t, jnp.zeros((1, 3)), bad, jnp.zeros((1, 3)), Likelihood())
    np.testing.assert_array_equal(gradient, [[0.0, 0.0, 0.5]])
