"""What can stand for the score of a generator's samples: a network, a point mass, or the samples themselves."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.lora import LoRA, adapt
from ddistill.losses.score import multi_sample_denoiser
from ddistill.losses.times import KarrasRamp, TimeLaw
from ddistill.losses.weightings import EDMWeight, Weighting
from ddistill.methods.base import Batch, Init, Loss, Memory, Space
from ddistill.net import Net
from ddistill.process import Process, expand


@dataclass(frozen=True)
class Drawn:
    """What the generator drew, samples x [B, ...] for conditions cond; and what else the step sees, with a key."""

    x: Array
    cond: Any
    nets: Mapping[str, Net]
    batch: Batch
    key: Array


class Fake(Protocol):
    """What stands for the score of the generator's samples; a frozen dataclass.

    networks, memory: what has to be trained or kept for it.
    """

    def __call__(self, process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
        """μ_fake(x_t, t): [B, ...]."""

    def networks(self, process: Process, draw: "Draw") -> dict[str, tuple[Init, Loss]]:
        """Networks to be trained: how each starts, and its loss."""

    def memory(self, draw: "Draw") -> dict[str, Memory]:
        """What has to be kept from step to step."""


class Draw(Protocol):
    """How the step's samples are drawn; the same for all losses of a step, so that it is computed once."""

    def __call__(self, nets: Mapping[str, Net], batch: Batch, key: Array) -> Drawn:
        """Draw as many samples as the batch has."""


def own_score(process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
    """E[x0 | x_t] if x0 is one of the samples drawn, of the same condition."""
    mine = None if drawn.cond is None else alike(drawn.cond, drawn.cond)
    return multi_sample_denoiser(process, x_t, t, drawn.x, mine)


def alike(a: Any, b: Any) -> Array:
    """Which labels a [A] and b [B] are the same, [A, B].

    Raises ValueError for conditions that are no labels, of which no two are the same.
    """
    if not hasattr(a, "dtype") or a.ndim != 1 or not jnp.issubdtype(a.dtype, jnp.integer):
        kind = f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") else type(a).__name__
        raise ValueError(
            "samples tell their own score where several have one label, integers [B], and these conditions are "
            f"{kind}: let a network alone tell it, DMD(Auxiliary(stable=False))"
        )
    return a[:, None] == b


@dataclass(frozen=True)
class Auxiliary:
    """A network beside the student, trained on its samples as a diffusion model: E w(t) ‖μ_ψ(x_t, t) − x‖².

    Yin et al. 2024, eq. 6. It starts at the teacher. stable: the target is not x but the mean of the step's samples
    that x_t may have come from, the same in expectation up to 1/B, and much less noisy where modes overlap (stable
    target fields; Xu et al. 2023, eq. 6). lora: trains only an adapter of it (as VSD does).
    """

    times: TimeLaw = field(default_factory=lambda: KarrasRamp(0.0, 1.0))
    weighting: Weighting = field(default_factory=EDMWeight)
    stable: bool = True
    lora: LoRA | None = None

    def __call__(self, process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
        """μ_ψ(x_t, t)."""
        return drawn.nets["fake"](x_t, t, drawn.cond)

    def networks(self, process: Process, draw: Draw) -> dict[str, tuple[Init, Loss]]:
        """The network "fake"."""

        def start(teacher: Net, key: Array, space: Space) -> Net:
            return teacher if self.lora is None else adapt(teacher, self.lora, key)

        def loss(nets, batch, progress, key):
            drawn = draw(nets, batch, key)
            k_t, k_noise, k_net = jax.random.split(drawn.key, 3)
            t = self.times(process, k_t, drawn.x.shape[0])
            x_t = process.diffuse(drawn.x, jax.random.normal(k_noise, drawn.x.shape), t)
            target = own_score(process, x_t, t, drawn) if self.stable else drawn.x
            error = (nets["fake"](x_t, t, drawn.cond, key=k_net) - target) ** 2
            return jnp.mean(expand(self.weighting(process, t), x_t) * error), {}

        return {"fake": (start, loss)}

    def memory(self, draw: Draw) -> dict[str, Memory]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Delta:
    """A point mass at each sample: μ = x, so that s_fake = −ε/σ_t. This is score distillation sampling."""

    def __call__(self, process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
        """The samples themselves."""
        return drawn.x

    def networks(self, process: Process, draw: Draw) -> dict[str, tuple[Init, Loss]]:
        """No network."""
        return {}

    def memory(self, draw: Draw) -> dict[str, Memory]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class MultiSample:
    """The score of the step's own samples, and with queue = n of the n before them (`multi_sample_denoiser`).

    Samples of the same condition alone count. The queue is filled after n/B steps; until then it is ignored.
    """

    queue: int = 0

    def __call__(self, process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
        """Σ w_i x_i over the samples x_i."""
        x, cond = drawn.x, drawn.cond
        if not self.queue:
            return own_score(process, x_t, t, drawn)
        old = drawn.batch["queue"]
        now, mine = jnp.ones((len(x), len(x)), bool), jnp.broadcast_to(old["filled"], (len(x), self.queue))
        if cond is not None:
            now, mine = alike(cond, cond), mine & alike(cond, old["cond"])
        references = jnp.concatenate([x, old["x"]])
        return multi_sample_denoiser(process, x_t, t, references, jnp.concatenate([now, mine], axis=1))

    def networks(self, process: Process, draw: Draw) -> dict[str, tuple[Init, Loss]]:
        """No network."""
        return {}

    def memory(self, draw: Draw) -> dict[str, Memory]:
        """The queue: samples, their conditions, and which are there."""
        if not self.queue:
            return {}

        def init(nets: Mapping[str, Net], space: Space) -> dict[str, Array]:
            empty = {"x": jnp.zeros((self.queue, *space.shape)), "filled": jnp.zeros(self.queue, bool)}
            return empty | ({"cond": jnp.zeros(self.queue, jnp.int32)} if space.num_classes else {})

        def update(old, nets, batch, progress, key):
            drawn = draw(nets, batch, key)
            new = {"x": jax.lax.stop_gradient(drawn.x), "filled": jnp.ones(len(drawn.x), bool), "cond": drawn.cond}
            return {name: jnp.concatenate([new[name], value])[: self.queue] for name, value in old.items()}

        return {"queue": Memory(init, update)}


@dataclass(frozen=True)
class Hybrid:
    """`above` where the noise-to-signal ratio is above `at`, `below` elsewhere; at is in units of the data.

    Samples tell their own score where the noise is broader than the distance of neighbours; a network, which may be
    small, is left with the rest (give it times up to there alone).
    """

    at: float
    above: Fake = field(default_factory=MultiSample)
    below: Fake = field(default_factory=Auxiliary)

    def __call__(self, process: Process, x_t: Array, t: Array, drawn: Drawn) -> Array:
        """One of the two, by t."""
        high = expand(process.half_log_snr(t) < -math.log(self.at), x_t)
        return jnp.where(high, self.above(process, x_t, t, drawn), self.below(process, x_t, t, drawn))

    def networks(self, process: Process, draw: Draw) -> dict[str, tuple[Init, Loss]]:
        """Those of both."""
        return self.above.networks(process, draw) | self.below.networks(process, draw)

    def memory(self, draw: Draw) -> dict[str, Memory]:
        """What both keep."""
        return self.above.memory(draw) | self.below.memory(draw)
