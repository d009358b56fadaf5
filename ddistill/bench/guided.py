"""Distillation of guidance against the truth: on a class-conditional mixture the guided field is exact for every w."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.bench.exact import Problem, Recipe, Row, distilled, fitted_network, row
from ddistill.bench.kept import Kept, how_many, write_kept
from ddistill.config import Data
from ddistill.evaluate.diversity import condition_diversity
from ddistill.evaluate.metrics import sliced_wasserstein
from ddistill.evaluate.mixture import SCALE
from ddistill.integrators import dpmpp_2m
from ddistill.integrators.exact import flow_map
from ddistill.methods.base import Made, home, sampling_of
from ddistill.mixture import Mixture
from ddistill.net import Scaled, guided, passes
from ddistill.process import Process
from ddistill.sample import matched_noise, sample

NULL = -1


def conditional(problem: Problem) -> Problem:
    """The same problem with the classes of the mixture's components as conditions."""
    mixture = problem.mixture
    x, modes = mixture.sample_with_modes(jax.random.key(11), 200_000)
    arrays = {"x": np.asarray(x), "cond": np.asarray(mixture.labels)[np.asarray(modes)]}
    return dataclasses.replace(problem, data=Data(arrays, (mixture.d,), mixture.num_classes))


def guided_rows(
    problem: Problem,
    name: str,
    made: Made,
    seed: int,
    recipe: Recipe,
    steps: Sequence[int],
    scales: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    samples: int = 2000,
    *,
    keep: Path | None = None,
) -> Iterator[Row]:
    """Distil a student that takes a guidance scale, and judge it at several scales and numbers of steps.

    endpoint, endpoint_median: distance to where the exact guided flow takes the same noise, None where samples were
    renoised on the way; sw2: sliced Wasserstein-2 distance to the exact guided flow of other noise, floor_sw2 that
    between two such sets; all over the data's scale. recall: the share of modes found, see `mode_recall`; diversity:
    mean distance between samples of one condition over that of the exact guided flow, which itself has less of it the
    higher the scale.
    The exact teacher under DPM-Solver++(2M) stands beside it. keep: the folder to put some samples without guidance in,
    w = 1, whose classes are equally frequent (`bench.kept`).
    """
    problem = conditional(problem)
    noise, other = problem.noise[:samples], problem.noise[-samples:]
    labels = jnp.arange(samples) % problem.mixture.num_classes
    start = fitted_network(problem, seed, recipe)
    begin = time.monotonic()
    student = distilled(problem, made, start, seed, recipe)
    wall = time.monotonic() - begin
    process, sampling = home(made, problem.process), sampling_of(made)
    own = matched_noise(noise, problem.process, process)

    for w in scales:
        net = guided(problem.teacher, w, NULL)
        field = net.bind(labels)
        exact, reference = (flow_map(field, problem.process, z, problem.process.t_max, 0.0) for z in (noise, other))
        floor = sliced_wasserstein(exact, reference) / SCALE
        varied = condition_diversity(reference, labels)

        def judged(
            method: str, n: int, nfe: int, x: Array, wall: float, mapped: bool = True,
            truth=(w, exact, reference, floor, varied),
        ) -> Row:  # fmt: skip
            w, exact, reference, floor, varied = truth
            error = (np.asarray(x, np.float64) - np.asarray(exact, np.float64)) / SCALE
            metrics = {
                "endpoint": float(np.sqrt(np.mean(error**2))) if mapped else None,
                "endpoint_median": float(np.median(np.sqrt(np.mean(error**2, axis=1)))) if mapped else None,
                "sw2": sliced_wasserstein(x, reference) / SCALE,
                "recall": mode_recall(problem.mixture, problem.process, x, reference, labels),
                "diversity": condition_diversity(x, labels) / varied,
            }
            return row(problem, method, n, nfe, seed, metrics, wall, w=w, floor_sw2=floor)

        for n in (8, 35):
            begin = time.monotonic()
            solution = dpmpp_2m(field, problem.process, jnp.asarray(grids.karras(problem.process, n)), noise)
            yield judged("teacher/dpmpp_2m", n, passes(net) * int(solution.nfe), solution.x, time.monotonic() - begin)
        cond = Scaled(labels, jnp.full(samples, w))
        drawn = {}
        for n in steps:
            key = jax.random.fold_in(jax.random.key(seed), 3)
            solution = sample(student, process, sampling.times(n), own, key, gamma=sampling.gamma, cond=cond)
            drawn[n] = solution.x
            yield judged(name, n, int(solution.nfe), solution.x, wall, n == 1 or sampling.gamma == 0)
        if keep is not None and w == 1:
            # By `mode_recall`, which counts all that is nearest to a mode, samples far from all would lose none.
            write_kept(keep, problem.name, name, seed, Kept(
                {n: np.asarray(x)[: how_many(problem.mixture.d)] for n, x in drawn.items()},
                {n: np.flatnonzero(~problem.judge.found(x)) for n, x in drawn.items()},
            ))  # fmt: skip


def mode_recall(
    mixture: Mixture, process: Process, x: Array, reference: Array, labels: Array, least: int = 10
) -> float | None:
    """Share of modes that more than a fifth as many of x [N, d] as of `reference` [N, d] lie in, given labels [N].

    A sample lies in the mode of its class with the highest posterior at t_min. Modes with fewer than `least` samples of
    the reference, which guidance has emptied, are left out: to find them would be chance. None where no mode is left.
    """

    def held(x: Array) -> np.ndarray:
        mode = jnp.argmax(mixture.responsibilities(process, x, process.t_min, labels), axis=1)
        return np.bincount(np.asarray(mode), minlength=mixture.K)

    there = held(reference)
    visited = there >= least
    return float(np.mean(held(x)[visited] > 0.2 * there[visited])) if visited.any() else None
