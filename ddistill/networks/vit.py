"""Vision transformers whose features metrics compare: the image side of CLIP (Radford et al. 2021) and DINOv2.

DINOv2 (Oquab et al. 2023) has layer scales, a gated MLP in its largest size, and perhaps registers (Darcet et al.
2023); its positions are interpolated to images of other sizes than it was trained on. Equal blocks are a `Stack`. The
names of published tensors are `ddistill.hub.vision`'s.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.networks.layers import Linear, Stack, attention
from ddistill.networks.preprocess import Resampling, resampling_matrix
from ddistill.networks.text import ACTIVATIONS

GATED = "swiglu"
"""The activation of a gated MLP (Shazeer 2020): silu(gate) · up."""


@dataclass(frozen=True)
class ViTConfig:
    """A vision transformer: `clip_config` and `dinov2_config` make the published ones.

    width, depth, heads, hidden: of tokens, of blocks, of an attention, of an MLP. patch, image: sides in pixels, of the
    squares that become tokens and of the images that there are positions for. activation: "quick_gelu", "gelu" or
    "swiglu". clip: there is a norm before the blocks and patches have no bias; otherwise layers are scaled. projection:
    the size of the embedding, 0 for the last norm's width. offset: what DINOv2's first code adds to the number of
    patches before it divides by that of positions. antialias: of positions, as with registers.
    """

    name: str
    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    image: int
    activation: str = "gelu"
    clip: bool = False
    projection: int = 0
    registers: int = 0
    epsilon: float = 1e-6
    offset: float = 0.0
    antialias: bool = False

    def __post_init__(self):
        if self.activation not in (GATED, "gelu", "quick_gelu"):
            raise ValueError(f"activation = {self.activation!r}: take 'quick_gelu', 'gelu' or '{GATED}'")
        if self.width % self.heads:
            raise ValueError(f"width = {self.width} does not split into {self.heads} heads")
        if self.image % self.patch:
            raise ValueError(f"image = {self.image} does not split into patches of {self.patch} pixels")

    @property
    def grid(self) -> int:
        """Positions along a side."""
        return self.image // self.patch


def clip_config(width: int, depth: int, patch: int, projection: int, image: int = 224, **changes: Any) -> ViTConfig:
    """The image side of a CLIP of OpenAI, with heads of 64 and MLPs of four widths."""
    letter = {768: "b", 1024: "l"}.get(width, str(width))
    name = f"clip-vit-{letter}-{patch}{'' if image == 224 else f'-{image}'}"
    made = ViTConfig(
        name, width, depth, width // 64, 4 * width, patch, image,
        activation="quick_gelu", clip=True, projection=projection, epsilon=1e-5,
    )  # fmt: skip
    return replace(made, **changes)


def dinov2_config(width: int, depth: int, registers: int = 0, **changes: Any) -> ViTConfig:
    """A DINOv2 for images of 518 × 518 with patches of 14, heads of 64; the one of 1536 has gated MLPs."""
    letter = {384: "s", 768: "b", 1024: "l", 1536: "g"}.get(width, str(width))
    name = f"dinov2-vit-{letter}-14{f'-reg{registers}' if registers else ''}"
    gated = width == 1536
    made = ViTConfig(
        name, width, depth, width // 64, 4096 if gated else 4 * width, 14, 518, activation=GATED if gated else "gelu",
        registers=registers, offset=0.0 if registers else 0.1, antialias=registers > 0,
    )  # fmt: skip
    return replace(made, **changes)


CLIP: Mapping[str, ViTConfig] = {
    config.name: config
    for config in (
        clip_config(768, 12, 32, 512),
        clip_config(768, 12, 16, 512),
        clip_config(1024, 24, 14, 768),
        clip_config(1024, 24, 14, 768, 336),
    )
}
"""OpenAI's CLIPs by name."""

DINOV2: Mapping[str, ViTConfig] = {
    config.name: config
    for registers in (0, 4)
    for width, depth in ((384, 12), (768, 12), (1024, 24), (1536, 40))
    for config in (dinov2_config(width, depth, registers),)
}
"""Published DINOv2s by name."""


