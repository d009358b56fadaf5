"""The exact flow map Φ_{t→s} of the probability flow, to any tolerance, by an adaptive solver.

With tan θ = ρ = σ/α the state y = x/√(α² + σ²) is of order one at every time, the end where α = 0 included, and in
τ = log tan(θ/2), so that ρ = −1/sinh τ, the probability flow of every process reads

    dy/dτ = cos θ · y − D(x, t),        cos θ = −tanh τ,        τ from −∞ (data) to 0 (no signal)

without a singularity or a derivative of the schedule. What is left at the data end is the stretch below a small ρ_e,
on which x/α is a smooth function of ρ² with derivative ½ score: there Φ is closed with

    x_s/α_s = x̄ + ½ (1 − ρ_s²/ρ_e²)(D − x̄) + O((ρ_e/c)⁴)        x̄ = x/α at ρ_e, c the smallest width of the data

(for a Gaussian of width c relative errors of ⅛ (ρ_e/c)⁴ downwards and, with D at the other end, −⅜ (ρ_e/c)⁴ upwards;
plain denoising, D itself, would be off by ½ (ρ_e/c)²).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.process import Process, expand, safe_divide

_SMALLEST_STEP = 1e-7  # as a share of the way: only a state that is not finite asks for less


def flow_map(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    x: Array,
    t: Array | float,
    s: Array | float,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    rho_min: float = 1e-5,
    max_steps: int = 10_000,
) -> Array:
    """Carry x [B, ...] along the probability flow from t to s, in either direction; the result has x's shape and dtype.

    denoise(x, t) -> E[x0 | x_t = x] may be a function or a callable pytree such as a bound `Net`; t and s are [] or [B]
    in [0, t_max], and denoise sees times of the same shape. The local error is held below atol + rtol |y| in
    root-mean-square over the coordinates of *each* sample, y = x/√(α² + σ²); by default both are 1e-5, or 1e-10 in
    float64. Where the noise-to-signal ratio is below rho_min, σ = 0 above all, the map is closed by the module's
    expansion and denoise is not evaluated: for a network that was not trained so far down give ρ(t_min).

    The solver is Dormand and Prince's of order 8 in float64 and Tsitouras' of order 5 in float32, with one step size
    for the batch. Differentiable in reverse mode. Raises ValueError for times outside the process and RuntimeError if
    the solver cannot hold the tolerance in max_steps steps; under a caller's jit the result is then NaN instead.
    """
    process.check_times(t, "flow map from time")
    process.check_times(s, "flow map to time")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"flow_map takes x of a floating dtype; given {x.dtype}")
    work = jnp.promote_types(x.dtype, jnp.float32)
    tolerance = 1e-10 if work == jnp.float64 else 1e-5
    solve = _compiled()
    result, ok, reason = solve(
        denoise,
        process,
        x.astype(work),
        jnp.asarray(t, work),
        jnp.asarray(s, work),
        tolerance if rtol is None else rtol,
        tolerance if atol is None else atol,
        rho_min,
        max_steps,
    )
    if isinstance(ok, jax.core.Tracer):
        result = jnp.where(ok, result, jnp.nan)
    elif not ok:
        raise RuntimeError(f"flow_map failed: {_explain(reason, max_steps)}")
    return result.astype(x.dtype)


@functools.cache
def _compiled():
    import equinox as eqx

    return eqx.filter_jit(_solve)


def _explain(result, max_steps: int) -> str:
    from diffrax import RESULTS

    words = RESULTS[result]  # type: ignore
    return (
        f"{words} It had max_steps={max_steps}; "
        "check that x and what denoise answers are finite, or loosen rtol and atol"
    )


def _solve(denoise, process, x, t, s, rtol, atol, rho_min, max_steps):
    import diffrax

    def inside(time):
        """The time nearest to `time` with ρ ≥ rho_min, its τ, and (ρ/rho_min)² where ρ was below, else 1."""
        lam = process.half_log_snr(time)
        lam_max = jnp.asarray(-math.log(rho_min), lam.dtype)
        below = lam > lam_max
        nearest = jnp.where(below, process.time_of(lam_max), time)
        ratio2 = jnp.where(below, jnp.exp(2 * (lam_max - lam)), 1.0)
        return nearest, -jnp.arcsinh(jnp.exp(jnp.minimum(lam, lam_max))), ratio2

    def small_move(x, a, b, edge, weight):
        """From a to b at or below the edge: x_b/α_b = x̄ + weight (D(x̄, edge) − x̄), x̄ = x/α_a."""
        x_bar = safe_divide(x, expand(process.alpha(a), x))
        estimate = denoise(expand(process.alpha(edge), x) * x_bar, edge)
        moved = expand(process.alpha(b), x) * (x_bar + expand(weight, x) * (estimate - x_bar))
        return jnp.where(expand(weight, x) == 0, x, moved)

    def norm(time):
        return jnp.sqrt(process.alpha(time) ** 2 + process.sigma(time) ** 2)

    def field(u, y, _):
        tau = tau_t + u * (tau_s - tau_t)
        time = process.time_of(jnp.log(jnp.sinh(jnp.maximum(-tau, 0.0))))
        estimate = denoise(y * expand(norm(time), y), time)
        return expand(tau_s - tau_t, y) * (expand(-jnp.tanh(tau), y) * y - estimate)

    def worst_sample(error):
        error = jnp.sqrt(jnp.max(jnp.mean(error.reshape(error.shape[0], -1) ** 2, -1)))
        return jnp.where(jnp.isnan(error), jnp.inf, error)  # shrinks the step until the solver gives up

    t_edge, tau_t, ratio2_t = inside(t)
    s_edge, tau_s, ratio2_s = inside(s)
    x = small_move(x, t, t_edge, t_edge, -0.5 * (1 - ratio2_t))
    y = x / expand(norm(t_edge), x)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8() if y.dtype == jnp.float64 else diffrax.Tsit5(),
        t0=0.0,
        t1=1.0,
        dt0=0.01,
        y0=y,
        stepsize_controller=diffrax.PIDController(
            rtol=rtol, atol=atol, norm=worst_sample, dtmin=_SMALLEST_STEP, force_dtmin=False
        ),
        max_steps=max_steps,
        throw=False,
    )
    x = solution.ys[0] * expand(norm(s_edge), y)
    x = small_move(x, s_edge, s, s_edge, 0.5 * (1 - ratio2_s))
    return x, solution.result == diffrax.RESULTS.successful, solution.result
