"""Layers that the image networks share: float32 where precision matters, paths as in diffusers' checkpoints.

A module's parameter paths are the names of diffusers' tensors, with kernel, scale or embedding for weight
(`ddistill.hub.weights`). `Stack` holds a list of equal blocks as one, with an axis more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.networks import flash

Remat = bool | Literal["dots"]
"""What the backward pass computes anew in each block: nothing, all (True), or "dots": all but products by weights."""


def rematerialised(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """A function whose backward pass finds only what `remat` leaves it.

    "dots" keeps the outputs of matrix products and convolutions with weights, a few times the memory of True at hardly
    more computing than False: attention's scores, norms and activations are computed anew.
    """
    if not remat:
        return function
    return jax.checkpoint(function, policy=_keeps_products if remat == "dots" else None)


def _keeps_products(primitive, *args, **params) -> bool:
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return primitive is jax.lax.conv_general_dilated_p or dots(primitive, *args, **params)


class _Keys:
    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def params(self) -> Array:
        key = jax.random.fold_in(self.key, self.count)
        self.count += 1
        return key

    __call__ = params


def rngs_of(key: Array | int) -> nnx.Rngs:
    """The keys of nnx.Rngs(key) for making a module, counted in Python.

    nnx.Rngs counts in an array. Under `nnx.eval_shape` every count searches all that was traced before, so that a
    Stable Diffusion takes five times as long.
    """
    return cast(nnx.Rngs, _Keys(jax.random.key(key) if isinstance(key, int) else key))


class Linear(nnx.Linear):
    """A linear map of the last axis, as one matrix product: with tokens left apart XLA's CPU code is slower."""

    def __call__(self, x: Array, out_sharding=None) -> Array:
        """[..., in] -> [..., out] in the layer's dtype."""
        return super().__call__(x.reshape(-1, x.shape[-1]), out_sharding).reshape(*x.shape[:-1], -1)


class GroupNorm(nnx.Module):
    """Group normalisation of [B, ..., C] in float32, folded to one scale and shift per channel."""

    def __init__(self, channels: int, groups: int = 32, epsilon: float = 1e-5):
        if channels % groups:
            raise ValueError(f"{channels} channels do not split into {groups} groups")
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Array) -> Array:
        """[B, ..., C] -> the same, in x's dtype."""
        batch, channels, size = x.shape[0], x.shape[-1], x.shape[-1] // self.groups
        flat = x.astype(jnp.float32).reshape(batch, -1, channels)

        def of_groups(means: Array) -> Array:  # sums along two axes at a time, and their gradients, are slow
            return jnp.repeat(means.reshape(batch, self.groups, size).mean(-1), size, axis=-1)

        mean = of_groups(flat.mean(1))
        rate = jax.lax.rsqrt(of_groups(jnp.mean((flat - mean[:, None]) ** 2, axis=1)) + self.epsilon)
        scale = rate * self.scale[...]
        shift = self.bias[...] - mean * scale
        return (flat * scale[:, None] + shift[:, None]).reshape(x.shape).astype(x.dtype)


def sinusoidal(
    t: Array, size: int, *, flip: bool = True, shift: float = 0.0, scale: float = 1.0, max_period: float = 10_000.0
) -> Array:
    """Sinusoidal embedding [B, size] of times t [B] at geometric frequencies, float32 (Vaswani et al. 2017, sec. 3.5).

    flip: cosines first. shift: diffusers' downscale_freq_shift, what the number of frequencies is lowered by in their
    exponent. scale: what angles are multiplied by.
    """
    half = size // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half) / (half - shift))
    angles = scale * t.astype(jnp.float32)[:, None] * frequencies
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, size % 2)))


@dataclass(frozen=True)
class Sinusoidal:
    """`sinusoidal` with its settings, a function that equals another of the same settings: for `Extra` and modules.

    A lambda would do but for one thing: networks that hold different ones share no compiled code.
    """

    size: int = 256
    flip: bool = True
    shift: float = 0.0
    scale: float = 1.0
    max_period: float = 10_000.0

    def __call__(self, t: Array) -> Array:
        """[B] -> [B, size], float32."""
        return sinusoidal(t, self.size, flip=self.flip, shift=self.shift, scale=self.scale, max_period=self.max_period)


