"""Sana: a diffusion transformer with linear attention that reads a text (Xie et al. 2024), `SanaTransformer2DModel`.

Sana-Sprint (Chen et al. 2025), its distilled form, normalises queries and keys and embeds a guidance scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.conditions import unscaled
from ddistill.networks.layers import Extra, Linear, Remat, Sinusoidal, Stack, TimestepEmbedding
from ddistill.networks.pixart import AdaLayerNormSingle
from ddistill.networks.tokens import (
    GUIDANCE,
    SMALL,
    XAVIER,
    ZEROS,
    Attention,
    CaptionProjection,
    PatchConv,
    PatchEmbed,
    extras,
    gated,
    image_of,
    modulated,
    rms_norm,
    text_of,
)

WAVES = Sinusoidal(256)
"""Waves of times and guidance scales."""


@dataclass(frozen=True)
class SanaConfig:
    """diffusers' options of Sana. The defaults are Sana-1.6B's at 1024 × 1024 pixels.

    interpolation_scale: what places of tokens are divided by; None adds no positions, which the convolutions tell.
    guidance_embeds: the network reads a guidance scale, times guidance_embeds_scale. qk_norm: None or
    "rms_norm_across_heads". timestep_scale: what pipelines multiply times by before the network sees them as c_noise.
    """

    in_channels: int = 32
    out_channels: int | None = 32
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_layers: int = 20
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    FIXED: ClassVar[Mapping[str, tuple]] = {"dropout": (0.0,), "norm_elementwise_affine": (False,)}
    """Options of diffusers at the only values supported."""

    def __post_init__(self):
        if self.out_channels not in (None, 0, self.in_channels):
            raise ValueError(f"out_channels = {self.out_channels} must be in_channels = {self.in_channels}, or None")
        if self.qk_norm not in (None, "rms_norm_across_heads"):
            raise ValueError(f'qk_norm = {self.qk_norm!r} is not supported: give None or "rms_norm_across_heads"')
        if self.cross_attention_dim != self.width:
            raise ValueError(
                f"cross_attention_dim = {self.cross_attention_dim} must be the width, num_attention_heads · "
                f"attention_head_dim = {self.width}, to which captions are projected"
            )

    @property
    def width(self) -> int:
        """The size of a token."""
        return self.num_attention_heads * self.attention_head_dim


class Sana(nnx.Module):
    """Blocks of linear attention, cross-attention to a text and gated convolutions, on patches or single latents.

    x: [B, H, W, in_channels], sides that patch_size divides; c_noise, s_noise: [B], the model's times after
    timestep_scale; cond: a Prompt of states [B, L, caption_channels] and mask [B, L], or `Scaled(prompt, w)`, which a
    network with guidance_embeds needs: its own embedding reads w, and it has no `guidance` of students. Computes in
    `dtype`; norms, attention's sums, embeddings and output in float32. remat: keeps one block's activations at a time.
    """

    def __init__(self, config: SanaConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        width, size = config.width, config.patch_size
        self.config = config
        self.patch_embed = PatchEmbed(
            config.in_channels,
            width,
            size,
            base=config.sample_size // size,
            scale=config.interpolation_scale,
            dtype=dtype,
            rngs=rngs,
        )
        embed = TimeAndGuidance if config.guidance_embeds else AdaLayerNormSingle
        self.time_embed = embed(width, rngs=rngs)
        self.caption_projection = CaptionProjection(config.caption_channels, width, dtype=dtype, rngs=rngs)
        self.caption_norm = rms_norm(width, rngs=rngs)
        self.transformer_blocks = Stack(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, remat=remat, rngs=rngs
        )
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (2, width)) / width**0.5)
        self.proj_out = Linear(width, size**2 * config.in_channels, kernel_init=ZEROS, rngs=rngs)
        self.target = Extra(width, WAVES, rngs=rngs)
        self.guidance = None if config.guidance_embeds else Extra(width, GUIDANCE, rngs=rngs)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: PyTree = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): like x, float32. Raises ValueError for other shapes and for conditions not texts."""
        del rngs
        config = self.config
        cond, w = unscaled(cond)
        prompt = text_of(cond, config.caption_channels, "Sana")
        read = WAVES(config.guidance_embeds_scale * w) if config.guidance_embeds and w is not None else None
        y = self.patch_embed(x)
        extra = extras(self.target, s_noise, self.guidance, w)
        modulation, embedding = self.time_embed(WAVES(c_noise), read, extra)
        text = self.caption_norm(self.caption_projection(prompt.states)).astype(y.dtype)
        y = self.transformer_blocks(y, modulation, text, prompt.mask)
        shift, scale = (self.scale_shift_table[i] + embedding for i in range(2))
        y = self.proj_out(modulated(y.astype(jnp.float32), shift, scale, 1e-6))
        return image_of(y, config.patch_size, config.in_channels)


