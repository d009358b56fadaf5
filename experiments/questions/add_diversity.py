"""Claim: "both objectives lead to mode collapse → very poor image diversity for a given prompt" (on ADD).

L_adv + λ L_distill over λ, from the discriminator alone to score distillation alone, for one-step students of 8
conditions of 4 modes each in the plane: precision, and recall and diversity within a condition.
"""

import jax
import numpy as np
from common import command_line, conclude, over_seeds, table
from drawing import Panel, picture
from prompts import ADVERSARY, Students, starts

from ddistill.methods.add import ADD
from ddistill.methods.sds import SDS

WEIGHTS = (0.0, 0.1, 1.0, 10.0)
ALONE = "distillation alone (SDS)"
MEASURES = ("precision", "recall", "diversity")


def main(seeds: int = 3, steps: int = 800, out: str | None = None) -> dict:
    """Print the table."""
    begin = starts(seeds)
    runs = {f"{w:g}": Students(ADD(ADVERSARY, w, steps=1, first=1.0, rate=0.3), steps) for w in WEIGHTS}
    runs[ALONE] = Students(SDS(), steps)

    def one(seed):
        row: dict = {}
        for name, run in runs.items():
            row |= {(name, what): value for what, value in run(begin[seed], 1.0, jax.random.key(seed)).items()}
        return row

    values = over_seeds(seeds, one)
    table(
        f"ADD over λ, one step, {steps} updates",
        ["λ", "precision", "recall within a condition", "diversity within a condition"],
        [[name, *(values[name, what] for what in MEASURES)] for name in runs],
    )
    mean = {name: float(np.mean(value)) for name, value in values.items()}
    first, *_, last, alone = runs
    recalls = ", ".join(f"{mean[name, 'recall']:.2f} at λ = {name}" for name in list(runs)[:-1])
    ends = {what: [mean[name, what] for name in (first, last, alone)] for what in ("diversity", "precision")}
    conclude(
        bool(mean[alone, "diversity"] < 0.3 and mean[last, "diversity"] < 0.7 * mean[first, "diversity"]),
        "of the two objectives it is score distillation that collapses, and it takes the discriminator with it as λ "
        f"grows: recall within a condition {recalls}, {mean[alone, 'recall']:.2f} without a discriminator; diversity "
        "{:.2f} to {:.2f}, and {:.2f} without; ".format(*ends["diversity"])
        + "precision {:.2f} to {:.2f}, and {:.2f} without.".format(*ends["precision"]),
    )
    if out:
        picture(
            out,
            Panel(
                "ADD over λ", "", "", [f"λ = {name}" for name in list(runs)[:-1]] + [ALONE],
                {what: [values[name, what] for name in runs] for what in MEASURES},
            ),
        )  # fmt: skip
    return values


if __name__ == "__main__":
    command_line(main)
