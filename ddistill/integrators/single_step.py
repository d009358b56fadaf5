"""Single-step methods: several evaluations inside a step, no memory between steps.

Contract and errors are those of `ddistill.integrators.multistep`; all methods here are deterministic and run in either
direction. Methods in t integrate `Process.velocity` and ask the schedule for α', σ' at the nodes (a table of betas has
one-sided ones there); methods in λ are the DPM-Solvers. A step on which a method is not defined, to σ = 0 or, in λ,
from α = 0, is one Euler (in t) or DDIM step and costs one evaluation: where all samples are there, no other is made.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators.multistep import phi
from ddistill.integrators.scan import Denoise, Linear, Solution, check_grid, linear
from ddistill.process import Process, expand, safe_divide

Jump = Callable[[Denoise, Array, Array, Array, Array], Array]
"""(denoise, x, x0, t, s) -> x at s, with x0 the estimate at (x, t); times are [B]."""


def euler(denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None) -> Solution:
    """Euler's method in t, x_s = x_t + (s − t) u(x_t, t), first order; one evaluation per step.

    It is `ddim` where σ and α are linear in t, that is for rectified flow and EDM.
    """
    nodes = check_grid(process, grid, x)
    t, step = nodes[:-1], nodes[1:] - nodes[:-1]
    alpha, d_alpha, d_sigma = process.alpha(t), process.alpha_prime(t), process.sigma_prime(t)
    growth = safe_divide(d_sigma, process.sigma(t))  # u = α' x̂0 + σ' (x − α x̂0)/σ
    return linear(denoise, process, nodes, x, Linear(1 + step * growth, (step * (d_alpha - growth * alpha),)))


def heun(
    denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None, *, mid: float = 1.0
) -> Solution:
    """Second-order Runge–Kutta in t, EDM's deterministic sampler (Karras et al. 2022, alg. 1 and app. D.2).

    mid: place of the second evaluation in the step, 1 for Heun, 2/3 for Ralston, 1/2 for the midpoint. 2N evaluations,
    2N − 1 on a grid that ends at σ = 0. For Heun in ρ on another process, retime the network to EDM.
    """
    nodes = check_grid(process, grid, x)
    return single_step(denoise, process, nodes, x, heun_jump(process, mid), euler_jump(process), 2)


def euler_jump(process: Process) -> Jump:
    """One Euler step in t."""
    return lambda denoise, x, x0, t, s: x + expand(s - t, x) * process.velocity(x0, x, t)


def heun_jump(process: Process, mid: float = 1.0) -> Jump:
    """One second-order Runge–Kutta step in t."""

    def jump(denoise, x, x0, t, s):
        step = expand(s - t, x)
        d = process.velocity(x0, x, t)
        d_mid = _velocity(denoise, process)(x + mid * step * d, t + mid * (s - t))
        return x + step * ((1 - 0.5 / mid) * d + 0.5 / mid * d_mid)

    return jump


def rk4(denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None) -> Solution:
    """The classical Runge–Kutta method in t, fourth order; four evaluations per step."""

    def jump(denoise, x, x0, t, s):
        step, middle, u = expand(s - t, x), 0.5 * (t + s), _velocity(denoise, process)
        k1 = process.velocity(x0, x, t)
        k2 = u(x + 0.5 * step * k1, middle)
        k3 = u(x + 0.5 * step * k2, middle)
        k4 = u(x + step * k3, s)
        return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return single_step(denoise, process, check_grid(process, grid, x), x, jump, euler_jump(process), 4)


def dpm_solver_2(
    denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None, *, r: float = 0.5
) -> Solution:
    """DPM-Solver-2 (Lu et al. 2022, alg. 4; noise prediction), second order, two evaluations, the second at r."""

    def jump(denoise, x, x0, t, s):
        alpha, sigma, lam = _alpha(process, x), _sigma(process, x), process.half_log_snr
        h = lam(s) - lam(t)
        m, hx = process.time_of(lam(t) + r * h), expand(h, x)
        eps = process.eps(x0, x, t)
        x_m = alpha(m) / alpha(t) * x - sigma(m) * jnp.expm1(r * hx) * eps
        eps_m = process.eps(denoise(x_m, m), x_m, m)
        return alpha(s) / alpha(t) * x - sigma(s) * jnp.expm1(hx) * (eps + (eps_m - eps) / (2 * r))

    return _in_lambda(denoise, process, grid, x, jump, 2)


def dpm_solver_3(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> Solution:
    """DPM-Solver-3 (Lu et al. 2022, alg. 5; noise prediction), third order for r2 = 2/3, three evaluations."""

    def jump(denoise, x, x0, t, s):
        alpha, sigma, lam = _alpha(process, x), _sigma(process, x), process.half_log_snr
        h = lam(s) - lam(t)
        m1, m2, hx = process.time_of(lam(t) + r1 * h), process.time_of(lam(t) + r2 * h), expand(h, x)
        eps = process.eps(x0, x, t)
        u1 = alpha(m1) / alpha(t) * x - sigma(m1) * jnp.expm1(r1 * hx) * eps
        d1 = process.eps(denoise(u1, m1), u1, m1) - eps
        u2 = alpha(m2) / alpha(t) * x - sigma(m2) * jnp.expm1(r2 * hx) * eps
        u2 = u2 - sigma(m2) * (r2 / r1) * r2 * hx * phi(2, r2 * hx) * d1  # (e^{r2 h} − 1)/(r2 h) − 1
        d2 = process.eps(denoise(u2, m2), u2, m2) - eps
        x_s = alpha(s) / alpha(t) * x - sigma(s) * jnp.expm1(hx) * eps
        return x_s - sigma(s) / r2 * hx * phi(2, hx) * d2  # (e^h − 1)/h − 1

    return _in_lambda(denoise, process, grid, x, jump, 3)


def dpmpp_2s(
    denoise: Denoise, process: Process, grid: Array, x: Array, key: Array | None = None, *, r: float = 0.5
) -> Solution:
    """DPM-Solver++(2S) (Lu et al. 2022b, alg. 1; data prediction), second order, two evaluations, the second at r."""

    def jump(denoise, x, x0, t, s):
        alpha, sigma, lam = _alpha(process, x), _sigma(process, x), process.half_log_snr
        h = lam(s) - lam(t)
        m, hx = process.time_of(lam(t) + r * h), expand(h, x)
        x_m = sigma(m) / sigma(t) * x - alpha(m) * jnp.expm1(-r * hx) * x0
        mean = (1 - 0.5 / r) * x0 + 0.5 / r * denoise(x_m, m)
        return sigma(s) / sigma(t) * x - alpha(s) * jnp.expm1(-hx) * mean

    return _in_lambda(denoise, process, grid, x, jump, 2)


def dpmpp_3s(
    denoise: Denoise,
    process: Process,
    grid: Array,
    x: Array,
    key: Array | None = None,
    *,
    r1: float = 1 / 3,
    r2: float = 2 / 3,
) -> Solution:
    """DPM-Solver++(3S) (Lu et al. 2022b; data prediction), third order for r2 = 2/3, three evaluations."""

    def jump(denoise, x, x0, t, s):
        alpha, sigma, lam = _alpha(process, x), _sigma(process, x), process.half_log_snr
        h = lam(s) - lam(t)
        m1, m2, hx = process.time_of(lam(t) + r1 * h), process.time_of(lam(t) + r2 * h), expand(h, x)
        u1 = sigma(m1) / sigma(t) * x - alpha(m1) * jnp.expm1(-r1 * hx) * x0
        d1 = denoise(u1, m1) - x0
        u2 = sigma(m2) / sigma(t) * x - alpha(m2) * jnp.expm1(-r2 * hx) * x0
        u2 = u2 + (r2 / r1) * alpha(m2) * r2 * hx * phi(2, -r2 * hx) * d1  # φ22 = (e^{−r2 h} − 1)/(r2 h) + 1
        d2 = denoise(u2, m2) - x0
        x_s = sigma(s) / sigma(t) * x - alpha(s) * jnp.expm1(-hx) * x0
        return x_s + alpha(s) / r2 * hx * phi(2, -hx) * d2  # φ2 = (e^{−h} − 1)/h + 1

    return _in_lambda(denoise, process, grid, x, jump, 3)


def single_step(
    denoise: Denoise,
    process: Process,
    nodes: Array,
    x: Array,
    jump: Jump,
    simple: Jump,
    evaluations: int,
    defined: Callable[[Array, Array], Array] | None = None,
    lift: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
    keys: Array | None = None,
) -> Solution:
    """Scan `jump` over checked nodes, and `simple` where defined(t, s) (σ_s > 0 if None) is false.

    `lift(x, t, key)` may first carry x up to a noisier time, as EDM's churn does.
    """

    def body(carry, step):
        x, nfe = carry
        t, s, key = step
        t, s = jnp.broadcast_to(t, x.shape[:1]), jnp.broadcast_to(s, x.shape[:1])
        if lift is not None:
            x, t = lift(x, t, key)
        x0 = model(x, t)
        here = process.sigma(s) > 0 if defined is None else defined(t, s)

        def full():
            # samples of a mixed batch that are not defined here ride along on harmless times, their result unused
            t_safe, s_safe = jnp.where(here, t, 0.5 * process.t_max), jnp.where(here, s, 0.25 * process.t_max)
            return jnp.where(expand(here, x), jump(model, x, x0, t_safe, s_safe), simple(model, x, x0, t, s))

        after, nfe = jax.lax.cond(
            jnp.any(here),
            lambda: (full().astype(dtype), nfe + evaluations),
            lambda: (simple(model, x, x0, t, s).astype(dtype), nfe + 1),
        )
        return (after, nfe), None

    dtype = x.dtype  # times and coefficients may be more precise: they are not rounded inside a step

    def model(x, t):
        return denoise(x.astype(dtype), t.astype(dtype))

    (x, nfe), _ = jax.lax.scan(body, (x, jnp.int32(0)), (nodes[:-1], nodes[1:], keys))
    return Solution(x, nfe)


def _in_lambda(denoise, process, grid, x, jump, evaluations) -> Solution:
    def defined(t, s):
        lam = process.half_log_snr
        return jnp.isfinite(lam(t)) & jnp.isfinite(lam(s))

    def simple(denoise, x, x0, t, s):
        return process.step(x0, x, t, s)

    return single_step(denoise, process, check_grid(process, grid, x), x, jump, simple, evaluations, defined)


def _velocity(denoise: Denoise, process: Process) -> Callable[[Array, Array], Array]:
    return lambda x, t: process.velocity(denoise(x, t), x, t)


def _alpha(process: Process, x: Array) -> Callable[[Array], Array]:
    return lambda t: expand(process.alpha(t), x)


def _sigma(process: Process, x: Array) -> Callable[[Array], Array]:
    return lambda t: expand(process.sigma(t), x)
