"""The UNets of EDM (Karras et al. 2022): SongUNet, which is DDPM++ and NCSN++, and DhariwalUNet, which is ADM.

Parameter paths are the names in NVlabs/edm's snapshots below "model.", "enc.32x32_block0.conv0.kernel" for example.
The networks see c_noise as EDM's preconditioning classes give it: ¼ log σ from EDMPrecond (`EDMPrecondition`), (M−1) t
from VPPrecond (`EpsPrecondition(999)` on `vp`), log ½σ from VEPrecond (`VEPrecondition`), and a count of noise levels
from iDDPMPrecond (`EpsPrecondition(time_offset=-1)` on `discrete_vp(squared_cosine_betas(1000))`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.net import PyTree, log_noise
from ddistill.networks.conditions import labels_or_none, unscaled
from ddistill.networks.layers import Extra, GroupNorm, Remat, Sinusoidal, attention, rematerialised
from ddistill.process import Process

EXTRA = Sinusoidal(scale=16.0)
"""Waves of a student's second time and of log(1 + w), 16 radians per unit and slower: both span a few units."""


@dataclass(frozen=True)
class VEPrecondition:
    """A network that outputs −ε and sees log ½σ, on any process: x0 = (x + σ F(x/α, log ½ρ))/α.

    EDM's VEPrecond (Karras et al. 2022, table 1, VE), multiplied out for processes with α ≠ 1.
    """

    def __call__(self, process: Process, t: Array) -> tuple[Array, Array, Array, Array]:
        """Coefficients at t; not finite where α = 0."""
        alpha = process.alpha(t)
        return 1 / alpha, process.sigma(t) / alpha, 1 / alpha, 4 * log_noise(process, t) - math.log(2)


@dataclass(frozen=True)
class SongUNetConfig:
    """Arguments of EDM's SongUNet by their names and defaults, which are DDPM++'s; label_dropout is the loss's.

    augment_dim: size of augmentation labels, whose map is kept with the weights and always sees zeros.
    Raises ValueError for kinds of embedding, encoder and decoder that there are not.
    """

    img_resolution: int
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.10
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    FIXED: ClassVar[Mapping[str, tuple]] = {"decoder_type": ("standard",)}

    def __post_init__(self):
        kinds = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual")}
        for name, accepted in kinds.items():
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} is one of {', '.join(accepted)}; given {getattr(self, name)!r}")
        check_levels(self.img_resolution, self.channel_mult)
        check_filter(self.resample_filter)


@dataclass(frozen=True)
class DhariwalUNetConfig:
    """Arguments of EDM's DhariwalUNet by their names and defaults, those of ADM on ImageNet-64.

    out_channels may be twice in_channels, where the variance was learned too. augment_dim: as in SongUNetConfig.
    """

    img_resolution: int
    in_channels: int = 3
    out_channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.10
    FIXED: ClassVar[Mapping[str, tuple]] = {}

    def __post_init__(self):
        check_levels(self.img_resolution, self.channel_mult)


def check_levels(resolution: int, mult: Sequence[int]) -> None:
    """Raise ValueError unless images can be halved from level to level."""
    if not mult or resolution % 2 ** (len(mult) - 1):
        raise ValueError(
            f"{len(mult)} levels (channel_mult) halve images {len(mult) - 1} times; {resolution} pixels cannot be"
        )


def check_filter(taps: Sequence[int]) -> None:
    """Raise ValueError unless a filter for resampling has an even number of taps."""
    if not taps or len(taps) % 2:
        raise ValueError(f"resample_filter has an even number of taps, as (1, 1) or (1, 3, 3, 1); given {tuple(taps)}")


