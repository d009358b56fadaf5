"""Consistency distillation: one network value along each trajectory of the teacher (Song et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators import dpmpp_3s
from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.losses.times import bounded_rho, karras_time
from ddistill.methods.base import Method, Progress, Sampling, from_teacher
from ddistill.process import Process


@dataclass(frozen=True)
class Consistency:
    """E λ d(f_θ(x_t, t), f_θ⁻(Solver_φ(x_t, t → s), s)), t and s neighbours on a grid of N intervals, f(x, 0) = x.

    Song et al. 2023, eq. 7. f(x, t) is the student's jump from t to 0. The grid is Karras' with 0 appended, uniform in
    ρ^{1/7}; N doubles from `intervals` to `max_intervals` (equal numbers fix N). λ = 1/(ρ_t − ρ_s). The target θ⁻ is
    the student itself behind a stop-gradient (target_ema = 0) or its average. solver: any deterministic integrator,
    taking solver_steps steps per interval; the student cannot be better than the chain of them. between: t is drawn
    between the nodes as well, and s one interval below it, so that f is trained at the times of every sampler; without,
    at the nodes alone, as in the paper. Few intervals with a good solver suffer less from errors handed down from
    interval to interval than many.
    """

    intervals: int = 10
    max_intervals: int = 20
    solver: Callable = dpmpp_3s
    solver_steps: int = 1
    between: bool = True
    distance: Distance = field(default_factory=PseudoHuber)
    weighted: bool = True
    target_ema: float = 0.0
    ema: float = 0.99
    rho: float = 7.0

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        target = "target" if self.target_ema else "student"

        def loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            k_n, k_noise, k_net = jax.random.split(key, 3)
            n = doubled(progress, self.intervals, self.max_intervals)
            i = jax.random.uniform(k_n, x0.shape[:1]) * n
            i = jnp.minimum(i, n - 1) if self.between else jnp.floor(i)
            t, s = node(process, i, n, self.rho), node(process, i + 1, n, self.rho)
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)
            nodes = [node(process, i + k / self.solver_steps, n, self.rho) for k in range(self.solver_steps)]
            x_s = self.solver(nets["teacher"].bind(cond), process, jnp.stack([*nodes, s]), x_t).x
            # One key for both branches: dropout must not differ between them.
            f_t = nets["student"].jump(process, x_t, t, jnp.zeros_like(t), cond, key=k_net)
            f_s = nets[target].jump(process, x_s, s, jnp.zeros_like(s), cond, key=k_net)
            weight = per_interval(process, t, s) if self.weighted else 1.0
            distance = self.distance(f_t, jax.lax.stop_gradient(f_s))
            return jnp.mean(weight * distance), {"intervals": n, "distance": jnp.mean(distance)}

        averages = {"target": ("student", self.target_ema)} if self.target_ema else {}
        return Method(
            losses={"student": loss},
            init={"student": from_teacher},
            ema={"ema": ("student", self.ema), **averages},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: renoising_times(process, steps), gamma=1.0),
        )


def doubled(progress: Progress, first: int, last: int) -> Array:
    """N at a moment of training: doubling from `first` at equal spans, piecewise constant, the last of them of `last`.

    Song & Dhariwal 2023, sec. 3.4: N = min(s0 2^⌊k/K'⌋, s1), K' = K/(⌈log2 s1/s0⌉ + 1). The paper's log2 ⌊s1/s0⌋ is
    the same for its ratio of 128; rounded up, s1 has a whole span whatever the ratio.
    """
    doublings = max(0, (-(-last // first) - 1).bit_length())  # ⌈log2 last/first⌉
    k = jnp.floor((doublings + 1) * progress.share)
    return jnp.minimum(first * 2.0**k, last)


def node(process: Process, i: Array, n: Array, rho: float = 7.0) -> Array:
    """Node i of n + 1, from t_max at 0 over t_min at n − 1 to 0 at n; i may lie between (Karras et al. 2022, eq. 5).

    Beyond n − 1 it stays at t_min until n. With n = 1, and where t_min is 0 itself, the ramp ends at n.
    """
    return jnp.where(i >= n, 0.0, karras_time(process, i / _ramp(process, n), rho))


def _ramp(process: Process, n: Array) -> Array:
    """How many of n intervals lie between t_max and t_min: all but that from t_min to 0, if there is one."""
    return jnp.maximum(n - (process.t_min > 0), 1)


def position(process: Process, t: Array, n: Array, rho: float = 7.0) -> Array:
    """The i in [0, n] for which `node` i of n + 1 is t; n for times below t_min, but for rounding."""
    high, low = bounded_rho(process, jnp.asarray([process.t_max, process.t_min])) ** (1 / rho)
    i = _ramp(process, n) * (high - bounded_rho(process, t) ** (1 / rho)) / (high - low)
    return jnp.where(t < 0.99 * process.t_min, n, jnp.clip(i, 0, n))


def per_interval(process: Process, t: Array, s: Array) -> Array:
    """1/(ρ_t − ρ_s), by which every interval pulls alike on its start (Song & Dhariwal 2023, sec. 3.2)."""
    return 1 / (bounded_rho(process, t) - bounded_rho(process, s))


def renoising_times(process: Process, steps: int, inner: tuple[float, ...] = ()) -> Array:
    """Times t_max, then steps − 1 noise-to-signal ratios from 4 down to .2 (one step in between: .8), then 0.

    Above, a sample's mode is decided at once; below, f is all but the identity: renoising there gains nothing. inner:
    times of the process for the steps in between, in place of these.
    """
    if steps < 1:
        raise ValueError(f"a sampler takes at least 1 step; {steps} were asked for")
    if inner and len(inner) != steps - 1:
        raise ValueError(f"inner = {inner} are the times of {steps} steps but the first: {steps - 1} are needed")
    between = jnp.geomspace(4.0, 0.2, steps - 1) if steps > 2 else jnp.full(steps - 1, 0.8)
    times = jnp.asarray(inner) if inner else process.time_of(-jnp.log(between))
    return jnp.concatenate([jnp.asarray([process.t_max]), times, jnp.zeros(1)])
