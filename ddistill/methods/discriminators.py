"""Discriminators between samples and data: what they look at, and the heads that are trained on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.features import features
from ddistill.methods.base import Space
from ddistill.net import EDMPrecondition, Net, log_noise, split
from ddistill.networks.conditions import Prompt, unscaled
from ddistill.networks.discriminators import Heads, PlainDiscriminator
from ddistill.process import Process, expand


class Sight(Protocol):
    """What a discriminator sees of its input, made of the frozen arrays `rest`: a pytree of [B, ...]; hashable."""

    def __call__(self, rest: Any, x: Array, t: Array, cond: Any) -> Any:
        """See x at time t [B]."""


@dataclass(frozen=True)
class _Judge:
    """The code of a discriminator: D(x, t, cond, s) = heads(sight(x)), logits [B, n]."""

    heads: Callable
    sight: Sight
    process: Process

    def __call__(self, params, rest, x, t, cond, *, s=None, key=None):
        return self.judge(params, rest, self.see(rest, x, t, cond), t, cond, s)

    def see(self, rest, x, t, cond):
        return self.sight(rest["sight"], x, t, unscaled(cond)[0])

    def judge(self, params, rest, seen, t, cond, s):
        heads = self.heads(params, rest["heads"])
        s_noise = None if s is None else log_noise(self.process, s)
        cond, _ = unscaled(cond)
        return heads(seen, log_noise(self.process, t), cond.pooled if isinstance(cond, Prompt) else cond, s_noise)


def _judged_by(module: nnx.Module, sight: Sight, frozen_parts: Any, process: Process) -> Net:
    params, rest, definition = split(module)
    return Net(params, {"heads": rest, "sight": frozen_parts}, _Judge(definition, sight, process))


class Discriminator(Protocol):
    """A choice of network; a frozen dataclass."""

    def __call__(self, process: Process, teacher: Net, key: Array, space: Space) -> Net:
        """The discriminator before its training: a Net of logits D(x_t, t, cond, s=s) [B, n].

        s: what time the sample was drawn from, if it is told.
        """


@dataclass(frozen=True)
class _Unit:
    process: Process

    def __call__(self, rest, x, t, cond):
        return expand(EDMPrecondition()(self.process, t)[2], x) * x


@dataclass(frozen=True)
class Plain:
    """A residual MLP on the sample itself, scaled to unit variance at its noise level: for low-dimensional data."""

    width: int = 128
    blocks: int = 3
    vector: int = 0

    def __call__(self, process: Process, teacher: Net, key: Array, space: Space) -> Net:
        """The discriminator before its training."""
        size = int(np.prod(_example(space).shape))
        module = PlainDiscriminator(
            size, self.width, self.blocks, space.num_classes, self.vector, rngs=nnx.Rngs(key)
        )  # fmt: skip
        return _judged_by(module, _Unit(process), None, process)


@dataclass(frozen=True)
class _Inside:
    layers: tuple[str, ...] | None

    def __call__(self, rest, x, t, cond):
        return list(features(rest, x, t, cond, layers=self.layers).values())


@dataclass(frozen=True)
class TeacherHeads:
    """Heads on the features of the frozen teacher at the noised input (LADD, Sauer et al. 2024).

    layers: paths of modules of the teacher (`ddistill.features`), by default of all its blocks. vector: the size of
    conditions that are vectors, or of the vectors (`pooled`) of conditions that are prompts.
    """

    layers: tuple[str, ...] | None = None
    width: int = 64
    vector: int = 0

    def __call__(self, process: Process, teacher: Net, key: Array, space: Space) -> Net:
        """The discriminator before its training."""
        return _with_heads(self, _Inside(self.layers), teacher, process, key, space)


@dataclass(frozen=True)
class _Outside:
    layers: tuple[str, ...] | None

    def __call__(self, rest, x, t, cond):
        if isinstance(rest, Net):
            return list(features(rest, x, t, None, layers=self.layers).values())
        return list(rest(x))


@dataclass(frozen=True)
class FeatureHeads:
    """Heads on the features of another frozen network, such as DINOv2 or a classifier (ADD, Sauer et al. 2023).

    features: x [B, ...] -> feature maps [B, ..., C], a function (a `jax.tree_util.Partial` keeps its arrays out of the
    compiled code), or a Net, of which `layers` are taken, at clean samples: with `Adversary(noise=None)`.
    """

    features: Callable[[Array], Sequence[Array]] | Net
    layers: tuple[str, ...] | None = None
    width: int = 64
    vector: int = 0

    def __call__(self, process: Process, teacher: Net, key: Array, space: Space) -> Net:
        """The discriminator before its training."""
        extract = self.features
        if not isinstance(extract, Net | jax.tree_util.Partial):
            extract = jax.tree_util.Partial(extract)
        return _with_heads(self, _Outside(self.layers), extract, process, key, space)


def _with_heads(choice: TeacherHeads | FeatureHeads, sight: Sight, seen_by: Any, process, key, space: Space) -> Net:
    one = jax.tree.map(lambda a: jnp.asarray(a)[None], space.null)
    maps = jax.eval_shape(sight, seen_by, _example(space), jnp.ones(1), one)
    shapes = [m.shape[1:] for m in maps]
    module = Heads(shapes, choice.width, space.num_classes, choice.vector, rngs=nnx.Rngs(key))
    return _judged_by(module, sight, seen_by, process)


def _example(space: Space) -> Array:
    if not space.shape:
        raise ValueError("a discriminator is made for the shape of a sample: start the training with a Space")
    return jnp.zeros((1, *space.shape))
