"""What evaluation networks see of an image: resampled as their references do, cut, and brought to a mean and spread.

A `Preprocessing` is a jitted program's first step, so that images go to the devices as they are. Resampling is linear
in the pixels, one matrix for each axis, which is made in float64. Numbers of different preprocessings do not compare
(Parmar et al. 2022): its name belongs to every result.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class Resampling:
    """How pixels of a new size are made of old ones.

    cubic: Keys' kernel, otherwise the triangle. antialias: kernels grow with the step where an image shrinks, as
    Pillow's and JAX's, with a = −1/2; otherwise they reach two (four) neighbours, as torch's interpolate, with
    a = −3/4. corner: pixels are their upper left corners, as in TensorFlow 1, not squares. rounded: to whole numbers
    after each axis, as Pillow does with images of 8 bits. clipped: to 0 … 255 in the end, as rounded ones are too.
    """

    cubic: bool = False
    antialias: bool = False
    corner: bool = False
    rounded: bool = False
    clipped: bool = False

    def __call__(self, x: Array, height: int, width: int) -> Array:
        """[B, H, W, C] in 0 … 255 -> [B, height, width, C], float32; first the columns, then the rows, as in Pillow."""
        if x.shape[2] != width:
            x = self._bounded(_product("ow,bhwc->bhoc", resampling_matrix(self, x.shape[2], width), x))
        if x.shape[1] != height:
            x = self._bounded(_product("oh,bhwc->bowc", resampling_matrix(self, x.shape[1], height), x))
        return jnp.clip(x, 0, 255) if self.clipped else x

    def _bounded(self, x: Array) -> Array:
        return jnp.clip(jnp.floor(x + 0.5), 0, 255) if self.rounded else x


def _product(how: str, matrix: np.ndarray, x: Array) -> Array:
    return jnp.einsum(how, jnp.asarray(matrix, jnp.float32), x, precision=jax.lax.Precision.HIGHEST)


@lru_cache(maxsize=64)
def resampling_matrix(how: Resampling, inputs: int, outputs: int, step: float | None = None) -> np.ndarray:
    """The weights [outputs, inputs] of old pixels in new ones, float64, their rows' sums 1.

    step: the distance of new pixels in old ones, inputs / outputs unless a reference has another.
    """
    step = inputs / outputs if step is None else step
    centre = np.arange(outputs) * step if how.corner else (np.arange(outputs) + 0.5) * step - 0.5
    if how.antialias:
        wide = max(step, 1.0)
        weights = _kernel(how, (np.arange(inputs) - centre[:, None]) / wide)
        return weights / weights.sum(1, keepdims=True)
    taps = np.floor(centre)[:, None].astype(int) + np.arange(-1, 3)
    weights = np.zeros((outputs, inputs))
    # Pixels beyond the border are those at it.
    np.add.at(
        weights, (np.arange(outputs)[:, None], np.clip(taps, 0, inputs - 1)), _kernel(how, taps - centre[:, None])
    )
    return weights


def _kernel(how: Resampling, x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    if not how.cubic:
        return np.maximum(1 - x, 0)
    a = -0.5 if how.antialias else -0.75  # Keys 1981, eq. 4, with his choice and Photoshop's
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


@dataclass(frozen=True)
class Preprocessing:
    """Images to what a network reads: resampled to `size`, then (255 x − mean)/std for values x of 0 … 1.

    crop: the shorter side becomes `size`, and the middle is cut out; otherwise both sides do, whatever their ratio.
    name: what results record.
    """

    name: str
    size: int
    resampling: Resampling
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: bool = False

    def __call__(self, images: Array) -> Array:
        """[B, H, W, 3], uint8 or of floats in [0, 1] -> [B, size, size, 3], float32; under jit, differentiable.

        Images of `size` × `size` are not resampled. Raises ValueError for other shapes and types.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images are [B, H, W, 3], of three colours; given {list(images.shape)}")
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(f"images are uint8 in 0 … 255 or floats in [0, 1]; given {images.dtype}")
        x = images.astype(jnp.float32) * (1.0 if images.dtype == jnp.uint8 else 255.0)
        x = self.resampling(x, *self._sides(*x.shape[1:3]))
        top, left = (self._offset(side) for side in x.shape[1:3])
        x = x[:, top : top + self.size, left : left + self.size]
        return (x - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        if not self.crop:
            return self.size, self.size
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _offset(self, side: int) -> int:
        return round((side - self.size) / 2)


def _of_255(values: tuple[float, float, float]) -> tuple[float, float, float]:
    first, second, third = values
    return 255 * first, 255 * second, 255 * third


_PILLOW = Resampling(cubic=True, antialias=True, rounded=True)
_TF, _HALF = (128.0,) * 3, (127.5,) * 3
_CLIP = _of_255((0.48145466, 0.4578275, 0.40821073)), _of_255((0.26862954, 0.26130258, 0.27577711))
_IMAGENET = _of_255((0.485, 0.456, 0.406)), _of_255((0.229, 0.224, 0.225))


def clean(size: int = 299) -> Preprocessing:
    """Clean-FID's for Inception: Pillow's bicubic filter in float32 (Parmar et al. 2022)."""
    how = Resampling(cubic=True, antialias=True, clipped=True)
    return Preprocessing("clean", size, how, _TF, _TF)


def pytorch_fid(size: int = 299) -> Preprocessing:
    """pytorch-fid's for Inception: bilinear, without antialiasing."""
    return Preprocessing("pytorch-fid", size, Resampling(), _HALF, _HALF)


def tensorflow(size: int = 299) -> Preprocessing:
    """The first FID's for Inception, in TensorFlow 1: ADM's and EDM's, torch-fidelity's; bilinear from the corner."""
    return Preprocessing("tensorflow", size, Resampling(corner=True), _TF, _TF)


def openai_clip(size: int = 224) -> Preprocessing:
    """CLIP's own: Pillow's bicubic filter on 8 bits, the shorter side, then the middle (Radford et al. 2021).

    Of squares it is CMMD's as well (Jayasumana et al. 2024).
    """
    return Preprocessing("clip", size, _PILLOW, *_CLIP, crop=True)


def dgm_eval(size: int = 224) -> Preprocessing:
    """FD-DINOv2's: Pillow's bicubic filter on 8 bits, both sides (Stein et al. 2023)."""
    return Preprocessing("dgm-eval", size, _PILLOW, *_IMAGENET)


PREPROCESSINGS: Mapping[str, Callable[[int], Preprocessing]] = {
    "clean": clean, "pytorch-fid": pytorch_fid, "tensorflow": tensorflow, "clip": openai_clip, "dgm-eval": dgm_eval,
}  # fmt: skip
"""From a name to the preprocessing for a side."""
