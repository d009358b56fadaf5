"""How straight a flow is and how far it carries: the two quantities that reflow lowers (Liu et al. 2022)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.net import Net
from ddistill.process import Flow, Process

SCALE = 0.5
"""The data's root-mean-square per coordinate, the unit of all distances here."""


def straightness(
    net: Net, process: Process, noise: Array, cond=None, *, steps: int = 100, scale: float = SCALE
) -> dict[str, float]:
    """Straightness S = ∫ E ‖(Z_1 − Z_0) − u(Z_t, t)‖² dt and transport cost E ‖Z_1 − Z_0‖² of a flow's trajectories.

    S is 0 where every trajectory is a straight line passed at constant speed, and one Euler step is then exact (Liu et
    al. 2022, sec. 2.2). noise: [B, ...] at t = 1; trajectories are solved by the midpoint rule. Both are means over
    coordinates, over scale², with scale the data's root-mean-square per coordinate.
    Answers {"straightness", "transport_cost"}. Raises ValueError for another process than the flow.
    """
    if not isinstance(process.schedule, Flow):
        raise ValueError(
            f"straightness is a property of rectified flow; given {type(process.schedule).__name__}: "
            "carry the network there with net.retime"
        )
    bent, cost = _bending(net, process, noise, cond, steps)
    return {"straightness": float(bent) / scale**2, "transport_cost": float(cost) / scale**2}


def transport_cost(noise: Array, x: Array, *, scale: float = SCALE) -> float:
    """E ‖Z_1 − Z_0‖² of pairs [B, ...] of noise and data, mean over coordinates and over scale²."""
    return float(jnp.mean((noise - x) ** 2)) / scale**2


def _bending(net: Net, process: Process, noise: Array, cond, steps: int) -> tuple[Array, Array]:
    width = process.t_max / steps

    @jax.jit
    def solve(denoise: Callable, x: Array) -> tuple[Array, Array]:
        def velocity(x, t):
            return process.velocity(denoise(x, t), x, t)

        def step(carry, i):
            x, mean, total = carry
            t = process.t_max - i * width
            middle = velocity(x - 0.5 * width * velocity(x, t), t - 0.5 * width)
            # Welford's sums: Z_1 − Z_0 is the mean of u along the midpoint rule's trajectory, so S is u's variance.
            off = middle - mean
            mean = mean + off / (i + 1)
            return (x - width * middle, mean, total + off * (middle - mean)), None

        start = (x, jnp.zeros_like(x), jnp.zeros_like(x))
        (end, _, total), _ = jax.lax.scan(step, start, jnp.arange(steps, dtype=x.dtype))
        return jnp.mean(total) / steps, jnp.mean((x - end) ** 2)

    return solve(net.bind(cond), jnp.asarray(noise))
