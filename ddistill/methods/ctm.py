"""Consistency trajectory models: jumps between any two times of the teacher's trajectories (Kim et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill import grids
from ddistill.integrators import dpmpp_3s
from ddistill.losses.distances import Distance, PseudoHuber
from ddistill.losses.times import LogNormal, TimeLaw, bounded_rho, karras_time
from ddistill.losses.weightings import EDMWeight, Weighting
from ddistill.methods.adversarial import Adversary, balance
from ddistill.methods.base import Init, Loss, Method, Sampling, from_teacher
from ddistill.methods.sharing import once
from ddistill.net import frozen
from ddistill.process import Process, expand


@dataclass(frozen=True)
class HalfKarras:
    """Half of the times log-normal, half on Karras' ramp, from t_max over the share `reach` of it (Kim et al. 2024)."""

    normal: LogNormal = field(default_factory=LogNormal)
    reach: float = 0.7
    rho: float = 7.0

    def __call__(self, process: Process, key: Array, n: int) -> Array:
        """Draw n times."""
        k_normal, k_ramp = jax.random.split(key)
        ramp = karras_time(process, self.reach * jax.random.uniform(k_ramp, (n,)), self.rho)
        return jnp.where(jnp.arange(n) % 2 == 0, self.normal(process, k_normal, n), ramp)


