"""Linear multistep methods: one network evaluation per step, each method nothing but its coefficients.

Every method here is x_{i+1} = a_i x_i + Σ_j b_ij m_{i−j} + c_i z_i, and comes from one of the two exact forms

    d(x/σ) = x̂0 d(1/ρ)   (data prediction, λ = log 1/ρ)        d(x/α) = ε̂ dρ   (noise prediction)

by replacing x̂0 or ε̂ with a polynomial through its latest values. The first order of both is DDIM, which is therefore
also DPM-Solver-1, DPM-Solver++(1), UniP-1 and DEIS-0: it is written once. Orders start at one and grow with the past; a
step that ends at σ = 0, or whose past holds the λ = −∞ of α = 0, takes the order that is defined there. The current
estimate enters as x̂0 in every method, so that a start at α = 0 is finite.

All functions share the contract `f(denoise, process, grid, x, key=None, **options) -> Solution`: x [B, ...] lies at
grid[0]; grid [N + 1] or [N + 1, B] is monotone within [0, t_max]. Deterministic methods run in either direction.
They raise ValueError for an invalid grid, and where noise is drawn for an ascending grid or a missing key. Traced
grids are not checked. Equal nodes are no step there, after which a method begins anew; UniPC's corrector alone needs
nodes that differ.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.integrators.scan import Denoise, Linear, Solution, check_grid, linear, step_keys
from ddistill.process import Process, safe_divide


class Steps(NamedTuple):
    """The process at both ends of all steps, t → s, each [N] or [N, B]; lam is λ at all nodes, [N + 1, …]."""

    t: Array
    s: Array
    alpha_t: Array
    alpha_s: Array
    sigma_t: Array
    sigma_s: Array
    ratio: Array
    decay: Array
    lam: Array

    @property
    def h(self) -> Array:
        """Step in λ, positive when denoising."""
        return self.lam[1:] - self.lam[:-1]


def steps_of(process: Process, nodes: Array) -> Steps:
    """Evaluate the process for the steps between nodes; ratio is σ_s/σ_t and decay e^{−h}, both 1 for no step."""
    t, s = nodes[:-1], nodes[1:]
    alpha, sigma = process.alpha(nodes), process.sigma(nodes)
    ratio = jnp.where(t == s, 1.0, safe_divide(sigma[1:], sigma[:-1]))
    lam = process.half_log_snr(nodes)
    return Steps(t, s, alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], ratio, process.decay(t, s), lam)


def ddim(
    denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None, *, eta: float = 0.0
) -> Solution:
    """DDIM (Song et al. 2021, eq. 12 and 16), first order; eta in [0, 1] scales the noise from ODE to DDPM.

    With eta = 0 it is DPM-Solver-1, DPM-Solver++(1), UniP-1 and Euler's method for d(x/α) = ε̂ dρ, hence also Euler in t
    for rectified flow and EDM. With eta = 1 it is `ddpm`.
    """
    nodes = check_grid(process, grid, x, descending=eta != 0)
    keys = step_keys(key, len(nodes) - 1, "ddim with eta > 0") if eta else None
    st = steps_of(process, nodes)
    if not eta:
        return linear(denoise, process, nodes, x, _first_order(st))
    std = eta * st.sigma_s * jnp.sqrt(jnp.clip(1 - st.decay**2, 0.0))
    a = safe_divide(jnp.sqrt(jnp.clip(st.sigma_s**2 - std**2, 0.0)), st.sigma_t)
    return linear(denoise, process, nodes, x, Linear(a, (st.alpha_s - a * st.alpha_t,), std), keys)


def ddpm(
    denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None, *, variance: float = 0.0
) -> Solution:
    """DDPM's ancestral sampling (Ho et al. 2020, alg. 2) between any nodes; weak order one.

    The noise's variance is β̃^{1−variance} β^{variance}: 0 is the posterior's β̃ ("fixed small"), 1 the forward β ("fixed
    large"), between them Improved DDPM's interpolation (Nichol & Dhariwal 2021, eq. 15). A step to σ = 0 draws none.
    """
    nodes = check_grid(process, grid, x, descending=True)
    keys = step_keys(key, len(nodes) - 1, "ddpm")
    return linear(denoise, process, nodes, x, ancestral(steps_of(process, nodes), variance), keys)


def ancestral(st: Steps, variance: float = 0.0) -> Linear:
    """Coefficients of DDPM's step, `Process.posterior` with the variance of `ddpm`."""
    spread = jnp.sqrt(jnp.clip(1 - st.decay**2, 0.0))
    std = jnp.where(st.sigma_s == 0, 0.0, st.sigma_s ** (1 - variance) * st.sigma_t**variance * spread)
    return Linear(st.decay * st.ratio, (st.alpha_s * (1 - st.decay**2),), std)


def dpmpp_2m(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    heun: bool = False,
    lower_order_final: bool = True,
) -> Solution:
    """DPM-Solver++(2M) (Lu et al. 2022b, alg. 2), second order; it is UniP-2 with B₂.

    heun: integrate the slope exactly instead of by its midpoint. lower_order_final: with fewer than 15 steps the last
    is first order, as in the public samplers (it always is where it ends at σ = 0).
    """
    nodes = check_grid(process, grid, x)
    return linear(denoise, process, nodes, x, _sde_2m(process, nodes, 0.0, heun, lower_order_final))


def sde_dpmpp_2m(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    eta: float = 1.0,
    heun: bool = False,
    lower_order_final: bool = True,
) -> Solution:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, app. B), weak order two; eta = 0 is `dpmpp_2m`, whose options it has."""
    nodes = check_grid(process, grid, x, descending=eta != 0)
    keys = step_keys(key, len(nodes) - 1, "sde_dpmpp_2m with eta > 0") if eta else None
    return linear(denoise, process, nodes, x, _sde_2m(process, nodes, eta, heun, lower_order_final), keys)


def _sde_2m(process: Process, nodes: Array, eta: float, heun: bool, lower_order_final: bool) -> Linear:
    st = steps_of(process, nodes)
    a = st.ratio * st.decay**eta  # (σ_s/σ_t) e^{−ηh}
    drift = 1 - st.decay ** (1 + eta)  # 1 − e^{−(1+η)h}
    order = _orders(st.lam, 2, lower_order_final and len(st.t) < 15)
    big = (1 + eta) * st.h
    slope = big * phi(2, -big) if heun else 0.5 * drift  # 1 − (1 − e^{−(1+η)h})/((1+η)h), or its midpoint value
    # slope · (m_i − m_{i−1})/r with r = h_{i−1}/h_i
    b1 = jnp.where(order == 2, st.alpha_s * slope * st.h / _past(st.h, 1), 0.0)
    c = st.sigma_s * jnp.sqrt(jnp.clip(1 - st.decay ** (2 * eta), 0.0)) if eta else None
    return Linear(a, (st.alpha_s * drift + b1, -b1), c)


def dpmpp_3m(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    kappa: float = 2.0,
    lower_order_final: bool = True,
) -> Solution:
    """DPM-Solver++(3M), third order with kappa = 2 and second with kappa = 1.

    kappa weighs the second difference. Taylor's formula asks for 2 (the method is then UniP-3); dpm-solver, k-diffusion
    and diffusers have 1. lower_order_final: with fewer than 15 steps the last two fall to second and first order.
    """
    nodes = check_grid(process, grid, x)
    st = steps_of(process, nodes)
    h, h1, h2 = st.h, _past(st.h, 1), _past(st.h, 2)
    # φ2 = φ1/h + 1 and φ3 = φ2/h − ½ of the papers, here without their cancellation
    phi1, phi2, phi3 = st.decay - 1, h * phi(2, -h), -h * phi(3, -h)
    r0, r1 = h1 / h, h2 / h
    # D1_0 = (m_i − m_{i−1})/r0, D1_1 = (m_{i−1} − m_{i−2})/r1 as coefficients of (m_i, m_{i−1}, m_{i−2})
    zero = jnp.zeros_like(h)
    d10, d11 = (1 / r0, -1 / r0, zero), (zero, 1 / r1, -1 / r1)
    d1 = [p + r0 / (r0 + r1) * (p - q) for p, q in zip(d10, d11, strict=True)]
    d2 = [kappa * (p - q) / (r0 + r1) for p, q in zip(d10, d11, strict=True)]
    third = [st.alpha_s * (phi2 * p - phi3 * q) for p, q in zip(d1, d2, strict=True)]
    third[0] = third[0] - st.alpha_s * phi1
    second = _slope_half(st, -phi1)
    order = _orders(st.lam, 3, lower_order_final and len(st.t) < 15)
    first = _first_order(st)
    return linear(denoise, process, nodes, x, Linear(first.a, _by_order(order, [first.b, second, third])))


def deis(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    order: int = 3,
    log_rho: bool = False,
    lower_order_final: bool = True,
) -> Solution:
    """DEIS, ρAB(order − 1) (Zhang & Chen 2023, eq. 15): ε̂ is a polynomial of degree order − 1 in ρ, integrated over ρ.

    log_rho: a polynomial in log ρ, as in diffusers. lower_order_final: with fewer than 15 steps the order is at most
    the number of steps left.
    """
    _at_least_one(order)
    nodes = check_grid(process, grid, x)
    st = steps_of(process, nodes)
    if log_rho:
        u, kernel = st.lam, lambda v: -st.sigma_s * jnp.exp(st.lam[1:] - v)  # dρ = −e^{−λ} dλ
    else:
        u, kernel = process.rho(nodes), lambda v: st.alpha_s
    orders = _orders(u, order, lower_order_final and len(st.t) < 15)
    first = _first_order(st)
    a = first.a
    b: list[Sequence[Array]] = [first.b]
    for p in range(2, order + 1):
        c = _adams(u[:-1], u[1:], [_past(u[:-1], j) for j in range(p)], kernel)
        # (α_s/α_t) x + c_0 ε̂_i + …, with ε̂_i = (x − α_t x̂0)/σ_t
        a = jnp.where(orders == p, st.alpha_s / st.alpha_t + c[0] / st.sigma_t, a)
        b.append([-c[0] * st.alpha_t / st.sigma_t, *c[1:]])
    return linear(denoise, process, nodes, x, Linear(a, _by_order(orders, b)), past_eps=True)


def unip(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    order: int = 3,
    bh1: bool = False,
    lower_order_final: bool = True,
) -> Solution:
    """UniP (Zhao et al. 2023), the predictor of `unipc` alone, of the given order; options as there."""
    nodes = check_grid(process, grid, x)
    return linear(denoise, process, nodes, x, _unip(process, nodes, order, bh1, lower_order_final)[0])


def unipc(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    order: int = 2,
    bh1: bool = False,
    lower_order_final: bool = True,
) -> Solution:
    """UniPC (Zhao et al. 2023, data prediction): UniP, corrected with the evaluation the next step makes anyway.

    The predictor is the exponential Adams–Bashforth method in λ, the corrector Adams–Moulton's: their linear systems
    Rρ = b say that polynomials of that degree are integrated exactly, whatever B(h). B matters in the two cases that
    the method fixes at ½ instead, the predictor of order 2 and the corrector of order 1: B₁ = −h (bh1) or
    B₂ = e^{−h} − 1. Order of accuracy is order + 1. lower_order_final: the order is at most the number of steps left.
    """
    nodes = check_grid(process, grid, x)
    predictor, corrector = _unip(process, nodes, order, bh1, lower_order_final)
    return linear(denoise, process, nodes, x, predictor, corrector=corrector)


def _unip(process: Process, nodes: Array, order: int, bh1: bool, lower: bool) -> tuple[Linear, Linear]:
    _at_least_one(order)
    st = steps_of(process, nodes)
    orders = _orders(st.lam, order, lower)
    first = _first_order(st)
    minus_b = jnp.where(jnp.isfinite(st.h), st.h, 1.0) if bh1 else 1 - st.decay
    half = 0.5 * st.alpha_s * minus_b
    predictors: list[Sequence[Array]] = [first.b, _slope_half(st, minus_b)]
    correctors: list[Sequence[Array]] = [(half, first.b[0] - half)]
    past = [_past(st.lam[:-1], j) for j in range(order)]

    def kernel(v):  # σ_s d(1/ρ)
        return st.alpha_s * jnp.exp(v - st.lam[1:])

    for p in range(2, order + 1):
        correctors.append(_adams(st.lam[:-1], st.lam[1:], [st.lam[1:], *past[:p]], kernel))
        if p > 2:
            predictors.append(_adams(st.lam[:-1], st.lam[1:], past[:p], kernel))
    predictor = Linear(first.a, _by_order(orders, predictors[:order]))
    corrector = Linear(first.a, _by_order(orders, correctors))
    # the step that the corrector repeats is the previous one
    return predictor, jax.tree.map(lambda w: jnp.concatenate([jnp.zeros_like(w[:1]), w[:-1]]), corrector)


def _first_order(st: Steps) -> Linear:
    return Linear(st.ratio, (st.alpha_s - st.ratio * st.alpha_t,))


def _slope_half(st: Steps, minus_b: Array) -> list[Array]:
    # α_s (1 − e^{−h}) m_i + ½ α_s B (m_i − m_{i−1})/r, B given with its sign reversed
    half = 0.5 * st.alpha_s * minus_b * st.h / _past(st.h, 1)
    return [st.alpha_s * (1 - st.decay) + half, -half]


def _past(values: Array, j: int) -> Array:
    # what wraps around belongs to steps without that much past, whose order does not use it
    return jnp.roll(values, j, axis=0)


def _orders(u: Array, order: int, lower_order_final: bool) -> Array:
    """Order of each step [N, ...]: as many values as there are with finite u, one if it ends at infinite u.

    Values count back to the last step without length; such a step is of first order.
    """
    n = len(u) - 1
    known = np.arange(1, n + 1).reshape((n,) + (1,) * (u.ndim - 1))
    most = np.minimum(order, known[::-1]) if lower_order_final else order
    moves = u[1:] != u[:-1]
    since = jnp.ones(moves.shape, int)
    apart = jnp.ones(moves.shape, bool)
    for j in range(1, order):
        apart &= _past(moves, j)
        since += apart
    orders = jnp.minimum(jnp.minimum(most, known - jnp.isinf(u[0])), since)
    return jnp.maximum(jnp.where(jnp.isinf(u[1:]) | ~moves, 1, orders), 1)


def _by_order(orders: Array, weights: list) -> list[Array]:
    """For each past value, the weight that belongs to the order of the step; weights[p] are those of order p + 1."""
    total = [jnp.zeros(()) for _ in weights[-1]]
    for p, of_order in enumerate(weights, 1):
        for j, weight in enumerate(of_order):
            total[j] = jnp.where(orders == p, weight, total[j])
    return total


def _adams(start: Array, end: Array, points: list[Array], kernel: Callable[[Array], Array]) -> list[Array]:
    """∫ kernel(u) ℓ_j(u) du from start to end, for the Lagrange polynomials ℓ_j of the points (Gauss–Legendre)."""
    z, w = (v.reshape((-1,) + (1,) * start.ndim) for v in np.polynomial.legendre.leggauss(16))
    half = 0.5 * (end - start)
    u = start + (1 + z) * half
    mass = w * half * kernel(u)

    def basis(j):
        return math.prod((u - uk) / (points[j] - uk) for k, uk in enumerate(points) if k != j)

    return [jnp.sum(mass * basis(j), axis=0) for j in range(len(points))]


def phi(k: int, z: Array) -> Array:
    """φ_k(z) = ∫₀¹ e^{(1−u)z} u^{k−1}/(k−1)! du of exponential integrators, φ_0 = e^z; without cancellation near 0."""
    small = jnp.abs(z) < 1
    inside = jnp.where(small, z, 0.0)
    series = jnp.zeros_like(inside)
    for n in range(17, -1, -1):  # Σ zⁿ/(n + k)!
        series = series * inside + 1 / float(np.prod(np.arange(1.0, n + k + 1)))
    outside = jnp.where(small, 1.0, z)
    value = jnp.exp(outside)
    for j in range(k):  # φ_{j+1} = (φ_j − 1/j!)/z
        value = (value - 1 / float(np.prod(np.arange(1.0, j + 1)))) / outside
    return jnp.where(small, series, value)


def _at_least_one(order: int) -> None:
    if order < 1:
        raise ValueError(f"order {order} must be at least 1")
