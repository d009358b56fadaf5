"""Progressive distillation: a student takes in one step what its teacher takes in two (Salimans & Ho 2022)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators import heun
from ddistill.losses.distances import L2, Distance
from ddistill.losses.times import karras_time
from ddistill.losses.weightings import EDMWeight, Weighting
from ddistill.methods.base import Method, Round, Sampling, from_teacher
from ddistill.process import Process

Node = Callable[[Process, Array], Array]
"""The time at u in [0, 1], from 0 (the data) at u = 0 to t_max at u = 1; N steps have the nodes u = i/N."""


def karras_node(process: Process, u: Array, rho: float = 7.0) -> Array:
    """ρ^{1/rho} linear in u from t_min to t_max, but u = 0 is the data (Karras et al. 2022, eq. 5)."""
    return jnp.where(u <= 0, 0.0, karras_time(process, 1 - u, rho))


def uniform_node(process: Process, u: Array) -> Array:
    """t = u t_max, the grid of the paper on its cosine process."""
    return jnp.clip(u, 0.0, 1.0) * process.t_max


@dataclass(frozen=True)
class Progressive:
    """E w(t) d(x̂_θ(x_t, t, s), x̃), where x̃ brings x_t to where the teacher's two steps t → m → s end (alg. 2).

    Rounds of N = start/2, start/4, …, stop steps: the student of each is the teacher of the next. t is one of the N
    nodes u = 1/N … 1, m and s half a step and a step below; nodes of N steps are nodes of 2N. The losses are in x0, and
    the weighting makes them those of another output: DataWeight x0's, EpsWeight (SNR) ε's, TruncatedSNRWeight the
    larger of both, the paper's; VWeight v's, SNR + 1 where α² + σ² = 1; EDMWeight F's.

    The error of the first teacher, which does not jump, is never made good: it takes solver_steps steps of `solver`
    from t to m and as many from m to s (one of `ddim` in the paper, with start = 1024 or more). A share `rehearsal` of
    the batch repeats single steps of the teacher, from those rounds of up to `serves` steps that are over, so that one
    student samples with stop, 2 stop, … `serves` steps. last: the last two rounds train this many times as long as the
    others (2 in Song et al. 2023, app. C), which takes a compilation more. stochastic: half of the steps that can begin
    half a step lower, between the nodes, from where the sampler of Meng et al. 2023, sec. 3.2 takes them:
    `sample(…, overshoot=1)` of N steps jumps as far as one of N/2. That sampler's last jump, one step of N, is what
    `rehearsal` teaches, of N up to `serves`.
    """

    start: int = 16
    stop: int = 1
    solver: Callable = heun
    solver_steps: int = 4
    node: Node = karras_node
    weighting: Weighting = field(default_factory=EDMWeight)
    distance: Distance = field(default_factory=L2)
    rehearsal: float = 0.2
    serves: int = 8
    stochastic: bool = False
    last: float = 1.0
    ema: float = 0.99

    def __post_init__(self):
        ratio = self.start // self.stop if self.stop >= 1 else 0
        if ratio < 2 or ratio & (ratio - 1) or ratio * self.stop != self.start:
            raise ValueError(
                f"progressive distillation halves start = {self.start} down to stop = {self.stop}: start must be stop "
                "times 2, 4, 8, …, and stop at least 1"
            )

    @property
    def halvings(self) -> list[int]:
        """The number of steps N of each round."""
        return [self.start >> (k + 1) for k in range((self.start // self.stop).bit_length() - 1)]

    def __call__(self, process: Process) -> tuple[Round, ...]:
        """One round for each halving, on a process."""

        def loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_i, k_noise, k_net, k_old = jax.random.split(key, 4)
            now = self.start / 2.0 ** (progress.round + 1)
            n, old = self._steps_of_each(k_old, now, progress.round, x0.shape[0])
            i = jnp.floor(jax.random.uniform(k_i, x0.shape[:1]) * n)
            if self.stochastic:
                lower = jax.random.bernoulli(jax.random.fold_in(k_i, 1), shape=x0.shape[:1])
                i = jnp.where(lower & (i >= 1), i - 0.5, i)
            # A former round's step is the teacher's own: its second half stays where it is.
            u_t, u_s = (i + 1) / n, i / n
            u_m = jnp.where(old, u_s, 0.5 * (u_t + u_s))
            t, m, s = (self.node(process, u) for u in (u_t, u_m, u_s))
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)

            def first():
                # Grids differ per sample, their number of nodes does not: m is the middle one.
                part = jnp.arange(2 * self.solver_steps)[:, None] / (2 * self.solver_steps)
                nodes = jnp.concatenate([self.node(process, u_t + part * (u_s - u_t)), s[None]])
                return self.solver(nets["teacher"].bind(cond), process, nodes, x_t).x

            def later():
                x_m = nets["teacher"].jump(process, x_t, t, m, cond)
                return nets["teacher"].jump(process, x_m, m, s, cond)

            x_s = jax.lax.cond(progress.round == 0, first, later)
            target = process.destination(x_t, t, x_s, s)  # app. G; at s = 0, where σ = 0, x_s itself
            x0_hat = nets["student"](x_t, t, cond, s=s, key=k_net)
            distance = self.distance(x0_hat, jax.lax.stop_gradient(target))
            return jnp.mean(self.weighting(process, t) * distance), {"steps": now, "distance": jnp.mean(distance)}

        method = Method(
            losses={"student": loss},
            init={"student": from_teacher},
            ema={"ema": ("student", self.ema)},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: self._times(process, steps)),
        )
        two_from_last = len(self.halvings) - 2
        return tuple(
            Round(f"{n}-steps", method, self.last if k >= two_from_last else 1.0, k)
            for k, n in enumerate(self.halvings)
        )

    def _steps_of_each(self, key: Array, now: Array, round: Array, batch: int) -> tuple[Array, Array]:
        """N for each sample and whether it rehearses a former round, of 2 `now`, 4 `now`, … up to `serves` steps."""
        k_old, k_n = jax.random.split(key)
        former = jnp.minimum(jnp.floor(jnp.log2(self.serves / now) + 1e-3), round)
        old = (jax.random.uniform(k_old, (batch,)) < self.rehearsal) & (former >= 1)
        doublings = 1 + jnp.floor(jax.random.uniform(k_n, (batch,)) * former)
        return jnp.where(old, now * 2.0**doublings, now), old

    def _times(self, process: Process, steps: int) -> Array:
        served = [n for n in self.halvings if n == self.stop or (self.rehearsal > 0 and n <= self.serves)]
        if steps not in served:
            raise ValueError(
                f"this student of progressive distillation samples in {' or '.join(map(str, sorted(served)))} steps, "
                f"not in {steps}: set stop, or serves with rehearsal > 0"
            )
        return self.node(process, jnp.arange(steps, -1, -1) / steps)
