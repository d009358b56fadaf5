"""Images as tokens, and the layers that label- and text-conditioned diffusion transformers share.

Patches and where they lie, attention within tokens and to a text, feed-forward, and the modulation of normalised tokens
by shifts, scales and gates (Peebles & Xie 2023, fig. 3). Names of parameters are diffusers'.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.networks.conditions import Prompt, prompt_of
from ddistill.networks.layers import Extra, Linear, Sinusoidal, attention

XAVIER = nnx.initializers.xavier_uniform()
SMALL = nnx.initializers.normal(0.02)
ZEROS = nnx.initializers.zeros_init()
GUIDANCE = Sinusoidal(256, scale=1000.0)
"""Waves of a student's guidance scale (Luo et al. 2023, LCM, sec. 4.2)."""


class PatchConv(nnx.Module):
    """A convolution whose stride is the size of its kernel: a linear map of square patches, as one matrix product."""

    casts_kernel = True

    def __init__(
        self,
        channels: int,
        out: int,
        size: int = 1,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        flat = XAVIER(rngs.params(), (size * size * channels, out), jnp.float32)
        self.kernel = nnx.Param(flat.reshape(size, size, channels, out))
        self.bias = nnx.Param(jnp.zeros(out)) if use_bias else nnx.data(None)
        self.size, self.dtype = size, dtype

    def __call__(self, x: Array) -> Array:
        """[B, H, W, channels] -> [B, H/size, W/size, out] in the layer's dtype."""
        (b, h, w, c), p = x.shape, self.size
        flat = x.reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3).reshape(-1, p * p * c).astype(self.dtype)
        out = flat @ self.kernel[...].reshape(p * p * c, -1).astype(self.dtype)
        if self.bias is not None:
            out = out + self.bias[...].astype(self.dtype)
        return out.reshape(b, h // p, w // p, -1)


class PatchEmbed(nnx.Module):
    """Patches of an image as tokens, plus their positions as waves unless scale is None.

    base: the number of patches along a side for which positions count 0, 1, 2 … / scale; an image of any other size
    spans the same stretch (Chen et al. 2023, PixArt-α, sec. 2.4).
    """

    def __init__(
        self,
        channels: int,
        width: int,
        size: int,
        *,
        base: int,
        scale: float | None,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels, self.size, self.base, self.scale = channels, size, base, scale
        self.proj = PatchConv(channels, width, size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, channels] -> [B, H/size, W/size, width]. Raises ValueError for any other shape."""
        if x.ndim != 4 or x.shape[-1] != self.channels or x.shape[1] % self.size or x.shape[2] % self.size:
            sides = f" with sides that {self.size} divides" if self.size > 1 else ""
            raise ValueError(f"this network takes images [B, H, W, {self.channels}]{sides}; given {list(x.shape)}")
        tokens = self.proj(x)
        if self.scale is None:
            return tokens
        where = positions(*tokens.shape[1:], base=self.base, scale=self.scale)
        return (tokens.astype(jnp.float32) + where).astype(tokens.dtype)


def positions(height: int, width: int, size: int, *, base: int, scale: float = 1.0) -> Array:
    """Sines and cosines of the places of a grid's tokens, [height, width, size], float32: columns first, then rows.

    A side of n tokens has places i · base/n/scale, each a vector of size/4 sines and size/4 cosines at geometric
    frequencies (He et al. 2022, MAE). Raises ValueError if 4 does not divide the size.
    """
    if size % 4:
        raise ValueError(f"positions in the plane take a width that 4 divides; given {size}")

    def along(count):
        frequencies = 10_000.0 ** (-np.arange(size // 4) / (size // 4))
        angles = np.outer(np.arange(count) * base / count / scale, frequencies)
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)

    columns, rows = along(width)[None, :], along(height)[:, None]
    shape = (height, width, size // 2)
    return jnp.concatenate([jnp.broadcast_to(columns, shape), jnp.broadcast_to(rows, shape)], axis=-1)


def image_of(tokens: Array, size: int, channels: int) -> Array:
    """Tokens [B, h, w, size² · c] as the first `channels` ≤ c channels of an image [B, h size, w size, c], float32.

    What a network says in the others, its learned variance (Nichol & Dhariwal 2021), is dropped.
    """
    b, h, w, _ = tokens.shape
    parts = tokens.astype(jnp.float32).reshape(b, h, w, size, size, -1)[..., :channels]
    return parts.swapaxes(2, 3).reshape(b, h * size, w * size, channels)


def modulated(x: Array, shift: Array, scale: Array, epsilon: float) -> Array:
    """(1 + scale) norm(x) + shift of tokens [B, ..., D], norm in float32 without weights; shift, scale: [B, D]."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + epsilon)
    return (normal * (1 + _to(scale, x)) + _to(shift, x)).astype(x.dtype)


def gated(x: Array, gate: Array, update: Array) -> Array:
    """x + gate · update for tokens [B, ..., D] and a gate [B, D], in x's dtype."""
    return (x + _to(gate, x) * update).astype(x.dtype)


def _to(vector: Array, x: Array) -> Array:
    return vector.reshape(vector.shape[0], *(1,) * (x.ndim - 2), vector.shape[-1])


class Attention(nnx.Module):
    """Attention of tokens among themselves or, with `context` the width of other tokens, to those.

    core: (q, k, v) of [B, L, H, D] -> [B, L, H, D]. norm: root-mean-square normalisation of queries and keys, each
    across all heads. out_init: of the last linear map.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_size: int,
        *,
        context: int | None = None,
        use_bias: bool = True,
        norm: bool = False,
        core: Callable[..., Array] = attention,
        out_init: Callable[..., Any] = XAVIER,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner = heads * head_size

        def linear(size):
            return Linear(size, inner, use_bias=use_bias, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

        self.heads, self.core = heads, core
        self.to_q = linear(width)
        self.to_k = linear(context or width)
        self.to_v = linear(context or width)
        self.norm_q = rms_norm(inner, rngs=rngs) if norm else None
        self.norm_k = rms_norm(inner, rngs=rngs) if norm else None
        self.to_out = nnx.List([Linear(inner, width, kernel_init=out_init, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Array, context: Array | None = None, mask: Array | None = None) -> Array:
        """x: [B, ..., width], context: [B, M, context], mask: [B, M], true for what is seen -> like x."""
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        context = tokens if context is None else context
        q, k, v = self.to_q(tokens), self.to_k(context), self.to_v(context)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).astype(v.dtype), self.norm_k(k).astype(v.dtype)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        seen = {} if mask is None else {"mask": mask.astype(bool)[:, None, None, :]}
        out = self.core(q, k, v, **seen).astype(v.dtype)
        return self.to_out[0](out.reshape(*out.shape[:2], -1)).reshape(*x.shape[:-1], -1)


def rms_norm(width: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Root-mean-square normalisation with a learned scale, in float32."""
    return nnx.RMSNorm(width, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)


class FeedForward(nnx.Module):
    """Linear to `factor` times the width, GELU in its tanh form, linear back."""

    def __init__(self, width: int, factor: int = 4, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        expand = Gelu(width, factor * width, dtype=dtype, rngs=rngs)
        contract = Linear(factor * width, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.net = nnx.Dict({"0": expand, "2": contract})  # 1 is the checkpoint's dropout

    def __call__(self, x: Array) -> Array:
        """[..., width] -> the same."""
        return self.net["2"](self.net["0"](x))


class Gelu(nnx.Module):
    """A linear map and GELU in its tanh form."""

    def __init__(self, width: int, out: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = Linear(width, out, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[..., width] -> [..., out]."""
        return jax.nn.gelu(self.proj(x), approximate=True)


class CaptionProjection(nnx.Module):
    """A text's states brought to the width of the tokens: linear, GELU in its tanh form, linear."""

    def __init__(self, channels: int, width: int, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.linear_1 = Linear(channels, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(width, width, kernel_init=XAVIER, dtype=dtype, rngs=rngs)

    def __call__(self, states: Array) -> Array:
        """[B, L, channels] -> [B, L, width] in the layer's dtype."""
        return self.linear_2(jax.nn.gelu(self.linear_1(states), approximate=True))


def text_of(cond: Any, channels: int, network: str) -> Prompt:
    """The prompt that a network of captions of `channels` channels needs; raises ValueError, naming it, otherwise."""
    prompt = prompt_of(cond, network)
    shape = prompt.states.shape
    if len(shape) != 3 or shape[-1] != channels:
        raise ValueError(f"{network} takes a text of states [B, L, {channels}]; given {list(shape)}")
    if prompt.mask is not None and prompt.mask.shape != shape[:2]:
        given = list(prompt.mask.shape)
        raise ValueError(f"{network}: the mask of states {list(shape)} is {list(shape[:2])}; given {given}")
    return prompt


def extras(target: Extra, s: Array | None, guidance: Extra | None, w: Array | None) -> Array | float:
    """What a student's second time s [B] and guidance scale w [B] add to the embedding, [B, D]; 0 without both."""
    added: Array | float = 0.0
    if s is not None:
        added = added + target(s)
    if w is not None and guidance is not None:
        added = added + guidance(w)
    return added
