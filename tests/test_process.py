import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddistill import process as P
from ddistill.integrators.exact import flow_map
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import retime

PROCESSES = {
    "vp": P.vp(),
    "sub_vp": P.sub_vp(),
    "vp_cosine": P.vp_cosine(),
    "cosine": P.cosine(),
    "linear": P.discrete_vp(P.linear_betas(100, 1e-3, 0.2)),
    "zero_snr": P.discrete_vp(P.zero_terminal_snr(P.scaled_linear_betas(100, 0.0085, 0.12))),
    "ve": P.ve(),
    "edm": P.edm(),
    "flow": P.flow(),
    "trig": P.trig(),
    "trig_unit": P.trig(1.0),
}
every_process = pytest.mark.parametrize("p", PROCESSES.values(), ids=PROCESSES)


def inner_times(p):
    """Times strictly inside the range, between the integers of a table, spread in log-SNR."""
    return p.t_max * jnp.asarray([0.0123, 0.1077, 0.347, 0.615, 0.883])


def draw(shape=(5, 3), seed=0, dtype=None):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3)]


def close(a, b, tol=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


@every_process
def test_conversions_round_trip(p, x64):
    x0, noise, _ = draw()
    t = inner_times(p)
    x = p.diffuse(x0, noise, t)
    eps, score, v, u = p.eps(x0, x, t), p.score(x0, x, t), p.v(x0, x, t), p.velocity(x0, x, t)
    close(eps, noise)
    close(score, -noise / p.sigma(t)[:, None])
    close(p.score_from_eps(eps, x, t), score)
    for back in (
        p.x0_from_eps(eps, x, t),
        p.x0_from_score(score, x, t),
        p.x0_from_v(v, x, t),
        p.x0_from_velocity(u, x, t),
    ):
        np.testing.assert_allclose(back, x0, rtol=1e-8, atol=1e-8)


@every_process
def test_conversions_follow_the_table(p, x64):
    """Independent formulas of every quantity from ε and from x0 (general α, σ with w = α² + σ²)."""
    x0, noise, _ = draw(seed=1)
    t = inner_times(p)
    a, s, da, ds = (f(t)[:, None] for f in (p.alpha, p.sigma, p.alpha_prime, p.sigma_prime))
    x, w = a * x0 + s * noise, a**2 + s**2
    close(p.v(x0, x, t), (w * noise - s * x) / a, 1e-8)
    close(p.v(x0, x, t), (a * x - w * x0) / s, 1e-8)
    close(p.velocity(x0, x, t), da / a * x + (ds - s * da / a) * noise, 1e-8)
    close(p.velocity(x0, x, t), ds / s * x + (da - a * ds / s) * x0, 1e-8)


def test_velocity_is_what_each_family_calls_it(x64):
    x0, noise, _ = draw()
    t = jnp.asarray([0.1, 0.3, 0.5, 0.7, 0.9])
    flow, edm, trig = P.flow(), P.edm(), P.trig(1.0)
    x = flow.diffuse(x0, noise, t)
    close(flow.velocity(x0, x, t), noise - x0)
    close(edm.velocity(x0, edm.diffuse(x0, noise, t), t), noise)
    x = trig.diffuse(x0, noise, t)
    close(trig.velocity(x0, x, t), trig.v(x0, x, t))


def _vp_beta(t):
    return 0.1 + t * 19.9


def _vp_integral(t):
    return 0.1 * t + 0.5 * t**2 * 19.9


def _pd_log_snr_prime(t):
    b = np.arctan(np.exp(-10.0))
    a = np.arctan(np.exp(10.0)) - b
    return -4 * a / np.sin(2 * (a * t + b))


def _table_log_alpha2(t):
    return np.log1p(-P.linear_betas(100, 1e-3, 0.2))[np.floor(t).astype(int)]


# f = d log α/dt and g² in closed form; a table is piecewise linear in log α.
FORWARD = {
    "vp": (lambda t: -0.5 * _vp_beta(t), _vp_beta),
    "sub_vp": (lambda t: -0.5 * _vp_beta(t), lambda t: _vp_beta(t) * -np.expm1(-2 * _vp_integral(t))),
    "ve": (np.zeros_like, lambda t: 2 * np.log(5000) * (0.01 * 5000**t) ** 2),
    "edm": (np.zeros_like, lambda t: 2 * t),
    "vp_cosine": (
        lambda t: 0.5 * _pd_log_snr_prime(t) * np.sin(np.arctan(np.exp(-P.vp_cosine().half_log_snr(t)))) ** 2,
        lambda t: -_pd_log_snr_prime(t) * np.sin(np.arctan(np.exp(-P.vp_cosine().half_log_snr(t)))) ** 2,
    ),
    "cosine": (lambda t: -np.pi / 2 * np.tan(np.pi * t / 2), lambda t: np.pi * np.tan(np.pi * t / 2)),
    "linear": (lambda t: 0.5 * _table_log_alpha2(t), lambda t: -_table_log_alpha2(t)),
    "flow": (lambda t: -1 / (1 - t), lambda t: 2 * t / (1 - t)),
    "trig": (lambda t: -np.tan(t), lambda t: 2 * 0.25 * np.tan(t)),
    "trig_unit": (lambda t: -np.tan(t), lambda t: 2 * np.tan(t)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_sde_has_the_known_drift_and_diffusion(name, x64):
    p, (f, g2) = PROCESSES[name], FORWARD[name]
    t = inner_times(p)
    close(p.drift(jnp.ones((5, 2)), t), np.broadcast_to(f(np.asarray(t))[:, None], (5, 2)), 1e-9)
    close(p.diffusion2(t), g2(np.asarray(t)), 1e-9)


@every_process
def test_diffusion_is_the_loss_of_log_snr(p, x64):
    """g² = −2σ² dλ/dt = α² d(ρ²)/dt, from the schedules' own λ."""
    t = inner_times(p)
    d_lambda = jax.vmap(jax.grad(p.half_log_snr))(t)
    d_rho2 = jax.vmap(jax.grad(lambda t: p.rho(t) ** 2))(t)
    close(p.diffusion2(t), -2 * p.sigma(t) ** 2 * d_lambda, 1e-8)
    close(p.diffusion2(t), p.alpha(t) ** 2 * d_rho2, 1e-8)
    close(p.half_log_snr(t), jnp.log(p.alpha(t) / p.sigma(t)), 1e-9)
    close(p.log_snr(t), jnp.log(p.alpha(t) ** 2 / p.sigma(t) ** 2), 1e-9)


@every_process
def test_probability_flow_has_two_forms(p, x64):
    """f x − ½ g² ∇log p = α' x0 + σ' ε, with the score of an exact mixture."""
    mixture = Mixture.load("ring8")
    t = inner_times(p)
    x0, noise, _ = draw((5, 2))
    x = p.diffuse(0.5 * x0, noise, t)
    score = mixture.score(p, x, t)
    sde_form = p.drift(x, t) - 0.5 * p.diffusion2(t)[:, None] * score
    estimate = mixture.denoise(p, x, t)
    close(sde_form, mixture.velocity(p, x, t), 1e-8)
    close(sde_form, p.velocity(estimate, x, t), 1e-7)
    close(p.score(estimate, x, t), score, 1e-7)


@every_process
def test_transitions_compose(p, x64):
    """Chapman-Kolmogorov: s → u → t is s → t, and 0 → t is the marginal."""
    s, u, t = (p.t_max * r for r in (0.211, 0.457, 0.883))
    (a1, d1), (a2, d2), (a, d) = p.transition(s, u), p.transition(u, t), p.transition(s, t)
    close(a1 * a2, a)
    close(a2**2 * d1**2 + d2**2, d**2)
    close(a * p.alpha(s), p.alpha(t))
    close(a**2 * p.sigma(s) ** 2 + d**2, p.sigma(t) ** 2)
    h = p.half_log_snr(s) - p.half_log_snr(t)
    close(p.decay(t, s), jnp.exp(-h))
    x, noise, _ = draw((4, 3))
    close(p.renoise(x, noise, s, t), a * x + d * noise)


@every_process
@pytest.mark.parametrize("at_end", [False, True])
def test_posterior_is_bayes_rule(p, at_end, x64):
    """Condition the joint Gaussian of (x_s, x_t) given x0 on x_t; at t_max as well, where α may be 0."""
    s, t = p.t_max * 0.457, p.t_max * (1.0 if at_end else 0.883)
    x0, x, _ = draw((4, 3))
    scale = p.alpha(t) / p.alpha(s)
    var_s, cov = p.sigma(s) ** 2, scale * p.sigma(s) ** 2
    gain = cov / p.sigma(t) ** 2
    mean, std = p.posterior(x0, x, t, s)
    close(mean, p.alpha(s) * x0 + gain * (x - p.alpha(t) * x0))
    close(jnp.squeeze(std) ** 2, var_s - gain * cov)


@every_process
def test_posterior_at_the_ends(p, x64):
    x0, x, _ = draw((4, 3))
    t = 0.6 * p.t_max
    mean, std = p.posterior(x0, x, t, t)
    close(mean, x)
    close(std, 0 * std)
    if p.sigma(0.0) == 0:
        mean, std = p.posterior(x0, x, t, 0.0)
        close(mean, x0)
        close(std, 0 * std)


@every_process
def test_decay_at_the_ends(p):
    t = jnp.float32(0.6 * p.t_max)
    for time in (jnp.float32(0), t, jnp.float32(p.t_max)):
        assert p.decay(time, time) == 1
        scale, std = p.transition(time, time)
        assert scale == 1 and std == 0
    if p.sigma(0.0) == 0:
        assert p.decay(t, jnp.float32(0)) == 0
    if p.alpha(p.t_max) == 0:
        assert p.decay(jnp.float32(p.t_max), t) == 0


@every_process
def test_step_and_destination_are_inverse(p, x64):
    x0, x, y = draw((5, 3))
    t, s = inner_times(p), inner_times(p)[::-1] * 0.9
    close(p.destination(x, t, p.step(x0, x, t, s), s), x0, 1e-8)
    close(p.step(p.destination(x, t, y, s), x, t, s), y, 1e-8)
    noise = p.eps(x0, x, t)
    close(p.step(x0, x, t, s), p.diffuse(x0, noise, s), 1e-8)


@every_process
def test_step_is_exact_where_it_must_be(p):
    x0, x, _ = draw((5, 3), dtype=jnp.float32)
    for t in (p.t_min, 0.31 * p.t_max, p.t_max):
        t = jnp.full((5,), t, jnp.float32)
        np.testing.assert_array_equal(p.step(x0, x, t, t), x)
        if p.sigma(0.0) == 0:
            np.testing.assert_array_equal(p.step(x0, x, t, jnp.zeros(5)), x0)
    t = jnp.asarray([0.9, 0.2]) * p.t_max
    mixed = p.step(x0[:2], x[:2], t, t.at[0].set(0.1 * p.t_max))
    np.testing.assert_array_equal(mixed[1], x[1])
    assert not np.allclose(mixed[0], x[0])


@every_process
def test_time_of_inverts_half_log_snr(p, x64):
    t = p.t_max * jnp.linspace(0.002, 0.998, 41)
    close(p.time_of(p.half_log_snr(t)) / p.t_max, t / p.t_max, 1e-9)
    assert p.time_of(jnp.inf) == 0
    last = p.time_of(-jnp.inf)
    assert last in (p.t_max, jnp.inf) or abs(last - p.t_max) < 1e-12
    if p.alpha(p.t_max) == 0:
        assert abs(last - p.t_max) < 1e-12


@every_process
def test_time_of_in_single_precision(p):
    """In float32 the noise level of the time found, not the time itself, is what must be right."""
    lam = jnp.linspace(max(-6.0, float(p.half_log_snr(0.99 * p.t_max))), 4.5, 61)
    np.testing.assert_allclose(p.half_log_snr(p.time_of(lam)), lam, atol=2e-4)


def test_ends_of_the_cosine_of_progressive_distillation(x64):
    p = P.vp_cosine()
    close(p.log_snr(jnp.asarray([0.0, 1.0])), [20.0, -20.0])
    close(p.log_snr(0.5), 0.0)
    np.testing.assert_allclose(P.vp_cosine().log_snr(jnp.float32([0, 1])), [20, -20], rtol=1e-6)
    p = P.vp_cosine(-15.0, 12.0)
    close(p.log_snr(jnp.asarray([0.0, 1.0])), [12.0, -15.0])


def test_zero_terminal_snr(x64):
    betas = P.scaled_linear_betas()
    alpha_bar = np.cumprod(1 - betas)
    fixed = P.zero_terminal_snr(betas)
    root = np.sqrt(np.cumprod(1 - fixed))
    assert fixed[-1] == 1 and root[-1] == 0
    close(root[0], np.sqrt(alpha_bar[0]))
    # An affine map of √ᾱ: second differences keep their ratio.
    old = np.sqrt(alpha_bar)
    close(np.diff(root) / np.diff(old), np.full(999, old[0] / (old[0] - old[-1])), 1e-9)
    p = P.discrete_vp(fixed)
    assert p.alpha(1000.0) == 0 and p.sigma(1000.0) == 1 and p.half_log_snr(1000.0) == -jnp.inf
    close(p.alpha(jnp.arange(1.0, 1000.0)), root[:-1], 1e-9)


def test_tables(x64):
    """ᾱ of the three tables from their definitions, at the integers of the process built on them."""
    steps = jnp.arange(1.0, 1001.0)
    linear = np.cumprod([1 - (1e-4 + i * (0.02 - 1e-4) / 999) for i in range(1000)])
    close(P.discrete_vp(P.linear_betas()).alpha(steps) ** 2, linear)
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    scaled = np.cumprod([1 - (low + i * (high - low) / 999) ** 2 for i in range(1000)])
    close(P.discrete_vp(P.scaled_linear_betas()).alpha(steps) ** 2, scaled)
    u = (np.arange(1, 1000) / 1000 + 0.008) / 1.008
    cosine = np.cos(u * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    betas = P.squared_cosine_betas()
    close(P.discrete_vp(betas).alpha(steps[:-1]) ** 2, cosine, 1e-9)  # only the last β is capped
    assert betas[-1] == 0.999 and betas[:-1].max() < 0.999


@pytest.mark.torch
@pytest.mark.parametrize(
    "schedule, betas, options",
    [
        ("linear", P.linear_betas(), {}),
        ("scaled_linear", P.scaled_linear_betas(), {"beta_start": 0.00085, "beta_end": 0.012}),
        ("squaredcos_cap_v2", P.squared_cosine_betas(), {}),
        (
            "scaled_linear",
            P.zero_terminal_snr(P.scaled_linear_betas()),
            {"beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_tables_are_those_of_diffusers(schedule, betas, options, x64):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(beta_schedule=schedule, **options).alphas_cumprod.numpy()
    ours = P.discrete_vp(betas).alpha(jnp.arange(1.0, 1001.0)) ** 2
    # Their products are accumulated in float32.
    np.testing.assert_allclose(ours, theirs, rtol=2e-4 if options.get("rescale_betas_zero_snr") else 3e-5, atol=1e-8)


def test_between_the_integers_a_table_is_linear_in_log_alpha(x64):
    p = P.discrete_vp(P.linear_betas())
    for low, mid, high in ((0.0, 0.5, 1.0), (400.0, 400.25, 401.0)):
        share = (mid - low) / (high - low)
        expected = (1 - share) * jnp.log(p.alpha(low)) + share * jnp.log(p.alpha(high))
        close(jnp.log(p.alpha(mid)), expected)


def test_flow_shift_lowers_log_snr(x64):
    p = P.flow()
    t = jnp.linspace(0.01, 0.99, 25)
    for shift in (0.5, 1.0, 3.0):
        close(p.log_snr(P.flow_shift(t, shift)), p.log_snr(t) - 2 * math.log(shift))
    close(P.flow_shift(jnp.asarray([0.0, 1.0]), 3.0), [0.0, 1.0])


@pytest.mark.parametrize("other", ["vp", "flow", "trig", "cosine"])
def test_retiming_commutes_with_the_flow_map(other, x64):
    """The map in EDM, then rescaled, is the other process's own flow integrated in its own time by scipy."""
    edm, p = PROCESSES["edm"], PROCESSES[other]
    mixture = Mixture.load("ring8")
    net = retime(as_teacher(mixture, edm), edm, p)
    sigma_t, sigma_s = 5.0, 0.05
    x = 5.0 * draw((3, 2), seed=4)[0]
    there = flow_map(mixture_denoise(mixture, edm), edm, x, sigma_t, sigma_s, rtol=1e-11, atol=1e-11)

    t, s = (float(p.time_of(-jnp.log(sigma))) for sigma in (sigma_t, sigma_s))
    close(p.rho(jnp.asarray([t, s])), [sigma_t, sigma_s], 1e-9)
    field = jax.jit(lambda time, x: p.velocity(net(x, time), x, time))
    run = solve_ivp(
        lambda time, y: np.asarray(field(time, y.reshape(3, 2))).ravel(),
        (t, s),
        np.asarray(p.alpha(t) * x).ravel(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-12,
    )
    close(run.y[:, -1].reshape(3, 2), p.alpha(s) * there, 1e-8)


def mixture_denoise(mixture, p):
    return lambda x, t: mixture.denoise(p, x, t)


@every_process
def test_everything_is_finite_at_both_ends(p):
    """Values and gradients with respect to x0, x and t at t = 0, t_min and t_max, in single precision."""
    x0, x, y = draw((2, 3), dtype=jnp.float32)

    def everything(x0, x, t, s):
        out = [p.alpha(t), p.sigma(t), p.alpha_prime(t), p.sigma_prime(t), p.decay(t, s)]
        out += [p.diffuse(x0, x, t), p.step(x0, x, t, s), p.destination(x, t, y, s)]
        conversions = (
            p.eps,
            p.score,
            p.v,
            p.velocity,
            p.x0_from_eps,
            p.x0_from_score,
            p.x0_from_v,
            p.x0_from_velocity,
        )
        out += [convert(x0, x, t) for convert in conversions] + [p.score_from_eps(x0, x, t)]
        return jnp.stack([jnp.sum(o) for o in out])

    def backwards(x0, x, t, s):
        return jnp.stack([jnp.sum(o) for o in (*p.posterior(x0, x, t, s), p.renoise(x, x0, s, t))])

    @jax.jit
    def check(x0, x, t, s):
        values = everything(x0, x, t, s), backwards(x0, x, jnp.maximum(t, s), jnp.minimum(t, s))
        down = jax.jacrev(everything, argnums=(0, 1, 2))(x0, x, t, s)
        up = jax.jacrev(backwards, argnums=(0, 1))(x0, x, jnp.maximum(t, s), jnp.minimum(t, s))
        return [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((values, down, up))]

    ends = [jnp.float32(t) for t in (0.0, p.t_min, p.t_max)]
    for t in ends:
        for s in ends:
            assert all(check(x0, x, t, s)), (float(t), float(s))


def test_noise_at_the_start(x64):
    for p, std in ((P.edm(), 80.0), (P.flow(), 1.0), (P.trig(0.5), 0.5)):
        x = p.prior(jax.random.key(0), (100_000,), jnp.float64)
        assert abs(float(x.std()) / std - 1) < 4 / math.sqrt(2 * 100_000)
        assert x.dtype == jnp.float64


def test_times_outside_are_met_with_words():
    with pytest.raises(ValueError, match=r"noise level 81.* is outside this process: EDM accepts 0 .* to 80"):
        P.edm().check_times(81.0, "noise level")
    with pytest.raises(ValueError, match=r"-0\.5.*Flow accepts 0 \(data\) to 1 \(noise\).*from 0\.001 on"):
        P.flow().check_times(np.asarray([0.2, -0.5]))
    with pytest.raises(ValueError, match="nan"):
        P.flow().check_times(jnp.asarray([0.2, jnp.nan]))
    P.trig().check_times(jnp.float32(math.pi / 2))
    jax.jit(lambda t: P.flow().check_times(t))(3.0)


@pytest.mark.parametrize("betas", [[], [0.1, 1.5], [0.0, 0.1], [0.1, 1.0, 0.1], [[0.1, 0.2]], [0.1, float("nan")]])
def test_tables_that_are_none_are_met_with_words(betas):
    with pytest.raises(ValueError, match=r"betas must be a one-dimensional table of values in \(0, 1\]"):
        P.discrete_vp(betas)
