"""All rows of the benchmark with exact teachers: what `ddistill bench exact` prints."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ddistill.bench.exact import (
    FEW,
    Problem,
    Row,
    fitted_network,
    problem,
    recipe,
    reference_rows,
    student_rows,
    teacher_row,
)
from ddistill.bench.guided import guided_rows
from ddistill.integrators import dpmpp_2m
from ddistill.methods import METHODS
from ddistill.net import Net


def leaderboard(
    names: Sequence[str],
    mixtures: Sequence[str],
    seeds: int,
    have: Sequence[Row] = (),
    jobs: int = 1,
    keep: Path | None = None,
) -> Iterator[Row]:
    """Rows of every mixture, seed and method, a student's as soon as all are known; with one job the teacher's first.

    have: rows of earlier calls. A method that has rows among them for a mixture and seed is not trained again.
    jobs: processes, of one thread each on a CPU, that train so many students at a time; they may share a GPU.
    keep: the folder for some samples of the students of the first seed (`bench.kept`).
    """
    known = {(row["mixture"], row["method"], row["steps"], row["seed"]) for row in have}
    todo = [
        (mixture, seed, name)
        for mixture in mixtures
        for seed in range(seeds)
        for name in names
        if (mixture, name, METHODS[name].steps[-1], seed) not in known
    ]
    parts: list[tuple] = []
    for mixture, seed in dict.fromkeys((mixture, seed) for mixture, seed, _ in todo):
        if seed == min(s for m, s, _ in todo if m == mixture) and (mixture, "teacher/exact-map", 0, 0) not in known:
            parts.append((_references, mixture))
        if (mixture, "teacher/network", 35, seed) not in known:
            parts.append((_network, mixture, seed))
        parts += [
            (_student, mixture, seed, name, None if seed else keep) for m, s, name in todo if (m, s) == (mixture, seed)
        ]
    if jobs == 1:
        for part in parts:
            yield from _all(part)
    else:
        yield from _side_by_side(parts, jobs)


@functools.lru_cache(maxsize=1)
def _case(mixture: str) -> Problem:
    return problem(mixture)


@functools.lru_cache(maxsize=1)
def _start(mixture: str, seed: int) -> Net:
    case = _case(mixture)
    return fitted_network(case, seed, recipe(case.mixture.d))


def _references(mixture: str) -> Iterator[Row]:
    return reference_rows(_case(mixture))


def _network(mixture: str, seed: int) -> Iterator[Row]:
    yield teacher_row(_case(mixture), _start(mixture, seed), "teacher/network", dpmpp_2m, 35, seed)


def _student(mixture: str, seed: int, name: str, keep: Path | None) -> Iterator[Row]:
    case, entry = _case(mixture), METHODS[name]
    plan = recipe(case.mixture.d)
    trained = dataclasses.replace(plan, steps=round(entry.effort[case.mixture.d > FEW] * plan.steps))
    made = entry.make()(case.process)
    if entry.guided:
        return guided_rows(case, name, made, seed, trained, entry.steps, keep=keep)
    return student_rows(case, name, made, _start(mixture, seed), seed, trained, entry.steps, keep)


def _all(part: tuple) -> list[Row]:
    rows, *which = part
    return list(rows(*which))


def _side_by_side(parts: Sequence[tuple], jobs: int) -> Iterator[Row]:
    """Rows of all parts, in the order in which they are ready, from processes that start with JAX unused."""
    with (
        _for_workers(),
        concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
    ):
        running = [pool.submit(_all, part) for part in parts]
        try:
            for done in concurrent.futures.as_completed(running):
                yield from done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _for_workers() -> Iterator[None]:
    """One thread for each process on a CPU; on a GPU no process takes all of the memory."""
    before = dict(os.environ)
    flags = f"{before.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".strip()
    os.environ.update(XLA_FLAGS=flags, OMP_NUM_THREADS="1", XLA_PYTHON_CLIENT_PREALLOCATE="false")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