def downsample(x: Array, taps: Sequence[float], padding: int | None = None) -> Array:
    """Filter [B, H, W, C] along both axes by taps, made to sum to 1, and keep every second value.

    padding: zeros at each side; by default such that H and W are halved.
    """
    if tuple(taps) == (1, 1) and padding is None:
        batch, height, width, channels = x.shape
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    weights = [tap / sum(taps) for tap in taps]
    pad = (len(taps) - 1) // 2 if padding is None else padding
    for axis in (1, 2):
        count = (x.shape[axis] + 2 * pad - len(taps)) // 2 + 1
        around = (pad, pad)
        x = jnp.pad(x, [around if a == axis else (0, 0) for a in range(x.ndim)])
        terms = [w * jax.lax.slice_in_dim(x, k, k + 2 * count - 1, 2, axis) for k, w in enumerate(weights)]
        x = sum(terms[1:], terms[0])
    return x


def upsample(x: Array, taps: Sequence[float]) -> Array:
    """Twice the size: zeros between the values of [B, H, W, C], filtered by taps; four times `downsample`'s adjoint."""
    batch, height, width, channels = x.shape
    if tuple(taps) == (1, 1):
        four = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
        return four.reshape(batch, 2 * height, 2 * width, channels)
    large = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, channels), x.dtype)
    (y,) = jax.linear_transpose(lambda y: downsample(y, taps), large)(x)
    return 4 * y


def anew(call: Callable[..., Array], module: nnx.Module, remat: Remat, *args: Any) -> Array:
    """call(module, *args) of which the backward pass finds module, args and what `remat` leaves."""
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states

    def pure(params, *args):
        return call(nnx.merge(graph, params, rest), *args)

    return rematerialised(pure, remat)(params, *args)


@dataclass(frozen=True)
class Init:
    """Initial weights of variance scale/fan, and biases uniform in ±spread/√fan_in."""

    scale: float
    fan: Literal["fan_in", "fan_avg"]
    distribution: Literal["uniform", "normal"] = "uniform"
    spread: float = 0.0

    def kernel(self, key: Array, shape: Sequence[int]) -> Array:
        """Draw weights [..., in, out]."""
        if self.scale == 0:
            return jnp.zeros(shape)
        return nnx.initializers.variance_scaling(self.scale, self.fan, self.distribution)(key, shape)

    def bias(self, key: Array, shape: Sequence[int]) -> Array:
        """Draw the biases [out] that go with weights of this shape."""
        bound = self.spread / math.sqrt(math.prod(shape[:-1]))
        return jax.random.uniform(key, shape[-1:], minval=-bound, maxval=bound) if bound else jnp.zeros(shape[-1:])

    def linear(self, inward: int, outward: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
        """A linear map with these weights, in float32."""

        def bias_init(key, shape, dtype=jnp.float32):
            return self.bias(key, (inward, *shape)).astype(dtype)

        def kernel_init(key, shape, dtype=jnp.float32):
            return self.kernel(key, shape).astype(dtype)

        return nnx.Linear(inward, outward, use_bias=bias, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)


class Conv(nnx.Module):
    """Convolution of [B, H, W, C] after resampling; size 0 resamples only. EDM's Conv2d.

    fused: the filter of downsampling comes after the convolution, with the borders that this leaves.
    """

    casts_kernel = True

    def __init__(
        self,
        inward: int,
        outward: int,
        size: int,
        init: Init,
        *,
        up: bool = False,
        down: bool = False,
        taps: Sequence[int] = (1, 1),
        fused: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.up, self.down, self.taps, self.fused, self.dtype = up, down, tuple(taps), fused, dtype
        shape = (size, size, inward, outward)
        self.kernel = nnx.Param(init.kernel(rngs.params(), shape)) if size else None
        self.bias = nnx.Param(init.bias(rngs.params(), shape)) if size else None

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', C'] in the layer's dtype."""
        x = x.astype(self.dtype)
        wider = (len(self.taps) - 1) // 2 if self.fused else 0
        if self.up:
            x = upsample(x, self.taps)
        if self.down and not self.fused:
            x = downsample(x, self.taps)
        if self.kernel is not None and self.bias is not None:
            x = convolve(x, self.kernel[...].astype(self.dtype), wider) + self.bias[...].astype(self.dtype)
        return downsample(x, self.taps, 0) if self.fused else x


def convolve(x: Array, kernel: Array, wider: int = 0) -> Array:
    """[B, H, W, C] with kernel [h, w, C, D], odd h = w, zeros around so that the size is kept, or 2·wider is added."""
    size, _, inward, outward = kernel.shape
    if size == 1 and not wider:  # one matrix product
        return (x.reshape(-1, inward) @ kernel[0, 0]).reshape(*x.shape[:-1], outward)
    pad = size // 2 + wider
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), [(pad, pad)] * 2, dimension_numbers=dims)


