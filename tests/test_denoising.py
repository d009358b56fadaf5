"""The regression that trains teachers, its weights and its laws of time, on data N(0, c²) with its exact denoiser."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ddistill import process as P
from ddistill.losses import weightings as W
from ddistill.losses.times import LogNormal, Uniform, UniformLogSNR
from ddistill.methods import Denoising
from ddistill.net import EDMPrecondition, Net

C = 0.5
PROCESSES = [P.vp(), P.sub_vp(), P.vp_cosine(), P.cosine(), P.ve(), P.edm(), P.flow(), P.trig()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.schedule).__name__)


@every_process
def test_each_weight_turns_the_x0_error_into_the_error_of_its_output(process, x64):
    rng = np.random.default_rng(0)
    x0, guess, noise = (jnp.asarray(rng.standard_normal((6, 3))) for _ in range(3))
    t = jnp.linspace(0.1, 0.95, 6) * process.t_max

    @jax.jit
    def errors(x0, guess, noise, t):
        x = process.diffuse(x0, noise, t)
        c_skip, c_out, _, _ = (c[:, None] for c in EDMPrecondition(0.7)(process, t))
        outputs = {
            W.DataWeight(): lambda x0: x0,
            W.EpsWeight(): lambda x0: process.eps(x0, x, t),
            W.VWeight(): lambda x0: process.v(x0, x, t),
            W.VelocityWeight(): lambda x0: process.velocity(x0, x, t),
            W.EDMWeight(0.7): lambda x0: (x0 - c_skip * x) / c_out,
        }
        true = {type(w).__name__: jnp.sum((f(guess) - f(x0)) ** 2, axis=1) for w, f in outputs.items()}
        weighted = {type(w).__name__: w(process, t) * jnp.sum((guess - x0) ** 2, axis=1) for w in outputs}
        truncated = W.TruncatedSNRWeight()(process, t) * jnp.sum((guess - x0) ** 2, axis=1)
        return true, weighted, truncated, process.eps(x0, x, t)

    true, weighted, truncated, eps = errors(x0, guess, noise, t)
    np.testing.assert_allclose(eps, noise, rtol=1e-7)
    for kind in true:
        np.testing.assert_allclose(weighted[kind], true[kind], rtol=1e-8, err_msg=kind)
    np.testing.assert_allclose(truncated, np.maximum(true["EpsWeight"], true["DataWeight"]), rtol=1e-8)
    assert all(w.shape == t.shape for w in weighted.values())


def test_weights_in_the_forms_that_papers_print(x64):
    t = jnp.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(W.VelocityWeight()(P.flow(), t), 1 / t**2, rtol=1e-12)
    np.testing.assert_allclose(W.VWeight()(P.vp(), t), 1 + W.snr(P.vp(), t), rtol=1e-10)
    np.testing.assert_allclose(W.EDMWeight(0.5)(P.edm(), t), (t**2 + 0.25) / (t * 0.5) ** 2, rtol=1e-12)
    np.testing.assert_allclose(W.EpsWeight()(P.edm(), t), 1 / t**2, rtol=1e-12)
    np.testing.assert_allclose(W.TruncatedSNRWeight()(P.edm(), 2 * t), np.maximum(1 / (2 * t) ** 2, 1), rtol=1e-12)


def gaussian(process, factor=1.0):
    def denoise(params, rest, x, t, cond, *, s, key):
        alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
        return params * alpha * C**2 * x / (alpha**2 * C**2 + sigma**2)

    return Net(jnp.asarray(factor), {}, denoise)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def loss_of(config, process, factor=1.0, n=40_000):
    x = C * jax.random.normal(jax.random.key(5), (n, 2))
    nets = {"teacher": gaussian(process), "student": gaussian(process, factor)}
    return config(process).losses["student"](nets, {"x": x}, jnp.asarray(0), jax.random.key(0))[0]


def expected_loss(law, weight, n=40_000):
    """Mean and Monte Carlo error of w ‖e‖²/2 where e ~ N(0, V), V = c²ρ²/(c² + ρ²) and log ρ is normal."""

    def moment(power):
        def integrand(z):
            rho2 = np.exp(2 * (law.mean + law.std * z))
            return (weight(rho2) * C**2 * rho2 / (C**2 + rho2)) ** power * stats.norm.pdf(z)

        return integrate.quad(integrand, -10, 10, epsabs=1e-12)[0]

    return moment(1), np.sqrt((2 * moment(2) - moment(1) ** 2) / n)  # E (‖e‖²/2)² = 2 V²


@pytest.mark.parametrize("process", [P.edm(), P.vp(), P.flow()], ids=lambda p: type(p.schedule).__name__)
@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        (W.DataWeight(), lambda rho2: 1),
        (W.EpsWeight(), lambda rho2: 1 / rho2),
        (W.TruncatedSNRWeight(), lambda rho2: np.maximum(1 / rho2, 1)),
        (W.EDMWeight(C), lambda rho2: (rho2 + C**2) / (rho2 * C**2)),
    ],
    ids=lambda w: type(w).__name__,
)
def test_the_exact_denoiser_is_left_with_the_posterior_variance(process, weighting, weight):
    law = LogNormal(-0.7, 0.8)
    mean, error = expected_loss(law, weight)
    assert abs(float(loss_of(Denoising(law, weighting), process)) - mean) < 3 * error
    if weighting == W.EDMWeight(C):
        assert mean == pytest.approx(1)  # the variance of F at its optimum is that of its target's noise


def test_the_exact_target_has_the_same_minimum_without_the_noise():
    law, process = LogNormal(-0.7, 0.8), P.edm()
    exact, noisy = (Denoising(law, exact=e) for e in (True, False))
    assert loss_of(exact, process) == 0
    value, gradient = jax.value_and_grad(lambda f: loss_of(exact, process, f))(1.0)
    assert value == gradient == 0
    # A student D/2: the noise of x0 adds its posterior variance, 1 under this weight, and nothing on average else.
    wrong = loss_of(exact, process, 0.5)
    error = np.sqrt(1 / 40_000 + 4 * float(wrong) / 80_000)
    assert abs(float(loss_of(noisy, process, 0.5) - wrong) - 1) < 3 * error


def test_conditions_reach_student_and_teacher_and_the_key_the_student_alone():
    seen = {}

    def spy(name):
        def apply(params, rest, x, t, cond, *, s, key):
            seen[name] = (cond, s, key is None)
            return x

        return Net({}, {}, apply)

    labels = jnp.asarray([2, 0])
    nets = {name: spy(name) for name in ("teacher", "student")}
    loss = Denoising(exact=True)(P.edm()).losses["student"]
    loss(nets, {"x": jnp.ones((2, 3)), "cond": labels}, jnp.asarray(0), jax.random.key(0))
    np.testing.assert_array_equal(np.stack([seen[name][0] for name in seen]), [[2, 0], [2, 0]])
    assert {name: rest for name, (_, *rest) in seen.items()} == {"teacher": [None, True], "student": [None, False]}


@pytest.mark.parametrize("process", [P.edm(1e-6, 1e6), P.vp(t_min=1e-6), P.trig(t_min=1e-6)], ids=str)
def test_log_normal_times_have_their_mean_and_deviation_in_log_rho(process):
    n, law = 40_000, LogNormal(-1.2, 1.1)
    log_rho = -np.asarray(process.half_log_snr(law(process, jax.random.key(0), n)), np.float64)
    assert abs(log_rho.mean() + 1.2) < 4 * 1.1 / np.sqrt(n)
    assert abs(log_rho.std() - 1.1) < 4 * 1.1 / np.sqrt(2 * n)


def test_log_normal_times_on_rectified_flow_are_logit_normal():
    t = np.asarray(LogNormal(0.3, 0.9)(P.flow(1e-6), jax.random.key(0), 10_000), np.float64)
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.3, 0.9).cdf).pvalue > 0.01


@every_process
def test_times_stay_in_the_range_of_the_process(process):
    for law in (LogNormal(0, 20), Uniform()):
        t = np.asarray(law(process, jax.random.key(0), 4096))
        assert t.shape == (4096,) and t.min() >= np.float32(process.t_min) and t.max() <= np.float32(process.t_max)
        # Both ends are reached: to 1 % under the uniform law, and by clipping under one far too wide.
        assert t.min() < process.t_min + 0.01 * process.t_max and t.max() > 0.99 * process.t_max


def test_uniform_laws_are_uniform():
    process, n = P.vp(), 10_000
    t = np.asarray(Uniform()(process, jax.random.key(0), n), np.float64)
    assert stats.kstest(t, stats.uniform(process.t_min, 1 - process.t_min).cdf).pvalue > 0.01
    middle = np.asarray(Uniform(0.02, 0.98)(P.discrete_vp(P.linear_betas()), jax.random.key(0), n), np.float64)
    low = 1 + 0.02 * 999  # DMD2's, of steps 1 to 1000
    assert stats.kstest(middle, stats.uniform(low, 0.96 * 999).cdf).pvalue > 0.01 and middle.min() >= low
    for wrong in ({"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.1}):
        with pytest.raises(ValueError, match="must be shares of the way, 0 <= low < high <= 1"):
            Uniform(**wrong)
    level = np.asarray(process.half_log_snr(UniformLogSNR()(process, jax.random.key(1), n)), np.float64)
    low, high = (float(process.half_log_snr(e)) for e in (process.t_max, process.t_min))
    assert stats.kstest(level, stats.uniform(low, high - low).cdf).pvalue > 0.01
