"""Research direction: "focus on the trajectory's properties": times where the teacher's trajectories bend.

(1) Where they bend: κ = E ‖dε̂/dλ‖² over the half-log-SNR λ. (2) Consistency distillation with its times drawn, and its
grid laid, uniformly in Karras' index, uniformly in log-SNR, or by curvature, at equal cost. (3) The teacher itself on
grids with equal curvature in every interval.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from common import Case, Distillation, case, command_line, conclude, gmm2d, isotropic, over_seeds, starts, table
from jax import Array

from ddistill import grids
from ddistill.integrators import ddim, heun
from ddistill.losses.curvature import Curved, curvature, curved, flat
from ddistill.losses.distances import PseudoHuber
from ddistill.methods.base import Method, Sampling, from_teacher
from ddistill.methods.consistency import renoising_times
from ddistill.mixture import Mixture
from ddistill.process import Process

INTERVALS = 14


def unseen(seed: int = 5) -> Mixture:
    """Ten modes of uneven weights and sizes that nothing here was tuned on."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, 10)
    return isotropic(weights / weights.sum(), rng.normal(size=(10, 2)).tolist(), rng.uniform(0.01, 0.05, 10) ** 1.5)


@dataclass(frozen=True)
class Timed:
    """Consistency distillation whose grid and law of times are given as warps of [0, 1].

    t = draw(u) for uniform u; s is one interval of the grid below t. weigh: each time counts as under the grid's own
    law. Else as `Consistency`: Heun in two steps per interval, times between the nodes, weight 1/(t − s).
    """

    grid: Curved
    draw: Curved
    weigh: bool = False

    def __call__(self, process: Process) -> Method:
        """The method on the EDM process."""
        n = INTERVALS

        def node(i: Array) -> Array:
            """Node i of n + 1: the warp's ends at 0 and n − 1, and the data at n."""
            return jnp.where(i >= n, 0.0, self.grid.warp(process, jnp.minimum(i / (n - 1), 1.0)))

        def loss(nets, batch, progress, key):
            k_last, k_u, k_noise = jax.random.split(key, 3)
            x0 = batch["x"]
            u, last = (jax.random.uniform(k, x0.shape[:1]) for k in (k_u, k_last))
            # One draw in n is of the last interval, from t_min to the data, which no law of times on λ holds.
            t = jnp.where(last * n < 1, process.t_min, self.draw.warp(process, u))
            i = (n - 1) * self.grid.position(process, t)
            i = jnp.where(last * n < 1, n - 1.0, i)
            s, middle = node(jnp.minimum(i + 1, n)), node(jnp.minimum(i + 0.5, n - 0.5))
            middle = jnp.where(i > n - 1.001, 0.5 * t, middle)
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)
            x_s = heun(nets["teacher"].bind(), process, jnp.stack([t, middle, s]), x_t).x
            f_t, f_s = (nets["student"].jump(process, x, r, jnp.zeros_like(r)) for x, r in ((x_t, t), (x_s, s)))
            weight = self.draw.weight(process, t, self.grid) if self.weigh else 1.0
            return jnp.mean(weight / (t - s) * PseudoHuber()(f_t, jax.lax.stop_gradient(f_s))), {}

        return Method(
            losses={"student": loss}, init={"student": from_teacher}, ema={"ema": ("student", 0.99)}, result="ema",
            needs=frozenset({"x"}), sampling=Sampling(lambda steps: renoising_times(process, steps), gamma=1.0),
        )  # fmt: skip


def laws(problem: Case, intervals: int = 64) -> tuple[Curved, Curved, Callable[[float, float], Curved]]:
    """Karras' grid, the grid uniform in log-SNR, and by curvature: from its share of Karras' law and its power."""
    process, key = problem.process, jax.random.key(3)
    x0 = problem.mixture.sample(jax.random.key(2), 2000)
    grid = grids.karras(process, intervals, final=None)

    def bent(uniform: float, power: float) -> Curved:
        return curved(problem.teacher.bind(), process, x0, key, grid, uniform=uniform, power=power)

    karras = flat(bent(0.5, 1.0))
    spans = np.diff(karras.nodes) / (karras.nodes[-1] - karras.nodes[0])
    return karras, dataclasses.replace(karras, shares=tuple(map(float, spans))), bent


