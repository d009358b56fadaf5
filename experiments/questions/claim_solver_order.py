"""Claim: G_θ(x_t, t, s) ≈ Solver(x_t, t, s; φ) ≈ G(x_t, t, s).

The second ≈ holds within the solver's own error, and a student cannot be told from its target: naive distillation on
pairs of weaker and better solvers, compared with its own teacher and with the exact flow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from common import Student, Training, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill import grids
from ddistill.evaluate.mixture import SCALE
from ddistill.integrators import ddim, dpmpp_2m
from ddistill.methods import KD


def main(seeds: int = 3, steps: int = 1000) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    solvers = {"Euler, 4": (ddim, 4), "Euler, 16": (ddim, 16), "Euler, 64": (ddim, 64), "DPM++(2M), 64": (dpmpp_2m, 64)}
    process, count = plane.process, 20_000

    def ends(name, noise):
        integrator, nodes = solvers[name]
        return integrator(plane.teacher.bind(), process, grids.karras(process, nodes), noise).x

    def rows(key, store):
        drawn = jax.random.randint(key, (256,), 0, count)
        return {"noise": store[0][drawn], "x": store[1][drawn]}

    method = KD(steps=(1,))(process)
    training = Training(method, rows, steps)
    own = {name: ends(name, plane.noise) for name in solvers}

    def one(seed):
        row = {}
        noise = process.prior(jax.random.key(50 + seed), (count, plane.mixture.d))
        for name in solvers:
            net = training(begin[seed], plane.teacher, jax.random.key(seed), (noise, ends(name, noise)))
            x = Student(net, process, method, plane)(1)
            row[name, "own"] = float(jnp.sqrt(jnp.mean((x - own[name]) ** 2))) / SCALE
            row[name, "exact"], row[name, "sw2"] = plane.endpoint(x), plane.sw2(x)
        return row

    values = over_seeds(seeds, one)
    table(
        "Naive distillation by solver of its pairs, one step, three modes in the plane (root-mean-square distances)",
        ["solver, steps", "solver to exact flow", "student to solver", "student to exact flow", "sw2"],
        [
            [name, plane.endpoint(own[name]), values[name, "own"], values[name, "exact"], values[name, "sw2"]]
            for name in solvers
        ],
    )
    coarse, fine = "Euler, 4", "DPM++(2M), 64"
    near = [float(np.mean(values[name, "own"])) for name in solvers]
    conclude(
        bool(
            np.mean(values[coarse, "exact"]) > 4 * np.mean(values[coarse, "own"])
            and np.mean(values[fine, "exact"]) < 1.5 * np.mean(values[fine, "own"])
        ),
        f"only within the solver's error: students come within {min(near):.3f} to {max(near):.3f} of their solvers, "
        "and inherit the solvers' errors whole.",
    )
    return values


if __name__ == "__main__":
    command_line(main)
