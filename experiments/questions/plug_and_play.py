"""Research direction: "plug-and-play", a distilled update of the weights carried over to another teacher.

A network is fitted to grid25's denoiser and distilled; τ is what distillation did to its weights. The same network,
fine-tuned for a few steps to other mixtures, gives other teachers: means moved at random, or weights redrawn. Their
one-step samples with τ added are compared with their own, with the first mixture's student, which knows nothing of the
new one, and with students distilled from them directly.
"""

import dataclasses

import jax
import numpy as np
from common import Case, Distillation, Training, case, command_line, conclude, data, draw, over_seeds, starts, table

from ddistill import grids, lora
from ddistill.integrators import dpmpp_3m
from ddistill.lora import LoRA
from ddistill.losses.times import LogNormal
from ddistill.methods import Consistency, Denoising
from ddistill.methods.lora import Adapted
from ddistill.mixture import Mixture
from ddistill.net import Net


def shifted(mixture: Mixture, size: float, seed: int = 1) -> Mixture:
    """Every mean moved by N(0, size²) in each coordinate."""
    moves = np.random.default_rng(seed).normal(size=np.shape(mixture.means))
    return dataclasses.replace(mixture, means=np.asarray(mixture.means) + size * moves)


def reweighted(mixture: Mixture, seed: int = 2) -> Mixture:
    """Other weights, of a ratio of up to twenty."""
    weights = np.exp(np.random.default_rng(seed).uniform(0, 3, mixture.K))
    return dataclasses.replace(mixture, weights=weights / weights.sum())


def one_step(problem: Case, net: Net):
    """A network's jump from the noise to the data."""
    return draw(net, problem.process, np.asarray([problem.process.t_max, 0.0], np.float32), problem.noise, None, 0.0)


def main(seeds: int = 3, steps: int = 1000) -> dict[str, dict[str, np.ndarray]]:
    """Print the tables."""
    first = case(Mixture.load("grid25"))
    others = {
        "means moved by .02": shifted(first.mixture, 0.02),
        "means moved by .05": shifted(first.mixture, 0.05),
        "means moved by .1": shifted(first.mixture, 0.1),
        "other weights": reweighted(first.mixture),
    }
    nets = starts(first, seeds, 1500)
    whole = Distillation(first, Consistency(), steps)
    low = Distillation(first, Adapted(Consistency(), LoRA(rank=8)), steps)
    students = [whole(nets[seed], jax.random.key(seed)).net for seed in range(seeds)]
    deltas = [lora.difference(s, n) for s, n in zip(students, nets, strict=True)]
    small = [lora.difference(low(n, jax.random.key(seed)).net, n) for seed, n in enumerate(nets)]
    results: dict[str, dict[str, np.ndarray]] = {}
    for name, mixture in others.items():
        problem = case(mixture, scale=False)
        tune = Training(Denoising(LogNormal(-0.4, 2.0), exact=True)(problem.process), data(problem), 600, 1e-3)
        direct = Distillation(problem, Consistency(), steps)

        def one(seed, problem=problem, tune=tune, direct=direct):
            teacher = tune(nets[seed], problem.teacher, jax.random.key(50 + seed))
            fine = dpmpp_3m(teacher.bind(), problem.process, grids.karras(problem.process, 32), problem.noise).x
            made = {
                "teacher": one_step(problem, teacher),
                "student of grid25": one_step(problem, students[seed]),
                "half τ": one_step(problem, lora.add(teacher, (0.5, deltas[seed]))),
                "τ": one_step(problem, lora.add(teacher, (1.0, deltas[seed]))),
                "τ of rank 8": one_step(problem, lora.add(teacher, (1.0, small[seed]))),
                "distilled": one_step(problem, direct(teacher, jax.random.key(seed)).net),
                "teacher, 32 steps": fine,
            }
            ends = {f"{label}/endpoint": problem.endpoint(x) for label, x in made.items()}
            return ends | {f"{label}/sw2": problem.sw2(x) for label, x in made.items()}

        results[name] = over_seeds(seeds, one)
    labels = list(dict.fromkeys(key.partition("/")[0] for key in next(iter(results.values()))))
    for metric in ("endpoint", "sw2"):
        lines = [[name, *(row[f"{label}/{metric}"] for label in labels)] for name, row in results.items()]
        table(f"One step on another mixture: {metric}", ["mixture", *labels], lines)
    return results


if __name__ == "__main__":
    command_line(main)
