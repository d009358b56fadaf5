"""Score distillation: what a teacher has against a sample, for networks and renderers (Poole et al. 2023)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.losses.score import DirectionWeight, NoisePrediction, divergence_gradient
from ddistill.losses.times import KarrasRamp, TimeLaw
from ddistill.methods.base import Method
from ddistill.methods.dmd import DMD
from ddistill.methods.fake_scores import Delta
from ddistill.net import Net
from ddistill.process import Process, Time


@dataclass(frozen=True)
class SDS:
    """`DMD` with s_fake = −ε/σ_t, a point mass at each sample: E w(t) (ε̂_real(x_t, t) − ε) ∂x/∂θ (eq. 3).

    −ε/σ_t has no mean: the gradient is that of E[−log p_real,t(x_t)] alone, without the entropy that keeps samples
    apart, and the samples of one condition fall into one mode. times, weight, rate and ema are those of `DMD`.
    """

    times: TimeLaw = field(default_factory=KarrasRamp)
    weight: DirectionWeight = field(default_factory=NoisePrediction)
    rate: float = 1.0
    ema: float = 0.99

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        return DMD(Delta(), self.times, self.weight, rate=self.rate, ema=self.ema)(process)


def sds_gradient(
    teacher: Net,
    process: Process,
    x: Array,
    t: Time,
    noise: Array,
    cond: Any = None,
    *,
    fake: Net | None = None,
    weight: DirectionWeight | None = None,
) -> Array:
    """The gradient by x [B, ...] of score distillation at times t [] or [B] with noise like x (Poole et al. 2023).

    w(t) (ε̂_real(x_t, t) − ε), eq. 3, for x_t = α_t x + σ_t ε: chain it with that of what renders x,
    `jax.vjp(render, scene)[1](gradient)`, or descend on x itself. teacher: guided (`net.guided`) for images, at scales
    near 100 in the paper. fake: a network of the samples' own score in place of −ε/σ_t: variational score distillation
    (Wang et al. 2023, eq. 9), at scales near 7.5. weight: DreamFusion's, `NoisePrediction(1, 0)`, by default.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))  # bfloat16 would round t and x_t
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    x_t = process.diffuse(x, noise, t)
    own = x if fake is None else fake(x_t, t, cond)
    weight = NoisePrediction() if weight is None else weight
    return divergence_gradient(process, t, x, own, teacher(x_t, t, cond), weight)


@dataclass(frozen=True)
class _Renderer:
    render: Callable[[Any], Array]

    def __call__(self, params, rest, x, t, cond, *, s, key):
        scenes = jax.tree.leaves(params)[0].shape[0]
        index = jnp.arange(x.shape[0]) % scenes
        return jax.vmap(self.render)(jax.tree.map(lambda p: p[index], params)).astype(x.dtype)


def particles(render: Callable[[Any], Array], scenes: Any) -> Net:
    """Scenes as a student: its sample i is render(scene i mod n), whatever the noise.

    scenes: a pytree of [n, ...], the parameters of n scenes; render: one scene -> one sample. As the student of `SDS`
    it optimises them with the teacher (Poole et al. 2023), and of `DMD` with an `Auxiliary` fake score with a LoRA it
    is variational score distillation (Wang et al. 2023), n being its number of particles. A batch, or the part of it
    that is accumulated at a time, should be a multiple of n: it renders the scenes in turn from the first.
    """
    return Net(scenes, {}, _Renderer(render))
