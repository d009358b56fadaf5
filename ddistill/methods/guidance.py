"""Distillation of guidance: one student for every guidance scale, which it takes as an input (Meng et al. 2023)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.times import LogNormal
from ddistill.methods.base import Loss, Made, Method, Round, rounds
from ddistill.methods.denoising import Denoising
from ddistill.methods.progressive import Progressive
from ddistill.methods.sharing import derived, exchanged
from ddistill.net import Scaled, guided_by_condition
from ddistill.process import Process


@dataclass(frozen=True)
class Scales:
    """Guidance scales for training, uniform in log(1 + w) on [low, high], or in w itself as in the papers.

    Imagen's convention, 1 is none: Meng et al. draw 1 to 5 (their w' + 1), LCM 6 to 16. sampled: the scale with which
    the student is sampled unless told otherwise. The logarithm is what networks embed, and gives weak guidance its
    share. Raises ValueError unless 0 ≤ low ≤ sampled ≤ high.
    """

    low: float = 1.0
    high: float = 8.0
    sampled: float = 2.0
    logarithmic: bool = True

    def __post_init__(self):
        if not 0 <= self.low <= self.sampled <= self.high:
            raise ValueError(
                f"guidance scales need 0 <= low <= sampled <= high, where 1 is no guidance; given {self.low}, "
                f"{self.sampled}, {self.high}"
            )

    def __call__(self, key: Array, n: int) -> Array:
        """Draw n scales."""
        u = jax.random.uniform(key, (n,))
        if not self.logarithmic:
            return self.low + u * (self.high - self.low)
        return (1 + self.low) * ((1 + self.high) / (1 + self.low)) ** u - 1


def with_guidance(made: Made, scales: Scales, null: int = -1, *, taught: bool = False) -> Made:
    """Any method as one of guidance: each sample draws its own w, and cond becomes `Scaled(cond, w)` for every network.

    The teacher of the first round becomes the guided one, D_∅ + w (D_c − D_∅); those of later rounds, and with `taught`
    the first as well, are students that embed w already. null: the label that means none.
    Raises ValueError for a method that learns from pairs made beforehand, whose scale is not known.
    """
    if isinstance(made, Method):
        return _with_scales(made, scales, None if taught else null)
    wrapped: dict[tuple[int, bool], Method] = {}
    parts = []
    for i, part in enumerate(rounds(made)):
        # Rounds of one method stay rounds of one method, and share its compilation.
        at = id(part.method), i > 0 or taught
        if at not in wrapped:
            wrapped[at] = _with_scales(part.method, scales, None if at[1] else null)
        parts.append(dataclasses.replace(part, method=wrapped[at]))
    return tuple(parts)


def _with_scales(method: Method, scales: Scales, null: int | None) -> Method:
    """The method with a scale for each sample, and a guided teacher unless null is None."""
    if method.pairs is not None:
        raise ValueError(
            "a method that learns from teacher pairs cannot draw a guidance scale for each sample: distil it at one "
            "scale, from a teacher with that guidance"
        )
    if method.memory:
        raise ValueError(
            f"a method that keeps samples from step to step ({', '.join(method.memory)}) cannot draw a guidance scale "
            "for each: leave its queue out, or distil it at one scale"
        )
    losses = {name: _scaled(loss, scales, null) for name, loss in method.losses.items()}
    sampling = dataclasses.replace(method.sampling, guidance=scales.sampled)
    return dataclasses.replace(method, losses=losses, sampling=sampling)


def _scaled(loss: Loss, scales: Scales, null: int | None) -> Loss:
    def with_scale(nets, batch, progress, key):
        if batch.get("cond") is None:
            raise ValueError("guidance is distilled from labelled data, and the batch has no cond")
        k_w, k_loss = derived(nets, key, lambda: tuple(jax.random.split(key)))
        cond = batch["cond"]
        w = scales(k_w, jnp.shape(jax.tree.leaves(cond)[0])[0])
        if null is not None:
            nets = exchanged(nets, teacher=guided_by_condition(nets["teacher"], null))
        return loss(nets, {**batch, "cond": Scaled(cond, w)}, progress, k_loss)

    return with_scale


@dataclass(frozen=True)
class Guided:
    """`method`, straight from the guided teacher, for every scale: see `with_guidance`."""

    method: Callable[[Process], Made]
    scales: Scales = field(default_factory=Scales)
    null: int = -1

    def __call__(self, process: Process) -> Made:
        """The method on a process."""
        return with_guidance(self.method(process), self.scales, self.null)


@dataclass(frozen=True)
class GuidanceDistillation:
    """E ω(t) ‖D_θ(x_t, t, c, w) − [D_∅ + w (D_c − D_∅)](x_t, t)‖², and then `then` on that student (Meng et al. 2023).

    Stage one (sec. 3.1) makes one network call of the two that guidance takes, its w drawn from `scales` for every
    sample; stage two (sec. 3.2) shortens its trajectory, with one w for all of a sample's teacher steps. share: of
    stage one in the training steps.
    """

    then: Callable[[Process], Made] = field(default_factory=Progressive)
    scales: Scales = field(default_factory=Scales)
    stage_one: Denoising = field(default_factory=lambda: Denoising(times=LogNormal(-0.4, 2.0), exact=True))
    share: float = 0.3
    null: int = -1

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ValueError(f"share = {self.share} of the training is stage one: it must lie between 0 and 1")
        if not self.stage_one.exact:
            raise ValueError("stage_one regresses the guided teacher's own answer: it needs exact=True")

    def __call__(self, process: Process) -> tuple[Round, ...]:
        """The rounds on a process: "guidance", then those of `then`."""
        later = rounds(with_guidance(self.then(process), self.scales, self.null, taught=True))
        here = later[0].method.process
        first = _with_scales(self.stage_one(here or process), self.scales, self.null)
        share = self.share / (1 - self.share) * sum(part.share for part in later)
        return (Round("guidance", dataclasses.replace(first, process=here), share), *later)
