"""All rows of the benchmark with exact teachers: what `ddistill bench exact` prints."""

import dataclasses
from collections.abc import Iterator, Sequence

from ddistill.bench.exact import Row, fitted_network, problem, recipe, reference_rows, student_rows, teacher_row
from ddistill.bench.guided import guided_rows
from ddistill.integrators import dpmpp_2m
from ddistill.methods import METHODS


def leaderboard(names: Sequence[str], mixtures: Sequence[str], seeds: int, have: Sequence[Row] = ()) -> Iterator[Row]:
    """Rows of every mixture, seed and method, each as soon as it is known; the teacher's first.

    have: rows of earlier calls. A method whose last row is among them for a mixture and seed is not trained again.
    """
    known = {(row["mixture"], row["method"], row["steps"], row["seed"]) for row in have}
    for mixture in mixtures:
        todo = [
            (seed, name)
            for seed in range(seeds)
            for name in names
            if (mixture, name, METHODS[name].steps[-1], seed) not in known
        ]
        if not todo:
            continue
        case = problem(mixture)
        if (mixture, "teacher/exact-map", 0, 0) not in known:
            yield from reference_rows(case)
        plan = recipe(case.mixture.d)
        for seed in dict.fromkeys(seed for seed, _ in todo):
            start = fitted_network(case, seed, plan)
            if (mixture, "teacher/network", 35, seed) not in known:
                yield teacher_row(case, start, "teacher/network", dpmpp_2m, 35, seed)
            for name in (name for s, name in todo if s == seed):
                entry = METHODS[name]
                made = entry.make()(case.process)
                trained = dataclasses.replace(plan, steps=round(entry.effort * plan.steps))
                if entry.guided:
                    yield from guided_rows(case, name, made, seed, trained, entry.steps)
                else:
                    yield from student_rows(case, name, made, start, seed, trained, entry.steps)
