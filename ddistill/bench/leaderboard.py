"""All rows of the benchmark with exact teachers: what `ddistill bench exact` prints."""

import dataclasses
from collections.abc import Iterator, Sequence

from ddistill.bench.exact import Row, fitted_network, problem, recipe, reference_rows, student_rows, teacher_row
from ddistill.bench.guided import guided_rows
from ddistill.integrators import dpmpp_2m
from ddistill.methods import METHODS


def leaderboard(names: Sequence[str], mixtures: Sequence[str], seeds: int) -> Iterator[Row]:
    """Rows of every mixture, seed and method, each as soon as it is known; the teacher's first."""
    for mixture in mixtures:
        case = problem(mixture)
        yield from reference_rows(case)
        plan = recipe(case.mixture.d)
        for seed in range(seeds):
            start = fitted_network(case, seed, plan)
            yield teacher_row(case, start, "teacher/network", dpmpp_2m, 35, seed)
            for name in names:
                entry = METHODS[name]
                made = entry.make()(case.process)
                trained = dataclasses.replace(plan, steps=round(entry.effort * plan.steps))
                if entry.guided:
                    yield from guided_rows(case, name, made, seed, trained, entry.steps)
                else:
                    yield from student_rows(case, name, made, start, seed, trained, entry.steps)
