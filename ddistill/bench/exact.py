"""The exact-teacher benchmark: students of a Gaussian mixture, judged against the truth.

The teacher is the mixture's own denoiser on the EDM process. A residual MLP is fitted to it once per seed; every method
starts its student there, with its defaults. All samplers start from the same noise.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.bench.kept import PATHS, Kept, how_many, write_kept
from ddistill.config import Data, MLPNetwork, Optimizer
from ddistill.data import Source
from ddistill.data.pairs import teacher_pairs
from ddistill.evaluate.inversion import exact_inverter, inversion_metrics, student_inverter, teacher_inverter
from ddistill.evaluate.mixture import SCALE, Judge, floor, judge
from ddistill.integrators import dpmpp_2m, euler, heun
from ddistill.integrators.exact import flow_map
from ddistill.losses.times import LogNormal
from ddistill.methods import Denoising
from ddistill.methods.base import Made, Pairs, home, rounds, sampling_of
from ddistill.mixture import Mixture, as_teacher
from ddistill.net import Net
from ddistill.process import Process, edm
from ddistill.report.motion import motion, student_path
from ddistill.sample import matched_noise, sample
from ddistill.stages import Stage, run, stages_of

Row = dict[str, Any]

FEW = 4
"""Dimensions up to which a mixture has few."""


@dataclass(frozen=True)
class Recipe:
    """Network and training of the benchmark, by dimension alone: nothing is tuned to one mixture."""

    network: MLPNetwork
    batch_size: int
    fit_steps: int
    steps: int
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(learning_rate=2e-3, warmup=100))


def recipe(d: int) -> Recipe:
    """The recipe for data of d dimensions."""
    if d <= FEW:
        return Recipe(MLPNetwork(width=128, blocks=4), batch_size=256, fit_steps=3000, steps=6000)
    return Recipe(MLPNetwork(width=384, blocks=4), batch_size=256, fit_steps=6000, steps=4000)


@dataclass(frozen=True)
class Problem:
    """A mixture to distil: exact teacher, judge, the noise that all samplers share and where the exact map takes it."""

    name: str
    mixture: Mixture
    process: Process
    teacher: Net
    judge: Judge
    floor: dict[str, float]
    noise: Array
    exact: Array
    exact_wall_s: float
    data: Data


def problem(name: str, samples: int = 10_000) -> Problem:
    """Set up a bundled mixture by name, or one from an .npz file; it is centred and scaled to root-mean-square .5."""
    mixture = Mixture.load(name).standardised(0.5)
    process = edm()
    teacher = as_teacher(mixture, process)
    noise = process.prior(jax.random.key(7), (samples, mixture.d))
    begin = time.monotonic()
    exact = jax.block_until_ready(flow_map(teacher.bind(), process, noise, process.t_max, 0.0))
    wall = time.monotonic() - begin
    data = {"x": np.asarray(mixture.sample(jax.random.key(11), 200_000))}
    by = judge(mixture, samples)
    return Problem(
        name, mixture, process, teacher, by, floor(by, samples), noise, exact, wall, Data(data, (mixture.d,), 0)
    )


def reference_rows(problem: Problem, nfes: Sequence[int] = (1, 2, 4, 8, 35)) -> Iterator[Row]:
    """Rows of the exact map and of the exact teacher under Euler, Heun and DPM-Solver++(2M) at the same costs."""
    exact = problem.judge(problem.exact, problem.exact)
    yield row(problem, "teacher/exact-map", 0, 0, 0, exact, problem.exact_wall_s)
    for method, integrator in (("euler", euler), ("heun", heun), ("dpmpp_2m", dpmpp_2m)):
        # Heun's last step, to σ = 0, takes one call; 2 steps − 1 calls in all.
        counts = dict.fromkeys((nfe + 1) // 2 for nfe in nfes) if integrator is heun else nfes
        for steps in counts:
            yield teacher_row(problem, problem.teacher, f"teacher/{method}", integrator, steps)


def teacher_row(problem: Problem, net: Net, method: str, integrator: Callable, steps: int, seed: int = 0) -> Row:
    """The row of one teacher and integrator."""
    grid = grids.karras(problem.process, steps)
    solve = jax.jit(lambda net, x: integrator(net.bind(), problem.process, grid, x))
    begin = time.monotonic()
    solution = jax.block_until_ready(solve(net, problem.noise))
    wall = time.monotonic() - begin
    metrics = problem.judge(solution.x, problem.exact)
    return row(problem, method, steps, int(solution.nfe), seed, metrics, wall)


def fitted_network(problem: Problem, seed: int, recipe: Recipe) -> Net:
    """The recipe's network fitted to the exact denoiser: the start of every student of this seed."""
    key = jax.random.key(seed)
    network = recipe.network.build(problem.data, problem.process, key)
    fit = Denoising(times=LogNormal(-0.4, 2.0), exact=True)(problem.process)
    stage = Stage(
        "fit", fit, recipe.fit_steps,
        source=lambda _: problem.data.source(recipe.batch_size, seed, 0.1),
        optimizer=recipe.optimizer.build,
        guide=lambda _: problem.teacher,
    )  # fmt: skip
    return run([stage], network, jax.random.fold_in(key, 1))[-1]