class VisionTransformer(nnx.Module):
    """Normalised images [B, H, W, 3], of sides that patches divide, to {"embedding": [B, D]}, float32.

    The embedding is the class token's last state after its norm, and CLIP's projection, of no particular length. CLIP
    takes images of one size. dtype: what is computed in; norms are float32.
    """

    def __init__(self, config: ViTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        normal, width, side = nnx.initializers.normal(0.02), config.width, config.patch
        norm = partial(_norm, config, rngs)
        self.patches = nnx.Conv(
            3, width, (side, side), strides=side, padding="VALID", use_bias=not config.clip, dtype=dtype, rngs=rngs
        )
        self.class_token = nnx.Param(normal(rngs.params(), (1, 1, width)))
        self.positions = nnx.Param(normal(rngs.params(), (1, config.grid**2 + 1, width)))
        self.registers = nnx.Param(normal(rngs.params(), (1, config.registers, width))) if config.registers else None
        self.norm_before = norm() if config.clip else None
        self.blocks = Stack(lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.depth, rngs=rngs)
        self.norm = norm()
        self.projection = (
            Linear(width, config.projection, use_bias=False, dtype=dtype, rngs=rngs) if config.projection else None
        )

    def __call__(self, x: Array) -> dict[str, Array]:
        """[B, H, W, 3] -> {"embedding": [B, D]}. Raises ValueError for sides that do not fit."""
        config = self.config
        sides = x.shape[1:3]
        if x.ndim != 4 or x.shape[3] != 3 or any(s % config.patch or not s for s in sides):
            raise ValueError(
                f"{config.name} takes images [B, H, W, 3] of patches of {config.patch}; given {list(x.shape)}"
            )
        if config.clip and sides != (config.image, config.image):
            raise ValueError(f"{config.name} takes images of {config.image} × {config.image}; given {list(x.shape)}")
        tokens = self.patches(x.astype(self.dtype)).reshape(len(x), -1, config.width)
        first, places = self._positions(*(s // config.patch for s in sides))
        parts = [self.class_token + first]
        if self.registers is not None:
            parts.append(self.registers[...])
        parts = [jnp.broadcast_to(p, (len(x), *p.shape[1:])).astype(self.dtype) for p in parts]
        x = jnp.concatenate([*parts, tokens + places.astype(self.dtype)], axis=1)
        if self.norm_before is not None:
            x = self.norm_before(x).astype(self.dtype)
        embedding = self.norm(self.blocks(x)[:, 0])
        if self.projection is not None:
            embedding = self.projection(embedding)
        return {"embedding": embedding.astype(jnp.float32)}

    def _positions(self, height: int, width: int) -> tuple[Array, Array]:
        """What is added to the class token [1, 1, C] and to the patches [1, height · width, C]."""
        config, grid = self.config, self.config.grid
        first, places = self.positions[:, :1], self.positions[:, 1:]
        if (height, width) == (grid, grid):
            return first, places
        how = Resampling(cubic=True, antialias=config.antialias)
        rows, columns = (
            jnp.asarray(resampling_matrix(how, grid, n, grid / (n + config.offset)), jnp.float32)
            for n in (height, width)
        )
        square = places.reshape(grid, grid, config.width)
        moved = jnp.einsum("oh,pw,hwc->opc", rows, columns, square, precision=jax.lax.Precision.HIGHEST)
        return first, moved.reshape(1, -1, config.width)


class Block(nnx.Module):
    """x + scale · attention(norm(x)), then x + scale · mlp(norm(x)); CLIP has no scales."""

    def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
        linear = partial(Linear, config.width, dtype=dtype, rngs=rngs)
        self.heads, self.activation = config.heads, config.activation
        self.norm1, self.norm2 = _norm(config, rngs), _norm(config, rngs)
        self.q, self.k, self.v, self.out = (linear(config.width) for _ in range(4))
        if config.activation == GATED:
            self.gate = linear(config.hidden)
        self.fc1 = linear(config.hidden)
        self.fc2 = Linear(config.hidden, config.width, dtype=dtype, rngs=rngs)
        self.scale1 = None if config.clip else nnx.Param(jnp.ones(config.width))
        self.scale2 = None if config.clip else nnx.Param(jnp.ones(config.width))

    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> the same."""
        y = self.norm1(x)
        q, k, v = (project(y).reshape(*x.shape[:2], self.heads, -1) for project in (self.q, self.k, self.v))
        x = x + _scaled(self.scale1, self.out(attention(q, k, v).reshape(x.shape)))
        y = self.norm2(x)
        wide = self.fc1(y)
        wide = jax.nn.silu(self.gate(y)) * wide if self.activation == GATED else ACTIVATIONS[self.activation](wide)
        return x + _scaled(self.scale2, self.fc2(wide))


def _scaled(scale: Any, x: Array) -> Array:
    return x if scale is None else x * scale[...].astype(x.dtype)


def _norm(config: ViTConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.width, epsilon=config.epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)
