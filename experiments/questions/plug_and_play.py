"""Research direction: "plug-and-play", a distilled update of the weights carried over to another teacher.

A network is fitted to grid25's denoiser and distilled; τ is what distillation did to its weights. The same network,
fine-tuned for a few steps to other mixtures, gives other teachers: means moved, weights redrawn, all turned. Their
one-step samples with τ added are compared with their own, with the first mixture's student, which knows nothing of the
new one, and with students distilled from them directly.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from common import Training, case, command_line, conclude, draw, over_seeds, starts, table
from jax import Array

from ddistill import grids, lora
from ddistill.integrators import dpmpp_3m
from ddistill.lora import LoRA
from ddistill.losses.times import LogNormal
from ddistill.methods import Consistency, Denoising
from ddistill.methods.lora import Adapted
from ddistill.mixture import Mixture
from ddistill.net import Net
from ddistill.process import Process


def shifted(mixture: Mixture, size: float, seed: int = 1) -> Mixture:
    """Every mean moved by N(0, size²) in each coordinate."""
    moves = np.random.default_rng(seed).normal(size=np.shape(mixture.means))
    return dataclasses.replace(mixture, means=np.asarray(mixture.means) + size * moves)


def turned(mixture: Mixture, degrees: float) -> Mixture:
    """The whole mixture turned about its centre."""
    angle = np.deg2rad(degrees)
    turn = np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return dataclasses.replace(
        mixture, means=np.asarray(mixture.means) @ turn.T, bases=turn @ np.asarray(mixture.bases)
    )


def reweighted(mixture: Mixture, seed: int = 2) -> Mixture:
    """Other weights, of a ratio of up to twenty."""
    weights = np.exp(np.random.default_rng(seed).uniform(0, 3, mixture.K))
    return dataclasses.replace(mixture, weights=weights / weights.sum())


def fresh(key, mixture):
    """Batches of the mixture that a training is given: trainings on several share one compilation."""
    return {"x": mixture.sample(key, 256)}


@functools.partial(jax.jit, static_argnums=1)
def fine(net: Net, process: Process, noise: Array) -> Array:
    """A network's samples in 32 steps of DPM-Solver++(3M)."""
    return dpmpp_3m(net.bind(), process, grids.karras(process, 32), noise).x


def main(seeds: int = 3, steps: int = 800) -> dict[str, dict[str, np.ndarray]]:
    """Print the tables."""
    first = case(Mixture.load("grid25"))
    process = first.process
    others = {
        "means moved by .03": shifted(first.mixture, 0.03),
        "means moved by .1": shifted(first.mixture, 0.1),
        "other weights": reweighted(first.mixture),
        "turned by 20°": turned(first.mixture, 20),
    }
    nets = starts(first, seeds, 1000)
    tune = Training(Denoising(LogNormal(-0.4, 2.0), exact=True)(process), fresh, 500, 1e-3)
    distil = Training(Consistency()(process), fresh, steps)
    low = Training(Adapted(Consistency(), LoRA(rank=8))(process), fresh, steps)

    def train(training, start, problem, seed):
        mixture = jax.tree.map(jnp.asarray, problem.mixture)
        return training(start, problem.teacher, jax.random.key(seed), mixture)

    def one_step(problem, net):
        return draw(net, process, jnp.asarray([process.t_max, 0.0]), problem.noise, jax.random.key(0), 0.0)

    students = [train(distil, net, first, seed) for seed, net in enumerate(nets)]
    deltas = [lora.difference(student, net) for student, net in zip(students, nets, strict=True)]
    small = [lora.difference(train(low, net, first, seed), net) for seed, net in enumerate(nets)]

    def judged(problem, seed):
        teacher = train(tune, nets[seed], problem, 50 + seed)
        made = {
            "teacher": one_step(problem, teacher),
            "student of grid25": one_step(problem, students[seed]),
            "teacher + half τ": one_step(problem, lora.add(teacher, (0.5, deltas[seed]))),
            "teacher + τ": one_step(problem, lora.add(teacher, (1.0, deltas[seed]))),
            "teacher + τ of rank 8": one_step(problem, lora.add(teacher, (1.0, small[seed]))),
            "distilled": one_step(problem, train(distil, teacher, problem, seed)),
            "teacher, 32 steps": fine(teacher, process, problem.noise),
        }
        ends = {f"{label}/endpoint": problem.endpoint(x) for label, x in made.items()}
        return ends | {f"{label}/sw2": problem.sw2(x) for label, x in made.items()}

    results: dict[str, dict[str, np.ndarray]] = {}
    for name, mixture in others.items():
        problem = case(mixture, scale=False)
        results[name] = over_seeds(seeds, lambda seed, problem=problem: judged(problem, seed))
    labels = list(dict.fromkeys(key.partition("/")[0] for key in next(iter(results.values()))))
    for metric in ("endpoint", "sw2"):
        lines = [[name, *(row[f"{label}/{metric}"] for label in labels)] for name, row in results.items()]
        table(f"One step on another mixture: {metric}", ["mixture", *labels], lines)

    def end(name, label):
        return float(results[name][f"{label}/endpoint"].mean())

    better = [name for name in others if end(name, "teacher + τ") < end(name, "student of grid25")]
    conclude(
        all(end(name, "distilled") < end(name, "teacher + τ") < 0.5 * end(name, "teacher") for name in others),
        "an update carries over in part: one-step endpoints of the new teachers "
        + "; ".join(
            f"{name}: {end(name, 'teacher'):.2f} without τ, {end(name, 'teacher + τ'):.2f} with it, "
            f"{end(name, 'student of grid25'):.2f} by the first student, {end(name, 'distilled'):.2f} distilled"
            for name in others
        )
        + ". It beats the student of the first teacher, which is the least that it should, for: "
        + (", ".join(better) or "none")
        + ".",
    )
    return results


if __name__ == "__main__":
    command_line(main)
