"""The one sampler of every student: jump with the student, then add forward noise."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.integrators import Solution
from ddistill.net import Net
from ddistill.process import Process


def matched_noise(x: Array, source: Process, target: Process) -> Array:
    """Noise at the start of one process as noise at the start of another: σ(t_max) ε with the same ε."""
    return x * (target.sigma(target.t_max) / source.sigma(source.t_max)).astype(x.dtype)


def sample(
    student: Net,
    process: Process,
    times,
    x: Array,
    key: Array | None = None,
    *,
    gamma: float = 0.0,
    overshoot: int = 0,
    cond: Any = None,
) -> Solution:
    """Sample along times t_0, t_1, … from x at t_0: in each step jump from t to s' ≤ t', then renoise s' → t'.

    γ chooses s' by its noise-to-signal ratio, ρ(s') = √(1 − γ²) ρ(t') (Kim et al. 2024, alg. 3): γ = 0 jumps to t'
    exactly and adds no noise (deterministic; times may also ascend, for inversion), γ = 1 jumps to the data and adds
    all of it (multistep consistency; Song et al. 2023, alg. 1). overshoot = n, in place of γ, makes s' the time n
    places after t', the last where there is none: n = 1 is the stochastic sampler of Meng et al. 2023, sec. 3.2, for
    students of `Progressive(stochastic=True)`.

    x: [B, ...] of noise level σ(t_0). times: [K + 1], within the process, each different from the one before. Answers
    the sample and its number of network calls, K. Raises ValueError for a γ outside [0, 1], an overshoot below 0, for
    both at once, for either without key or with ascending times, and for times outside the process.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie in [0, 1] (0 deterministic, 1 fully stochastic); given {gamma}")
    if overshoot < 0 or (overshoot and gamma):
        raise ValueError(f"overshoot must be at least 0, and 0 where gamma is not; given {overshoot}, gamma = {gamma}")
    noisy = gamma > 0 or overshoot > 0
    if noisy and key is None:
        name = f"gamma = {gamma}" if gamma else f"overshoot = {overshoot}"
        raise ValueError(f"{name} adds noise: pass key=jax.random.key(seed), or {name.partition(' ')[0]}=0")
    process.check_times(times, "sampling time")
    times = jnp.asarray(times, x.dtype)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"times must be a list of at least two times, from the noise to the data; given {times.shape}")
    if not isinstance(times, jax.core.Tracer) and noisy and np.any(np.diff(np.asarray(times)) > 0):
        needs = "need gamma = 0 and overshoot = 0: forward noise would overwrite the trajectory"
        raise ValueError(f"times that ascend (inversion) {needs}")

    def one(x, step):
        t, t_next, beyond, i = step
        if not noisy or key is None:
            return student.jump(process, x, t, t_next, cond), None
        landing = beyond if overshoot else _landing(process, t_next, gamma)
        x = student.jump(process, x, t, landing, cond)
        noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
        return process.renoise(x, noise, landing, t_next), None

    steps = times.shape[0] - 1
    beyond = times[jnp.minimum(jnp.arange(1, steps + 1) + overshoot, steps)]
    x, _ = jax.lax.scan(one, x, (times[:-1], times[1:], beyond, jnp.arange(steps)))
    return Solution(x, jnp.asarray(steps, jnp.int32))


def _landing(process: Process, t: Array, gamma: float) -> Array:
    if gamma == 1:
        return jnp.zeros_like(t)
    return process.time_of(process.half_log_snr(t) - 0.5 * math.log1p(-(gamma**2)))
