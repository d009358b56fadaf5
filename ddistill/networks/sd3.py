"""SD3: the multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024).

diffusers' `SD3Transformer2DModel`.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.conditions import unscaled
from ddistill.networks.joint import EPSILON, JointBlock, Modulation, TimeAndText, texts_of
from ddistill.networks.layers import Extra, Linear, Remat, Sinusoidal, Stack
from ddistill.networks.tokens import GUIDANCE, ZEROS, PatchConv, extras, image_of, modulated, positions


@dataclass(frozen=True)
class SD3Config:
    """diffusers' options and defaults. SD3 medium: 24 layers, 24 heads, caption_projection_dim 1536, 192 positions.

    sample_size, pos_embed_max_size: the side of the images that positions were made for, in latent pixels, and the side
    of the table of positions, in patches, from whose middle an image takes its own. dual_attention_layers: the numbers
    of the blocks with a second attention among the image's tokens. qk_norm: None or "rms_norm".
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {}
    """Options of diffusers at the only values supported: there are none."""

    def __post_init__(self):
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm is None or 'rms_norm'; given {self.qk_norm!r}")
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim is the width of the tokens, {self.num_attention_heads} heads of "
                f"{self.attention_head_dim}; given {self.caption_projection_dim}"
            )
        if self.channels_out < self.in_channels:
            raise ValueError(
                f"out_channels = {self.out_channels} leave no output for each of {self.in_channels} inputs"
            )
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise ValueError(f"dual_attention_layers {beyond} are not among {self.num_layers} layers")

    @property
    def width(self) -> int:
        """The size of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        """Channels of the output."""
        return self.in_channels if self.out_channels is None else self.out_channels


class SD3(nnx.Module):
    """Blocks of joint attention on the patches of a latent image and the tokens of a text.

    x: [B, H, W, in_channels], sides that patch_size divides and at most pos_embed_max_size patches; c_noise, s_noise:
    [B], 1000 times the flow's time, 0 … 1000; cond: `Prompt(states [B, L, joint_attention_dim], pooled=[B,
    pooled_projection_dim])`, alone or in `Scaled`. Computes in `dtype`; norms, embeddings and output in float32.
    remat: keeps one block's activations at a time.

    Equal blocks that follow each other are a `Stack`, named by the number of its first block. The table of positions
    is saved in checkpoints, and those of SD3 differ from what the options say: it is kept in `rest`, not trained.
    """

    def __init__(self, config: SD3Config, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        width, size = config.width, config.patch_size
        waves = Sinusoidal(256)
        self.config = config
        self.pos_embed = Patches(config, dtype=dtype, rngs=rngs)
        self.time_text_embed = TimeAndText(waves, config.pooled_projection_dim, width, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, width, dtype=dtype, rngs=rngs)

        def kind(number):
            return {"dual": number in config.dual_attention_layers, "last": number == config.num_layers - 1}

        def stack(numbers):
            heads, head_size, norm = config.num_attention_heads, config.attention_head_dim, config.qk_norm is not None
            make = partial(JointBlock, heads, head_size, norm=norm, **kind(numbers[0]), dtype=dtype)
            return Stack(lambda rngs: make(rngs=rngs), len(numbers), remat=remat, rngs=rngs)

        runs = [tuple(numbers) for _, numbers in itertools.groupby(range(config.num_layers), kind)]
        self.firsts = tuple(str(numbers[0]) for numbers in runs)
        self.transformer_blocks = nnx.Dict({str(numbers[0]): stack(numbers) for numbers in runs})
        self.norm_out = Modulation(width, 2, rngs=rngs)
        self.proj_out = Linear(width, size**2 * config.channels_out, kernel_init=ZEROS, rngs=rngs)
        self.target = Extra(width, waves, rngs=rngs)
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
        """F(x, c_noise, cond, s): like x, float32. Raises ValueError for other shapes and conditions."""
        del rngs
        config = self.config
        cond, w = unscaled(cond)
        states, pooled = texts_of(cond, x.shape[0], config.joint_attention_dim, config.pooled_projection_dim, "SD3")
        patches = self.pos_embed(x)
        embedding = self.time_text_embed(c_noise, pooled) + extras(self.target, s_noise, self.guidance, w)
        embedding = jax.nn.silu(embedding)
        tokens: Any = (patches.reshape(x.shape[0], -1, config.width), self.context_embedder(states))
        for first in self.firsts:
            tokens = self.transformer_blocks[first](tokens, embedding)
        scale, shift = self.norm_out(embedding)
        out = self.proj_out(modulated(tokens[0].astype(jnp.float32), shift, scale, EPSILON))
        return image_of(out.reshape(*patches.shape[:3], -1), config.patch_size, config.in_channels)


class Patches(nnx.Module):
    """Patches of an image as tokens, plus their positions, cut from the middle of a table (Esser et al. 2024, B.2)."""

    def __init__(self, config: SD3Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.proj = PatchConv(config.in_channels, config.width, config.patch_size, dtype=dtype, rngs=rngs)
        side = config.pos_embed_max_size
        table = positions(side, side, config.width, base=config.sample_size // config.patch_size)
        self.pos_embed = nnx.Variable(table.reshape(1, side * side, config.width))

    def __call__(self, x: Array) -> Array:
        """[B, H, W, in_channels] -> [B, H/patch_size, W/patch_size, width]. Raises ValueError for any other shape."""
        channels, size, side = self.config.in_channels, self.config.patch_size, self.config.pos_embed_max_size
        if x.ndim != 4 or x.shape[-1] != channels or any(n % size or n > size * side for n in x.shape[1:3]):
            raise ValueError(
                f"this network takes images [B, H, W, {channels}] with sides that {size} divides, at most "
                f"{size * side}; given {list(x.shape)}"
            )
        patches = self.proj(x)
        _, height, width, _ = patches.shape
        top, left = (side - height) // 2, (side - width) // 2
        table = self.pos_embed[...].reshape(side, side, -1)[top : top + height, left : left + width]
        return (patches.astype(jnp.float32) + table).astype(patches.dtype)
