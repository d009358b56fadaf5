"""Q9. "What is intuition behind this objective" of consistency distillation?

It is value iteration for the endpoint map: the boundary value f(x, 0) = x travels up the trajectory, one teacher step
at a time, where regression on the trajectories' ends (naive distillation at all t) would be the Monte-Carlo estimate.
So the error ‖f(x_t, t) − Φ_{t→0}(x_t)‖ should go down at low t first, and a front should move to high t.

(1) A table of slopes a_n, f(x, t_n) = a_n x, on a Gaussian, under gradient descent: nothing is shared between times.
(2) A network, from a random initialisation, by the local loss with N intervals and by regression on the ends.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, Training, case, command_line, conclude, gmm2d, network, over_seeds, table
from jax import Array

from ddistill import grids
from ddistill.evaluate.mixture import SCALE
from ddistill.integrators import heun
from ddistill.integrators.exact import flow_map
from ddistill.losses.distances import PseudoHuber
from ddistill.methods import Consistency
from ddistill.methods.base import Method, from_teacher
from ddistill.methods.consistency import node
from ddistill.net import Net
from ddistill.process import Process, edm

TIMES = (0.3, 1.0, 3.0, 10.0, 30.0, 80.0)
BELOW = 0.3


def slopes(n: int = 18, rate: float = 0.1, updates: int = 400, std: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Errors |a_n/exact − 1| [updates + 1, n − 1] of descent on E (a_n x_t − a_{n−1} x_s)²/E x_t² from a_n = 0.

    Nodes ascend from .002, where a = 1 is given, to 80; x_s is Heun's step. Also the times [n − 1] of the columns.
    """
    t = np.asarray(grids.karras(edm(), n - 1, final=None), np.float64)[::-1]
    high, low = t[1:], t[:-1]
    drift = lambda time: time / (std**2 + time**2)  # noqa: E731
    h = low - high
    step = 1 + 0.5 * h * (drift(high) + drift(low) * (1 + h * drift(high)))  # x_s/x_t
    fixed = np.cumprod(step)
    a, errors = np.zeros(n - 1), []
    for _ in range(updates + 1):
        errors.append(np.abs(a / fixed - 1))
        a = a + rate * (np.concatenate([[1.0], a[:-1]]) * step - a)  # the target a_{n−1} is behind a stop-gradient
    return np.asarray(errors), high


def arrival(errors: np.ndarray, below: float) -> np.ndarray:
    """First row from which on a column stays below a value; the number of rows where none."""
    over = errors >= below
    return np.where(over.any(0), len(over) - np.argmax(over[::-1], 0), 0)


@dataclass(frozen=True)
class Endpoints:
    """E d(f_θ(x_t, t), Φ_{t→0}(x_t))/ρ_t with times as consistency distillation draws them: no self-reference."""

    intervals: int = 18
    solver_steps: int = 12

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def loss(nets, batch, progress, key):
            x0, n = batch["x"], self.intervals
            k_i, k_noise = jax.random.split(key)
            i = jnp.minimum(jax.random.uniform(k_i, x0.shape[:1]) * n, n - 1)
            t = node(process, i, n)
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)
            way = [node(process, i + k / self.solver_steps * (n - 1 - i), n) for k in range(self.solver_steps)]
            end = heun(nets["teacher"].bind(), process, jnp.stack([*way, 0 * t]), x_t).x
            return jnp.mean(PseudoHuber()(nets["student"].jump(process, x_t, t, 0 * t), end) / t), {}

        local = Consistency()(process)
        return Method({"student": loss}, {"student": from_teacher}, local.sampling, ema=local.ema, needs=local.needs)


def probes(plane: Case) -> tuple[list[Array], list[Array]]:
    """Points x_t of the diffused data at each of TIMES, and where the exact flow takes them."""
    x0 = plane.mixture.sample(jax.random.key(3), 2000)
    noise = jax.random.normal(jax.random.key(4), x0.shape)
    points = [plane.process.diffuse(x0, noise, t) for t in TIMES]
    return points, [
        flow_map(plane.teacher.bind(), plane.process, x, t, 0.0) for x, t in zip(points, TIMES, strict=True)
    ]


def trained(seeds: int, steps: int, every: int) -> dict:
    """Errors [seeds, probes, times] during training for the local loss and for regression on the ends."""
    plane = case(gmm2d())
    points, ends = probes(plane)

    @jax.jit
    def errors(net: Net) -> Array:
        def one(x, end, t):
            return jnp.sqrt(jnp.mean((net.jump(plane.process, x, t, 0.0) - end) ** 2)) / SCALE

        return jnp.stack([one(x, end, t) for x, end, t in zip(points, ends, TIMES, strict=True)])

    configs: dict[str, Any] = {"regression on the ends": Endpoints()}
    for n in (10, 160):
        configs[f"consistency, N = {n}"] = Consistency(intervals=n, max_intervals=n, solver_steps=1)
    result = {}
    for name, config in configs.items():
        training = Training(
            config(plane.process), lambda key, _: {"x": plane.mixture.sample(key, 256)}, steps, every=every
        )

        def one(seed, training=training):
            seen = []
            training(
                network(plane, seed), plane.teacher, jax.random.key(seed),
                probe=lambda net, step: seen.append(np.asarray(errors(net))),
            )  # fmt: skip
            return {"errors": np.asarray(seen)}

        result[name] = over_seeds(seeds, one)["errors"]
    return result


def main(seeds: int = 3, steps: int = 500, every: int = 10) -> dict:
    """Print the tables."""
    tabular, times = slopes()
    shown, columns = [0, 20, 40, 80, 160], [3, 6, 9, 12, 16]
    table(
        "Relative error of a table of slopes, N(0, .5²), N = 18, by updates",
        ["updates", *(f"t = {times[c]:.2g}" for c in columns)],
        [[str(u), *(float(tabular[u, c]) for c in columns)] for u in shown]
        + [["below .5 after", *(str(arrival(tabular, 0.5)[c]) for c in columns)]],
    )
    measured = trained(seeds, steps, every)
    arrivals = {name: np.asarray([arrival(e, BELOW) * every for e in errors]) for name, errors in measured.items()}
    table(
        f"Training steps after which a network's endpoint error stays below {BELOW}, three modes in the plane",
        ["training", *(f"t = {t:g}" for t in TIMES)],
        [[name, *a.T.astype(float)] for name, a in arrivals.items()],
    )
    table(
        f"Endpoint error after {steps} steps",
        ["training", *(f"t = {t:g}" for t in TIMES)],
        [[name, *errors[:, -1].T] for name, errors in measured.items()],
    )
    front = {name: a.mean(0) for name, a in arrivals.items()}
    ends, few, many = (
        front[name] for name in ("regression on the ends", "consistency, N = 10", "consistency, N = 160")
    )
    conclude(
        bool(
            np.all(np.diff(arrival(tabular, 0.5)) > 0)
            and few[-1] < 1.2 * ends[-1]
            and many[-1] > 1.5 * ends[-1]
            and many[0] < many[-1]
        ),
        "value iteration: where nothing is shared between times the boundary value climbs one interval after the "
        "other. A network shares its weights between times and learns low times first even by regression on the ends, "
        "so that the climb shows only as slowness where intervals are many: the highest time is learned after "
        f"{few[-1]:.0f} steps with N = 10, {many[-1]:.0f} with N = 160 and {ends[-1]:.0f} by regression on the ends.",
    )
    return {"tabular": tabular, **measured}


if __name__ == "__main__":
    command_line(main)
