"""Q14. "Expensive training due to global consistency that requires many teacher steps".

What a training step costs, in calls of the teacher and in CPU time with a network for the teacher, and what the same
time buys: local matching (CTM), soft and global matching, consistency distillation.
"""

import time
from collections.abc import Callable

import jax
import numpy as np
from common import Case, Distillation, Training, case, command_line, conclude, data, gmm2d, over_seeds, starts, table

from ddistill.methods import Consistency
from ddistill.methods.ctm import CTM
from ddistill.net import Net

CONFIGS: dict[str, Callable] = {
    "CTM local, 3 Heun steps": CTM(),
    "CTM soft, 10 Heun steps": CTM(gap=(0.0, 1.0), solver_steps=10),
    "CTM global, 17 Heun steps": CTM(gap=(1.0, 1.0), solver_steps=17),
    "consistency, 2 Heun steps": Consistency(),
}


def teacher_calls(config) -> int:
    """Calls of the teacher in one training step: Heun makes two in each of its steps."""
    return 2 * config.solver_steps


def seconds_per_step(plane: Case, config, net: Net, count: int = 60) -> float:
    """CPU time of a training step with `net` for the teacher, the best of three loops after a first one."""
    training = Training(config(plane.process), data(plane), count)
    took = []
    for _ in range(4):
        begin = time.process_time()
        jax.block_until_ready(training(net, net, jax.random.key(0)).params)
        took.append(time.process_time() - begin)
    return min(took[1:]) / count


def main(seeds: int = 3, seconds: float = 4.0) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    cost = {name: seconds_per_step(plane, config, begin[0]) for name, config in CONFIGS.items()}
    steps = {name: max(20, int(seconds / cost[name])) for name in CONFIGS}
    runs = {name: Distillation(plane, config, steps[name]) for name, config in CONFIGS.items()}

    def one(seed):
        row: dict = {}
        for name, run in runs.items():
            student = run(begin[seed], jax.random.key(seed))
            for k in (1, 4):
                row[name, k] = plane.sw2(student(k))
        return row

    values = over_seeds(seeds, one)
    first = next(iter(CONFIGS))
    table(
        f"Cost of a step and what {seconds:g} s of training buy (steps = time/cost), three modes in the plane",
        ["training", "teacher calls", "ms a step", "relative", "steps", "sw2, K = 1", "sw2, K = 4"],
        [
            [
                name,
                str(teacher_calls(config)),
                f"{1000.0 * cost[name]:.1f}",
                f"{cost[name] / cost[first]:.2f}",
                str(steps[name]),
                values[name, 1],
                values[name, 4],
            ]
            for name, config in CONFIGS.items()
        ],
    )
    dear = "CTM global, 17 Heun steps"
    best = np.mean(values[first, 1] + values[first, 4])
    others = [np.mean(values[name, 1] + values[name, 4]) for name in CONFIGS if "soft" in name or "global" in name]
    conclude(
        bool(cost[dear] > 1.5 * cost[first] and best < 1.1 * min(others)),
        f"true, and not worth it: a global step costs {cost[dear] / cost[first]:.1f} times a local one, and at equal "
        "time local matching is at least as good.",
    )
    return {"cost": cost, "values": values}


if __name__ == "__main__":
    command_line(main)
