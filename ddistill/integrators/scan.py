"""What all integrators share: their contract, the border check, and the one scan behind every linear method."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.process import Process, expand

Denoise = Callable[[Array, Array], Array]
"""(x [B, ...], t [B]) -> x0 estimate [B, ...]: a network, with its conditioning and guidance closed over."""


class Solution(NamedTuple):
    """Where an integrator ended, and what it cost.

    x: [B, ...] at the last node. nfe: int32 scalar, the calls to `denoise` that were made.
    """

    x: Array
    nfe: Array


class Linear(NamedTuple):
    """Coefficients of x_{i+1} = a_i x_i + Σ_j b_ij m_{i−j} + c_i z_i for all steps i.

    a, c: [N] or [N, B]. b: one such array for each of m_i, m_{i−1}, …, zero where there is no past yet.
    """

    a: Array
    b: Sequence[Array]
    c: Array | None = None


def check_grid(process: Process, grid: Array, x: Array, *, descending: bool = False) -> Array:
    """Return the nodes as floats of at least x's and single precision.

    grid: [N + 1], or [N + 1, B] with own nodes for each sample. Raises ValueError for other shapes and, where its
    values are concrete, for times outside the process and for nodes not strictly monotone (decreasing, if asked).
    """
    grid = grid if isinstance(grid, Array) else np.asarray(grid)
    if grid.ndim not in (1, 2) or len(grid) < 2 or (grid.ndim == 2 and grid.shape[1] != x.shape[0]):
        raise ValueError(f"grid has shape {grid.shape}: give [N + 1] or [N + 1, {x.shape[0]}] nodes, N at least 1")
    if not isinstance(grid, jax.core.Tracer):
        process.check_times(grid, "grid node")
        steps = np.diff(np.asarray(grid), axis=0)
        down, up = np.all(steps < 0, axis=0), np.all(steps > 0, axis=0)
        if not np.all(down if descending else down | up):
            direction = (
                "strictly decreasing (this method does not run backwards)" if descending else "strictly monotone"
            )
            raise ValueError(f"grid nodes must be {direction}, given {np.asarray(grid)}")
    return jnp.asarray(grid, jnp.promote_types(jnp.promote_types(x.dtype, jnp.float32), _float_dtype(grid)))


def step_keys(key: Array | None, n: int, what: str) -> Array:
    """One key for each of n steps. Raises ValueError for no key."""
    if key is None:
        raise ValueError(f"{what} draws noise at every step: pass key=jax.random.key(seed)")
    return jax.random.split(key, n)


def per_sample(t: Array, x: Array) -> Array:
    """Times [] or [B] as networks take them: [B], in x's dtype."""
    return jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype)


def linear(
    denoise: Denoise,
    process: Process,
    nodes: Array,
    x: Array,
    predictor: Linear,
    keys: Array | None = None,
    *,
    corrector: Linear | None = None,
    past_eps: bool = False,
) -> Solution:
    """Run a linear method over checked nodes [N + 1] or [N + 1, B], one evaluation per step.

    m_i is the x0 estimate at node i, and the earlier m the x0 estimates there, or the ε estimates if past_eps. A
    corrector replaces x_i by A_i x_{i−1} + Σ_j B_ij m_{i−j}, m_i evaluated at the prediction and not again (its entry
    0 is not used).
    """

    def combine(a, x, weights, values):
        total = expand(a, x) * x
        for weight, value in zip(weights, values, strict=True):
            total = total + expand(weight, x) * value
        return total

    def body(carry, step):
        before, x, past, nfe = carry
        t, rule, correction, key, first = step
        x0 = denoise(x, per_sample(t, x))
        if correction is not None:
            corrected = combine(correction.a, before, correction.b, (x0, *past)).astype(x.dtype)
            x = jnp.where(first, x, corrected)
        after = combine(rule.a, x, rule.b, (x0, *past[: len(rule.b) - 1]))
        if rule.c is not None:
            after = after + expand(rule.c, x) * jax.random.normal(key, x.shape, x.dtype)
        newest = process.eps(x0, x, t) if past_eps else x0
        past = (newest.astype(x.dtype), *past)[: len(past)]
        return (x if correction is not None else None, after.astype(x.dtype), past, nfe + 1), None

    memory = max(len(predictor.b), len(corrector.b) if corrector else 0) - 1
    past = tuple(jnp.zeros_like(x) for _ in range(memory))
    first = np.arange(len(nodes) - 1) == 0
    steps = (nodes[:-1], predictor, corrector, keys if predictor.c is not None else None, first)
    carry = (x if corrector else None, x, past, jnp.int32(0))
    (_, x, _, nfe), _ = jax.lax.scan(body, carry, steps)
    return Solution(x, nfe)


def _float_dtype(grid) -> np.dtype:
    dtype = jnp.asarray(grid).dtype
    return dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.float32)
