"""Where a teacher's trajectories bend, and times drawn there.

In x̄ = x/α and ρ = σ/α the probability flow is dx̄/dρ = ε̂(x, t), so that a path is bent as far as ε̂ changes along it.
In half-log-SNR λ = −log ρ, dx̄/dλ = −ρ ε̂ and the total derivative is the jvp of ε̂ along (−ρ ε̂, 1):

    κ²(λ) = E ‖dε̂/dλ‖²/d,        x_t of the forward process, whose laws are those of the trajectories

For data N(0, c²) it is κ = c² ρ/(c² + ρ²)^{3/2}, largest at ρ = c/√2.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill.process import LARGEST_RHO, Process, expand

Denoise = Callable[[Array, Array], Array]


@functools.partial(jax.jit, static_argnums=1)
def curvature(denoise: Denoise, process: Process, x0: Array, half_log_snr: Array, key: Array) -> Array:
    """κ [n] at the half-log-SNRs λ [n]: the root-mean-square over samples and coordinates of dε̂/dλ.

    denoise(x [B, ...], t []) -> E[x0 | x_t = x], a callable pytree such as a bound Net. x0: [B, ...] data, or samples
    of the teacher; the same noise is added at every λ. Costs one forward-mode derivative of denoise for each λ.
    """
    noise = jax.random.normal(key, x0.shape, x0.dtype)

    def eps(x_bar, lam):
        t = process.time_of(lam)
        # In scaled coordinates ε̂ = (x̄ − x̂0)/ρ, which has no 0/0 where α vanishes.
        return (x_bar - denoise(process.alpha(expand(t, x_bar)) * x_bar, t)) * jnp.exp(lam)

    def one(lam):
        rho = jnp.exp(-lam)
        x_bar = x0 + rho * noise
        along = -rho * eps(x_bar, lam)
        change = jax.jvp(eps, (x_bar, lam), (along, jnp.ones_like(lam)))[1]
        return jnp.sqrt(jnp.mean(change**2))

    return jax.lax.map(one, jnp.asarray(half_log_snr, x0.dtype))


@dataclass(frozen=True)
class Curved:
    """A law of times with a density in λ, constant on each interval between nodes, and its warp of [0, 1].

    nodes: [n + 1] half-log-SNRs, increasing (from the noise to the data). shares: [n] probabilities of the intervals.
    As a law of times it is called as the others, law(process, key, n). Make one with `curved`.
    """

    nodes: tuple[float, ...]
    shares: tuple[float, ...]

    def __post_init__(self):
        if len(self.nodes) != len(self.shares) + 1 or not np.all(np.diff(self.nodes) > 0):
            raise ValueError(
                f"nodes must be {len(self.shares) + 1} increasing half-log-SNRs, one more than shares; "
                f"given {len(self.nodes)}"
            )
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-4:
            raise ValueError(f"shares must be positive and sum to 1; they sum to {sum(self.shares):g}")

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        return self.warp(process, jax.random.uniform(key, (n,)))

    def warp(self, process: Process, u: Array) -> Array:
        """The time at which a share u in [0, 1] of the law lies on the noise's side: 0 is t_max and 1 is t_min.

        Uniform u give the law itself; u = i/n the nodes of a grid with as much curvature in every interval.
        """
        u = jnp.asarray(u)
        t = process.time_of(jnp.interp(u, self._cumulative(), jnp.asarray(self.nodes)))
        t = jnp.clip(t, process.t_min, process.t_max)
        return jnp.where(u <= 0, process.t_max, jnp.where(u >= 1, process.t_min, t))

    def position(self, process: Process, t: Array) -> Array:
        """The u of a time, the inverse of `warp`."""
        return jnp.interp(process.half_log_snr(t), jnp.asarray(self.nodes), self._cumulative())

    def weight(self, process: Process, t: Array, other: "Curved") -> Array:
        """Density of another law of the same nodes over this one's at t: times drawn here then count as drawn there.

        Raises ValueError where the nodes differ.
        """
        if self.nodes != other.nodes:
            raise ValueError("weight compares two laws of the same nodes")
        i = jnp.searchsorted(jnp.asarray(self.nodes), process.half_log_snr(t), side="right") - 1
        return (jnp.asarray(other.shares) / jnp.asarray(self.shares))[jnp.clip(i, 0, len(self.shares) - 1)]

    def _cumulative(self) -> Array:
        return jnp.asarray(np.append(0.0, np.cumsum(self.shares)) / np.sum(self.shares))


def curved(
    denoise: Denoise,
    process: Process,
    x0: Array,
    key: Array,
    grid: Sequence[float] | np.ndarray,
    *,
    uniform: float = 0.5,
    power: float = 1.0,
) -> Curved:
    """A law that follows κ^power, mixed with a share `uniform` of one that is uniform in the grid's index.

    grid: times [n + 1] descending from t_max to above 0, as those of `grids` with final=None (64 intervals of Karras'
    grid, or of `log_snr_uniform`); where there is no signal it begins at ρ = 1000. power: 1 the density of least
    variance for a mean of gradients ∝ κ, 2 the density ∝ E‖dε̂/dλ‖². Raises ValueError for a share outside [0, 1], for
    a grid that reaches σ = 0, and where uniform = 0 leaves an interval without probability.
    """
    if not 0 <= uniform <= 1:
        raise ValueError(f"uniform = {uniform} must be a share, from 0 (curvature alone) to 1")
    nodes = np.asarray(process.half_log_snr(jnp.asarray(grid)), np.float64)
    nodes = np.maximum(nodes, -math.log(LARGEST_RHO))
    if not np.all(np.isfinite(nodes)):
        raise ValueError("the grid reaches a time without noise, where the half-log-SNR is infinite: end it above 0")
    middle = jnp.asarray((nodes[:-1] + nodes[1:]) / 2)
    mass = np.asarray(curvature(denoise, process, x0, middle, key), np.float64) ** power * np.diff(nodes)
    shares = (1 - uniform) * mass / mass.sum() + uniform / len(mass)
    return Curved(tuple(map(float, nodes)), tuple(map(float, shares)))


def flat(law: Curved) -> Curved:
    """The law of the same nodes that is uniform in their index."""
    return Curved(law.nodes, (1 / len(law.shares),) * len(law.shares))
