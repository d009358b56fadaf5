"""FLUX.1: a rectified-flow transformer of joint and then of single-stream blocks (Black Forest Labs 2024).

diffusers' `FluxTransformer2DModel`, together with the packing of latents that diffusers leaves to its pipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.conditions import unscaled
from ddistill.networks.joint import EPSILON, JointAttention, JointBlock, Modulation, Rotary, TimeAndText, texts_of
from ddistill.networks.layers import Extra, Linear, Remat, Sinusoidal, Stack
from ddistill.networks.tokens import GUIDANCE, ZEROS, extras, gated, modulated

PACKED = 2
"""The side of the squares of latent pixels that are packed into one token."""


@dataclass(frozen=True)
class FluxConfig:
    """diffusers' options and defaults, those of FLUX.1 schnell; dev is guidance_embeds=True.

    in_channels: of a token, 4 times the channels of the latents. axes_dims_rope: how many of a head's numbers the
    positions turn, for an axis that is not used, for rows and for columns.
    """

    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    FIXED: ClassVar[Mapping[str, tuple]] = {"patch_size": (1,)}
    """Options of diffusers at the only values supported."""

    def __post_init__(self):
        if self.in_channels % PACKED**2:
            raise ValueError(f"in_channels are {PACKED**2} latent pixels' channels; given {self.in_channels}")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(
                f"a network of {self.in_channels} channels that answers {self.out_channels} takes an image as a "
                "condition (FLUX.1 Fill, Depth, Canny), which is not supported"
            )
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(n % 2 for n in axes):
            raise ValueError(
                f"axes_dims_rope are three even numbers that sum to attention_head_dim = {self.attention_head_dim}; "
                f"given {axes}"
            )

    @property
    def width(self) -> int:
        """The size of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the images that the network takes."""
        return self.in_channels // PACKED**2


class Flux(nnx.Module):
    """Blocks of joint attention, then blocks that treat image and text tokens alike; positions are rotations.

    x: [B, H, W, in_channels / 4], even sides; c_noise, s_noise: [B], the flow's time, 0 … 1, as diffusers' forward
    takes it (its pipeline divides the scheduler's timesteps by 1000); cond: `Prompt(states [B, L, joint_attention_dim],
    pooled=[B, pooled_projection_dim])`. Computes in `dtype`; norms, embeddings and output in float32. remat: keeps one
    block's activations at a time.

    With guidance_embeds cond is `Scaled(prompt, w)`, and w, the pipeline's guidance_scale, enters the embedding that
    the network was trained with. Without, `Scaled` is for students, whose embedding of w is 0 at first.
    """

    def __init__(self, config: FluxConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        width = config.width
        heads, head_size = config.num_attention_heads, config.attention_head_dim
        waves = Sinusoidal(256, scale=1000.0)
        self.config = config
        self.x_embedder = Linear(config.in_channels, width, dtype=dtype, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, width, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeAndText(
            waves, config.pooled_projection_dim, width, config.guidance_embeds, rngs=rngs
        )
        self.transformer_blocks = Stack(
            lambda rngs: JointBlock(heads, head_size, norm=True, dtype=dtype, rngs=rngs),
            config.num_layers,
            remat=remat,
            rngs=rngs,
        )
        self.single_transformer_blocks = Stack(
            lambda rngs: SingleBlock(heads, head_size, dtype=dtype, rngs=rngs),
            config.num_single_layers,
            remat=remat,
            rngs=rngs,
        )
        self.norm_out = Modulation(width, 2, rngs=rngs)
        self.proj_out = Linear(width, config.in_channels, kernel_init=ZEROS, rngs=rngs)
        self.target = Extra(width, waves, rngs=rngs)
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
        """F(x, c_noise, cond, s): like x, float32. Raises ValueError for other shapes and conditions."""
        del rngs
        config = self.config
        if x.ndim != 4 or x.shape[-1] != config.latent_channels or x.shape[1] % PACKED or x.shape[2] % PACKED:
            raise ValueError(
                f"Flux takes latents [B, H, W, {config.latent_channels}] with even sides; given {list(x.shape)}"
            )
        cond, w = unscaled(cond)
        if config.guidance_embeds and w is None:
            raise ValueError("this Flux was trained with guidance: cond = Scaled(Prompt(states, pooled=...), w)")
        states, pooled = texts_of(cond, x.shape[0], config.joint_attention_dim, config.pooled_projection_dim, "Flux")
        embedding = self.time_text_embed(c_noise, pooled, w)
        embedding = jax.nn.silu(embedding + extras(self.target, s_noise, self.guidance, w))

        packed = pack(x)
        _, height, width, _ = packed.shape
        length = states.shape[1]
        rotary = turns(length, height, width, config.axes_dims_rope)
        image = self.x_embedder(packed.reshape(x.shape[0], height * width, -1))
        image, text = self.transformer_blocks((image, self.context_embedder(states)), embedding, rotary)
        tokens = self.single_transformer_blocks(jnp.concatenate([text, image], axis=1), embedding, rotary)
        scale, shift = self.norm_out(embedding)
        out = self.proj_out(modulated(tokens[:, length:].astype(jnp.float32), shift, scale, EPSILON))
        return unpack(out.reshape(packed.shape))


class SingleBlock(nnx.Module):
    """Attention and a feed-forward map side by side, from one normalisation and through one linear map."""

    def __init__(self, heads: int, head_size: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = heads * head_size
        self.norm = Modulation(width, 3, rngs=rngs)
        self.attn = JointAttention(heads, head_size, joint=False, norm=True, project=False, dtype=dtype, rngs=rngs)
        self.proj_mlp = Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.proj_out = Linear(5 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Array, embedding: Array, rotary: Rotary) -> Array:
        """tokens: [B, L, width], embedding: [B, width] -> like tokens."""
        shift, scale, gate = self.norm(embedding)
        seen = modulated(tokens, shift, scale, EPSILON)
        out, _ = self.attn(seen, rotary=rotary)
        wide = jax.nn.gelu(self.proj_mlp(seen), approximate=True)
        return gated(tokens, gate, self.proj_out(jnp.concatenate([out, wide], axis=-1)))


def turns(text: int, height: int, width: int, axes: tuple[int, ...]) -> Rotary:
    """Rotary angles i θ^(−2j/d), θ = 10⁴, of `text` tokens at place 0 and then of a grid's, by row and by column."""

    def angles(count, size):
        return np.outer(np.arange(count), 10_000.0 ** (-np.arange(0, size, 2) / size))

    def table(wave):
        unused, rows, columns = (
            jnp.asarray(wave(angles(count, size)), jnp.float32)
            for count, size in zip((1, height, width), axes, strict=True)
        )
        parts = unused[:, None], rows[:, None], columns[None, :]
        grid = jnp.concatenate([jnp.broadcast_to(p, (height, width, p.shape[-1])) for p in parts], axis=-1)
        origin = jnp.broadcast_to(wave(np.zeros(1)).astype(np.float32), (text, sum(axes) // 2))
        return jnp.concatenate([origin, grid.reshape(height * width, -1)])

    return table(np.cos), table(np.sin)


def pack(x: Array) -> Array:
    """Squares of 2 × 2 pixels as one: [B, H, W, C] -> [B, H/2, W/2, 4 C], channel by channel, then row, then column."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h // PACKED, PACKED, w // PACKED, PACKED, c)
    return squares.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // PACKED, w // PACKED, PACKED**2 * c)


def unpack(packed: Array) -> Array:
    """The inverse of `pack`."""
    b, h, w, c = packed.shape
    squares = packed.reshape(b, h, w, c // PACKED**2, PACKED, PACKED)
    return squares.transpose(0, 1, 4, 2, 5, 3).reshape(b, PACKED * h, PACKED * w, -1)
