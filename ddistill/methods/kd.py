"""Naive knowledge distillation: regress the teacher's trajectory on its beginning (Luhman & Luhman 2021)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ddistill import grids
from ddistill.integrators import dpmpp_3s
from ddistill.losses.distances import L2, Distance
from ddistill.methods.base import Method, Pairs, Sampling, from_teacher
from ddistill.process import Process


@dataclass(frozen=True)
class KD:
    """E d(G_θ(x_T, T, 0), Φ_{T→0}(x_T)) over pairs (x_T, Φ_{T→0}(x_T)) that the teacher's integrator made.

    The coupling is deterministic, so that the least loss is 0, unlike that of independent pairs, whose optimum is the
    data mean. Data-free.

    steps: the numbers of steps that the student can sample in. With a largest number N above 1 the pairs hold the
    trajectory x_0 … x_N at the nodes t_0 … t_N of Karras' grid, and K steps jump N/K nodes at a time: K is drawn,
    then one of its jumps i → j, and g_θ(x_i, t_i, t_j) regresses the x0 that leads from x_i to x_j, d in the space of
    x0. The least number takes the share `few` of the samples; all jumps of the others are equally likely. distance:
    `Perceptual` for images. pairs: their number. teacher_steps: of the integrator for each pair, at least. ema: how
    much of the average of the student's weights is kept at a step.
    """

    steps: tuple[int, ...] = (1, 2, 4, 8)
    few: float = 0.5
    distance: Distance = field(default_factory=L2)
    pairs: int = 100_000
    teacher_steps: int = 22
    integrator: Callable = dpmpp_3s
    ema: float = 0.99

    def __post_init__(self):
        most = max(self.steps, default=0)
        if min(self.steps, default=0) < 1 or any(most % k for k in self.steps):
            raise ValueError(f"steps = {self.steps} must hold numbers from 1 on, each of which divides the largest")

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        most = max(self.steps)
        nodes = grids.karras(process, most)

        def loss(nets, batch, progress, key):
            k_jump, k_net = jax.random.split(key)
            cond = batch.get("cond")
            path = batch["path"] if most > 1 else jnp.stack([batch["noise"], batch["x"]], axis=1)
            i, j = self.jumps(k_jump, path.shape[0])
            x_t, x_s = (jax.vmap(lambda path, n: path[n])(path, n) for n in (i, j))
            t, s = (jnp.asarray(nodes, path.dtype)[n] for n in (i, j))
            x0 = process.destination(x_t, t, x_s, s)  # x_s itself at s = 0
            return jnp.mean(self.distance(nets["student"](x_t, t, cond, s=s, key=k_net), x0)), {}

        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"path"} if most > 1 else {"x", "noise"}),
            result="ema",
            pairs=Pairs(self.pairs, self.teacher_steps, self.integrator, most if most > 1 else 0),
            sampling=Sampling(lambda steps: self.times(nodes, steps)),
        )

    def jumps(self, key: Array, n: int) -> tuple[Array, Array]:
        """Nodes [n] that the samples of a batch jump from and to."""
        k_steps, k_start = jax.random.split(key)
        counts = sorted(set(self.steps))
        jumps = sum(counts[1:])
        law = [self.few, *[(1 - self.few) * k / jumps for k in counts[1:]]] if jumps else [1.0]
        steps = jax.random.choice(k_steps, jnp.asarray(counts), (n,), p=jnp.asarray(law))
        length = counts[-1] // steps
        start = jax.random.randint(k_start, (n,), 0, steps) * length
        return start, start + length

    def times(self, nodes: np.ndarray, steps: int) -> np.ndarray:
        """Every N/steps-th node."""
        if steps not in self.steps:
            raise ValueError(f"this student of naive distillation was taught {self.steps} steps; given {steps} steps")
        return nodes[:: (len(nodes) - 1) // steps]
