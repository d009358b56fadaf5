"""Autoencoders between pictures and latents, with the names and the numbers of diffusers' checkpoints.

`AutoencoderKL` is the one of Stable Diffusion, SDXL, SD3 and FLUX (Rombach et al. 2022), `AutoencoderTiny` its small
distilled stand-in (TAESD). Pictures are [B, H, W, 3] in [−1, 1]. A denoiser sees latents as `to_latents` gives them,
(z − shift) · scale, and `to_pictures` takes them back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.networks.layers import GroupNorm, Linear, attention

DOWN, UP = "DownEncoderBlock2D", "UpDecoderBlock2D"


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of diffusers' AutoencoderKL, under their names and with their defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = (DOWN,)
    up_block_types: tuple[str, ...] = (UP,)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    FIXED: ClassVar[Mapping[str, tuple]] = {"act_fn": ("silu",)}

    def __post_init__(self):
        for name in ("latents_mean", "latents_std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.latent_channels:
                raise ValueError(f"{name} has {len(given)} numbers for {self.latent_channels} latent_channels")
        levels = len(self.block_out_channels)
        for name, kind in (("down_block_types", DOWN), ("up_block_types", UP)):
            if tuple(getattr(self, name)) != (kind,) * levels:
                raise ValueError(
                    f"{name} = {list(getattr(self, name))}: an AutoencoderKL of {levels} block_out_channels "
                    f"has {levels} times {kind}; other blocks are not supported"
                )

    @property
    def reduction(self) -> int:
        """By what height and width are divided."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class AutoencoderTinyConfig:
    """The fields of diffusers' AutoencoderTiny, under their names and with their defaults."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float | None = 0.0

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "act_fn": ("relu",),
        "upsample_fn": ("nearest",),
        "upsampling_scaling_factor": (2,),
        "force_upcast": (False,),
    }
    UNREAD: ClassVar[tuple[str, ...]] = ("block_out_channels",)  # diffusers writes it, and reads the two above

    def __post_init__(self):
        for part in ("encoder", "decoder"):
            widths, blocks = getattr(self, f"{part}_block_out_channels"), getattr(self, f"num_{part}_blocks")
            if len(widths) != len(blocks) or len(set(widths)) > 1:
                raise ValueError(
                    f"{part}_block_out_channels = {list(widths)} with num_{part}_blocks = {list(blocks)}: "
                    "give one number of blocks for each width, and the same width at all levels"
                )

    @property
    def reduction(self) -> int:
        """By what height and width are divided."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Posterior:
    """N(mean, exp(log_variance)) of each latent number, float32 [B, h, w, C]: what `AutoencoderKL.encode` answers."""

    mean: Array
    log_variance: Array

    def mode(self) -> Array:
        """The mean."""
        return self.mean

    def sample(self, key: Array) -> Array:
        """A draw, [B, h, w, C]."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * jax.random.normal(key, self.mean.shape)

    def kl(self) -> Array:
        """KL divergence to N(0, I) of each picture's latents, [B], in nats (Kingma & Welling 2014, app. B)."""
        each = self.mean**2 + jnp.exp(self.log_variance) - 1 - self.log_variance
        return 0.5 * jnp.sum(each, axis=(1, 2, 3))


class AutoencoderKL(nnx.Module):
    """The variational autoencoder of latent diffusion (Rombach et al. 2022, app. E), diffusers' AutoencoderKL.

    It computes in `dtype`, but in float32 if that is float16 and the config says force_upcast, where it would overflow.
    remat: inside a block nothing is kept for the backward pass.
    """

    def __init__(self, config: AutoencoderKLConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        dtype = jnp.float32 if config.force_upcast and dtype == jnp.float16 else dtype
        z = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, dtype=dtype, remat=remat, rngs=rngs)
        self.decoder = Decoder(config, dtype=dtype, remat=remat, rngs=rngs)
        self.quant_conv = _conv(2 * z, 2 * z, 1, dtype=dtype, rngs=rngs) if config.use_quant_conv else None
        self.post_quant_conv = _conv(z, z, 1, dtype=dtype, rngs=rngs) if config.use_post_quant_conv else None

    def encode(self, x: Array) -> Posterior:
        """Pictures [B, H, W, in_channels] in [−1, 1] -> the posterior of z, [B, H/r, W/r, latent_channels].

        Raises ValueError for other channels, and for sizes that r = config.reduction does not divide.
        """
        _check("encodes pictures", x, self.config.in_channels, self.config.reduction)
        moments = self.encoder(x)
        moments = moments if self.quant_conv is None else self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def decode(self, z: Array) -> Array:
        """z [B, h, w, latent_channels], as encoded, not as a denoiser sees it -> pictures [B, r h, r w, out_channels].

        float32, about in [−1, 1]. Raises ValueError for other channels.
        """
        _check("decodes latents", z, self.config.latent_channels)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return self.decoder(z).astype(jnp.float32)


