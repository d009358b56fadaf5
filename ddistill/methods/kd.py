"""Naive knowledge distillation: regress the end of the teacher's trajectory on its beginning (Luhman & Luhman 2021)."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from ddistill.losses.distances import L2, Distance
from ddistill.methods.base import Method, Pairs, Sampling, from_teacher
from ddistill.process import Process


@dataclass(frozen=True)
class KD:
    """E d(G_θ(x_T, T, 0), Φ_{T→0}(x_T)) over pairs (x_T, Φ_{T→0}(x_T)) that the teacher's integrator made.

    The coupling is deterministic, so that the least loss is 0, unlike that of independent pairs, whose optimum is the
    data mean. Data-free.
    """

    distance: Distance = field(default_factory=L2)
    pairs: int = 100_000
    teacher_steps: int = 64
    ema: float = 0.99

    def __call__(self, process: Process) -> Method:
        """The method on a process."""

        def loss(nets, batch, progress, key):
            student = nets["student"].jump(process, batch["noise"], process.t_max, 0.0, batch.get("cond"), key=key)
            return jnp.mean(self.distance(student, batch["x"])), {}

        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x", "noise"}),
            result="ema",
            pairs=Pairs(self.pairs, self.teacher_steps),
            sampling=Sampling(lambda steps: _one_step(process, steps)),
        )


def _one_step(process: Process, steps: int):
    if steps != 1:
        raise ValueError(f"a student of naive distillation knows one step, from t_max to 0; given {steps} steps")
    return [process.t_max, 0.0]