class Block(nnx.Module):
    """Linear self-attention, cross-attention to the text, gated convolutions; the first and last are modulated."""

    def __init__(self, config: SanaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, norm = config.width, config.qk_norm is not None
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, width)) / width**0.5)
        self.attn1 = Attention(
            width,
            config.num_attention_heads,
            config.attention_head_dim,
            use_bias=config.attention_bias,
            norm=norm,
            core=linear_attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.attn2 = Attention(
            width,
            config.num_cross_attention_heads,
            config.cross_attention_head_dim,
            context=config.cross_attention_dim,
            norm=norm,
            out_init=ZEROS,
            dtype=dtype,
            rngs=rngs,
        )
        self.ff = GatedConvolutions(width, int(config.mlp_ratio * width), dtype=dtype, rngs=rngs)
        self.epsilon = config.norm_eps

    def __call__(self, y: Array, modulation: Array, text: Array, mask: Array | None) -> Array:
        """y: [B, h, w, D], modulation: [B, 6, D], float32, text: [B, L, C], mask: [B, L] -> like y."""
        table = self.scale_shift_table[...]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[i] + modulation[:, i] for i in range(6))
        y = gated(y, gate, self.attn1(modulated(y, shift, scale, self.epsilon)))
        y = y + self.attn2(y, text, mask)
        return gated(y, gate_mlp, self.ff(modulated(y, shift_mlp, scale_mlp, self.epsilon)))


def linear_attention(q: Array, k: Array, v: Array) -> Array:
    """Σ_j (φ(q_i)·φ(k_j)) v_j / Σ_j φ(q_i)·φ(k_j) with φ = ReLU, in float32 and linear in the number of tokens.

    q, k, v: [B, L, H, D] -> the same (Xie et al. 2024, eq. 2).
    """
    q, k, v = (a.astype(jnp.float32) for a in (jax.nn.relu(q), jax.nn.relu(k), v))
    sums = jnp.einsum("blhd,blhe->bhde", k, v)
    total = jnp.einsum("blhd,bhd->blh", q, jnp.sum(k, axis=1))
    return jnp.einsum("blhd,bhde->blhe", q, sums) / (total[..., None] + 1e-15)


class GatedConvolutions(nnx.Module):
    """Mix-FFN: linear to twice the inner width and SiLU, a 3 × 3 convolution of each channel, SiLU gates, linear."""

    def __init__(self, width: int, inner: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv_inverted = PatchConv(width, 2 * inner, dtype=dtype, rngs=rngs)
        self.conv_depth = DepthwiseConv(2 * inner, dtype=dtype, rngs=rngs)
        self.conv_point = PatchConv(inner, width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, h, w, width] -> the same."""
        value, gate = jnp.split(self.conv_depth(jax.nn.silu(self.conv_inverted(x))), 2, axis=-1)
        return self.conv_point(value * jax.nn.silu(gate))


class DepthwiseConv(nnx.Module):
    """A 3 × 3 convolution of each channel by itself, as a sum of nine shifted products.

    These fuse with what stands before and after; XLA's grouped convolution is many times slower on CPU.
    """

    def __init__(self, channels: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.kernel = nnx.Param(XAVIER(rngs.params(), (3, 3, 1, channels), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        """[B, h, w, C] -> the same, in the layer's dtype."""
        height, width = x.shape[1:3]
        padded, kernel = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32), self.kernel[...]
        parts = [padded[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(3) for j in range(3)]
        return (sum(parts) + self.bias[...]).astype(self.dtype)


class TimeAndGuidance(nnx.Module):
    """The sum of an embedding of the time and one of the guidance scale, and the modulation linear in it."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(256, width, rngs=rngs)
        self.guidance_embedder = TimestepEmbedding(256, width, rngs=rngs)
        self.linear = nnx.Linear(width, 6 * width, kernel_init=SMALL, rngs=rngs)

    def __call__(self, waves: Array, read: Array | None, extra: Array | float) -> tuple[Array, Array]:
        """Waves of time and of scale: [B, 256], extra: [B, D], added to the embedding -> [B, 6, D] and it, [B, D]."""
        if read is None:
            raise ValueError("this Sana (guidance_embeds) reads a guidance scale: cond = Scaled(prompt, w)")
        embedding = self.timestep_embedder(waves) + self.guidance_embedder(read) + extra
        return self.linear(jax.nn.silu(embedding)).reshape(embedding.shape[0], 6, -1), embedding
