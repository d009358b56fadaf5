"""InceptionV3 as it was published in December 2015, the network of FID, sFID, KID and the Inception score.

Szegedy et al. 2016, with 1008 classes and the graph's own poolings: averages leave out the border's zeros, and the last
block takes a maximum. Modules have the names of torchvision's and pytorch-fid's tensors.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

SMALLEST = 75
"""The smallest side of an image of which the last block sees anything."""

SPATIAL = 7
"""Channels of sFID's features, of which 17 × 17 × 7 = 2023 are about as many as FID's 2048 (Nash et al. 2021)."""


@dataclass(frozen=True)
class InceptionConfig:
    """classes: of the logits. thinner: what every number of channels is divided by, 16 for a network in a test."""

    name: str = "inception-2015-12-05"
    classes: int = 1008
    thinner: int = 1

    def __post_init__(self):
        if self.thinner not in (1, 2, 4, 8, 16):
            raise ValueError(f"thinner = {self.thinner}: channels are divided by 1, 2, 4, 8 or 16")


class InceptionV3(nnx.Module):
    """Images [B, H, W, 3] in (−1, 1), of sides of at least 75, to features by name; 299 is the side it was trained at.

    pool: [B, 2048], what FID, KID, precision and recall take. logits: [B, 1008] without the last bias, as the
    Inception score's reference takes them. spatial: [B, 17 · 17 · 7] in the order of height, width, channel: the first
    channels of the first convolution in the seventh block, sFID's "mixed_6/conv".
    """

    def __init__(self, config: InceptionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        conv = partial(_conv, config.thinner, dtype, rngs)
        block = {"thinner": config.thinner, "dtype": dtype, "rngs": rngs}
        self.Conv2d_1a_3x3 = _conv(1, dtype, rngs, 3, 32 // config.thinner, 3, stride=2)
        self.Conv2d_2a_3x3 = conv(32, 32, 3)
        self.Conv2d_2b_3x3 = conv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = conv(64, 80, 1)
        self.Conv2d_4a_3x3 = conv(80, 192, 3)
        self.Mixed_5b = InceptionA(192, 32, **block)
        self.Mixed_5c = InceptionA(256, 64, **block)
        self.Mixed_5d = InceptionA(288, 64, **block)
        self.Mixed_6a = InceptionB(288, **block)
        self.Mixed_6b = InceptionC(768, 128, **block)
        self.Mixed_6c = InceptionC(768, 160, **block)
        self.Mixed_6d = InceptionC(768, 160, **block)
        self.Mixed_6e = InceptionC(768, 192, **block)
        self.Mixed_7a = InceptionD(768, **block)
        self.Mixed_7b = InceptionE(1280, largest=False, **block)
        self.Mixed_7c = InceptionE(2048, largest=True, **block)
        self.fc = nnx.Linear(2048 // config.thinner, config.classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> dict[str, Array]:
        """[B, H, W, 3] -> {"pool", "logits", "spatial"}, float32. Raises ValueError for other shapes."""
        if x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < SMALLEST:
            raise ValueError(
                f"Inception takes images [B, H, W, 3] of at least {SMALLEST} pixels; given {list(x.shape)}"
            )
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x.astype(self.dtype))))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.branch1x1(x)[..., :SPATIAL].astype(jnp.float32)
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        pool = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        logits = pool @ self.fc.kernel[...].astype(jnp.float32)
        return {"pool": pool, "logits": logits, "spatial": spatial.reshape(len(x), -1)}


class ConvNorm(nnx.Module):
    """Convolution, batch normalisation with the statistics of its training, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], stride: int, padding, dtype, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            inputs, outputs, size, strides=stride, padding=padding, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.bn = FixedNorm(outputs)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', D]."""
        return jax.nn.relu(self.bn(self.conv(x)))


