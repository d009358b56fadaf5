"""log p(x) of what a denoiser's probability flow samples, by the instantaneous change of variables (Chen et al. 2018).

In the coordinates of `ddistill.integrators.exact`, y = x/n, n = √(α² + σ²), the flow is dy/dτ = cos θ · y − D(x, t), so
that along it d log p/dτ = −(d cos θ − n tr ∂D/∂x). The integral of the bracket is carried as one coordinate more,

    e/n with d(e/n)/dτ = d cos θ − n tr ∂D/∂x,        cos θ = α/n,

by the same solver, under the same error control, and with the same closure below the smallest noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators.exact import flow_map
from ddistill.process import Process


def log_likelihood(
    denoise: Callable[[Array, Array], Array],
    process: Process,
    x: Array,
    *,
    t: float = 0.0,
    probes: int | None = None,
    key: Array | None = None,
    prior: Callable[[Array], Array] | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    rho_min: float = 1e-5,
    max_steps: int = 10_000,
) -> Array:
    """log p_t(x) [B] in nats, p_t being what the probability flow makes of the prior (Song et al. 2021, eq. 39).

    denoise(x, t) -> E[x0 | x_t = x] is a function or a callable pytree such as a bound `Net`, on any process; of a
    student's diagonal take `net.diagonal(student).bind(cond)`. x: [B, ...] at time t. The trace is exact, by d forward
    derivatives for d coordinates, or with probes = n estimated by n random signs (Hutchinson; Grathwohl et al. 2019,
    eq. 8), which leaves the answer unbiased. prior: log density [B] at t_max, by default of N(0, σ(t_max)² I), from
    which samplers start. rtol, atol, rho_min, max_steps and RuntimeError: those of `flow_map`; rtol and atol bound the
    error of x and of log p alike.

    Raises ValueError for probes without a key or below 1, and for a time outside [0, t_max).
    """
    x = jnp.asarray(x)
    d = math.prod(x.shape[1:])
    process.check_times(t, "likelihood at time")
    if not 0 <= t < process.t_max:
        raise ValueError(f"the likelihood is of a time in [0, {process.t_max:g}), before the prior's; given {t:g}")
    signs = None
    if probes is not None:
        if probes < 1 or key is None:
            raise ValueError(f"probes = {probes} must be at least 1 and come with key=jax.random.key(seed)")
        signs = jax.random.rademacher(key, (probes, *x.shape), x.dtype)

    start = jnp.concatenate([x.reshape(-1, d), jnp.zeros((x.shape[0], 1), x.dtype)], axis=1)
    carried = _Carried(denoise, signs, process, x.shape[1:])
    end = flow_map(
        carried, process, start, t, process.t_max, rtol=rtol, atol=atol, rho_min=rho_min, max_steps=max_steps
    )
    x_end, norm = end[:, :-1].reshape(x.shape), _norm(process, jnp.asarray(process.t_max, x.dtype))
    if prior is None:
        sigma = process.sigma(jnp.asarray(process.t_max, x.dtype))
        log_prior = -0.5 * jnp.sum((end[:, :-1] / sigma) ** 2, axis=1) - d * (
            0.5 * math.log(2 * math.pi) + jnp.log(sigma)
        )
    else:
        log_prior = prior(x_end)
    # log p of x is that of y less d log n, at both ends.
    return log_prior + d * jnp.log(norm / _norm(process, jnp.asarray(t, x.dtype))) + end[:, -1] / norm


def _norm(process: Process, t: Array) -> Array:
    return jnp.sqrt(process.alpha(t) ** 2 + process.sigma(t) ** 2)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Carried:
    """The denoiser of (x, e) [B, d + 1] under which the flow of e/n is the divergence of that of y."""

    denoise: Callable[[Array, Array], Array]
    signs: Array | None
    process: Process = field(metadata={"static": True})
    shape: tuple[int, ...] = field(metadata={"static": True})

    def __call__(self, xe: Array, t: Array) -> Array:
        x, e = xe[:, :-1].reshape(-1, *self.shape), xe[:, -1]
        d = xe.shape[1] - 1
        alpha, norm = self.process.alpha(t), _norm(self.process, t)
        if self.signs is None:
            basis = jnp.eye(d, dtype=x.dtype).reshape(d, 1, *self.shape)
            directions = jnp.broadcast_to(basis, (d, *x.shape))
        else:
            directions = self.signs
        estimate, push = jax.linearize(lambda x: self.denoise(x, t), x)
        products = jnp.sum(directions * jax.vmap(push)(directions), axis=range(2, 2 + len(self.shape)))
        trace = jnp.sum(products, axis=0) if self.signs is None else jnp.mean(products, axis=0)
        divergence = d * alpha / norm - norm * trace
        e0 = alpha / norm**2 * e - divergence  # so that cos θ · e/n − e0 is the divergence
        return jnp.concatenate([estimate.reshape(-1, d), e0[:, None]], axis=1)
