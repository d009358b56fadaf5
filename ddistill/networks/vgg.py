"""The convolutions of VGG16 (Simonyan & Zisserman 2015) and AlexNet (Krizhevsky 2014), whose maps LPIPS compares.

Modules have the names of torchvision's tensors; its classifiers are left out.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


@dataclass(frozen=True)
class Layer:
    """A convolution and its ReLU. number: in torchvision's `features`. pool: the side of the maximum before it, or 0.

    seen: whether its map is among the outputs.
    """

    number: int
    width: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    seen: bool = False


@dataclass(frozen=True)
class ConvolutionsConfig:
    """Convolutions one after the other; `VGG16` and `ALEXNET` are the published ones."""

    name: str
    layers: tuple[Layer, ...]

    def __post_init__(self):
        if not any(layer.seen for layer in self.layers):
            raise ValueError(f"{self.name} has no layer whose map is seen")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the maps that are seen."""
        return tuple(layer.width for layer in self.layers if layer.seen)


def vgg16(width: int = 64) -> ConvolutionsConfig:
    """Five groups of two or three convolutions, the first of `width` channels: 64, or less for a network in a test."""
    layers: list[Layer] = []
    number = 0
    for group, count in enumerate((2, 2, 3, 3, 3)):
        for i in range(count):
            wide = width * min(2**group, 8)
            layers.append(Layer(number, wide, pool=2 if group and not i else 0, seen=i == count - 1))
            number += 2
        number += 1  # the maximum after the group
    return ConvolutionsConfig("vgg16" if width == 64 else f"vgg16-{width}", tuple(layers))


VGG16 = vgg16()
ALEXNET = ConvolutionsConfig(
    "alexnet",
    (
        Layer(0, 64, 11, 4, 2, seen=True),
        Layer(3, 192, 5, 1, 2, pool=3, seen=True),
        Layer(6, 384, pool=3, seen=True),
        Layer(8, 256, seen=True),
        Layer(10, 256, seen=True),
    ),
)


class Convolutions(nnx.Module):
    """Images [B, H, W, 3] to the maps of the layers that are seen, float32. dtype: what is computed in."""

    def __init__(self, config: ConvolutionsConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        width, convolutions = 3, {}
        for layer in config.layers:
            convolutions[str(layer.number)] = nnx.Conv(
                width, layer.width, (layer.size, layer.size), strides=layer.stride, padding=layer.padding,
                dtype=dtype, rngs=rngs,
            )  # fmt: skip
            width = layer.width
        self.features = nnx.Dict(convolutions)

    def __call__(self, x: Array) -> tuple[Array, ...]:
        """[B, H, W, 3] -> maps [B, h, w, C] from fine to coarse. Raises ValueError for images without a last map."""
        given, maps = x.shape, []
        x = x.astype(self.dtype)
        for layer in self.config.layers:
            side = layer.pool or layer.size - 2 * layer.padding
            if min(x.shape[1:3]) < side:
                raise ValueError(f"images {list(given)} are too small for {self.config.name}: nothing is left of them")
            if layer.pool:
                x = nnx.max_pool(x, (layer.pool, layer.pool), strides=(2, 2))
            x = jax.nn.relu(self.features[str(layer.number)](x))
            if layer.seen:
                maps.append(x.astype(jnp.float32))
        return tuple(maps)
