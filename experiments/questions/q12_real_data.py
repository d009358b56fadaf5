"""Q12. "Do we need real data?" for consistency distillation.

The loss uses data only to choose the points x_t at which f is trained: any law that covers the diffused data has the
same optimum. So the same loss is run on points from several sources and the students are judged from the prior, where
they will be used: root-mean-square distance from the exact end points, and sliced Wasserstein-2.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from common import Student, Training, case, command_line, conclude, gmm2d, over_seeds, starts, table

from ddistill import grids
from ddistill.evaluate.mixture import SCALE
from ddistill.integrators import ddim, dpmpp_2m, heun
from ddistill.losses.distances import PseudoHuber
from ddistill.methods import Consistency
from ddistill.methods.base import Method
from ddistill.methods.consistency import node, per_interval
from ddistill.process import Process


@dataclass(frozen=True)
class OnTrajectories:
    """Consistency distillation at points of the teacher's own trajectories, solved down from noise: no data at all."""

    intervals: int = 10
    solver_steps: int = 2
    way_steps: int = 10

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        like = Consistency()(process)

        def loss(nets, batch, progress, key):
            noise, n, teacher = batch["x"], self.intervals, nets["teacher"].bind()
            # Not nearer to the start than nodes can be told apart.
            i = jnp.clip(jax.random.uniform(key, noise.shape[:1]) * n, 0.01, n - 1)
            way = [node(process, i * (k / self.way_steps), n) for k in range(self.way_steps + 1)]
            x_t, t, s = dpmpp_2m(teacher, process, jnp.stack(way), noise).x, way[-1], node(process, i + 1, n)
            steps = [node(process, i + k / self.solver_steps, n) for k in range(self.solver_steps)]
            x_s = heun(teacher, process, jnp.stack([*steps, s]), x_t).x
            f_t = nets["student"].jump(process, x_t, t, 0 * t)
            f_s = jax.lax.stop_gradient(nets["student"].jump(process, x_s, s, 0 * s))
            return jnp.mean(per_interval(process, t, s) * PseudoHuber()(f_t, f_s)), {}

        return dataclasses.replace(like, losses={"student": loss})


def main(seeds: int = 3, steps: int = 700) -> dict:
    """Print the table."""
    plane = case(gmm2d())
    begin = starts(plane, seeds)
    process, d, count = plane.process, plane.mixture.d, 20_000
    keys = jax.random.split(jax.random.key(21), 5)
    noise, unit = process.prior(keys[0], (count, d)), jax.random.normal(keys[1], (count, d))

    def generated(integrator, nodes):
        return integrator(plane.teacher.bind(), process, grids.karras(process, nodes), noise).x

    real, modes = plane.mixture.sample_with_modes(keys[2], count)
    largest = real[modes == int(np.argmax(plane.mixture.weights))]
    sources = {
        "20 000 data points": real,
        "50 data points": jnp.tile(real[:50], (count // 50, 1)),
        "teacher's samples, 2M with 35 steps": generated(dpmpp_2m, 35),
        "teacher's samples, Euler with 4 steps": generated(ddim, 4),
        "teacher's trajectories from N(0, T²)": noise,
        "N(0, .5²), the data's mean and scale": SCALE * unit,
        "N(0, 2²), four times too broad": 4 * SCALE * unit,
        "a single point, the mean": 0 * unit,
        "one mode of three": largest[jax.random.randint(keys[3], (count,), 0, len(largest))],
    }

    def rows(key, store):
        return {"x": store[jax.random.randint(key, (256,), 0, count)]}

    local = Consistency(intervals=10, max_intervals=10)(process)
    diffused, carried = Training(local, rows, steps), Training(OnTrajectories()(process), rows, steps)

    def one(seed):
        row = {}
        for name, x0 in sources.items():
            training = carried if "trajectories" in name else diffused
            net = training(begin[seed], plane.teacher, jax.random.key(seed), x0)
            x = Student(net, process, local, plane)(1)
            row["endpoint", name], row["sw2", name] = plane.endpoint(x), plane.sw2(x)
        return row

    values = over_seeds(seeds, one)
    table(
        "Consistency distillation of three modes in the plane, one step of the student",
        ["x0 of the points x_t", "endpoint", "sw2"],
        [[name, values["endpoint", name], values["sw2", name]] for name in sources],
    )
    first, *others = list(sources)
    ratio = {name: float(np.mean(values["endpoint", name]) / np.mean(values["endpoint", first])) for name in sources}
    free = max(ratio[name] for name in others[:3])
    own, broad, narrow = (ratio[others[i]] for i in (3, 5, 7))
    conclude(
        free < 1.25 and own < 1.1 and max(ratio.values()) < 2,
        "no. 50 points of data or coarse samples of the teacher train as good a student, and the teacher's own "
        f"trajectories, which need no data at all, have {own:.2f} times its error. Even wrong data costs little, since "
        f"its noised points still cover the way: {broad:.2f} times the error where it is four times too broad, "
        f"{narrow:.2f} times where it is one mode of three.",
    )
    return values


if __name__ == "__main__":
    command_line(main)
