"""Claims on CTM's loss: u ∈ [s, t) on one slide and [s, t] on the next; sg(θ) in the outer map G_{sg(θ)}(·, s, 0).

With u = t the target is the estimate itself and such a sample teaches nothing. On the estimate's side sg stops the
parameters only: stopped as a whole, the outer map would let no gradient through. Gradients at a fitted start, and what
training does with each reading.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from common import Case, Distillation, case, command_line, conclude, gmm2d, over_seeds, starts, table
from jax import Array
from jax.flatten_util import ravel_pytree

from ddistill.integrators import heun
from ddistill.losses.distances import PseudoHuber
from ddistill.methods.base import Method, Progress
from ddistill.methods.ctm import CTM
from ddistill.net import Net, frozen
from ddistill.process import Process

OUTER = ("parameters stopped", "stopped as a whole", "nothing stopped")


@dataclass(frozen=True)
class Reading:
    """L_CTM alone, with one reading of sg(θ) in the outer map on the estimate's side; still: the share with u = t."""

    outer: str = OUTER[0]
    still: float = 0.0

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        like = CTM()

        def loss(nets, batch, progress, key):
            x0, student = batch["x"], nets["student"]
            k_times, k_noise = jax.random.split(key)
            nodes, s = like.times(process, k_times, x0.shape[0])
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), nodes[0])
            moved = jnp.arange(x0.shape[0]) >= self.still * x0.shape[0]
            u = jnp.where(moved, nodes[-1], nodes[0])
            x_u = jnp.where(moved[:, None], heun(nets["teacher"].bind(), process, nodes, x_t).x, x_t)
            goal = frozen(student).jump(process, frozen(student).jump(process, x_u, u, s), s, 0 * s)
            outer = student if self.outer == OUTER[2] else frozen(student)
            x_s = student.jump(process, x_t, nodes[0], s)
            x_s = jax.lax.stop_gradient(x_s) if self.outer == OUTER[1] else x_s
            estimate = outer.jump(process, x_s, s, 0 * s)
            return jnp.mean(PseudoHuber()(estimate, jax.lax.stop_gradient(goal))), {}

        return dataclasses.replace(like(process), losses={"student": loss})


def gradient_norm(plane: Case, config: Reading) -> Callable[[Net, Array], Array]:
    """norm(net, key): of the gradient of one batch of 1024."""
    loss = config(plane.process).losses["student"]

    @jax.jit
    def norm(net, key):
        batch = {"x": plane.mixture.sample(key, 1024)}

        def value(params):
            nets = {"student": net.replace(params=params), "teacher": plane.teacher}
            return loss(nets, batch, Progress(0), key)[0]

        return jnp.linalg.norm(ravel_pytree(jax.grad(value)(net.params))[0])

    return norm


def main(seeds: int = 3, steps: int = 800) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    configs = {f"sg: {outer}": Reading(outer) for outer in OUTER}
    configs |= {"half of the batch with u = t": Reading(still=0.5), "all of it with u = t": Reading(still=1.0)}
    norms = {name: gradient_norm(plane, config) for name, config in configs.items()}
    # Without a gradient there is nothing to train.
    idle = f"sg: {OUTER[1]}", "all of it with u = t"
    runs = {name: Distillation(plane, config, steps) for name, config in configs.items() if name not in idle}

    def one(seed):
        row: dict = {("start", k): plane.sw2(runs[next(iter(runs))].unchanged(begin[seed])(k)) for k in (1, 4)}
        for name, norm in norms.items():
            row["gradient", name] = float(norm(begin[seed], jax.random.key(seed)))
        for name, run in runs.items():
            student = run(begin[seed], jax.random.key(seed))
            row |= {(name, k): plane.sw2(student(k)) for k in (1, 4)}
        return row

    values = over_seeds(seeds, one)
    table(
        "L_CTM alone on three modes in the plane",
        ["reading", "gradient norm at the start", "sw2, K = 1", "sw2, K = 4"],
        [["before training", "–", values["start", 1], values["start", 4]]]
        + [[name, values["gradient", name], *(values.get((name, k), "as before") for k in (1, 4))] for name in norms],
    )
    norm = {name: values["gradient", name].mean() for name in norms}
    end = {name: values[name, 1].mean() for name in runs}
    right = "sg: parameters stopped"
    conclude(
        bool(
            norm["all of it with u = t"] < 1e-5 * norm[right]
            and norm["sg: stopped as a whole"] == 0
            and end[right] < 0.5 * values["start", 1].mean()
        ),
        "u < t, as on the first slide: samples with u = t have no gradient. And sg stops the outer map's parameters, "
        "not the gradient through its input: stopped as a whole nothing is learned at all.",
    )
    return values


if __name__ == "__main__":
    command_line(main)