@dataclass(frozen=True)
class CTM:
    """L_CTM + λ L_DSM + λ' L_GAN (Kim et al. 2024, eq. 13), G_θ(x_t, t, s) being the student's jump, s ≤ u < t:

    L_CTM = E w(t) d(G_θ⁻(G_θ(x_t, t, s), s, 0), G_θ⁻(G_θ⁻(Solver_φ(x_t, t → u), u, s), s, 0))  (eq. 7, 8)
    L_DSM = E w'(t) ‖x̂ − g_θ(x_t, t, t)‖²                                                    (eq. 10)
    L_GAN: an adversary's, the left side's samples being the fakes                           (eq. 11)

    Both sides are carried to the data by the frozen outer map, whose parameters θ⁻ are stopped and through whose input
    the gradient flows.

    Times lie on Karras' grid of `intervals` intervals, the last of which ends at 0; between its nodes too, or with
    between = False on them alone, as in the paper; that draws the gap before t and cuts none short. gap: the smallest
    and the largest t − u as shares of that grid, drawn with a density proportional to t − u; u is never below s.
    (.12, .12) is local matching, (0, 1) soft and (1, 1) global (u = s). final: share of the batch with s = 0, over
    those that the uniform law of s puts there. solver: any deterministic integrator, with solver_steps from t to u.
    weighted: w = 1/ρ_t, as errors of a jump grow with the noise it removes; 1 in the paper. target_ema: θ⁻ is the
    student itself (0) or its average. dsm: λ; None is the paper's adaptive one by the parameters of path `last_layer`
    (`balance`). exact: x̂ is the teacher's denoiser instead of x0: the same optimum, less noise. adversary: trained
    from the first step on, heard by the student after the share adversary_from of the steps, with λ' = adversary_weight
    times the adaptive weight, which stays within [.01, 10].
    Few long gaps with an accurate solver hand down less error than many short ones.
    """

    gap: tuple[float, float] = (0.12, 0.12)
    intervals: int = 18
    between: bool = True
    final: float = 0.25
    solver: Callable = dpmpp_3s
    solver_steps: int = 2
    distance: Distance = field(default_factory=PseudoHuber)
    weighted: bool = True
    target_ema: float = 0.0
    dsm: float | None = 0.3
    dsm_times: TimeLaw = field(default_factory=HalfKarras)
    dsm_weighting: Weighting = field(default_factory=EDMWeight)
    exact: bool = True
    last_layer: str = "outward.kernel"
    adversary: Adversary | None = None
    adversary_weight: float = 0.1
    adversary_from: float = 0.5
    ema: float = 0.99
    rho: float = 7.0

    def __post_init__(self):
        low, high = self.gap
        if not 0 <= low <= high <= 1 or high == 0:
            raise ValueError(f"gap = {self.gap} must be shares of the time range, 0 <= smallest <= largest <= 1, not 0")

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        target, adversary = "target" if self.target_ema else "student", self.adversary

        def estimates(nets, batch, key):
            """x_t, the solver's nodes and s; the left side's samples as a function of the student, and its own."""
            x0, cond = batch["x"], batch.get("cond")
            k_times, k_noise, k_net, k_dsm, k_gan = jax.random.split(key, 5)
            outer = frozen(nets[target])
            nodes, s = self.times(process, k_times, x0.shape[0])
            x_t = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), nodes[0])

            def estimate(student):
                x_s = student.jump(process, x_t, nodes[0], s, cond, key=k_net)
                return outer.jump(process, x_s, s, jnp.zeros_like(s), cond, key=k_net)

            samples = once(nets, "student", key, lambda: estimate(nets["student"]))
            return x_t, nodes, s, estimate, samples, (k_net, k_dsm, k_gan)

        def loss(nets, batch, progress, key):
            x0, cond = batch["x"], batch.get("cond")
            x_t, nodes, s, estimate, samples, (k_net, k_dsm, k_gan) = estimates(nets, batch, key)
            outer, t, u = frozen(nets[target]), nodes[0], nodes[-1]
            x_u = self.solver(nets["teacher"].bind(cond), process, nodes, x_t).x
            goal = outer.jump(process, x_u, u, s, cond, key=k_net)
            goal = jax.lax.stop_gradient(outer.jump(process, goal, s, jnp.zeros_like(s), cond, key=k_net))
            weight = 1 / bounded_rho(process, t) if self.weighted else 1.0

            def matching(samples):
                return jnp.mean(weight * self.distance(samples, goal))

            def ctm(student):
                return matching(estimate(student))

            def dsm(student):
                k_t, k_noise, k_net = jax.random.split(k_dsm, 3)
                t = self.dsm_times(process, k_t, x0.shape[0])
                x = process.diffuse(x0, jax.random.normal(k_noise, x0.shape), t)
                clean = nets["teacher"](x, t, cond) if self.exact else x0
                error = (student(x, t, cond, s=t, key=k_net) - clean) ** 2
                return jnp.mean(expand(self.dsm_weighting(process, t), x) * error)

            student = nets["student"]
            l_ctm, l_dsm = matching(samples), dsm(student)
            share = jnp.asarray(self.dsm) if self.dsm is not None else balance(ctm, dsm, student, self.last_layer)
            total, metrics = l_ctm + share * l_dsm, {"ctm": l_ctm, "dsm": l_dsm, "dsm_weight": share}
            if adversary is not None:

                def against(samples):
                    return adversary.generator(process, nets, samples, cond, k_gan)

                def gan(student):
                    return against(estimate(student))

                adaptive = jnp.clip(balance(ctm, gan, student, self.last_layer), 0.01, 10.0)
                heard = jnp.where(progress.share < self.adversary_from, 0.0, self.adversary_weight * adaptive)
                metrics |= {"gan": against(samples), "gan_weight": heard}
                total = total + heard * metrics["gan"]
            return total, metrics

        losses: dict[str, Loss] = {"student": loss}
        init: dict[str, Init] = {"student": from_teacher}
        if adversary is not None:

            def discriminator(nets, batch, progress, key):
                *_, samples, (_, _, k_gan) = estimates(nets, batch, key)
                return adversary.discriminator(process, nets, batch["x"], samples, batch.get("cond"), k_gan)

            losses["discriminator"], init["discriminator"] = discriminator, adversary.start(process)

        averages = {"target": ("student", self.target_ema)} if self.target_ema else {}
        return Method(
            losses=losses,
            init=init,
            rate={} if adversary is None else {"discriminator": adversary.rate},
            ema={"ema": ("student", self.ema), **averages},
            needs=frozenset({"x"}),
            result="ema",
            sampling=Sampling(lambda steps: flow_times(process, steps)),
        )

    def times(self, process: Process, key: Array, n: int) -> tuple[Array, Array]:
        """Draw the solver's nodes [solver_steps + 1, n] from t to u < t, and s [n] ≤ u."""
        k_t, k_gap, k_s, k_final = jax.random.split(key, 4)
        low, high = (share * self.intervals for share in self.gap)
        t, last = jax.random.uniform(k_t, (n,)), self.intervals
        t = t * (last - 1) if self.between else jnp.floor(t * last)
        gap = jnp.sqrt(jax.random.uniform(k_gap, (n,), minval=low**2, maxval=high**2))
        s = last - (last - t) * jax.random.uniform(k_s, (n,))  # in (t, last]
        if not self.between:
            gap, s = jnp.maximum(jnp.ceil(gap), 1), jnp.ceil(s)
        s = jnp.where(jax.random.uniform(k_final, (n,)) < self.final, last, s)
        u = jnp.minimum(t + gap, s)
        # Steps to 0 take their inner nodes above t_min, where the teacher is defined.
        inner = [t + k / self.solver_steps * (jnp.minimum(u, last - 1) - t) for k in range(self.solver_steps)]
        nodes = self.node(process, jnp.stack([*inner, u, s]))
        return nodes[:-1], nodes[-1]

    def node(self, process: Process, i: Array) -> Array:
        """Karras' node i (Karras et al. 2022, eq. 5): t_max at 0, t_min at intervals − 1, and 0 beyond."""
        return jnp.where(i > self.intervals - 1, 0.0, karras_time(process, i / (self.intervals - 1), self.rho))


def ctm_with_adversary() -> CTM:
    """`CTM` with its adversarial term (Kim et al. 2024, eq. 13)."""
    return CTM(adversary=Adversary())


def flow_times(process: Process, steps: int) -> Array:
    """Times [steps + 1] of the deterministic sampler: Karras' nodes from t_max to t_min, then 0 in place of t_min."""
    return jnp.asarray(grids.karras(process, steps, final=None)).at[-1].set(0.0)
