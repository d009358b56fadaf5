import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddistill import grids, process
from ddistill import integrators as I
from ddistill.process import expand

DETERMINISTIC = {
    "euler": I.euler,
    "heun": I.heun,
    "rk4": I.rk4,
    "ddim": I.ddim,
    "dpm_solver_2": I.dpm_solver_2,
    "dpm_solver_3": I.dpm_solver_3,
    "dpmpp_2s": I.dpmpp_2s,
    "dpmpp_3s": I.dpmpp_3s,
    "dpmpp_2m": I.dpmpp_2m,
    "dpmpp_3m": I.dpmpp_3m,
    "unip": I.unip,
    "unipc": functools.partial(I.unipc, order=3),
    "deis": I.deis,
    "deis_log": functools.partial(I.deis, log_rho=True),
}
STOCHASTIC = {
    "ddim_eta": functools.partial(I.ddim, eta=0.7),
    "ddpm": I.ddpm,
    "ddpm_large": functools.partial(I.ddpm, variance=1.0),
    "sde_dpmpp_2m": I.sde_dpmpp_2m,
    "sde_dpmpp_2m_heun": functools.partial(I.sde_dpmpp_2m, heun=True),
    "euler_maruyama": I.euler_maruyama,
    "heun_churn": functools.partial(I.heun_churn, churn=2.0, churn_max=math.inf),
    "predictor_corrector": I.predictor_corrector,
    "predictor_corrector_ancestral": functools.partial(I.predictor_corrector, predictor=I.ancestral),
}
ALL = DETERMINISTIC | STOCHASTIC

MEANS = np.array([[1.0, 0.5], [-1.0, 0.2], [0.1, -0.9]])
WIDTHS = np.array([0.4, 0.5, 0.6])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def mixture(proc):
    """E[x0 | x_t] of Σ_k w_k N(μ_k, τ_k² I) in the plane."""

    def denoise(x, t):
        alpha, sigma = expand(proc.alpha(t), x)[..., None], expand(proc.sigma(t), x)[..., None]
        mu, width = jnp.asarray(MEANS, x.dtype), jnp.asarray(WIDTHS, x.dtype)[:, None]
        total = (alpha * width) ** 2 + sigma**2  # [B, K, 1]
        away = x[:, None] - alpha * mu
        log_r = jnp.log(jnp.asarray(WEIGHTS, x.dtype)) - jnp.log(total[..., 0]) - 0.5 * jnp.sum(away**2 / total, -1)
        r = jax.nn.softmax(log_r, axis=-1)[..., None]
        return jnp.sum(r * (mu + alpha * width**2 / total * away), axis=1)

    return denoise


def gaussian(proc, c):
    """E[x0 | x_t] for x0 ~ N(0, c²)."""

    def denoise(x, t):
        alpha, sigma = expand(proc.alpha(t), x), expand(proc.sigma(t), x)
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * x

    return denoise


def variance(proc, c, t):
    t = jnp.asarray(t)
    return np.asarray(proc.alpha(t) ** 2 * c**2 + proc.sigma(t) ** 2)


@functools.partial(jax.jit, static_argnames=("f", "proc", "model"))
def run(f, proc, grid, x, key=None, model=mixture):
    return f(model(proc), proc, grid, x, key)


@functools.cache
def exact(start, end):
    """The flow of the mixture under the VP process between two times, by scipy."""
    from scipy.integrate import solve_ivp

    proc = process.vp()
    x = np.random.default_rng(0).normal(size=(4, 2)) * float(proc.sigma(start))
    velocity = jax.jit(lambda t, y: proc.velocity(mixture(proc)(y, jnp.full(4, t)), y, jnp.full(4, t)))
    solution = solve_ivp(
        lambda t, y: np.asarray(velocity(t, y.reshape(4, 2))).ravel(),
        (start, end),
        x.ravel(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    )
    return x, solution.y[:, -1].reshape(4, 2)


def lambda_nodes(proc, n, start, end, halvings=0):
    """n steps uniform in λ, the first of them split at its halves so that a low-order start weighs nothing."""
    lam = np.linspace(*np.asarray(proc.half_log_snr(np.array([start, end]))), n + 1)
    split = lam[0] + (lam[1] - lam[0]) * 2.0 ** -np.arange(halvings, 0, -1)
    lam = np.concatenate([lam[:1], split, lam[1:]])
    return np.asarray(proc.time_of(lam))


def slope(errors):
    return np.log2(np.asarray(errors[:-1]) / np.asarray(errors[1:]))


def multistep(f, **options):
    return functools.partial(f, lower_order_final=False, **options)


ORDERS = [
    ("ddim", I.ddim, 1, 0.25),
    ("dpm_solver_2", I.dpm_solver_2, 2, 0.25),
    ("dpm_solver_3", I.dpm_solver_3, 3, 0.25),
    ("dpmpp_2s", I.dpmpp_2s, 2, 0.25),
    ("dpmpp_3s", I.dpmpp_3s, 3, 0.25),
    ("dpmpp_2m", multistep(I.dpmpp_2m), 2, 0.25),
    ("dpmpp_2m_heun", multistep(I.dpmpp_2m, heun=True), 2, 0.25),
    ("dpmpp_3m", multistep(I.dpmpp_3m), 3, 0.4),
    ("dpmpp_3m_kappa1", multistep(I.dpmpp_3m, kappa=1.0), 2, 0.4),
    ("unip_1", multistep(I.unip, order=1), 1, 0.25),
    ("unip_2", multistep(I.unip, order=2), 2, 0.25),
    ("unip_3", multistep(I.unip, order=3), 3, 0.25),
    ("unipc_1", multistep(I.unipc, order=1), 2, 0.25),
    ("unipc_2", multistep(I.unipc, order=2), 3, 0.25),
    ("unipc_2_bh1", multistep(I.unipc, order=2, bh1=True), 3, 0.25),
    ("unipc_3", multistep(I.unipc, order=3), 4, 0.25),
    ("deis_2", multistep(I.deis, order=2), 2, 0.25),
    ("deis_3", multistep(I.deis, order=3), 3, 0.25),
    ("deis_4", multistep(I.deis, order=4), 4, 0.25),
    ("deis_3_log", multistep(I.deis, order=3, log_rho=True), 3, 0.25),
]


def errors_of(f, nodes_of, start=0.7, end=0.1):
    x, y = exact(start, end)
    return [float(np.abs(run(f, process.vp(), nodes_of(n), x).x - y).max()) for n in (40, 80, 160)]


@pytest.mark.parametrize(("f", "order", "slack"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS])
def test_order_in_lambda(x64, f, order, slack):
    proc = process.vp()
    rates = slope(errors_of(f, lambda n: lambda_nodes(proc, n, 0.7, 0.1, halvings=16)))
    print(rates)
    assert abs(rates[-1] - order) < slack


T_ORDERS = [
    ("euler", I.euler, 1),
    ("heun", I.heun, 2),
    ("ralston", functools.partial(I.heun, mid=2 / 3), 2),
    ("midpoint", functools.partial(I.heun, mid=0.5), 2),
    ("rk4", I.rk4, 4),
]


@pytest.mark.parametrize(("f", "order"), [o[1:] for o in T_ORDERS], ids=[o[0] for o in T_ORDERS])
def test_order_in_t(x64, f, order):
    rates = slope(errors_of(f, lambda n: np.linspace(0.7, 0.1, n + 1)))
    print(rates)
    assert abs(rates[-1] - order) < 0.25
