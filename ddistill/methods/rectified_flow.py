"""Rectified flow: velocity regression on couplings of noise and data, reflow, distillation (Liu et al. 2022)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill import grids
from ddistill.integrators import dpmpp_3m
from ddistill.losses.distances import L2, Distance
from ddistill.losses.times import Nodes, TimeLaw, Uniform
from ddistill.losses.weightings import DataWeight, Weighting
from ddistill.methods.base import Method, Pairs, Round, Sampling, from_teacher
from ddistill.methods.consistency import Consistency
from ddistill.process import Process, flow


@dataclass(frozen=True)
class AlphaWeight:
    """α(t), which is 1 − t on rectified flow: the weight of rf++'s velocity term (Lee et al. 2024)."""

    def __call__(self, process: Process, t: Array) -> Array:
        """t: [B] -> [B]."""
        return process.alpha(t)


@dataclass(frozen=True)
class RectifiedFlow:
    """E w(t) d(û_θ(x_t, t), ε − x0) + d'(x̂0, x0), x_t = (1 − t) x0 + t ε and x̂0 = x_t − t û.

    Liu et al. 2022, eq. 1, with t = 0 the data: the minimum is E[ε − x0 | x_t], the flow of the coupling of ε and x0,
    and a student samples from t = 1 down by Euler steps. On data and independent noise it is 1-RF, and its start, the
    teacher carried into flow, is its optimum already: a small `rate`, of the optimiser's, keeps the noise of that
    coupling from undoing it. With `pairs` it is a round of reflow. Either distance may be
    None: d alone is the paper's, d' alone (that is t² ‖û − u‖²) its distillation, both are rf++ (Lee et al. 2024).
    """

    times: TimeLaw = field(default_factory=Uniform)
    distance: Distance | None = field(default_factory=L2)
    weighting: Weighting = field(default_factory=DataWeight)
    data_distance: Distance | None = None
    pairs: Pairs | None = None
    rate: float = 0.03
    ema: float = 0.999

    def __call__(self, process: Process) -> Method:
        """The method for a teacher of any process; the student lives in rectified flow's."""
        process = flow()

        def loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_t, k_noise, k_net = jax.random.split(key, 3)
            noise = jax.random.normal(k_noise, x0.shape) if self.pairs is None else batch["noise"]
            t = self.times(process, k_t, x0.shape[0])
            x_t = process.diffuse(x0, noise, t)
            estimate = nets["student"](x_t, t, cond, key=k_net)
            terms = {}
            if self.distance is not None:
                distance = self.distance(process.velocity(estimate, x_t, t), noise - x0)
                terms["velocity"] = jnp.mean(self.weighting(process, t) * distance)
            if self.data_distance is not None:
                terms["data"] = jnp.mean(self.data_distance(estimate, x0))
            return sum(terms.values()), terms

        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            rate={"student": self.rate},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x"} if self.pairs is None else {"x", "noise"}),
            result="ema",
            pairs=self.pairs,
            process=process,
            sampling=Sampling(lambda steps: grids.uniform(process, steps)),
        )


@dataclass(frozen=True)
class Reflow:
    """Rounds of reflow, 2-RF to k-RF, each on the pairs of the flow before, then the distillation of the last.

    Liu et al. 2022, alg. 1. The pairs of 2-RF come from the teacher itself, in flow time, and so need no 1-RF; those of
    later rounds from flows that are nearly straight, and so need few steps. The distillation regresses x0 on points of
    the line to its noise, at t = 1 and the other nodes j/nodes; where x̂0 is right so is every jump along the line, and
    one student serves each number of steps that divides `nodes`. nodes = 1 is one step alone, 0 no distillation.
    shares: of the training steps: 2-RF, which hands its errors down, each later flow, distillation. Times uniform make
    the best flow to make pairs with; `UShaped` ones (rf++) make one better in a single step. Data-free, unless a share
    `inverted` of the pairs is data and the noise that the flow takes it to (rf++).
    """

    k: int = 3
    nodes: int = 8
    first: float = 0.5
    regression: RectifiedFlow = field(default_factory=lambda: RectifiedFlow(rate=1.0, ema=0.99))
    distance: Distance = field(default_factory=L2)
    count: int = 100_000
    teacher_steps: int = 96
    flow_steps: int = 24
    integrator: Callable = dpmpp_3m
    inverted: float = 0.0
    shares: tuple[float, float, float] = (3.0, 1.0, 2.0)

    def __call__(self, process: Process) -> tuple[Round, ...]:
        """The rounds for a teacher of any process."""
        if self.k < 2:
            raise ValueError(f"k = {self.k}: reflow makes k-RF with k >= 2; RectifiedFlow is 1-RF")
        of_teacher = Pairs(self.count, self.teacher_steps, self.integrator, inverted=self.inverted)
        of_flow = Pairs(self.count, self.flow_steps, self.integrator, inverted=self.inverted)
        later = dataclasses.replace(self.regression, pairs=of_flow)(process)
        rounds = [Round("2-rf", dataclasses.replace(self.regression, pairs=of_teacher)(process), self.shares[0])]
        rounds += [Round(f"{k}-rf", later, self.shares[1], k - 2) for k in range(3, self.k + 1)]
        if self.nodes:
            times = Nodes(self.nodes, self.first)
            distil = dataclasses.replace(
                self.regression, times=times, distance=None, data_distance=self.distance, pairs=of_flow
            )
            rounds.append(Round("distilled", distil(process), self.shares[2], self.k - 1))
        return tuple(rounds)


@dataclass(frozen=True)
class FlowConsistency:
    """Consistency distillation of a flow (Song et al. 2023): f(x, t) = x − t û. "Combine CD and RF".

    Rounds of reflow (Liu et al. 2022) come first if k > 1: where the flow is straight one Euler step is exact, so that
    few intervals and a plain solver suffice. With k = 1 the flow is the teacher's own.
    """

    k: int = 1
    reflow: Reflow = field(default_factory=lambda: Reflow(nodes=0))
    consistency: Consistency = field(default_factory=Consistency)
    share: float = 1.0

    def __call__(self, process: Process) -> tuple[Round, ...]:
        """The rounds for a teacher of any process."""
        last = dataclasses.replace(self.consistency(flow()), process=flow())
        before = dataclasses.replace(self.reflow, k=self.k)(process) if self.k > 1 else ()
        return (*before, Round("consistency", last, self.share, self.k - 1))
