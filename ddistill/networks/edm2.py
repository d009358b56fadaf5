"""The UNet of EDM2, in which every layer keeps the magnitude of activations (Karras et al. 2024, arXiv 2312.02696).

Parameter paths are the names in NVlabs/edm2's snapshots below "unet.", "enc.64x64_block0.conv_res0.kernel" for example.
Weights count by their direction alone, as every layer normalises what it reads (eq. 47). Training also writes the
normalised weights back before each step (forced weight normalisation, eq. 66): `normalised` is that step. The network
sees ¼ log σ (`EDMPrecondition`); EDM2's uncertainty estimate, logvar, is for its training loss and left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.edm import (
    EXTRA,
    Step,
    anew,
    check_filter,
    check_image,
    check_levels,
    convolve,
    downsample,
    dropout_key,
    one_hot,
    plan,
    upsample,
)
from ddistill.networks.layers import Extra, Remat, attention

EPSILON = 1e-4
SILU_GAIN = 1 / 0.596
"""What restores the magnitude of SiLU's outputs for normal inputs (eq. 81)."""


@dataclass(frozen=True)
class EDM2UNetConfig:
    """Arguments of EDM2's UNet and of its blocks, by their names and defaults, which are EDM2-S's.

    channel_mult_noise, channel_mult_emb: None for the first and the largest of channel_mult. clip_act: None does not
    clip activations.
    """

    img_resolution: int
    img_channels: int = 3
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (16, 8)
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: tuple[int, ...] = (1, 1)
    channels_per_head: int = 64
    dropout: float = 0.0
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256
    FIXED: ClassVar[Mapping[str, tuple]] = {}

    def __post_init__(self):
        check_levels(self.img_resolution, self.channel_mult)
        check_filter(self.resample_filter)


def unit(x: Array, axes: Sequence[int] | int) -> Array:
    """x with a root mean square of 1 over the axes (EDM2's normalize), in x's dtype."""
    size = jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
    return x / (EPSILON + size).astype(x.dtype)


def normalised(params: Mapping[str, Array]) -> dict[str, Array]:
    """Parameters whose weights have been normalised: forced weight normalisation, after (or before) every step, eq. 66.

    params: those of an EDM2UNet, by path. Gains and what a student adds (target, guidance) stay as they are.
    """

    def force(path, w):
        ours = path.startswith(("target.", "guidance."))
        return w if ours or not path.endswith(".kernel") else unit(w, tuple(range(w.ndim - 1)))

    return {path: force(path, w) for path, w in params.items()}


def mp_silu(x: Array) -> Array:
    """SiLU that keeps the magnitude (eq. 81)."""
    return jax.nn.silu(x) * SILU_GAIN


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """(1 − t) a + t b over the magnitude that it has for independent a and b (eq. 88)."""
    return (a + t * (b - a)) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Array, b: Array, t: float) -> Array:
    """Channels of a and b, which count 1 − t and t whatever their numbers (eq. 103)."""
    n, m = a.shape[-1], b.shape[-1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return jnp.concatenate([a * (scale * (1 - t) / math.sqrt(n)), b * (scale * t / math.sqrt(m))], axis=-1)


class MPFourier(nnx.Module):
    """Cosines of random frequencies and phases, of magnitude 1, saved with the weights but not trained (eq. 75)."""

    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.freqs = nnx.Variable(2 * math.pi * jax.random.normal(rngs.params(), (size,)))
        self.phases = nnx.Variable(2 * math.pi * jax.random.uniform(rngs.params(), (size,)))

    def __call__(self, t: Array) -> Array:
        """[B] -> [B, size], float32."""
        return math.sqrt(2) * jnp.cos(t.astype(jnp.float32)[:, None] * self.freqs[...] + self.phases[...])


class MPConv(nnx.Module):
    """Convolution, or linear map for size None, by normalised weights, without bias (eq. 47)."""

    def __init__(self, inward: int, outward: int, size: int | None = None, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        window = () if size is None else (size, size)
        self.dtype = dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*window, inward, outward)))

    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        """[B, H, W, C] -> [B, H, W, C'], or [B, C] -> [B, C'], in the layer's dtype."""
        kernel = self.kernel[...]
        fan_in = math.prod(kernel.shape[:-1])
        kernel = (unit(kernel, tuple(range(kernel.ndim - 1))) * (gain / math.sqrt(fan_in))).astype(self.dtype)
        x = x.astype(self.dtype)
        return x @ kernel if kernel.ndim == 2 else convolve(x, kernel)