@dataclass(frozen=True)
class Style:
    """In what the blocks of EDM's two networks differ.

    skip: what sums are multiplied by. project: resampled skips have a 1 × 1 convolution always. modulate: the embedding
    gives a scale too. head: channels per attention head, None for one head.
    """

    skip: float
    epsilon: float
    project: bool
    modulate: bool
    head: int | None
    init: Init
    last: Init
    attention: Init


XAVIER = Init(1.0, "fan_avg")
SONG = Style(
    math.sqrt(0.5), 1e-6, True, False, None, XAVIER, Init(1e-10, "fan_avg"), Init(0.2, "fan_avg")
)  # fmt: skip
TORCH = Init(1 / 3, "fan_in", spread=1.0)
DHARIWAL = Style(1.0, 1e-5, False, True, 64, TORCH, Init(0.0, "fan_in"), TORCH)


def normalisation(channels: int, epsilon: float) -> GroupNorm:
    """EDM's group normalisation: at most 32 groups, of at least four channels."""
    return GroupNorm(channels, max(1, min(32, channels // 4)), epsilon)


class UNetBlock(nnx.Module):
    """Residual block with resampling and self-attention, told the noise by an embedding; EDM's UNetBlock."""

    def __init__(
        self,
        inward: int,
        outward: int,
        width: int,
        style: Style,
        *,
        up: bool = False,
        down: bool = False,
        attend: bool = False,
        taps: Sequence[int] = (1, 1),
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        remat: Remat = False,
        rngs: nnx.Rngs,
    ):
        self.style, self.remat, self.dtype = style, remat, dtype
        move: dict[str, Any] = {"up": up, "down": down, "taps": taps}
        kinds: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.norm0 = normalisation(inward, style.epsilon)
        self.conv0 = Conv(inward, outward, 3, style.init, **move, **kinds)
        self.affine = style.init.linear(width, outward * (1 + style.modulate), rngs=rngs)
        self.norm1 = normalisation(outward, style.epsilon)
        self.dropout = nnx.Dropout(dropout)
        self.conv1 = Conv(outward, outward, 3, style.last, **kinds)
        moves = inward != outward or up or down
        size = int(style.project or inward != outward)
        self.skip = Conv(inward, outward, size, style.init, **move, **kinds) if moves else None
        self.heads = 0 if not attend else 1 if style.head is None else outward // style.head
        if self.heads:
            self.norm2 = normalisation(outward, style.epsilon)
            self.qkv = Conv(outward, 3 * outward, 1, style.attention, **kinds)
            self.proj = Conv(outward, outward, 1, style.last, **kinds)

    def __call__(self, x: Array, emb: Array, key: Array | None = None) -> Array:
        """x [B, H, W, C] and the embedding [B, E], float32 -> [B, H', W', C']; key draws dropout."""
        if self.remat:
            return anew(UNetBlock._run, self, self.remat, x, emb, key)
        return self._run(x, emb, key)

    def _run(self, x: Array, emb: Array, key: Array | None) -> Array:
        y = self.conv0(jax.nn.silu(self.norm0(x)))
        change = self.affine(emb)[:, None, None].astype(y.dtype)
        if self.style.modulate:
            scale, shift = jnp.split(change, 2, axis=-1)
            y = jax.nn.silu(self.norm1(y) * (1 + scale) + shift)
        else:
            y = jax.nn.silu(self.norm1(y + change))
        y = self.conv1(self.dropout(y, deterministic=key is None, rngs=key))
        x = (y + (x if self.skip is None else self.skip(x))) * self.style.skip
        if self.heads:
            batch, height, width, _ = x.shape
            # A channel of qkv is (head, channel of the head, which of the three).
            qkv = self.qkv(self.norm2(x)).reshape(batch, height * width, self.heads, -1, 3)
            a = attention(qkv[..., 0], qkv[..., 1], qkv[..., 2])
            x = (x + self.proj(a.reshape(x.shape))) * self.style.skip
        return x


class Step(NamedTuple):
    """One block of a UNet: its name, channels that come in and out, and what it does beside."""

    name: str
    inward: int
    outward: int
    kind: Literal["conv", "down", "up", "in", "block"]
    attend: bool


def plan(
    resolution: int, image: int, first: int, sizes: Sequence[int], blocks: int, attend_at: Sequence[int]
) -> tuple[list[Step], list[Step]]:
    """The encoder and the decoder of a UNet of EDM or EDM2; a block of the decoder takes channels of the encoder too.

    image, first, sizes: channels of images, after the first convolution, and at each level.
    """
    encoder, decoder = [], []
    channels = image
    for level, size in enumerate(sizes):
        res = resolution >> level
        if level == 0:
            encoder.append(Step(f"{res}x{res}_conv", channels, first, "conv", False))
            channels = first
        else:
            encoder.append(Step(f"{res}x{res}_down", channels, channels, "down", False))
        for i in range(blocks):
            encoder.append(Step(f"{res}x{res}_block{i}", channels, size, "block", res in attend_at))
            channels = size
    skips = [step.outward for step in encoder]
    for level, size in reversed(list(enumerate(sizes))):
        res = resolution >> level
        if level == len(sizes) - 1:
            decoder += [Step(f"{res}x{res}_in{i}", channels, channels, "in", i == 0) for i in (0, 1)]
        else:
            decoder.append(Step(f"{res}x{res}_up", channels, channels, "up", False))
        for i in range(blocks + 1):
            decoder.append(Step(f"{res}x{res}_block{i}", channels + skips.pop(), size, "block", res in attend_at))
            channels = size
    return encoder, decoder


class FourierEmbedding(nnx.Module):
    """Cosines and sines of random frequencies, which are saved with the weights but not trained; NCSN++'s."""

    def __init__(self, size: int, scale: float = 16.0, *, rngs: nnx.Rngs):
        self.freqs = nnx.Variable(scale * jax.random.normal(rngs.params(), (size // 2,)))

    def __call__(self, t: Array) -> Array:
        """[B] -> [B, size], float32, sines first."""
        angles = t.astype(jnp.float32)[:, None] * (2 * np.pi * self.freqs[...])
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def one_hot(cond: PyTree, batch: int, classes: int, network: str) -> tuple[Array, Array | None]:
    """Labels as one-hot vectors [B, classes], zero for −1, `classes` and no labels, and the guidance scale that came.

    Raises ValueError for labels that a network without classes is given.
    """
    labels, w = unscaled(cond)
    if not classes and labels is not None:
        raise ValueError(f"this {network} was built without classes (label_dim = 0) and cannot take cond")
    return jax.nn.one_hot(labels_or_none(labels, batch, classes), classes), w


def check_image(x: Array, channels: int, levels: int, network: str) -> None:
    """Raise ValueError unless x is [B, H, W, channels] with H and W that can be halved at all levels."""
    factor = 2 ** (levels - 1)
    if x.ndim != 4 or x.shape[-1] != channels or x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(
            f"this {network} takes images [B, H, W, {channels}], H and W multiples of {factor}; given {x.shape}"
        )


def dropout_key(rngs: nnx.Rngs | None, rate: float) -> Array | None:
    """A key for one block's dropout, None where nothing is dropped."""
    return None if rngs is None or not rate else rngs.dropout()


class SongUNet(nnx.Module):
    """DDPM++ (positional embedding, standard encoder) and NCSN++ (Fourier, residual), as EDM trains them.

    x: [B, H, W, in_channels]; c_noise, s_noise: [B]; cond: labels [B], −1 and label_dim being none, or
    `Scaled(labels, w)`. s and w add nothing before training. Computes in `dtype`; norms, embeddings and output are
    float32. remat: the backward pass computes each block anew.
    """

    def __init__(self, config: SongUNetConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        self.config = config
        width, noise = (config.model_channels * m for m in (config.channel_mult_emb, config.channel_mult_noise))
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        move: dict[str, Any] = {"taps": config.resample_filter, **common}

        def block(step: Step, attend: bool) -> UNetBlock:
            moves: dict[str, Any] = {
                "up": step.kind == "up",
                "down": step.kind == "down",
                "attend": attend,
                "dropout": config.dropout,
            }
            return UNetBlock(step.inward, step.outward, width, SONG, remat=remat, **moves, **move)

        if config.embedding_type == "positional":
            self.map_noise: Any = Sinusoidal(noise, flip=False, shift=1.0)
        else:
            self.map_noise = FourierEmbedding(noise, rngs=rngs)
        self.map_label = XAVIER.linear(config.label_dim, noise, rngs=rngs) if config.label_dim else None
        self.map_augment = (
            XAVIER.linear(config.augment_dim, noise, bias=False, rngs=rngs) if config.augment_dim else None
        )
        self.map_layer0 = XAVIER.linear(noise, width, rngs=rngs)
        self.map_layer1 = XAVIER.linear(width, width, rngs=rngs)
        self.target = Extra(noise, EXTRA, rngs=rngs)
        self.guidance = Extra(noise, EXTRA, rngs=rngs)

        sizes = [config.model_channels * m for m in config.channel_mult]
        encoder, decoder = plan(
            config.img_resolution, config.in_channels, config.model_channels, sizes, config.num_blocks,
            config.attn_resolutions,
        )  # fmt: skip
        enc: dict[str, Any] = {}
        aux = config.in_channels
        for step in encoder:
            if step.kind == "conv":
                enc[step.name] = Conv(step.inward, step.outward, 3, XAVIER, **common)
            else:
                enc[step.name] = block(step, step.attend)
            if step.kind == "down" and config.encoder_type == "residual":
                name = step.name.replace("down", "aux_residual")
                enc[name] = Conv(aux, step.outward, 3, XAVIER, down=True, fused=True, **move)
                aux = step.outward
        dec: dict[str, Any] = {}
        for step in decoder:  # of a level's blocks the last alone attends
            last = step.kind != "block" or step.name.endswith(f"block{config.num_blocks}")
            dec[step.name] = block(step, step.attend and last)
        name = f"{config.img_resolution}x{config.img_resolution}"
        dec[f"{name}_aux_norm"] = normalisation(sizes[0], SONG.epsilon)
        dec[f"{name}_aux_conv"] = Conv(sizes[0], config.out_channels, 3, SONG.last, **common)
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)
        self.order = tuple(enc), tuple(dec)  # merged modules have their names sorted

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: PyTree = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, H, W, in_channels] like x, float32; more output channels are dropped."""
        config = self.config
        check_image(x, config.in_channels, len(config.channel_mult), "SongUNet")
        labels, w = one_hot(cond, len(x), config.label_dim, "SongUNet")
        emb = self.map_noise(c_noise)
        if self.map_label is not None:
            emb = emb + self.map_label(labels * math.sqrt(config.label_dim))
        if s_noise is not None:
            emb = emb + self.target(s_noise)
        if w is not None:
            emb = emb + self.guidance(jnp.log1p(w))
        emb = jax.nn.silu(self.map_layer1(jax.nn.silu(self.map_layer0(emb))))

        encoder, decoder = self.order
        skips: list[Array] = []
        aux = x
        for name in encoder:
            module = self.enc[name]
            if "aux" in name:
                x = skips[-1] = aux = (x + module(aux)) * SONG.skip
            else:
                x = module(x) if "conv" in name else module(x, emb, dropout_key(rngs, config.dropout))
                skips.append(x)
        *blocks, norm, conv = decoder
        for name in blocks:
            x = jnp.concatenate([x, skips.pop()], axis=-1) if "block" in name else x
            x = self.dec[name](x, emb, dropout_key(rngs, config.dropout))
        x = self.dec[conv](jax.nn.silu(self.dec[norm](x)))
        return x[..., : config.in_channels].astype(jnp.float32)


class DhariwalUNet(nnx.Module):
    """ADM (Dhariwal & Nichol 2021) as EDM trains it; inputs and output as those of `SongUNet`."""

    def __init__(
        self, config: DhariwalUNetConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs
    ):
        self.config = config
        first, width = config.model_channels, config.model_channels * config.channel_mult_emb
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}

        def block(step: Step) -> UNetBlock:
            moves: dict[str, Any] = {"up": step.kind == "up", "down": step.kind == "down", "dropout": config.dropout}
            return UNetBlock(
                step.inward, step.outward, width, DHARIWAL, attend=step.attend, remat=remat, **moves, **common
            )

        self.map_noise = Sinusoidal(first)
        self.map_augment = (
            Init(0.0, "fan_in").linear(config.augment_dim, first, bias=False, rngs=rngs) if config.augment_dim else None
        )
        self.map_layer0 = TORCH.linear(first, width, rngs=rngs)
        self.map_layer1 = TORCH.linear(width, width, rngs=rngs)
        unit = Init(config.label_dim, "fan_in", "normal")  # weights of variance 1
        self.map_label = unit.linear(config.label_dim, width, bias=False, rngs=rngs) if config.label_dim else None
        self.target = Extra(width, EXTRA, rngs=rngs)
        self.guidance = Extra(width, EXTRA, rngs=rngs)

        sizes = [first * m for m in config.channel_mult]
        encoder, decoder = plan(
            config.img_resolution, config.in_channels, sizes[0], sizes, config.num_blocks, config.attn_resolutions
        )
        conv, *steps = encoder
        enc: dict[str, Any] = {conv.name: Conv(conv.inward, conv.outward, 3, TORCH, **common)} | {
            s.name: block(s) for s in steps
        }
        dec: dict[str, Any] = {step.name: block(step) for step in decoder}
        self.enc, self.dec = nnx.Dict(enc), nnx.Dict(dec)
        self.order = tuple(enc), tuple(dec)  # merged modules have their names sorted
        self.out_norm = normalisation(sizes[0], DHARIWAL.epsilon)
        self.out_conv = Conv(sizes[0], config.out_channels, 3, DHARIWAL.last, **common)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: PyTree = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, H, W, in_channels] like x, float32; a learned variance's channels are dropped."""
        config = self.config
        check_image(x, config.in_channels, len(config.channel_mult), "DhariwalUNet")
        labels, w = one_hot(cond, len(x), config.label_dim, "DhariwalUNet")
        emb = self.map_layer1(jax.nn.silu(self.map_layer0(self.map_noise(c_noise))))
        if self.map_label is not None:
            emb = emb + self.map_label(labels)
        if s_noise is not None:
            emb = emb + self.target(s_noise)
        if w is not None:
            emb = emb + self.guidance(jnp.log1p(w))
        emb = jax.nn.silu(emb)

        encoder, decoder = self.order
        skips = []
        for name in encoder:
            module = self.enc[name]
            x = module(x) if "conv" in name else module(x, emb, dropout_key(rngs, config.dropout))
            skips.append(x)
        for name in decoder:
            x = jnp.concatenate([x, skips.pop()], axis=-1) if "block" in name else x
            x = self.dec[name](x, emb, dropout_key(rngs, config.dropout))
        x = self.out_conv(jax.nn.silu(self.out_norm(x)))
        return x[..., : config.in_channels].astype(jnp.float32)
