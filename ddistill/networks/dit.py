"""DiT: the label-conditioned diffusion transformer (Peebles & Xie 2023), diffusers' `DiTTransformer2DModel`.

SiT (Ma et al. 2024) is the same network, trained to output a flow's velocity. `from_original` and `original_config`
read the checkpoints of both projects; SiT's time runs from noise to data, which `as_flow` turns round.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.conditions import labels_or_none, unscaled
from ddistill.networks.layers import Extra, Linear, Remat, Sinusoidal, Stack, TimestepEmbedding
from ddistill.networks.tokens import (
    GUIDANCE,
    SMALL,
    ZEROS,
    Attention,
    FeedForward,
    PatchEmbed,
    extras,
    gated,
    image_of,
    modulated,
    positions,
)


@dataclass(frozen=True)
class DiTConfig:
    """diffusers' options of DiT, and two that its checkpoints imply. The defaults are DiT-XL/2's at 256 × 256 pixels.

    num_embeds_ada_norm: the number of classes. sample_size: the side of the images for which positions count 0, 1, 2 ….
    freq_shift: what the number of the time's frequencies is lowered by in their exponent, 1 in diffusers and 0 in the
    original. shared_embedding: one embedding of time and label for all blocks, as in the paper; diffusers' checkpoints
    have one for each block, XL/2 then 750 M parameters instead of 675 M.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    num_embeds_ada_norm: int = 1000
    norm_eps: float = 1e-5
    freq_shift: float = 1.0
    shared_embedding: bool = False

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "activation_fn": ("gelu-approximate",),
        "dropout": (0.0,),
        "norm_elementwise_affine": (False,),
        "norm_num_groups": (32,),
        "norm_type": ("ada_norm_zero",),
        "upcast_attention": (False,),
    }
    """Options of diffusers at the only values supported."""

    OURS: ClassVar[Mapping[str, object]] = {"freq_shift": 1.0, "shared_embedding": False}
    """Options that diffusers does not have, at the values that its class has built in."""

    def __post_init__(self):
        if self.channels_out < self.in_channels:
            raise ValueError(
                f"out_channels = {self.out_channels} leave no output for each of in_channels = {self.in_channels}: "
                "give as many, or twice as many where the variance is learned"
            )

    @property
    def width(self) -> int:
        """The size of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def channels_out(self) -> int:
        """Channels of the output, those of a learned variance included."""
        return self.in_channels if self.out_channels is None else self.out_channels


class DiT(nnx.Module):
    """Transformer blocks on patches, modulated by an embedding of time and label; they are identities at first.

    x: [B, H, W, in_channels], sides that patch_size divides; c_noise, s_noise: [B], in the model's timesteps (0 … 999
    of DiT, 0 … 1 of SiT); cond: labels [B], where −1, num_embeds_ada_norm and no cond at all mean no label, alone or in
    `Scaled(labels, w)`. Of out_channels > in_channels, a learned variance, the first in_channels are the output.
    Computes in `dtype`; norms, embeddings and output in float32. remat: keeps one block's activations at a time.
    """

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs):
        width, size = config.width, config.patch_size
        waves = Sinusoidal(256, shift=config.freq_shift)
        self.config, self.waves = config, waves
        self.pos_embed = PatchEmbed(
            config.in_channels, width, size, base=config.sample_size // size, scale=1.0, dtype=dtype, rngs=rngs
        )
        self.emb = TimeAndLabel(width, config.num_embeds_ada_norm, rngs=rngs) if config.shared_embedding else None
        self.transformer_blocks = Stack(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs), config.num_layers, remat=remat, rngs=rngs
        )
        self.proj_out_1 = nnx.Linear(width, 2 * width, kernel_init=ZEROS, rngs=rngs)
        self.proj_out_2 = Linear(width, size**2 * config.channels_out, kernel_init=ZEROS, rngs=rngs)
        self.target = Extra(width, waves, rngs=rngs)
        self.guidance = Extra(width, GUIDANCE, rngs=rngs)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: PyTree = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): like x, float32. Raises ValueError for other shapes and for conditions not labels."""
        del rngs
        config = self.config
        cond, w = unscaled(cond)
        if cond is not None and not hasattr(cond, "shape"):
            raise ValueError(f"DiT is conditioned on labels [B] of integers; given {type(cond).__name__}")
        labels = labels_or_none(cond, x.shape[0], config.num_embeds_ada_norm)
        tokens, waves = self.pos_embed(x), self.waves(c_noise)
        embedding = extras(self.target, s_noise, self.guidance, w)
        if self.emb is not None:
            embedding = embedding + self.emb(waves, labels)
        tokens = self.transformer_blocks(tokens, embedding, waves, labels)
        if self.emb is None:
            embedding = embedding + self.transformer_blocks.block(0).norm1.emb(waves, labels)  # as diffusers does
        shift, scale = jnp.split(self.proj_out_1(jax.nn.silu(embedding)), 2, axis=-1)
        tokens = self.proj_out_2(modulated(tokens.astype(jnp.float32), shift, scale, 1e-6))
        return image_of(tokens, config.patch_size, config.in_channels)


