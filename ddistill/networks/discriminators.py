"""Discriminators: modules called as module(seen, c_noise, cond, s_noise), answering logits [B, n], high if real."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.networks.embedding import Fourier, Waves
from ddistill.networks.mlp import Block


class Context(nnx.Module):
    """Embedding [B, width] of the noise level, the condition and the noise level that a sample was drawn from.

    cond: None, labels [B] in 0 … num_classes, where num_classes and −1 are "no label", or with vector > 0 an embedding
    [B, vector] of a text or an image.
    """

    def __init__(self, width: int, num_classes: int = 0, vector: int = 0, *, rngs: nnx.Rngs):
        self.num_classes, self.vector = num_classes, vector
        self.fourier = Fourier(64)
        self.time = nnx.Linear(64, width, rngs=rngs)
        self.origin = nnx.Linear(64, width, use_bias=False, rngs=rngs)
        self.label = nnx.Embed(num_classes + 1, width, rngs=rngs) if num_classes else None
        self.project = nnx.Linear(vector, width, rngs=rngs) if vector else None

    def __call__(self, c_noise: Array, cond: Array | None, s_noise: Array | None) -> Array:
        """c_noise and s_noise: [B] -> [B, width]."""
        h = self.time(self.fourier(c_noise))
        if s_noise is not None:
            h = h + self.origin(self.fourier(s_noise))
        if self.project is not None:
            if cond is None or cond.ndim != 2 or cond.shape[1] != self.vector:
                given = None if cond is None else cond.shape
                raise ValueError(f"this discriminator takes cond [B, {self.vector}]; given {given}")
            return h + self.project(cond)
        if self.label is None:
            if cond is not None:
                raise ValueError("this discriminator was built without conditions and cannot take cond")
            return h
        none = self.num_classes
        known = jnp.full(c_noise.shape, none) if cond is None else jnp.where(cond < 0, none, cond)
        return h + self.label(jnp.minimum(known, none))


class PlainDiscriminator(nnx.Module):
    """The student's residual MLP with one logit: for vectors and small images, `size` values of order 1."""

    def __init__(
        self, size: int, width: int = 128, blocks: int = 3, num_classes: int = 0, vector: int = 0, *, rngs: nnx.Rngs
    ):
        inner = width // 2
        self.size = size
        self.context = Context(inner, num_classes, vector, rngs=rngs)
        self.embed = nnx.Linear(inner, inner, rngs=rngs)
        self.waves = Waves(size, width // 4)
        self.inward = nnx.Linear(size + 2 * (width // 4), width, rngs=rngs)
        self.blocks = nnx.List([Block(width, inner, 0.0, jnp.float32, rngs=rngs) for _ in range(blocks)])
        self.outward = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(
        self, x: Array, c_noise: Array, cond: Array | None = None, s_noise: Array | None = None
    ) -> Array:  # fmt: skip
        """x: [B, ...], c_noise and s_noise: [B] -> [B, 1]."""
        h = jax.nn.silu(self.embed(jax.nn.silu(self.context(c_noise, cond, s_noise))))
        flat = x.astype(jnp.float32).reshape(x.shape[0], self.size)
        y = self.inward(jnp.concatenate([flat, self.waves(flat)], axis=-1))
        for block in self.blocks:
            y = block(y, h, rngs=None)
        return self.outward(y)


class Heads(nnx.Module):
    """A small head on each of several feature maps (Sauer et al. 2023, sec. 3.2; the heads are StyleGAN-T's).

    shapes: of the maps without their batch axis, [C] or [..., C]; the places of a map are its tokens, one logit each.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], width: int = 64, num_classes: int = 0, vector: int = 0, *,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.context = Context(width, num_classes, vector, rngs=rngs)
        self.heads = nnx.List([Head(math.prod(s[:-1]), s[-1], width, rngs=rngs) for s in shapes])

    def __call__(
        self, maps: Sequence[Array], c_noise: Array, cond: Array | None = None, s_noise: Array | None = None
    ) -> Array:  # fmt: skip
        """maps: [B, ..., C] each, c_noise and s_noise: [B] -> [B, n], all tokens of all maps."""
        if len(maps) != len(self.heads):
            raise ValueError(f"{len(self.heads)} heads cannot judge {len(maps)} feature maps")
        context = self.context(c_noise, cond, s_noise)
        return jnp.concatenate([head(m, context) for head, m in zip(self.heads, maps, strict=True)], axis=1)


class Head(nnx.Module):
    """Linear to `width` channels, a residual convolution over tokens (linear for one token), a logit per token.

    logit = w·h + h·e/√width with the embedding e of the condition (projection; Miyato & Koyama 2018).
    """

    def __init__(self, tokens: int, channels: int, width: int, *, rngs: nnx.Rngs):
        self.inward = nnx.Linear(channels, width, rngs=rngs)
        self.mix = nnx.Conv(width, width, (min(9, tokens),), padding="CIRCULAR", rngs=rngs)
        self.first = nnx.RMSNorm(width, rngs=rngs)
        self.second = nnx.RMSNorm(width, rngs=rngs)
        self.outward = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, features: Array, context: Array) -> Array:
        """features: [B, ..., C], context: [B, width] -> [B, tokens]."""
        tokens = features.astype(jnp.float32).reshape(features.shape[0], -1, features.shape[-1])
        h = nnx.leaky_relu(self.first(self.inward(tokens)), 0.2)
        h = (h + nnx.leaky_relu(self.second(self.mix(h)), 0.2)) / math.sqrt(2)
        by_condition = jnp.einsum("btc,bc->bt", h, context) / math.sqrt(h.shape[-1])
        return self.outward(h)[..., 0] + by_condition
