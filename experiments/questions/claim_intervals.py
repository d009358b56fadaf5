"""Claim: "doing CD on individual intervals works fine", in place of all of CTM.

Multistep consistency and phased consistency models, which are consistency distillation within the segments of the
trajectory, against CTM and plain consistency distillation after equally many training steps.
"""

import jax
import numpy as np
from common import Distillation, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill.methods import Consistency
from ddistill.methods.ctm import CTM
from ddistill.methods.multistep import MultistepConsistency
from ddistill.methods.phased import PhasedConsistency

STEPS = (1, 2, 4, 8)


def main(seeds: int = 3, steps: int = 1000) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    configs = {
        "consistency, renoised": Consistency(),
        "multistep consistency": MultistepConsistency(),
        "phased consistency": PhasedConsistency(),
        "CTM, γ = 0": CTM(),
    }
    runs = {name: Distillation(plane, config, steps) for name, config in configs.items()}

    def one(seed):
        row: dict = {}
        for name, run in runs.items():
            student = run(begin[seed], jax.random.key(seed))
            for k in STEPS:
                x = student(k)
                row["sw2", name, k] = plane.sw2(x)
                row["endpoint", name, k] = plane.endpoint(x)
        return row

    values = over_seeds(seeds, one)
    for what, names in (("sw2", list(runs)), ("endpoint", list(runs)[1:])):
        table(
            f"{what} on three modes in the plane, {steps} training steps",
            ["student", *(f"K = {k}" for k in STEPS)],
            [[name, *(values[what, name, k] for k in STEPS)] for name in names],
        )
    mean = {name: np.mean([values["endpoint", name, k] for k in STEPS]) for name in list(runs)[1:]}
    best = min(mean["multistep consistency"], mean["phased consistency"])
    conclude(
        bool(best < 1.1 * mean["CTM, γ = 0"]),
        f"supported: consistency on segments has a mean endpoint error of {best:.3f} where CTM has "
        f"{mean['CTM, γ = 0']:.3f}.",
    )
    return values


if __name__ == "__main__":
    command_line(main)