class FixedNorm(nnx.Module):
    """Batch normalisation that knows mean and variance, as one scale and shift for each channel."""

    def __init__(self, channels: int):
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        self.running_mean, self.running_var = nnx.Param(jnp.zeros(channels)), nnx.Param(jnp.ones(channels))

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> the same."""
        scale = self.scale * jax.lax.rsqrt(self.running_var[...] + 1e-3)
        return x * scale.astype(x.dtype) + (self.bias - self.running_mean * scale).astype(x.dtype)


def _conv(thinner: int, dtype, rngs: nnx.Rngs, inputs: int, outputs: int, size, *, stride: int = 1, same: bool = False):
    """A convolution of size × size or of the two sizes given, with zeros around the image (same) or none."""
    high, wide = (size, size) if isinstance(size, int) else size
    padding = [(high // 2, high // 2), (wide // 2, wide // 2)] if same else [(0, 0), (0, 0)]
    return ConvNorm(inputs // thinner, outputs // thinner, (high, wide), stride, padding, dtype, rngs)


def _halved(x: Array) -> Array:
    return nnx.max_pool(x, (3, 3), strides=(2, 2))


def _averaged(x: Array) -> Array:
    """Averages of 3 × 3 pixels, of fewer at the border."""
    return nnx.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


class InceptionA(nnx.Module):
    """Branches of 1 × 1, 5 × 5 and twice 3 × 3, and an average."""

    def __init__(self, inputs: int, pooled: int, *, thinner: int, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, thinner, dtype, rngs, same=True)
        self.branch1x1 = conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = conv(inputs, 48, 1), conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(inputs, 64, 1), conv(64, 96, 3)
        self.branch3x3dbl_3 = conv(96, 96, 3)
        self.branch_pool = conv(inputs, pooled, 1)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 224 + pooled]."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch1x1(x), five, three, self.branch_pool(_averaged(x))], axis=-1)


class InceptionB(nnx.Module):
    """Half the size: branches of 3 × 3 and twice 3 × 3, and a maximum."""

    def __init__(self, inputs: int, *, thinner: int, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, thinner, dtype, rngs)
        self.branch3x3 = conv(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(inputs, 64, 1), conv(64, 96, 3, same=True)
        self.branch3x3dbl_3 = conv(96, 96, 3, stride=2)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, ⌊(H−1)/2⌋, ⌊(W−1)/2⌋, 480 + C]."""
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return jnp.concatenate([self.branch3x3(x), twice, _halved(x)], axis=-1)


class InceptionC(nnx.Module):
    """Branches of 1 × 1, of 7 × 7 in two strips and in four, and an average."""

    def __init__(self, inputs: int, middle: int, *, thinner: int, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, thinner, dtype, rngs, same=True)
        self.branch1x1 = conv(inputs, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = conv(inputs, middle, 1), conv(middle, middle, (1, 7))
        self.branch7x7_3 = conv(middle, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = conv(inputs, middle, 1), conv(middle, middle, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = conv(middle, middle, (1, 7)), conv(middle, middle, (7, 1))
        self.branch7x7dbl_5 = conv(middle, 192, (1, 7))
        self.branch_pool = conv(inputs, 192, 1)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 768]."""
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return jnp.concatenate([self.branch1x1(x), once, twice, self.branch_pool(_averaged(x))], axis=-1)


class InceptionD(nnx.Module):
    """Half the size: branches of 3 × 3 and of 7 × 7 with 3 × 3, and a maximum."""

    def __init__(self, inputs: int, *, thinner: int, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, thinner, dtype, rngs)
        self.branch3x3_1, self.branch3x3_2 = conv(inputs, 192, 1), conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = conv(inputs, 192, 1), conv(192, 192, (1, 7), same=True)
        self.branch7x7x3_3, self.branch7x7x3_4 = conv(192, 192, (7, 1), same=True), conv(192, 192, 3, stride=2)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, ⌊(H−1)/2⌋, ⌊(W−1)/2⌋, 512 + C]."""
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return jnp.concatenate([self.branch3x3_2(self.branch3x3_1(x)), seven, _halved(x)], axis=-1)


class InceptionE(nnx.Module):
    """Branches of 1 × 1, of 3 × 3 in two strips, of 3 × 3 and two strips, and an average or (largest) a maximum."""

    def __init__(self, inputs: int, *, largest: bool, thinner: int, dtype, rngs: nnx.Rngs):
        conv = partial(_conv, thinner, dtype, rngs, same=True)
        self.largest = largest
        self.branch1x1 = conv(inputs, 320, 1)
        self.branch3x3_1 = conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = conv(inputs, 448, 1), conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = conv(384, 384, (1, 3)), conv(384, 384, (3, 1))
        self.branch_pool = conv(inputs, 192, 1)

    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 2048]."""
        one = self.branch3x3_1(x)
        two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = nnx.max_pool(x, (3, 3), strides=(1, 1), padding="SAME") if self.largest else _averaged(x)
        branches = [self.branch1x1(x), self.branch3x3_2a(one), self.branch3x3_2b(one)]
        branches += [self.branch3x3dbl_3a(two), self.branch3x3dbl_3b(two), self.branch_pool(pooled)]
        return jnp.concatenate(branches, axis=-1)