class Block(nnx.Module):
    """Attention and feed-forward on normalised tokens, both modulated, with gates that are 0 at first (adaLN-Zero)."""

    def __init__(self, config: DiTConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, classes = config.width, None if config.shared_embedding else config.num_embeds_ada_norm
        self.norm1 = AdaLayerNormZero(width, classes, rngs=rngs)
        self.attn1 = Attention(
            width,
            config.num_attention_heads,
            config.attention_head_dim,
            use_bias=config.attention_bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.ff = FeedForward(width, dtype=dtype, rngs=rngs)
        self.epsilon = config.norm_eps

    def __call__(self, y: Array, embedding: Array | float, waves: Array, labels: Array) -> Array:
        """y: [B, h, w, D]; the embedding [B, D] or what is to be added to this block's own of waves and labels."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(embedding, waves, labels)
        y = gated(y, gate, self.attn1(modulated(y, shift, scale, 1e-6)))
        return gated(y, gate_mlp, self.ff(modulated(y, shift_mlp, scale_mlp, self.epsilon)))


class AdaLayerNormZero(nnx.Module):
    """Shift, scale and gate of a block's two layers, linear in the embedding and 0 at first."""

    def __init__(self, width: int, classes: int | None, *, rngs: nnx.Rngs):
        self.emb = None if classes is None else TimeAndLabel(width, classes, rngs=rngs)
        self.linear = nnx.Linear(width, 6 * width, kernel_init=ZEROS, rngs=rngs)

    def __call__(self, embedding: Array | float, waves: Array, labels: Array) -> list[Array]:
        """Six [B, D], float32."""
        if self.emb is not None:
            embedding = embedding + self.emb(waves, labels)
        return jnp.split(self.linear(jax.nn.silu(embedding)), 6, axis=-1)


class TimeAndLabel(nnx.Module):
    """The sum of an embedding of the time's waves and one of the label."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(256, width, rngs=rngs)
        self.class_embedder = LabelEmbedding(width, classes, rngs=rngs)

    def __call__(self, waves: Array, labels: Array) -> Array:
        """waves: [B, 256], labels: [B] -> [B, D], float32."""
        return self.timestep_embedder(waves) + self.class_embedder(labels)


class LabelEmbedding(nnx.Module):
    """A vector for each class and one, the last, for none."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.embedding_table = nnx.Embed(classes + 1, width, embedding_init=SMALL, rngs=rngs)

    def __call__(self, labels: Array) -> Array:
        """[B] -> [B, D], float32."""
        return self.embedding_table(labels)


RENAMED = (
    (r"x_embedder\.", "pos_embed."),
    (r"t_embedder\.mlp\.0\.", "emb.timestep_embedder.linear_1."),
    (r"t_embedder\.mlp\.2\.", "emb.timestep_embedder.linear_2."),
    (r"y_embedder\.", "emb.class_embedder."),
    (r"blocks\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"transformer_blocks.\1.attn1.to_{}."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"blocks\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"blocks\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"final_layer\.linear\.", "proj_out_2."),
)
"""Beginnings of names in facebookresearch/DiT and willisma/SiT, and what diffusers calls them; {} is one of q, k, v."""


def from_original(tensors: Mapping[str, np.ndarray], *, shared: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint of the DiT or SiT project, renamed and split as diffusers' names.

    The embedding of time and label is copied to every block, as diffusers has it, or with shared=True is kept as the
    one "emb." of `DiTConfig(shared_embedding=True)`. Positions, which are computed, are left out. Raises ValueError for
    names that such a checkpoint does not have, and for positions that are not those of `positions`.
    """
    unknown = [name for name in tensors if name != "pos_embed" and not any(re.match(old, name) for old, _ in RENAMED)]
    if unknown:
        raise ValueError(f"not tensors of a DiT or SiT checkpoint of the original projects: {', '.join(unknown)}")
    if "pos_embed" in tensors:
        _check_positions(np.asarray(tensors["pos_embed"]))
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        for old, new in RENAMED:
            if re.match(old, name):
                parts = zip("qkv", np.split(tensor, 3), strict=True) if "{}" in new else [("", tensor)]
                renamed |= {re.sub(old, new, name, count=1).format(part): a for part, a in parts}
    return renamed if shared else per_block(renamed)


def per_block(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a DiT of one shared embedding as those of one that has it in every block, as diffusers' have."""
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    shared = {name: tensor for name, tensor in tensors.items() if name.startswith("emb.")}
    copies = {f"transformer_blocks.{i}.norm1.{name}": tensor for i in blocks for name, tensor in shared.items()}
    return {name: tensor for name, tensor in tensors.items() if name not in shared} | copies


def as_flow(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of a SiT, by `from_original`, as those of a network for `flow` and `VelocityPrecondition`.

    A SiT sees 1 − t and outputs x0 − ε, this network sees t and outputs ε − x0. That is exact: the waves of 1 − t are
    those of t turned by the angle of each frequency, which the first linear map of the time takes up.
    """
    angles = 10_000.0 ** (-np.arange(128) / 128)

    def one(name: str, tensor: np.ndarray) -> np.ndarray:
        if name.startswith("proj_out_2."):
            return -tensor
        if name.endswith("timestep_embedder.linear_1.weight"):
            cosine, sine = np.split(tensor.astype(np.float64), 2, axis=1)
            turned = (cosine * np.cos(angles) + sine * np.sin(angles), cosine * np.sin(angles) - sine * np.cos(angles))
            return np.concatenate(turned, axis=1).astype(tensor.dtype)
        return tensor

    return {name: one(name, tensor) for name, tensor in tensors.items()}


def original_config(
    tensors: Mapping[str, np.ndarray], *, heads: int | None = None, shared_embedding: bool = False
) -> DiTConfig:
    """The configuration of a checkpoint of the DiT or SiT project, read from its shapes.

    heads: by default those of the published sizes: 16 for a width of 1152 (XL), width/64 for S, B and L. Raises
    ValueError for checkpoints that lack a tensor it is read from, and for other widths without heads.
    """
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "final_layer.linear.weight")
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"a checkpoint of the DiT or SiT project has {', '.join(missing)}; this one does not")
    width, channels, size, _ = tensors[needed[0]].shape
    if heads is None and width % 64:
        raise ValueError(f"a width of {width} does not tell the heads, as 384, 768, 1024 and 1152 do: give heads")
    heads = heads or (16 if width == 1152 else width // 64)
    return DiTConfig(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=tensors[needed[3]].shape[0] // size**2,
        num_layers=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        sample_size=math.isqrt(tensors["pos_embed"].shape[1]) * size,
        patch_size=size,
        num_embeds_ada_norm=tensors[needed[1]].shape[0] - 1,
        norm_eps=1e-6,
        freq_shift=0.0,
        shared_embedding=shared_embedding,
    )


def _check_positions(given: np.ndarray) -> None:
    side, width = math.isqrt(given.shape[1]), given.shape[2]
    if side**2 != given.shape[1] or not np.allclose(
        given[0], np.asarray(positions(side, side, width, base=side)).reshape(-1, width), atol=1e-3
    ):
        raise ValueError(
            f"pos_embed {list(given.shape)} are not the sines and cosines of a square grid, which this network computes"
        )
