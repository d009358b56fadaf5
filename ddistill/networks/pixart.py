"""PixArt-α and -Σ: a diffusion transformer that reads a text (Chen et al. 2023, 2024), `PixArtTransformer2DModel`."""

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
from ddistill.networks.tokens import (
    GUIDANCE,
    SMALL,
    ZEROS,
    Attention,
    CaptionProjection,
    FeedForward,
    PatchEmbed,
    extras,
    gated,
    image_of,
    modulated,
    text_of,
)

WAVES = Sinusoidal(256)
"""Waves of times and sizes."""


@dataclass(frozen=True)
class PixArtConfig:
    """diffusers' options of PixArt. The defaults are PixArt-α's at 1024 × 1024 pixels but for caption_channels = 4096.

    sample_size: the side of the latents; with interpolation_scale, which is max(sample_size // 64, 1) by default, it
    says where tokens lie. use_additional_conditions: whether the network also sees the height and width of the image
    and their ratio; by default those of sample_size = 128 do. caption_channels: the text's, which are projected to the
    width; None takes a text of cross_attention_dim channels as it is.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    cross_attention_dim: int = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "activation_fn": ("gelu-approximate",),
        "attention_type": ("default", None),
        "dropout": (0.0,),
        "norm_elementwise_affine": (False,),
        "norm_num_groups": (32,),
        "norm_type": ("ada_norm_single",),
        "num_embeds_ada_norm": (1000,),
        "upcast_attention": (False,),
    }
    """Options of diffusers at the only values supported."""

    def __post_init__(self):
        if self.channels_out < self.in_channels:
            raise ValueError(
                f"out_channels = {self.out_channels} leave no output for each of in_channels = {self.in_channels}: "
                "give as many, or twice as many where the variance is learned"
            )
        if self.caption_channels is not None and self.cross_attention_dim != self.width:
            raise ValueError(
                f"cross_attention_dim = {self.cross_attention_dim} must be the width, num_attention_heads · "
                f"attention_head_dim = {self.width}, to which captions are projected"
            )
        if self.sizes and self.width % 3:
            raise ValueError(f"the width {self.width} must be divisible by 3: height, width and ratio share it")

    @property
    def width(self) -> int:
        """The size of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        """Channels of the output, those of a learned variance included."""
        return self.in_channels if self.out_channels is None else self.out_channels

    @property
    def sizes(self) -> bool:
        """Whether the network sees the size of the image."""
        return self.sample_size == 128 if self.use_additional_conditions is None else self.use_additional_conditions

    @property
    def scale(self) -> float:
        """What places of tokens are divided by."""
        return max(self.sample_size // 64, 1) if self.interpolation_scale is None else self.interpolation_scale


class PixArt(nnx.Module):
    """Transformer blocks on patches, with cross-attention to a text and one modulation for all (adaLN-single).

    x: [B, H, W, in_channels], sides that patch_size divides; c_noise, s_noise: [B], timesteps 0 … 999; cond: a Prompt,
    or `Scaled(prompt, w)`: states [B, L, caption_channels], mask [B, L], and where the config asks for them sizes
    [B, 3], (height, width, height/width) in pixels. Of out_channels > in_channels, a learned variance, the first
    in_channels are the output. Computes in `dtype`; norms, softmax, embeddings and output in float32. remat: keeps one
    block's activations at a time.
    """

    def __init__(self, config: PixArtConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        width, size = config.width, config.patch_size
        self.config = config
        self.pos_embed = PatchEmbed(
            config.in_channels,
            width,
            size,
            base=config.sample_size // size,
            scale=config.scale,
            dtype=dtype,
            rngs=rngs,
        )
        self.adaln_single = AdaLayerNormSingle(width, config.sizes, rngs=rngs)
        channels = config.caption_channels
        self.caption_projection = (
            None if channels is None else CaptionProjection(channels, width, dtype=dtype, rngs=rngs)
        )
        self.transformer_blocks = Stack(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, remat=remat, rngs=rngs
        )
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (2, width)) / width**0.5)
        self.proj_out = Linear(width, size**2 * config.channels_out, kernel_init=ZEROS, rngs=rngs)
        self.target = Extra(width, WAVES, rngs=rngs)
        self.guidance = Extra(width, GUIDANCE, rngs=rngs)

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
        prompt = text_of(cond, config.caption_channels or config.cross_attention_dim, "PixArt")
        sizes = prompt.sizes if config.sizes else None
        if config.sizes and (sizes is None or sizes.shape != (x.shape[0], 3)):
            given = "none" if sizes is None else list(sizes.shape)
            raise ValueError(
                "this PixArt (use_additional_conditions) sees the image's height, width and height/width in pixels, "
                f"Prompt(..., sizes=[B, 3]); given {given}"
            )
        tokens, text = self.pos_embed(x), prompt.states
        extra = extras(self.target, s_noise, self.guidance, w)
        modulation, embedding = self.adaln_single(WAVES(c_noise), sizes, extra)
        if self.caption_projection is not None:
            text = self.caption_projection(text)
        tokens = self.transformer_blocks(tokens, modulation, text, prompt.mask)
        shift, scale = (self.scale_shift_table[i] + embedding for i in range(2))
        tokens = self.proj_out(modulated(tokens.astype(jnp.float32), shift, scale, 1e-6))
        return image_of(tokens, config.patch_size, config.in_channels)


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last are modulated."""

    def __init__(self, config: PixArtConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, heads, size = config.width, config.num_attention_heads, config.attention_head_dim
        self.scale_shift_table = nnx.Param(jax.random.normal(rngs.params(), (6, width)) / width**0.5)
        self.attn1 = Attention(width, heads, size, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.attn2 = Attention(
            width,
            heads,
            size,
            context=config.cross_attention_dim,
            use_bias=config.attention_bias,
            out_init=ZEROS,
            dtype=dtype,
            rngs=rngs,
        )
        self.ff = FeedForward(width, dtype=dtype, rngs=rngs)
        self.epsilon = config.norm_eps

    def __call__(self, y: Array, modulation: Array, text: Array, mask: Array | None) -> Array:
        """y: [B, h, w, D], modulation: [B, 6, D], float32, text: [B, L, C], mask: [B, L] -> like y."""
        table = self.scale_shift_table[...]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (table[i] + modulation[:, i] for i in range(6))
        y = gated(y, gate, self.attn1(modulated(y, shift, scale, self.epsilon)))
        y = y + self.attn2(y, text, mask)
        return gated(y, gate_mlp, self.ff(modulated(y, shift_mlp, scale_mlp, self.epsilon)))


class AdaLayerNormSingle(nnx.Module):
    """One embedding of the time, and perhaps the image's size, and the modulation of all blocks linear in it."""

    def __init__(self, width: int, sizes: bool = False, *, rngs: nnx.Rngs):
        self.emb = TimeAndSizes(width, sizes, rngs=rngs)
        self.linear = nnx.Linear(width, 6 * width, kernel_init=SMALL, rngs=rngs)

    def __call__(self, waves: Array, sizes: Array | None, extra: Array | float) -> tuple[Array, Array]:
        """waves: [B, 256], sizes: [B, 3], extra: [B, D], added to the embedding -> modulation [B, 6, D], it [B, D]."""
        embedding = self.emb(waves, sizes) + extra
        return self.linear(jax.nn.silu(embedding)).reshape(embedding.shape[0], 6, -1), embedding


class TimeAndSizes(nnx.Module):
    """An embedding of the time's waves plus one third of the width for each of an image's height, width and ratio."""

    def __init__(self, width: int, sizes: bool, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(256, width, rngs=rngs)
        self.resolution_embedder = TimestepEmbedding(256, width // 3, rngs=rngs) if sizes else None
        self.aspect_ratio_embedder = TimestepEmbedding(256, width // 3, rngs=rngs) if sizes else None

    def __call__(self, waves: Array, sizes: Array | None) -> Array:
        """waves: [B, 256], sizes: [B, 3] -> [B, D], float32."""
        embedding = self.timestep_embedder(waves)
        if self.resolution_embedder is None or self.aspect_ratio_embedder is None or sizes is None:
            return embedding
        height, width = (self.resolution_embedder(WAVES(sizes[:, i])) for i in range(2))
        return embedding + jnp.concatenate([height, width, self.aspect_ratio_embedder(WAVES(sizes[:, 2]))], axis=-1)
