"""Q10. "Is it important how to approximate the score to get x_{t_{n−1}}"?

Consistency distillation steps with a teacher and an ODE solver, consistency training with the data itself, x0 + s z.
(1) On a Gaussian the students' fixed points are products of one slope per interval: the ratio of that product to the
exact flow map is the bias, in closed form and from the library's integrators and from regression on consistency
training's pairs. (2) Where the bias is alike, the noise is not: the target's variance floor ((t − s)/t)² Var[x0 | x_t]
and the scatter of minibatch gradients. (3) Students trained with each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, Distillation, case, command_line, conclude, gaussian, gmm2d, over_seeds, starts, table
from jax import Array
from jax.flatten_util import ravel_pytree

from ddistill import grids
from ddistill.integrators import euler, heun
from ddistill.methods import Consistency
from ddistill.methods.base import Progress
from ddistill.methods.consistency import node
from ddistill.methods.consistency_training import ConsistencyTraining
from ddistill.mixture import as_teacher
from ddistill.net import Net
from ddistill.process import Process, edm

STD = 0.5
NODES = (18, 40, 150, 1280)


def nodes(n: int) -> np.ndarray:
    """Karras' n nodes from 80 down to .002, without a 0."""
    return np.asarray(grids.karras(edm(), n - 1, end=0.002, final=None), np.float64)


def exact_slope() -> float:
    """Slope of the exact flow map from 80 to .002."""
    return float(np.sqrt((STD**2 + 0.002**2) / (STD**2 + 80.0**2)))


def euler_slope(n: int) -> float:
    """Product of Euler's slopes (c² + s t)/(c² + t²), which is also the least-squares slope of consistency training."""
    t, s = nodes(n)[:-1], nodes(n)[1:]
    return float(np.prod((STD**2 + s * t) / (STD**2 + t**2)))


def heun_slope(n: int) -> float:
    """Product of Heun's slopes 1 + h/2 (a_t + a_s (1 + h a_t)), a_t = t/(c² + t²), h = s − t."""
    t, s = nodes(n)[:-1], nodes(n)[1:]
    at, as_, h = t / (STD**2 + t**2), s / (STD**2 + s**2), s - t
    return float(np.prod(1 + 0.5 * h * (at + as_ * (1 + h * at))))


def solver_slope(n: int, integrator: Callable) -> float:
    """The same from the library: where its integrator takes x = 1, in double precision."""
    with jax.enable_x64(True):
        teacher = as_teacher(gaussian(STD), edm())
        return float(integrator(teacher.bind(), edm(), nodes(n), jnp.ones((1, 1), jnp.float64)).x[0, 0])


def regressed(n: int, samples: int = 20_000, seed: int = 0) -> tuple[float, float]:
    """Slope by least squares, interval by interval, on consistency training's pairs, and the noise of its targets.

    The noise is the mean over intervals of the measured variance of x_s around its regression on x_t, divided by
    ((t − s)/t)² Var[x0 | x_t], Var[x0 | x_t] = c² t²/(c² + t²): it should be 1.
    """
    rng = np.random.default_rng(seed)
    slopes, ratios = 1.0, []
    for t, s in zip(nodes(n)[:-1], nodes(n)[1:], strict=True):
        x0, z = STD * rng.standard_normal(samples), rng.standard_normal(samples)
        x_t, x_s = x0 + t * z, x0 + s * z
        slope = x_t @ x_s / (x_t @ x_t)
        floor = ((t - s) / t) ** 2 * STD**2 * t**2 / (STD**2 + t**2)
        ratios.append(np.var(x_s - slope * x_t) / floor)
        slopes *= slope
    return float(slopes), float(np.mean(ratios))


def closed_form(seeds: int = 3) -> dict[str, list]:
    """Ratio of each fixed point's slope to the exact one, by N; and the check of the variance floor."""
    exact = exact_slope()
    fits = {n: np.asarray([regressed(n, seed=seed) for seed in range(seeds)]) for n in NODES}
    rows: dict[str, list] = {
        "Euler, closed form": [euler_slope(n) / exact for n in NODES],
        "Euler, the integrator": [solver_slope(n, euler) / exact for n in NODES],
        "CT, least squares on its pairs": [fits[n][:, 0] / exact for n in NODES],
        "Heun, closed form": [heun_slope(n) / exact for n in NODES],
        "Heun, the integrator": [solver_slope(n, heun) / exact for n in NODES],
        "CT, measured target variance over ((t − s)/t)² Var[x0 given x_t]": [fits[n][:, 1] for n in NODES],
    }
    table(
        "Slope of the fixed point over that of the exact map, N(0, .5²)",
        ["fixed point", *(f"N = {n}" for n in NODES)],
        [[name, *(f"{v:.5f}" if np.ndim(v) == 0 else v for v in values)] for name, values in rows.items()],
    )
    return rows


def data_pair(nets, process: Process, x0, noise, t, s, x_t):
    """Consistency training's neighbour: the same x0 and noise, less of it."""
    return process.diffuse(x0, noise, s)


def solver_pair(integrator: Callable) -> Callable:
    """Consistency distillation's neighbour: one step of the teacher."""

    def pair(nets, process, x0, noise, t, s, x_t):
        return integrator(nets["teacher"].bind(), process, jnp.stack([t, s]), x_t).x

    return pair


