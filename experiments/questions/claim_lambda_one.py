"""Claim: "λ = 1 in practice" in consistency distillation.

So the original papers; iCT and ECT weight with 1/(t − s). Both, with either distance, on the default grid.
"""

import jax
import numpy as np
from common import Distillation, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill.losses.distances import L2, PseudoHuber
from ddistill.methods import Consistency


def main(seeds: int = 3, steps: int = 800) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    configs = {
        (f"λ = {'1/(t − s)' if weighted else '1'}", name): Consistency(weighted=weighted, distance=distance)
        for name, distance in (("pseudo-Huber", PseudoHuber()), ("l2", L2()))
        for weighted in (False, True)
    }
    runs = {name: Distillation(plane, config, steps) for name, config in configs.items()}

    def one(seed):
        row: dict = {}
        for name, run in runs.items():
            x = run(begin[seed], jax.random.key(seed))(1)
            row["endpoint", name], row["sw2", name] = plane.endpoint(x), plane.sw2(x)
        return row

    values = over_seeds(seeds, one)
    table(
        "Consistency distillation of three modes in the plane, one step of the student",
        ["weight", "distance", "endpoint", "sw2"],
        [[*name, values["endpoint", name], values["sw2", name]] for name in runs],
    )
    mean = {name: np.mean(values["endpoint", name]) for name in runs}
    gain = {d: mean["λ = 1", d] / mean["λ = 1/(t − s)", d] for d in ("pseudo-Huber", "l2")}
    conclude(
        min(gain.values()) > 1,
        f"λ = 1 is not the better choice: 1/(t − s) divides the endpoint error by {gain['pseudo-Huber']:.2f} "
        f"with pseudo-Huber and by {gain['l2']:.2f} with l2.",
    )
    return values


if __name__ == "__main__":
    command_line(main)
