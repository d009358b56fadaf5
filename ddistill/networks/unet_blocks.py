"""The blocks of diffusers' UNets: residual blocks, changes of resolution, and one level on the way down or up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.networks.layers import GroupNorm, Remat, rematerialised

Attend = Callable[[int], nnx.Module]
"""Makes the attention of a level's i-th layer, called as attention(x, context, mask)."""


@dataclass(frozen=True)
class Style:
    """What all residual blocks of a network share.

    embedding: width of the time embedding. scale_shift: it scales and shifts after the second norm instead of being
    added before it. remat: inside a block nothing is kept for the backward pass.
    """

    embedding: int
    groups: int
    epsilon: float
    scale_shift: bool
    dropout: float
    dtype: jnp.dtype
    remat: Remat


def conv(inward: int, outward: int, *, stride: int = 1, size: int = 3, zero: bool = False, dtype, rngs) -> nnx.Conv:
    """A convolution with PyTorch's symmetric padding; zero: it starts at 0."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    pad = (size // 2, size // 2)
    return nnx.Conv(
        inward, outward, (size, size), stride, padding=(pad, pad), kernel_init=init, dtype=dtype, rngs=rngs
    )  # fmt: skip


def doubled(x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, C], every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def halved(x: Array) -> Array:
    """[B, H, W, C] -> [B, H/2, W/2, C], means of 2 × 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean(axis=(2, 4))


class Resnet(nnx.Module):
    """A residual block told the time: two times norm, SiLU, convolution (Ho et al. 2020; Dhariwal & Nichol 2021).

    resize: `doubled` or `halved`, what the input goes through, in the residual branch after norm and SiLU. The second
    convolution starts at 0. diffusers' `ResnetBlock2D`.
    """

    def __init__(
        self, inward: int, outward: int, style: Style, resize: Callable[[Array], Array] | None = None, *, rngs: nnx.Rngs
    ):
        self.style, self.resize = style, resize
        dtype = style.dtype
        self.norm1 = GroupNorm(inward, style.groups, style.epsilon)
        self.conv1 = conv(inward, outward, dtype=dtype, rngs=rngs)
        self.time_emb_proj = nnx.Linear(style.embedding, (1 + style.scale_shift) * outward, rngs=rngs)
        self.norm2 = GroupNorm(outward, style.groups, style.epsilon)
        self.conv2 = conv(outward, outward, zero=True, dtype=dtype, rngs=rngs)
        self.conv_shortcut = None if inward == outward else conv(inward, outward, size=1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, embedding: Array, rngs: nnx.Rngs | None = None) -> Array:
        """x: [B, H, W, C], embedding: [B, E], rngs: for dropout -> [B, H', W', C']."""
        key = None if rngs is None or self.style.dropout == 0 else rngs.dropout()
        if not self.style.remat:
            return self._residual(x, embedding, key)
        graph, *states = nnx.split(self, nnx.Param, ...)
        params, rest = states

        def pure(params, x, embedding):
            return nnx.merge(graph, params, rest)._residual(x, embedding, key)

        return rematerialised(pure, self.style.remat)(params, x, embedding)

    def _residual(self, x: Array, embedding: Array, key: Array | None) -> Array:
        h = jax.nn.silu(self.norm1(x))
        if self.resize is not None:
            x, h = self.resize(x), self.resize(h)
        h = self.conv1(h)
        time = self.time_emb_proj(jax.nn.silu(embedding)).astype(h.dtype)[:, None, None, :]
        if self.style.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = jax.nn.silu(h)
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - self.style.dropout, h.shape)
            h = jnp.where(kept, h / (1 - self.style.dropout), 0)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return x + self.conv2(h)