class TimestepEmbedding(nnx.Module):
    """Linear, SiLU, linear, in float32; diffusers' module of that name.

    condition: the size of a second input, which is added by a linear map, 0 at first.
    """

    def __init__(self, size: int, width: int, out: int | None = None, *, condition: int | None = None, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(size, width, rngs=rngs)
        self.linear_2 = nnx.Linear(width, width if out is None else out, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.cond_proj = (
            None if condition is None else nnx.Linear(condition, size, use_bias=False, kernel_init=zeros, rngs=rngs)
        )

    def __call__(self, x: Array, condition: Array | None = None) -> Array:
        """[B, size] -> [B, out], float32."""
        x = x.astype(jnp.float32)
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Extra(nnx.Module):
    """One more number for an embedding, which adds nothing before training: a linear map, 0 at first, of its waves.

    A student's second time (the network's `target`) and its guidance scale (`guidance`) enter this way, so that it
    starts as its teacher.
    """

    def __init__(self, width: int, waves: Callable[[Array], Array], size: int = 256, *, rngs: nnx.Rngs):
        self.waves = waves
        self.linear = nnx.Linear(
            size, width, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )  # fmt: skip

    def __call__(self, value: Array) -> Array:
        """[B] -> [B, width], float32."""
        return self.linear(self.waves(value))


def attention(q: Array, k: Array, v: Array, *, mask: Array | None = None, causal: bool = False) -> Array:
    """softmax(q kᵀ/√D) v of [B, L, H, D] with softmax in float32; mask: True where seen, broadcast to [B, H, L, M].

    Where programs go to an NVIDIA GPU, arrays of 16 bits with D ≤ 128 divisible by 8 and no mask take cuDNN's flash
    attention, which never holds the L × M weights, backwards neither; everything else takes XLA's. Both differentiate
    in reverse and forward mode.
    """
    if mask is None and flash.fits(q) and flash.on_cuda():
        return flash.attention(q, k, v, causal)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="xla")


class Stack(nnx.Module):
    """Equal blocks with their parameters stacked, run by a scan: one block is compiled whatever the depth.

    make: from random keys to a block, called as block(carry, *args) -> carry. remat: see `Remat`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module], depth: int, *, remat: Remat = False, rngs: nnx.Rngs):
        if depth < 1:
            raise ValueError(f"a stack of {depth} blocks: give at least one")
        self.depth, self.remat = depth, remat
        self.stack = nnx.vmap(lambda key: make(rngs_of(key)))(jax.random.split(rngs.params(), depth))

    def __call__(self, carry: Any, *args: Any) -> Any:
        """Run all blocks; carry is a pytree of arrays, args are the same for all blocks."""
        graph, *states = nnx.split(self.stack, nnx.Param, ...)
        params, rest = states

        def body(carry, params):
            return nnx.merge(graph, params, rest)(carry, *args), None

        return jax.lax.scan(rematerialised(body, self.remat), carry, params)[0]

    def block(self, number: int) -> Any:
        """One of the blocks, by its number."""
        graph, state = nnx.split(self.stack)
        return nnx.merge(graph, jax.tree.map(lambda a: a[number], state))

    def unrolled(self) -> "Unrolled":
        """The same blocks one after the other, for what must see each of them by itself, such as `features`."""
        return Unrolled([self.block(i) for i in range(self.depth)])


class Unrolled(nnx.Module):
    """Blocks one after the other, called as a `Stack` is; they are its attributes "0", "1" …."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.depth = len(blocks)
        for i, block in enumerate(blocks):
            setattr(self, str(i), block)

    def __call__(self, carry: Any, *args: Any) -> Any:
        """Run all blocks."""
        for i in range(self.depth):
            carry = self.block(i)(carry, *args)
        return carry

    def block(self, number: int) -> Any:
        """One of the blocks, by its number."""
        return getattr(self, str(number))
