"""Q8. "Would it be more efficient sampling these samples using G_θ(z) at each training iteration?"

One-step students of eight modes by distribution matching with the score of the step's own B samples, with and without
a queue of the 1024 before them, (1) after the same number of samples from the generator, (2) after the same CPU time.
"""

import time

import jax
import numpy as np
from common import Case, Distillation, case, command_line, conclude, gmm8, over_seeds, published, starts, table
from drawing import Panel, picture

from ddistill.methods.fake_scores import MultiSample
from ddistill.net import Net

SIZES = (16, 64, 256, 1024)
QUEUES = (0, 1024)


def run_of(world: Case, size: int, queue: int, steps: int) -> Distillation:
    """A distillation in so many steps."""
    return Distillation(world, published(MultiSample(queue)), steps, size=size)


def seconds_per_step(world: Case, size: int, queue: int, start: Net, count: int = 20) -> float:
    """CPU time of a step, the better of two runs after a first one."""
    run, took = run_of(world, size, queue, count), []
    for _ in range(3):
        begin = time.process_time()
        jax.block_until_ready(run(start, jax.random.key(0)).net.params)
        took.append(time.process_time() - begin)
    return min(took[1:]) / count


def main(seeds: int = 3, steps: int = 1000, out: str | None = None, seconds: float = 2.0) -> dict:
    """Print the table. steps: those of 64 samples each; there are as many samples for all sizes."""
    world = case(gmm8(2))
    begin = starts(world, seeds, 500, width=64, blocks=2)
    names = [(size, queue) for queue in QUEUES for size in SIZES]
    cost = {name: seconds_per_step(world, *name, begin[0]) for name in names}
    counts = {
        "samples": {(size, queue): max(1, 64 * steps // size) for size, queue in names},
        "time": {name: max(1, int(seconds * steps / 1000 / cost[name])) for name in names},
    }
    runs = {(by, n): run_of(world, *n, count) for by, of in counts.items() for n, count in of.items()}

    def one(seed):
        row: dict = {}
        for (by, name), run in runs.items():
            found = world.judge(run(begin[seed], jax.random.key(seed))(1))
            row |= {(by, name, what): found[what] for what in ("sw2", "precision")}
        return row

    values = over_seeds(seeds, one)
    table(
        f"One-step students of eight modes after {64 * steps} samples, and after {seconds * steps / 1000:g} CPU s",
        ["queue", "B", "ms a step", "steps", "sw2", "precision", "steps in time", "sw2", "precision"],
        [
            [
                str(n[1]), str(n[0]), f"{1000 * cost[n]:.1f}",
                str(counts["samples"][n]), values["samples", n, "sw2"], values["samples", n, "precision"],
                str(counts["time"][n]), values["time", n, "sw2"], values["time", n, "precision"],
            ]
            for n in names
        ],
    )  # fmt: skip
    sw2 = {(by, n): float(np.mean(values[by, n, "sw2"])) for by, n in runs}
    best = {by: min(names, key=lambda n, by=by: sw2[by, n]) for by in counts}
    own = {by: min((n for n in names if not n[1]), key=lambda n, by=by: sw2[by, n]) for by in counts}
    gain = {size: sw2["samples", (size, 1024)] / sw2["samples", (size, 0)] for size in SIZES}
    conclude(
        bool(sw2["time", own["time"]] < 1.3 * sw2["time", best["time"]] and own["time"][0] in SIZES[1:]),
        f"yes: the batch itself is enough. In equal time {own['time'][0]} fresh samples a step are best "
        f"(sw2 {sw2['time', own['time']]:.3f}; 16 give {sw2['time', (16, 0)]:.3f}), and the best with a queue comes to "
        f"{min(sw2['time', n] for n in names if n[1]):.3f}; from equally many samples {own['samples'][0]} a step are "
        f"best ({sw2['samples', own['samples']]:.3f}). The queue, whose samples are of older students, multiplies sw2 "
        "at equal samples by " + ", ".join(f"{gain[size]:.2f} at B = {size}" for size in SIZES) + ".",
    )
    if out:
        picture(
            out,
            *(
                Panel(
                    f"after equal {by}", "B", "sw2", SIZES,
                    {f"queue {q}" if q else "no queue": [values[by, (n, q), "sw2"] for n in SIZES] for q in QUEUES},
                    log="xy",
                )
                for by in counts
            ),
        )  # fmt: skip
    return values


if __name__ == "__main__":
    command_line(main)