def distilled(problem: Problem, made: Made, start: Net, seed: int, recipe: Recipe) -> Net:
    """The student of a method, distilled from the exact teacher and started at a network fitted to it."""
    key = jax.random.fold_in(jax.random.key(seed), 2)

    def data():
        return problem.data.source(recipe.batch_size, seed, 0.0)

    def pairs(teacher: Net, process: Process, wanted: Pairs, number: int) -> Source:
        arrays = teacher_pairs(
            teacher, process, jax.random.fold_in(jax.random.fold_in(key, 0), number), wanted.count, problem.data.shape,
            steps=wanted.steps, integrator=wanted.integrator, points=wanted.points,
        )  # fmt: skip
        return Data(arrays, problem.data.shape, 0).source(recipe.batch_size, seed, 0.0)

    plan = stages_of(
        made, problem.process, recipe.steps,
        data=data, pairs=pairs, optimizer=recipe.optimizer.build, guide=lambda _: problem.teacher,
        space=problem.data.space,
    )  # fmt: skip
    return run(plan, start, jax.random.fold_in(key, 1))[-1]


def student_rows(
    problem: Problem,
    name: str,
    made: Made,
    start: Net,
    seed: int,
    recipe: Recipe,
    steps: Sequence[int],
    keep: Path | None = None,
) -> Iterator[Row]:
    """Distil with one method, and judge the student at several numbers of steps.

    keep: the folder to put some of its samples and paths in, for pictures (`bench.kept`).
    """
    begin = time.monotonic()
    student = distilled(problem, made, start, seed, recipe)
    wall = time.monotonic() - begin
    process, sampling = home(made, problem.process), sampling_of(made)
    noise = matched_noise(problem.noise, problem.process, process)
    key = jax.random.fold_in(jax.random.key(seed), 3)
    drawn = {}
    for n in steps:
        solution = sample(student, process, sampling.times(n), noise, key, gamma=sampling.gamma)
        drawn[n] = solution.x
        exact = problem.exact if sampling.gamma == 0 or n == 1 else None
        yield row(problem, name, n, int(solution.nfe), seed, problem.judge(solution.x, exact), wall)
    if keep is not None:
        times, some = sampling.times(max(steps)), noise[:PATHS]
        path = student_path(student, process, times, some, key, gamma=sampling.gamma)
        write_kept(keep, problem.name, name, seed, Kept(
            {n: np.asarray(x)[: how_many(problem.mixture.d)] for n, x in drawn.items()},
            {n: np.flatnonzero(~problem.judge.found(x)) for n, x in drawn.items()},
            motion(name, "student", process, times, path, SCALE),
        ))  # fmt: skip
    if rounds(made)[-1].method.inverse is not None:
        yield from inversion_rows(problem, name, student, [sampling.times(n) for n in steps], seed)


def inversion_rows(
    problem: Problem, name: str, student: Net, times: Sequence[Array], seed: int, samples: int = 2000
) -> Iterator[Row]:
    """Data encoded to noise and decoded, by a student that goes both ways and by DDIM with the exact teacher."""
    x0 = problem.mixture.sample(jax.random.key(13), samples)
    code = exact_inverter(problem.teacher, problem.process).encode(x0, None)
    both = [(f"{name}/inversion", student_inverter(student, problem.process, t)) for t in times]
    both += [("teacher/ddim-inversion", teacher_inverter(problem.teacher, problem.process, n)) for n in (4, 8, 16, 50)]
    for method, inverter in both:
        begin = time.monotonic()
        metrics = inversion_metrics(inverter, problem.process, x0, code)
        calls = inverter.calls or 0
        wall = time.monotonic() - begin
        yield row(problem, method, calls, 2 * calls, seed, metrics, wall)


METRICS = (
    "endpoint", "endpoint_median", "sw2", "precision", "recall", "weights", "spread", "diversity", "ll_gap",
    "encoding", "encoding_median", "round_trip", "round_trip_median",
)  # fmt: skip


def row(
    problem: Problem, method: str, steps: int, nfe: int, seed: int, metrics: Mapping[str, Any], wall: float, **other
) -> Row:
    """A row of the benchmark: who, at what cost, and METRICS, None where a metric does not apply."""
    values = {name: metrics.get(name) for name in METRICS}
    who = {"mixture": problem.name, "method": method, "steps": steps, "nfe": nfe, "seed": seed, "w": None}
    at = {"wall_s": round(wall, 3), "device": jax.devices()[0].device_kind}
    return {**who, **values, "floor_sw2": problem.floor["sw2"], **at, **other}