class AutoencoderTiny(nnx.Module):
    """TAESD (https://github.com/madebyollin/taesd), diffusers' AutoencoderTiny: its z is a denoiser's already."""

    def __init__(self, config: AutoencoderTinyConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        c = config
        self.config = config
        self.encoder = EncoderTiny(
            c.in_channels, c.encoder_block_out_channels[0], c.latent_channels, c.num_encoder_blocks,
            dtype=dtype, remat=remat, rngs=rngs,
        )  # fmt: skip
        self.decoder = DecoderTiny(
            c.latent_channels, c.decoder_block_out_channels[0], c.out_channels, c.num_decoder_blocks,
            dtype=dtype, remat=remat, rngs=rngs,
        )  # fmt: skip

    def encode(self, x: Array) -> Array:
        """Pictures [B, H, W, in_channels] in [−1, 1] -> latents [B, H/r, W/r, latent_channels], float32.

        Raises ValueError for other channels, and for sizes that r = config.reduction does not divide.
        """
        _check("encodes pictures", x, self.config.in_channels, self.config.reduction)
        return self.encoder(x).astype(jnp.float32)

    def decode(self, z: Array) -> Array:
        """Latents [B, h, w, latent_channels] -> pictures [B, r h, r w, out_channels], float32, about in [−1, 1].

        Raises ValueError for other channels.
        """
        _check("decodes latents", z, self.config.latent_channels)
        return self.decoder(z).astype(jnp.float32)

    def to_unit(self, z: Array) -> Array:
        """Latents squeezed to [0, 1], to be kept as bytes."""
        return jnp.clip(z / (2 * self.config.latent_magnitude) + self.config.latent_shift, 0.0, 1.0)

    def from_unit(self, u: Array) -> Array:
        """The inverse of `to_unit`."""
        return (u - self.config.latent_shift) * (2 * self.config.latent_magnitude)


def to_latents(
    autoencoder: AutoencoderKL | AutoencoderTiny, pictures: Array, key: Array | None = None, at_once: int | None = None
) -> Array:
    """Pictures [B, H, W, 3] in [−1, 1] as a denoiser's latents (z − shift) · scale, [B, h, w, C], float32.

    z is the posterior's mean, or with a key a draw from it. at_once: how many pictures are encoded at a time; all if
    None. The numbers do not depend on it.
    """
    z = _in_slices(autoencoder.encode, pictures, at_once)
    if isinstance(z, Posterior):
        z = z.mode() if key is None else z.sample(key)
    shift, scale = scale_of(autoencoder.config)
    return (z - shift) * scale


def scale_of(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> tuple[Any, Any]:
    """shift and scale, each a number or one for each channel: a denoiser's latents are (z − shift) · scale.

    Where latents have a mean and a deviation of their own, z is normalised by them first.
    """
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    shift = (config.shift_factor or 0.0) if mean is None else np.asarray(mean, np.float32)
    scale = config.scaling_factor if std is None else config.scaling_factor / np.asarray(std, np.float32)
    return shift, scale


def to_pictures(
    autoencoder: AutoencoderKL | AutoencoderTiny, latents: Array, at_once: int | None = None, clip: bool = True
) -> Array:
    """A denoiser's latents [B, h, w, C] as pictures [B, H, W, 3], float32.

    at_once: how many are decoded at a time, so that a large batch fits; all if None. clip: to [−1, 1]; losses that send
    gradients through the pictures go without.
    """
    shift, scale = scale_of(autoencoder.config)
    pictures = _in_slices(autoencoder.decode, latents / scale + shift, at_once)
    return jnp.clip(pictures, -1.0, 1.0) if clip else pictures


def current_name(name: str) -> str:
    """The name that a tensor of an old AutoencoderKL checkpoint, Stable Diffusion 1.5's for example, has today."""
    renamed = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    head, _, rest = name.partition(".attentions.")
    number, _, rest = rest.partition(".")
    layer, _, leaf = rest.partition(".")
    return f"{head}.attentions.{number}.{renamed[layer]}.{leaf}" if layer in renamed else name


class Resnet(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), [B, H, W, in] -> [B, H, W, out]."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups, 1e-6)
        self.conv1 = _conv(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups, 1e-6)
        self.conv2 = _conv(outputs, outputs, dtype=dtype, rngs=rngs)
        self.conv_shortcut = _conv(inputs, outputs, 1, dtype=dtype, rngs=rngs) if inputs != outputs else None

    def __call__(self, x: Array) -> Array:
        """[B, H, W, in] -> [B, H, W, out]."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Self-attention of all positions, with one head."""

    def __init__(self, channels: int, groups: int, *, dtype, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, 1e-6)
        linear = partial(Linear, channels, channels, dtype=dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v, self.to_out = linear(), linear(), linear(), nnx.List([linear()])

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        tokens = self.group_norm(x).reshape(x.shape[0], -1, 1, x.shape[-1])
        out = attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


class Middle(nnx.Module):
    """Two residual blocks, with attention between them."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
        width, groups = config.block_out_channels[-1], config.norm_num_groups
        self.remat = remat
        self.resnets = nnx.List([Resnet(width, width, groups, dtype=dtype, rngs=rngs) for _ in range(2)])
        attend = config.mid_block_add_attention
        self.attentions = nnx.List([Attention(width, groups, dtype=dtype, rngs=rngs)] if attend else [])

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        return _run([self.resnets[0], *self.attentions, self.resnets[1]], x, self.remat)


class Level(nnx.Module):
    """Residual blocks of one resolution, and after them a step to the next: "down", "up" or None."""

    def __init__(
        self, inputs: int, outputs: int, depth: int, step: str | None, groups: int, *, dtype, remat, rngs: nnx.Rngs
    ):
        self.remat = remat
        self.resnets = nnx.List(
            [Resnet(inputs if i == 0 else outputs, outputs, groups, dtype=dtype, rngs=rngs) for i in range(depth)]
        )
        self.downsamplers = nnx.List([Down(outputs, dtype=dtype, rngs=rngs)] if step == "down" else [])
        self.upsamplers = nnx.List([Up(outputs, dtype=dtype, rngs=rngs)] if step == "up" else [])

    def __call__(self, x: Array) -> Array:
        """[B, H, W, in] -> [B, H', W', out]."""
        return _run([*self.resnets, *self.downsamplers, *self.upsamplers], x, self.remat)


class Down(nnx.Module):
    """Half the resolution: a convolution of stride 2 that sees one row and column of zeros, below and to the right."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, stride=2, padding=((0, 1), (0, 1)), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H/2, W/2, C]."""
        return self.conv(x)


class Up(nnx.Module):
    """Twice the resolution: each position four times, then a convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, 2H, 2W, C]."""
        return self.conv(_doubled(x))


class Encoder(nnx.Module):
    """Pictures [B, H, W, in_channels] -> mean and log-variance side by side, [B, H/r, W/r, 2 latent_channels]."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        make = partial(Level, depth=config.layers_per_block, groups=groups, dtype=dtype, remat=remat, rngs=rngs)
        self.conv_in = _conv(config.in_channels, widths[0], dtype=dtype, rngs=rngs)
        self.down_blocks = nnx.List(
            [
                make(widths[max(i - 1, 0)], width, step="down" if i < len(widths) - 1 else None)
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = Middle(config, dtype=dtype, remat=remat, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, 1e-6)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, in_channels] -> [B, H/r, W/r, 2 latent_channels]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents [B, h, w, latent_channels] -> pictures [B, r h, r w, out_channels]."""

    def __init__(self, config: AutoencoderKLConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        make = partial(Level, depth=config.layers_per_block + 1, groups=groups, dtype=dtype, remat=remat, rngs=rngs)
        self.conv_in = _conv(config.latent_channels, widths[0], dtype=dtype, rngs=rngs)
        self.mid_block = Middle(config, dtype=dtype, remat=remat, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                make(widths[max(i - 1, 0)], width, step="up" if i < len(widths) - 1 else None)
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups, 1e-6)
        self.conv_out = _conv(widths[-1], config.out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, z: Array) -> Array:
        """[B, h, w, latent_channels] -> [B, r h, r w, out_channels]."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class TinyBlock(nnx.Module):
    """relu(x + three convolutions of x)."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, width, width, dtype=dtype, rngs=rngs)
        self.conv = nnx.List([conv(), jax.nn.relu, conv(), jax.nn.relu, conv()])

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        return jax.nn.relu(x + _run(self.conv, x))


class EncoderTiny(nnx.Module):
    """Pictures in [−1, 1] -> latents; `blocks` tiny blocks at each resolution."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: tuple[int, ...], *, dtype, remat, rngs):
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        layers: list[Callable] = []
        for level, depth in enumerate(blocks):
            layers.append(conv(width, width, stride=2, use_bias=False) if level else conv(inputs, width))
            layers += [TinyBlock(width, dtype=dtype, rngs=rngs) for _ in range(depth)]
        self.remat = remat
        self.layers = nnx.List([*layers, conv(width, outputs)])

    def __call__(self, x: Array) -> Array:
        """[B, H, W, in] -> [B, H/r, W/r, out]."""
        return _run(self.layers, (x + 1) / 2, self.remat)


class DecoderTiny(nnx.Module):
    """Latents -> pictures in [−1, 1]; `blocks` tiny blocks at each resolution."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: tuple[int, ...], *, dtype, remat, rngs):
        conv = partial(_conv, dtype=dtype, rngs=rngs)
        layers: list[Callable] = [conv(inputs, width), jax.nn.relu]
        for level, depth in enumerate(blocks):
            layers += [TinyBlock(width, dtype=dtype, rngs=rngs) for _ in range(depth)]
            if level < len(blocks) - 1:
                layers += [_doubled, conv(width, width, use_bias=False)]
        self.remat = remat
        self.layers = nnx.List([*layers, conv(width, outputs)])

    def __call__(self, z: Array) -> Array:
        """[B, h, w, in] -> [B, r h, r w, out]."""
        return 2 * _run(self.layers, 3 * jnp.tanh(z / 3), self.remat) - 1


def _conv(inputs, outputs, size=3, *, stride=1, padding=None, use_bias=True, dtype, rngs) -> nnx.Conv:
    # PyTorch's padding, the same on all sides, which "SAME" is not at stride 2
    around = ((size // 2, size // 2),) * 2 if padding is None else padding
    return nnx.Conv(
        inputs, outputs, (size, size), strides=stride, padding=around, use_bias=use_bias, dtype=dtype, rngs=rngs
    )  # fmt: skip


def _doubled(x: Array) -> Array:
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _run(layers, x: Array, remat: bool = False) -> Array:
    for layer in layers:
        if remat and isinstance(layer, nnx.Module):
            graph, state = nnx.split(layer)
            x = jax.checkpoint(lambda state, x, graph=graph: nnx.merge(graph, state)(x))(state, x)
        else:
            x = layer(x)
    return x


def _in_slices(function, x: Array, at_once: int | None):
    if at_once is None or at_once >= len(x):
        return function(x)
    if at_once < 1:
        raise ValueError(f"at_once = {at_once}: give how many pictures go through the autoencoder at a time, 1 or more")
    whole = len(x) // at_once * at_once
    # A slice takes pictures from all over the batch: where devices share the batch, all of them work on each slice.
    parts = jax.lax.map(function, x[:whole].reshape(at_once, -1, *x.shape[1:]).swapaxes(0, 1))
    joined = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(whole, *a.shape[2:]), parts)
    if whole == len(x):
        return joined
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), joined, function(x[whole:]))


def _check(does: str, x: Array, channels: int, reduction: int = 1) -> None:
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"this autoencoder {does} [B, H, W, {channels}]; given {list(x.shape)}")
    if x.shape[1] % reduction or x.shape[2] % reduction:
        raise ValueError(
            f"this autoencoder {does} whose height and width are multiples of {reduction}; given {list(x.shape)}: "
            "crop or pad them"
        )
