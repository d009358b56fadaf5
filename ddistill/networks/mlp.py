"""A residual MLP for vectors and small images, conditioned on time, label, guidance and the student's second time."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import Scaled
from ddistill.networks.embedding import Fourier, Waves


class MLP(nnx.Module):
    """Residual MLP on x and random waves of x: blocks of (normalise, linear, modulate by the embedding, SiLU, linear).

    x: [B, ...] with `size` values per sample; c_noise and s_noise: [B]; cond: labels [B] in 0 … num_classes, where
    num_classes and −1 are "no label", or labels with a guidance scale, `Scaled(labels, w)`. The embeddings of s and w
    are initialised to nothing (zero linear maps), so that a student equals its teacher for every s and w before
    training. Computes in `dtype`; embeddings and output in float32.
    """

    def __init__(
        self,
        size: int,
        width: int = 128,
        blocks: int = 4,
        num_classes: int = 0,
        dropout: float = 0.0,
        dtype: jnp.dtype = jnp.float32,
        *,
        rngs: nnx.Rngs,
    ):
        zeros = nnx.initializers.zeros_init()
        inner = width // 2
        self.size, self.num_classes = size, num_classes
        self.fourier = Fourier(64)
        self.time = nnx.Linear(64, inner, rngs=rngs)
        self.target = nnx.Linear(64, inner, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.guidance = nnx.Linear(64, inner, use_bias=False, kernel_init=zeros, rngs=rngs)
        self.label = nnx.Embed(num_classes + 1, inner, rngs=rngs) if num_classes else None
        self.embed = nnx.Linear(inner, inner, rngs=rngs)
        self.waves = Waves(size, width // 4)
        self.inward = nnx.Linear(size + 2 * (width // 4), width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, inner, dropout, dtype, rngs=rngs) for _ in range(blocks)])
        self.outward = nnx.Linear(width, size, kernel_init=zeros, rngs=rngs)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: Array | Scaled | None = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, ...] like x."""
        cond, w = (cond.cond, cond.w) if isinstance(cond, Scaled) else (cond, None)
        if self.label is None and cond is not None:
            raise ValueError("this MLP was built without classes (num_classes = 0) and cannot take cond")
        h = self.time(self.fourier(c_noise))
        if s_noise is not None:
            h = h + self.target(self.fourier(s_noise))
        if w is not None:
            h = h + self.guidance(self.fourier(jnp.log1p(w)))  # scales from 0 to 20 span three units
        if self.label is not None:
            none = self.num_classes
            known = jnp.full(x.shape[:1], none) if cond is None else jnp.where(cond < 0, none, cond)
            h = h + self.label(jnp.minimum(known, none))
        h = jax.nn.silu(self.embed(jax.nn.silu(h)))
        flat = x.reshape(x.shape[0], self.size)
        y = self.inward(jnp.concatenate([flat, self.waves(flat)], axis=-1))
        for block in self.blocks:
            y = block(y, h, rngs=rngs)
        return self.outward(y.astype(jnp.float32)).reshape(x.shape)


class Block(nnx.Module):
    """y + W₂ silu(scale · W₁ norm(y) + shift), scale and shift read from the embedding; W₂ starts at 0."""

    def __init__(self, width: int, inner: int, dropout: float, dtype: jnp.dtype, *, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.norm = nnx.RMSNorm(width, use_scale=False, dtype=jnp.float32, rngs=rngs)
        self.modulation = nnx.Linear(inner, 2 * width, rngs=rngs)
        self.expand = nnx.Linear(width, width, use_bias=False, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.contract = nnx.Linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(self, y: Array, h: Array, *, rngs: nnx.Rngs | None) -> Array:
        """y: [B, width], h: [B, inner] -> [B, width]."""
        scale, shift = jnp.split(self.modulation(h), 2, axis=-1)
        z = jax.nn.silu(self.expand(self.norm(y)) * (1 + scale) + shift)
        return y + self.contract(self.dropout(z, deterministic=rngs is None, rngs=rngs))