def profile(problem: Case) -> dict[str, float]:
    """Where E ‖dε̂/dλ‖² is largest, and what the fifth of λ with the most of it holds."""
    lam = jnp.linspace(-4.0, 6.0, 201)
    x0 = problem.mixture.sample(jax.random.key(2), 2000)
    k2 = np.asarray(curvature(problem.teacher.bind(), problem.process, x0, lam, jax.random.key(3))) ** 2
    top = np.sort(k2)[::-1]
    return {"peak": float(np.exp(-lam[k2.argmax()])), "fifth": float(top[:40].sum() / top.sum())}


def teacher_rows(problem: Case, name: str, law: Curved) -> list:
    """Endpoint errors of DDIM with 4, 8 and 16 steps on the grid of equal shares of a law."""

    def error(steps):
        u = jnp.arange(steps) / (steps - 1)
        grid = jnp.append(law.warp(problem.process, u), 0.0)
        return problem.endpoint(ddim(problem.teacher.bind(), problem.process, grid, problem.noise).x)

    return [name, *(error(steps) for steps in (4, 8, 16))]


def main(seeds: int = 3, steps: int = 800) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Print the tables."""
    cases = {"grid25": case(Mixture.load("grid25")), "unseen": case(unseen())}
    rows = [
        [name, *profile(problem).values()]
        for name, problem in {"three modes": case(gmm2d(), scale=False), **cases}.items()
    ]
    header = ["mixture", "σ/α of the largest E‖dε̂/dλ‖²", "share of it in the top fifth of λ in [−4, 6]"]
    table("Where trajectories bend", header, rows)
    results: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for name, problem in cases.items():
        karras, log_snr, bent = laws(problem)
        half = bent(0.5, 1.0)
        variants = {
            "Karras' index": Timed(karras, karras),
            "log-SNR": Timed(log_snr, log_snr),
            "curvature, grid and draws": Timed(half, half),
            "curvature, draws alone": Timed(karras, half),
            "curvature, draws alone, weighted back": Timed(karras, half, weigh=True),
        }
        nets = starts(problem, seeds, 800)
        results[name] = {}
        for label, config in variants.items():
            distil = Distillation(problem, config, steps)

            def one(seed, distil=distil, problem=problem, nets=nets):
                student = distil(nets[seed], jax.random.key(seed))
                x1, x4 = student(1), student(4)
                return {"endpoint": problem.endpoint(x1), "sw2": problem.sw2(x1), "sw2_4": problem.sw2(x4)}

            results[name][label] = over_seeds(seeds, one)
        lines = [[label, *row.values()] for label, row in results[name].items()]
        header = ["grid and law of times", "endpoint, 1 step", "sw2, 1 step", "sw2, 4 steps"]
        table(f"Consistency distillation of {name}, {steps} steps, {INTERVALS} intervals", header, lines)
        grid_rows = {
            "Karras": karras,
            "uniform in log-SNR": log_snr,
            "half curvature": half,
            "curvature alone": bent(0.001, 1.0),
            "√curvature": bent(0.001, 0.5),
        }
        lines = [teacher_rows(problem, label, law) for label, law in grid_rows.items()]
        table(f"The teacher of {name} by DDIM: endpoint", ["grid", "4 steps", "8 steps", "16 steps"], lines)
    gains = {
        name: {
            label: float(rows["Karras' index"]["endpoint"].mean() / row["endpoint"].mean())
            for label, row in rows.items()
        }
        for name, rows in results.items()
    }
    best = {name: max(gain, key=lambda k: gain[k]) for name, gain in gains.items()}
    conclude(
        all("curvature" in label for label in best.values()),
        "at equal cost curvature helps: "
        + "; ".join(
            f"on {name} best is {label}, {gains[name][label]:.2f} times closer than Karras"
            for name, label in best.items()
        ),
    )
    return results


if __name__ == "__main__":
    command_line(main)