class Downsample(nnx.Module):
    """A convolution of stride 2. padding: 1, or 0 for one row and column of zeros after the image."""

    def __init__(self, width: int, padding: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        pad = (padding, 1)
        self.conv = nnx.Conv(width, width, (3, 3), 2, padding=(pad, pad), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H/2, W/2, C], rounded up if padding is 1."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel four times, then a convolution."""

    def __init__(self, width: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.conv = conv(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, size: Sequence[int]) -> Array:
        """[B, H, W, C] -> [B, *size, C], size at most (2H, 2W)."""
        return self.conv(doubled(x)[:, : size[0], : size[1]])


class Down(nnx.Module):
    """One level on the way down: residual blocks, each with its attention if there is any, then half the resolution.

    attend: see `Attend`. downsample: "conv", "resnet" or None. These are diffusers' `...DownBlock2D`.
    """

    def __init__(
        self,
        inward: int,
        outward: int,
        layers: int,
        style: Style,
        *,
        attend: Attend | None,
        downsample: str | None,
        padding: int,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List([Resnet(outward if i else inward, outward, style, rngs=rngs) for i in range(layers)])
        self.attentions = _attentions(attend, layers)
        samplers: dict[str, Callable[[], Any]] = {
            "conv": lambda: Downsample(outward, padding, dtype=style.dtype, rngs=rngs),
            "resnet": lambda: Resnet(outward, outward, style, halved, rngs=rngs),
        }
        self.downsamplers = nnx.List([samplers[downsample]()] if downsample else [])

    def __call__(
        self, x: Array, embedding: Array, context: Array | None, mask: Array | None, rngs: nnx.Rngs | None
    ) -> tuple[Array, list[Array]]:
        """The level's output, and all that the way up will see of it, in order."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, embedding, rngs)
            x = x if self.attentions is None else self.attentions[i](x, context, mask)
            skips.append(x)
        for sampler in self.downsamplers:
            x = sampler(x, embedding, rngs) if isinstance(sampler, Resnet) else sampler(x)
            skips.append(x)
        return x, skips


class Middle(nnx.Module):
    """A residual block, then `layers` times an attention, if there is any, and a residual block."""

    def __init__(self, width: int, layers: int, style: Style, *, attend: Attend | None, rngs: nnx.Rngs):
        self.resnets = nnx.List([Resnet(width, width, style, rngs=rngs) for _ in range(1 + layers)])
        self.attentions = _attentions(attend, layers)

    def __call__(
        self, x: Array, embedding: Array, context: Array | None, mask: Array | None, rngs: nnx.Rngs | None
    ) -> Array:
        """[B, H, W, C] -> the same."""
        x = self.resnets[0](x, embedding, rngs)
        for i in range(len(self.resnets) - 1):
            x = x if self.attentions is None else self.attentions[i](x, context, mask)
            x = self.resnets[i + 1](x, embedding, rngs)
        return x


class Up(nnx.Module):
    """One level on the way up: residual blocks that also see what the way down left, then twice the resolution.

    skips: channels of what each residual block sees beside its input. attend: see `Attend`. upsample: "conv", "resnet"
    or None. These are diffusers' `...UpBlock2D`.
    """

    def __init__(
        self,
        inward: int,
        outward: int,
        skips: Sequence[int],
        style: Style,
        *,
        attend: Attend | None,
        upsample: str | None,
        rngs: nnx.Rngs,
    ):
        widths = [skip + (outward if i else inward) for i, skip in enumerate(skips)]
        self.resnets = nnx.List([Resnet(width, outward, style, rngs=rngs) for width in widths])
        self.attentions = _attentions(attend, len(skips))
        samplers: dict[str, Callable[[], Any]] = {
            "conv": lambda: Upsample(outward, dtype=style.dtype, rngs=rngs),
            "resnet": lambda: Resnet(outward, outward, style, doubled, rngs=rngs),
        }
        self.upsamplers = nnx.List([samplers[upsample]()] if upsample else [])

    def __call__(
        self,
        x: Array,
        skips: list[Array],
        embedding: Array,
        context: Array | None,
        mask: Array | None,
        rngs: nnx.Rngs | None,
    ) -> Array:
        """The level's output; it takes what it sees from the end of skips, and comes out as large as what is left."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips.pop()], axis=-1), embedding, rngs)
            x = x if self.attentions is None else self.attentions[i](x, context, mask)
        for sampler in self.upsamplers:
            x = sampler(x, embedding, rngs) if isinstance(sampler, Resnet) else sampler(x, skips[-1].shape[1:3])
        return x


@dataclass(frozen=True)
class Level:
    """What a level of a UNet is made of. resample: how its resolution changes at the end, "conv", "resnet" or None."""

    width: int
    layers: int
    attend: Attend | None
    resample: str | None


def ways(
    stem: int, down: Sequence[Level], up: Sequence[Level], style: Style, *, padding: int, rngs: nnx.Rngs
) -> tuple[nnx.List, nnx.List]:
    """The levels down, from `stem` channels, and up, whose residual blocks see what those down answered, last first."""
    width, left, downs, ups = stem, [stem], [], []
    for level in down:
        resample = partial(Down, downsample=level.resample, padding=padding)
        downs.append(resample(width, level.width, level.layers, style, attend=level.attend, rngs=rngs))
        width = level.width
        left += [width] * (level.layers + (level.resample is not None))
    for level in up:
        skips = [left.pop() for _ in range(level.layers)]
        ups.append(Up(width, level.width, skips, style, attend=level.attend, upsample=level.resample, rngs=rngs))
        width = level.width
    return nnx.List(downs), nnx.List(ups)


def _attentions(attend: Attend | None, count: int) -> nnx.List | None:
    return None if attend is None else nnx.List([attend(i) for i in range(count)])