PAIRS = {"CD, Heun": solver_pair(heun), "CD, Euler": solver_pair(euler), "CT": data_pair}


@dataclass(frozen=True)
class Uniform:
    """Neighbours as consistency distillation draws them: t uniform in the position on the grid of n intervals."""

    n: int

    def __call__(self, process: Process, progress: Progress, key: Array, count: int) -> tuple[Array, Array]:
        """Draw `count` pairs of times."""
        i = jnp.minimum(jax.random.uniform(key, (count,)) * self.n, self.n - 1)
        return node(process, i, self.n), node(process, i + 1, self.n)


def gradient_noise(plane: Case, pair: Callable, batches: int = 48, size: int = 256) -> Callable[[Net, float], Array]:
    """noise(net, n): root of the total variance of minibatch gradients of ‖f(x_t, t) − f(x_s, s)‖²/(t − s), N = n."""
    process = plane.process

    def gradient(net, n, key):
        k_x, k_i, k_noise = jax.random.split(key, 3)
        x0, noise = plane.mixture.sample(k_x, size), jax.random.normal(k_noise, (size, 2))
        i = jnp.floor(jax.random.uniform(k_i, (size,)) * (n - 1))  # the last interval, to t = 0, is trivial
        t, s = node(process, i, n), node(process, i + 1, n)
        x_t = process.diffuse(x0, noise, t)
        x_s = pair({"teacher": plane.teacher}, process, x0, noise, t, s, x_t)

        def loss(params):
            student = net.replace(params=params)
            f_t, f_s = student.jump(process, x_t, t, 0 * t), student.jump(process, x_s, s, 0 * s)
            return jnp.mean(jnp.sum((f_t - jax.lax.stop_gradient(f_s)) ** 2, 1) / (t - s))

        return ravel_pytree(jax.grad(loss)(net.params))[0]

    @jax.jit
    def noise(net, n):
        grads = jax.lax.map(lambda key: gradient(net, n, key), jax.random.split(jax.random.key(1), batches))
        return jnp.sqrt(jnp.sum(jnp.var(grads, 0)))

    return noise


def trained(seeds: int, steps: int) -> dict[Any, np.ndarray]:
    """Endpoint error of students by solver and N, and gradient noise at the best of them."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)

    def distilled(n, solver):
        return Consistency(intervals=n, max_intervals=n, solver=solver, solver_steps=1)

    configs = {
        ("CD, Heun", 20): distilled(20, heun),
        ("CD, Euler", 20): distilled(20, euler),
        ("CD, Euler", 80): distilled(80, euler),
        ("CT", 80): ConsistencyTraining(Uniform(80), rate=1.0),
    }
    runs = {name: Distillation(plane, config, steps) for name, config in configs.items()}
    noises = {name: gradient_noise(plane, pair) for name, pair in PAIRS.items()}

    def one(seed):
        row: dict = {}
        for name, run in runs.items():
            student = run(begin[seed], jax.random.key(seed))
            row["endpoint", name], row["sw2", name] = plane.endpoint(student(1)), plane.sw2(student(1))
            if name == ("CD, Heun", 20):
                for n in (20, 80):
                    row |= {("noise", pair, n): float(noise(student.net, float(n))) for pair, noise in noises.items()}
        return row

    values = over_seeds(seeds, one)
    table(
        "Three modes in the plane: one step of the student",
        ["pairs", "N", "endpoint", "sw2"],
        [[name, str(n), values["endpoint", (name, n)], values["sw2", (name, n)]] for name, n in runs],
    )
    table(
        "Standard deviation of a minibatch gradient at the student of CD, Heun, N = 20",
        ["pairs", "N = 20", "N = 80"],
        [[pair, values["noise", pair, 20], values["noise", pair, 80]] for pair in PAIRS],
    )
    return values


def main(seeds: int = 3, steps: int = 800) -> dict[Any, Any]:
    """Print the tables."""
    rows = closed_form(seeds)
    values = trained(seeds, steps)
    end = {name: np.mean(v) for (what, name, *_), v in values.items() if what == "endpoint"}
    sw2 = {n: float(np.mean(values["sw2", ("CD, Euler", n)])) for n in (20, 80)}
    noise = np.mean(values["noise", "CT", 80]) / np.mean(values["noise", "CD, Euler", 80])
    conclude(
        bool(
            end["CD, Heun", 20] < 0.7 * end["CD, Euler", 20]
            and sw2[80] < 0.8 * sw2[20]
            and end["CD, Euler", 80] < 0.8 * end["CT", 80]
            and noise > 2
        ),
        f"yes. With few intervals a second-order step has {end['CD, Heun', 20] / end['CD, Euler', 20]:.2f} times the "
        "endpoint error of Euler's. Euler's and the data's pairs have one and the same bias, which more intervals "
        f"remove (sw2 {sw2[20]:.3f} to {sw2[80]:.3f}), though they take longer to train; and the data's pairs pay for "
        f"the missing teacher with {noise:.0f} times the gradient noise.",
    )
    return rows | values


if __name__ == "__main__":
    command_line(main)
