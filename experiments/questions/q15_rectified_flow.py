"""Q15. Rectified flow, "not established in practice": does reflow straighten, and what is it worth?

Straightness, transport cost and the error of one Euler step of 1-RF (the teacher carried into flow time, its optimum),
2-RF and 3-RF, then 3-RF distilled, against naive distillation and consistency distillation with as many training steps.
"""

import jax
import numpy as np
from common import Distillation, Student, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill.evaluate.flow import straightness
from ddistill.methods import KD, Consistency
from ddistill.methods.rectified_flow import RectifiedFlow, Reflow
from ddistill.net import retime
from ddistill.process import flow
from ddistill.sample import matched_noise


def main(seeds: int = 3, steps: int = 2400) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    there = flow()
    noise = matched_noise(plane.noise, plane.process, there)
    teacher = retime(plane.teacher, plane.process, there)
    reflow = Distillation(plane, Reflow(k=3), steps)
    others = {
        "naive distillation": Distillation(plane, KD(steps=(1,)), steps),
        "consistency distillation": Distillation(plane, Consistency(), steps),
    }

    def judged(student: Student) -> dict[str, float]:
        x = student(1)
        row = {"endpoint": plane.endpoint(x), "sw2": plane.sw2(x)}
        if student.process == there:
            row |= straightness(student.net, there, noise[:1000])
        return row

    def one(seed):
        row: dict = {}
        one_rf = Student(teacher, there, RectifiedFlow(rate=1.0, ema=0.99)(plane.process), plane)
        names = ["1-RF: the exact teacher in flow time", "2-RF", "3-RF", "3-RF distilled"]
        students = [one_rf, *reflow.rounds(begin[seed], jax.random.key(seed))]
        for name, student in zip(names, students, strict=True):
            row |= {(name, what): value for what, value in judged(student).items()}
        for name, run in others.items():
            row |= {(name, what): value for what, value in judged(run(begin[seed], jax.random.key(seed))).items()}
        return row

    values = over_seeds(seeds, one)
    names = list(dict.fromkeys(name for name, _ in values))
    whats = ("straightness", "transport_cost", "endpoint", "sw2")
    table(
        f"Three modes in the plane, one step; {steps} training steps in all, a third in each round of reflow",
        ["student", *whats],
        [[name, *(values.get((name, what), "–") for what in whats)] for name in names],
    )
    bent = [values[name, "straightness"].mean() for name in names[:3]]
    error = {name: values[name, "endpoint"].mean() for name in names}
    ratio = {name: error[f"{name} distillation"] / error["3-RF distilled"] for name in ("naive", "consistency")}
    conclude(
        bool(bent[0] > 20 * bent[1] and error[names[0]] > 5 * error["2-RF"]),
        f"one reflow straightens the flow: S falls by a factor {bent[0] / bent[1]:.0f}, the one-step error by "
        f"{error[names[0]] / error['2-RF']:.0f}, and by another {error['2-RF'] / error['3-RF']:.2f} with the second. "
        f"After as many training steps naive distillation has {ratio['naive']:.2f} and consistency distillation "
        f"{ratio['consistency']:.2f} times the error of the distilled 3-RF.",
    )
    np.testing.assert_array_less(values["2-RF", "transport_cost"], 1.1 * values[names[0], "transport_cost"])
    return values


if __name__ == "__main__":
    command_line(main)
