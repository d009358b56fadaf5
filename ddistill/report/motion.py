"""Paths of samplers from the noise to the data, for pictures and pages."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.integrators import heun
from ddistill.integrators.scan import Denoise
from ddistill.net import Net
from ddistill.process import Process
from ddistill.report.page import Kind, Motion
from ddistill.sample import sample


def student_path(
    student: Net, process: Process, times: Any, x: Array, key: Array, *, gamma: float = 0.0, cond: Any = None
) -> list[Array]:
    """Where x [B, ...] at the first of `times` [K + 1] is at each of them, sampled as `sample.sample` does it.

    With γ > 0 the noise that is added differs from what one call of `sample` would add.
    """
    times = np.asarray(times)
    states = [x]
    for i in range(len(times) - 1):
        at = jax.random.fold_in(key, i)
        states.append(sample(student, process, times[i : i + 2], states[-1], at, gamma=gamma, cond=cond).x)
    return states


def teacher_path(denoise: Denoise, process: Process, grid: Any, x: Array, integrator: Callable = heun) -> list[Array]:
    """Where x [B, ...] is at each node of the grid, under an integrator that uses no earlier steps."""
    grid = jnp.asarray(grid)
    step = jax.jit(lambda x, pair: integrator(denoise, process, pair, x).x)
    states = [x]
    for i in range(len(grid) - 1):
        states.append(step(states[-1], grid[i : i + 2]))
    return states


def motion(label: str, kind: Kind, process: Process, times: Any, states: Sequence[Any], spread: float) -> Motion:
    """The path through states [B, d] at the times of a process, for data of root-mean-square `spread`.

    States are divided by √(α² c² + σ²)/c with c the spread, so that noise and data fill the same frame; the share of
    noise is σ/(σ + α c).
    """
    t = jnp.asarray(times, jnp.float32)
    alpha, sigma = (np.asarray(f(t), np.float64) for f in (process.alpha, process.sigma))
    size = np.sqrt(alpha**2 * spread**2 + sigma**2) / spread
    x = np.stack([np.asarray(state, np.float64) for state in states]) / size[:, None, None]
    return Motion(label, kind, (sigma / (sigma + alpha * spread)).tolist(), x)
