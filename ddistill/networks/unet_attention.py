"""Attention in diffusers' UNets: among the pixels of an image, and from pixels to the tokens of a text."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.networks.layers import GroupNorm, Linear, Remat, Stack, attention, rematerialised


class Attention(nnx.Module):
    """Multi-head attention of tokens or pixels to a context, by default to themselves; diffusers' `Attention`.

    context: the context's width if it is not x's. bias: of queries, keys and values. norm: what x goes through first.
    residual: x is added, and the output map starts at 0. remat: the scores are not kept for the backward pass. They are
    summed and normalised in float32, which is what diffusers' `upcast_attention` asks for. Raises ValueError if the
    width does not split into the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int | None = None,
        *,
        bias: bool = False,
        norm: GroupNorm | None = None,
        residual: bool = False,
        remat: Remat = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"{width} channels do not split into {heads} attention heads")
        self.heads, self.residual, self.remat = heads, residual, remat
        self.group_norm = norm
        self.to_q = Linear(width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = Linear(context or width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = Linear(context or width, width, use_bias=bias, dtype=dtype, rngs=rngs)
        init = nnx.initializers.zeros_init() if residual else nnx.initializers.lecun_normal()
        self.to_out = nnx.List([Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        """x: [B, ..., C], context: [B, M, D], mask: [B, M], True for tokens that are seen -> [B, ..., C]."""
        h = x.reshape(x.shape[0], -1, x.shape[-1])
        h = h if self.group_norm is None else self.group_norm(h)
        context = h if context is None else context
        q, k, v = (self._heads(a) for a in (self.to_q(h), self.to_k(context), self.to_v(context)))
        attend = partial(attention, mask=None if mask is None else mask[:, None, None, :])
        h = rematerialised(attend, self.remat)(q, k, v)
        h = self.to_out[0](h.reshape(*h.shape[:2], -1)).reshape(x.shape)
        return x + h if self.residual else h

    def _heads(self, a: Array) -> Array:
        return a.reshape(*a.shape[:2], self.heads, -1)


class GEGLU(nnx.Module):
    """a · gelu(b) of a linear map (a, b) (Shazeer 2020, eq. 6), with the exact gelu."""

    def __init__(self, width: int, inner: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = Linear(width, 2 * inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[..., width] -> [..., inner]."""
        a, b = jnp.split(self.proj(x), 2, axis=-1)
        return a * jax.nn.gelu(b, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width, and a linear map back. Between them diffusers has a dropout, which is not used."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = 4 * width
        self.net: Any = nnx.List(
            [GEGLU(width, inner, dtype=dtype, rngs=rngs), None, Linear(inner, width, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x: Array) -> Array:
        """[..., width] -> the same."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Attention among the tokens, attention to the context, feed-forward, each of the normalised tokens and added.

    diffusers' `BasicTransformerBlock`.
    """

    def __init__(self, width: int, heads: int, context: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1, self.norm2, self.norm3 = (
            nnx.LayerNorm(width, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, rngs=rngs) for _ in range(3)
        )
        self.attn1 = Attention(width, heads, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(width, heads, context, dtype=dtype, rngs=rngs)
        self.ff = FeedForward(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        """x: [B, L, C], context: [B, M, D], mask: [B, M] or None -> [B, L, C]."""
        x = x + self.attn1(self.norm1(x).astype(x.dtype))
        x = x + self.attn2(self.norm2(x).astype(x.dtype), context, mask)
        return x + self.ff(self.norm3(x).astype(x.dtype))


class Transformer(nnx.Module):
    """x + a transformer over its pixels that sees a context: diffusers' `Transformer2DModel` (Rombach et al. 2022).

    linear: the maps in and out are stored as linear maps, not as convolutions. The map out starts at 0.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context: int,
        depth: int,
        *,
        groups: int,
        linear: bool,
        dtype: jnp.dtype,
        remat: Remat,
        rngs: nnx.Rngs,
    ):
        def project(init):
            if linear:
                return Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)
            return nnx.Conv(width, width, (1, 1), kernel_init=init, dtype=dtype, rngs=rngs)

        def block(rngs):
            return TransformerBlock(width, heads, context, dtype=dtype, rngs=rngs)

        self.norm = GroupNorm(width, groups, 1e-6)
        self.proj_in = project(nnx.initializers.lecun_normal())
        self.transformer_blocks = Stack(block, depth, remat=remat, rngs=rngs)
        self.proj_out = project(nnx.initializers.zeros_init())

    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        """x: [B, H, W, C], context: [B, M, D], mask: [B, M], True for tokens that are seen -> [B, H, W, C]."""
        h = self.proj_in(self.norm(x))
        tokens = self.transformer_blocks(h.reshape(h.shape[0], -1, h.shape[-1]), context, mask)
        return x + self.proj_out(tokens.reshape(h.shape))