class Block(nnx.Module):
    """A block of the encoder or, with decode, of the decoder, with self-attention or without (fig. 21)."""

    def __init__(
        self,
        inward: int,
        outward: int,
        width: int,
        config: EDM2UNetConfig,
        *,
        decode: bool = False,
        up: bool = False,
        down: bool = False,
        attend: bool = False,
        dtype: jnp.dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        self.config, self.decode, self.up, self.down, self.remat = config, decode, up, down, remat
        kinds: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.emb_gain = nnx.Param(jnp.zeros(()))
        self.conv_res0 = MPConv(inward if decode else outward, outward, 3, **kinds)
        self.emb_linear = MPConv(width, outward, dtype=jnp.float32, rngs=rngs)
        self.conv_res1 = MPConv(outward, outward, 3, **kinds)
        self.dropout = nnx.Dropout(config.dropout)
        self.conv_skip = MPConv(inward, outward, 1, **kinds) if inward != outward else None
        self.heads = outward // config.channels_per_head if attend else 0
        self.attn_qkv = MPConv(outward, 3 * outward, 1, **kinds) if self.heads else None
        self.attn_proj = MPConv(outward, outward, 1, **kinds) if self.heads else None

    def __call__(self, x: Array, emb: Array, key: Array | None = None) -> Array:
        """x [B, H, W, C] and the embedding [B, E], float32 -> [B, H', W', C']; key draws dropout."""
        if self.remat:
            return anew(Block._run, self, self.remat, x, emb, key)
        return self._run(x, emb, key)

    def _run(self, x: Array, emb: Array, key: Array | None) -> Array:
        config = self.config
        if self.up or self.down:
            x = (upsample if self.up else downsample)(x, config.resample_filter)
        if not self.decode:
            x = unit(x if self.conv_skip is None else self.conv_skip(x), -1)
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, self.emb_gain[...]) + 1
        y = mp_silu(y * scale[:, None, None].astype(y.dtype))
        y = self.conv_res1(self.dropout(y, deterministic=key is None, rngs=key))
        if self.decode and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, config.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            batch, height, width, _ = x.shape
            # A channel of qkv is (head, channel of the head, which of the three).
            qkv = unit(self.attn_qkv(x).reshape(batch, height * width, self.heads, -1, 3), -2)
            a = attention(qkv[..., 0], qkv[..., 1], qkv[..., 2])
            x = mp_sum(x, self.attn_proj(a.reshape(x.shape)), config.attn_balance)
        return x if config.clip_act is None else jnp.clip(x, -config.clip_act, config.clip_act)


class EDM2UNet(nnx.Module):
    """EDM2's UNet, on pixels or latents.

    x: [B, H, W, img_channels]; c_noise, s_noise: [B]; cond: labels [B], −1 and label_dim being none, or
    `Scaled(labels, w)`. s and w add nothing before training. Computes in `dtype`; norms, embeddings and output are
    float32. remat: the backward pass computes each block anew.
    """

    def __init__(self, config: EDM2UNetConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        sizes = [config.model_channels * m for m in config.channel_mult]
        noise = config.model_channels * (config.channel_mult_noise or config.channel_mult[0])
        width = config.model_channels * (config.channel_mult_emb or max(config.channel_mult))
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        single: dict[str, Any] = {"dtype": jnp.float32, "rngs": rngs}

        def block(step: Step, decode: bool) -> Block:
            moves: dict[str, Any] = {
                "up": step.kind == "up",
                "down": step.kind == "down",
                "attend": step.attend,
                "decode": decode,
            }
            return Block(step.inward, step.outward, width, config, remat=remat, **moves, **common)

        self.out_gain = nnx.Param(jnp.zeros(()))
        self.emb_fourier = MPFourier(noise, rngs=rngs)
        self.emb_noise = MPConv(noise, width, **single)
        self.emb_label = MPConv(config.label_dim, width, **single) if config.label_dim else None
        self.target = Extra(width, EXTRA, rngs=rngs)
        self.guidance = Extra(width, EXTRA, rngs=rngs)

        encoder, decoder = plan(
            config.img_resolution, config.img_channels + 1, sizes[0], sizes, config.num_blocks, config.attn_resolutions
        )
        conv, *steps = encoder
        enc: dict[str, Any] = {conv.name: MPConv(conv.inward, conv.outward, 3, **common)} | {
            s.name: block(s, False) for s in steps
        }
        dec: dict[str, Any] = {step.name: block(step, True) for step in decoder}
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)
        self.order = tuple(enc), tuple(dec)  # merged modules have their names sorted
        self.out_conv = MPConv(sizes[0], config.img_channels, 3, **common)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: PyTree = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, H, W, C] like x, float32."""
        config = self.config
        check_image(x, config.img_channels, len(config.channel_mult), "EDM2UNet")
        labels, w = one_hot(cond, len(x), config.label_dim, "EDM2UNet")
        emb = self.emb_noise(self.emb_fourier(c_noise))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(labels * math.sqrt(config.label_dim)), config.label_balance)
        if s_noise is not None:
            emb = emb + self.target(s_noise)
        if w is not None:
            emb = emb + self.guidance(jnp.log1p(w))
        emb = mp_silu(emb)

        encoder, decoder = self.order
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # instead of biases
        skips = []
        for name in encoder:
            module = self.enc[name]
            x = module(x) if "conv" in name else module(x, emb, dropout_key(rngs, config.dropout))
            skips.append(x)
        for name in decoder:
            x = mp_cat(x, skips.pop(), config.concat_balance) if "block" in name else x
            x = self.dec[name](x, emb, dropout_key(rngs, config.dropout))
        return self.out_conv(x, self.out_gain[...]).astype(jnp.float32)
