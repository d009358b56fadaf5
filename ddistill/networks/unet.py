"""diffusers' UNets: `UNet2DModel` of pictures, perhaps with labels, and `UNet2DConditionModel` of pictures with texts.

Both are Ho et al.'s UNet (2020) with the changes of Dhariwal & Nichol (2021), the second with Rombach et al.'s (2022)
attention to a text. They cover the pipelines DDPM, DDIM and consistency models; Stable Diffusion 1, 2, XL and its
refiner, their distilled relatives and LCM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import Scaled
from ddistill.networks.conditions import Prompt, labels_or_none, prompt_of, unscaled
from ddistill.networks.layers import Extra, GroupNorm, Linear, Remat, TimestepEmbedding, sinusoidal
from ddistill.networks.unet_attention import Attention, Transformer
from ddistill.networks.unet_blocks import Level, Middle, Style, conv, ways

PIXELS, TEXT = "pixels", "text"
BLOCKS: Mapping[str, tuple[str | None, str | None]] = {
    "DownBlock2D": (None, "conv"),
    "ResnetDownsampleBlock2D": (None, "resnet"),
    "AttnDownBlock2D": (PIXELS, None),
    "CrossAttnDownBlock2D": (TEXT, "conv"),
    "UpBlock2D": (None, "conv"),
    "ResnetUpsampleBlock2D": (None, "resnet"),
    "AttnUpBlock2D": (PIXELS, None),
    "CrossAttnUpBlock2D": (TEXT, "conv"),
}
"""diffusers' blocks: what they attend to, and how they change the resolution, where None leaves it to the config."""


@dataclass(frozen=True)
class UNet2DConfig:
    """diffusers' config of a `UNet2DModel`; its names, defaults and meanings. Raises ValueError for what is not built.

    sample_size says what the model was trained on; the network takes every size that its levels can halve.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "center_input_sample": (False,),
        "act_fn": ("silu", "swish"),
        "mid_block_scale_factor": (1,),
    }

    def __post_init__(self):
        _check_levels(self, attention=PIXELS)
        _check_choice(self, "mid_block_type", "UNetMidBlock2D", None)
        _check_choice(self, "time_embedding_type", "positional", "fourier", "learned")
        _check_choice(self, "class_embed_type", None, "timestep")
        _check_choice(self, "downsample_type", "conv", "resnet")
        _check_choice(self, "upsample_type", "conv", "resnet")
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("learned time embeddings need num_train_timesteps, the number of times to learn")


class UNet2D(nnx.Module):
    """diffusers' `UNet2DModel`: a UNet with attention among the pixels of some levels (Ho et al. 2020).

    x: [B, H, W, in_channels], H and W divisible by 2 for every level but the last. c_noise and s_noise: [B], in the
    model's timesteps (of fourier embeddings: noise levels). cond: None; with num_class_embeds labels [B], where −1 and
    num_class_embeds are "no label" and add nothing; with class_embed_type "timestep" numbers [B]. It may come with a
    guidance scale, `Scaled(cond, w)`. The answer is [B, H, W, in_channels] in float32: of a network that also learned
    its variance, the mean alone. remat: nothing is kept inside a residual block for the backward pass, and no scores.
    """

    def __init__(
        self, config: UNet2DConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs
    ):  # fmt: skip
        stem, *_ = channels = config.block_out_channels
        width = config.time_embedding_dim or 4 * stem
        style = _style(config, width, dtype, remat)
        fourier = config.time_embedding_type == "fourier"
        self.config = config
        self.conv_in = conv(config.in_channels, stem, dtype=dtype, rngs=rngs)
        learned: Any = config.num_train_timesteps if config.time_embedding_type == "learned" else None
        waves = Frequencies(stem, rngs=rngs) if fourier else None
        self.time_proj: Any = nnx.Embed(learned, stem, rngs=rngs) if learned else waves
        size = 2 * stem if fourier else stem
        self.time_embedding = TimestepEmbedding(size, width, rngs=rngs)
        self.target = Extra(width, log_waves if fourier else time_waves, rngs=rngs)
        self.guidance = Extra(width, guidance_waves, rngs=rngs)
        self.class_embedding = _class_embedding(config, size, width, rngs)

        def pixels(width, groups, _=0):
            norm = None if groups is None else GroupNorm(width, groups, config.norm_eps)
            heads = _heads_of_size(width, config.attention_head_dim)
            return Attention(width, heads, bias=True, norm=norm, residual=True, dtype=dtype, remat=remat, rngs=rngs)

        def level(kind, width, layers, resampling, last):
            attention, resample = BLOCKS[kind]
            attend = None if attention is None else partial(pixels, width, config.norm_num_groups)
            return Level(width, layers, attend, None if last else resample or resampling)

        layers, last = config.layers_per_block, len(channels) - 1
        down = [
            level(kind, width, layers, config.downsample_type, i == last)
            for i, (kind, width) in enumerate(zip(config.down_block_types, channels, strict=True))
        ]
        up = [
            level(kind, width, layers + 1, config.upsample_type, i == last)
            for i, (kind, width) in enumerate(zip(config.up_block_types, channels[::-1], strict=True))
        ]
        self.down_blocks, self.up_blocks = ways(stem, down, up, style, padding=config.downsample_padding, rngs=rngs)
        groups = config.attn_norm_num_groups
        if groups is None and not style.scale_shift:
            groups = config.norm_num_groups
        attend = partial(pixels, channels[-1], groups) if config.add_attention else None
        middle = config.mid_block_type is not None
        self.mid_block = Middle(channels[-1], 1, style, attend=attend, rngs=rngs) if middle else None
        self.conv_norm_out = GroupNorm(stem, config.norm_num_groups, config.norm_eps)
        self.conv_out = conv(stem, config.out_channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: Array | Scaled | None = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, H, W, in_channels] in float32. Raises ValueError for shapes that do not fit."""
        _check_image(x, self.config, "UNet2D")
        by = 2 ** (len(self.config.block_out_channels) - 1)
        if x.shape[1] % by or x.shape[2] % by:
            raise ValueError(
                f"this UNet2D halves images {by.bit_length() - 1} times: H and W must be divisible by {by}"
            )
        labels, w = unscaled(cond)
        embedding = self.time_embedding(self._waves(c_noise))
        if s_noise is not None:
            embedding = embedding + self.target(s_noise)
        if w is not None:
            embedding = embedding + self.guidance(w)
        if self.config.class_embed_type == "timestep":
            if labels is None:
                raise ValueError('a UNet2D with class_embed_type "timestep" needs cond, numbers [B]')
            embedding = embedding + self.class_embedding(self._waves(labels))
        elif self.class_embedding is not None:
            embedding = embedding + _embed_labels(self.class_embedding, labels, x.shape[0])
        elif labels is not None:
            raise ValueError("this UNet2D has no classes (num_class_embeds is None) and takes no cond")
        out = _through(self, x, embedding, None, None, rngs)
        return out / c_noise[:, None, None, None] if self.config.time_embedding_type == "fourier" else out

    def _waves(self, t: Array) -> Array:
        config = self.config
        if config.time_embedding_type == "learned":
            return self.time_proj(t.astype(jnp.int32))
        if config.time_embedding_type == "fourier":
            return self.time_proj(jnp.log(t))
        size = config.block_out_channels[0]
        return sinusoidal(t, size, flip=config.flip_sin_to_cos, shift=config.freq_shift)


class Frequencies(nnx.Module):
    """Sines and cosines at random frequencies that a checkpoint keeps and nothing trains (Song et al. 2021, NCSN++)."""

    def __init__(self, size: int, scale: float = 16.0, *, rngs: nnx.Rngs):
        self.weight = nnx.Variable(scale * jax.random.normal(rngs.params(), (size,)))

    def __call__(self, t: Array) -> Array:
        """[B] -> [B, 2 size], float32."""
        angles = 2 * jnp.pi * t.astype(jnp.float32)[:, None] * self.weight
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


Depth = int | tuple[int, ...]
"""Transformer blocks of a level: of each of its layers, or layer by layer."""


@dataclass(frozen=True)
class UNet2DConditionConfig:
    """diffusers' config of a `UNet2DConditionModel`; its names, defaults and meanings.

    attention_head_dim is the number of heads, as in diffusers, whatever its name. upcast_attention changes nothing:
    scores are always in float32. sample_size says what the model was trained on; the network takes every size.
    Raises ValueError for what is not built.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 1280
    transformer_layers_per_block: int | tuple[Depth, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depth, ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    FIXED: ClassVar[Mapping[str, tuple]] = {
        "center_input_sample": (False,),
        "only_cross_attention": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "act_fn": ("silu", "swish"),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
        "addition_embed_type_num_heads": (64,),
    }

    def __post_init__(self):
        _check_levels(self, attention=TEXT)
        _check_choice(self, "mid_block_type", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
        _check_choice(self, "class_embed_type", None, "timestep", "projection")
        _check_choice(self, "addition_embed_type", None, "text_time")
        _check_choice(self, "encoder_hid_dim_type", None, "text_proj")
        per_level = ("layers_per_block", "cross_attention_dim", "attention_head_dim", "transformer_layers_per_block")
        for name in (*per_level, "reverse_transformer_layers_per_block"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != len(self.block_out_channels):
                raise ValueError(f"{name} has {len(given)} entries for {len(self.block_out_channels)} levels")
        if self.addition_embed_type and (self.num_class_embeds is not None or self.class_embed_type):
            raise ValueError("addition_embed_type and classes are both read from the prompt: only one of them is built")
        added = self.addition_embed_type and (self.addition_time_embed_dim, self.projection_class_embeddings_input_dim)
        if added and None in added:
            raise ValueError('"text_time" needs addition_time_embed_dim and projection_class_embeddings_input_dim')
        if self.class_embed_type == "projection" and self.projection_class_embeddings_input_dim is None:
            raise ValueError('class_embed_type "projection" needs projection_class_embeddings_input_dim')
        if self.encoder_hid_dim_type and self.encoder_hid_dim is None:
            raise ValueError('encoder_hid_dim_type "text_proj" needs encoder_hid_dim, the width of the text')


class UNet2DCondition(nnx.Module):
    """diffusers' `UNet2DConditionModel`: a UNet whose pixels attend to a text (Rombach et al. 2022).

    x: [B, H, W, in_channels], of any size. c_noise and s_noise: [B], in the model's timesteps. cond: a `Prompt`, alone
    or with a guidance scale, `Scaled(prompt, w)`. Of the prompt are read
    - states [B, L, C] and perhaps mask [B, L], which cross-attention sees;
    - with addition_embed_type "text_time" (SDXL), pooled [B, P] and sizes [B, n], the time ids;
    - with num_class_embeds or class_embed_type "timestep", sizes [B, 1] as the label or number (a label of −1 or
      num_class_embeds is none and adds nothing); with "projection", pooled as the vector.
    w enters as LCM's guidance embedding if time_cond_proj_dim is given, through `time_embedding.cond_proj`, and through
    `guidance` otherwise. The answer is [B, H, W, in_channels] in float32: of a network that also learned its variance,
    the mean alone. remat: nothing is kept inside a residual or transformer block for the backward pass.
    """

    def __init__(
        self, config: UNet2DConditionConfig, *, dtype: jnp.dtype = jnp.float32, remat: Remat = False, rngs: nnx.Rngs
    ):
        stem, *_ = channels = config.block_out_channels
        levels = len(channels)
        width = config.time_embedding_dim or 4 * stem
        style = _style(config, width, dtype, remat)
        self.config, self.dtype = config, dtype
        self.conv_in = conv(config.in_channels, stem, dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(stem, width, condition=config.time_cond_proj_dim, rngs=rngs)
        self.target = Extra(width, time_waves, rngs=rngs)
        self.guidance = Extra(width, guidance_waves, rngs=rngs) if config.time_cond_proj_dim is None else None
        self.class_embedding = _class_embedding(config, stem, width, rngs)
        inputs: Any = config.projection_class_embeddings_input_dim
        self.add_embedding = TimestepEmbedding(inputs, width, rngs=rngs) if config.addition_embed_type else None
        contexts = _per_level(config.cross_attention_dim, levels)
        read: Any = config.encoder_hid_dim
        self.encoder_hid_proj = Linear(read, contexts[0], dtype=dtype, rngs=rngs) if read else None

        def text(level, depth, i):
            return Transformer(
                channels[level],
                heads[level],
                contexts[level],
                depth if isinstance(depth, int) else depth[i],
                groups=config.norm_num_groups,
                linear=config.use_linear_projection,
                dtype=dtype,
                remat=remat,
                rngs=rngs,
            )

        def plan(kind, level, depth, layers, last):
            attention, resample = BLOCKS[kind]
            attend = None if attention is None else partial(text, level, depth)
            return Level(channels[level], layers, attend, None if last else resample)

        heads = _per_level(config.attention_head_dim, levels)
        layers = _per_level(config.layers_per_block, levels)
        depths = _per_level(config.transformer_layers_per_block, levels)
        depths_up = config.reverse_transformer_layers_per_block or depths[::-1]
        down = [
            plan(kind, i, depths[i], layers[i], i == levels - 1) for i, kind in enumerate(config.down_block_types)
        ]  # fmt: skip
        up = [
            plan(kind, levels - 1 - i, depths_up[i], layers[levels - 1 - i] + 1, i == levels - 1)
            for i, kind in enumerate(config.up_block_types)
        ]
        self.down_blocks, self.up_blocks = ways(stem, down, up, style, padding=1, rngs=rngs)
        seeing = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        attend = partial(text, levels - 1, depths[-1]) if seeing else None
        middle = config.mid_block_type is not None
        self.mid_block = Middle(channels[-1], int(seeing), style, attend=attend, rngs=rngs) if middle else None
        self.conv_norm_out = GroupNorm(stem, config.norm_num_groups, config.norm_eps)
        self.conv_out = conv(stem, config.out_channels, zero=True, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        x: Array,
        c_noise: Array,
        cond: Prompt | Scaled | None = None,
        s_noise: Array | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Array:
        """F(x, c_noise, cond, s): [B, H, W, in_channels] in float32. Raises ValueError for shapes that do not fit."""
        config = self.config
        _check_image(x, config, "UNet2DCondition")
        cond, w = unscaled(cond)
        pooled = config.addition_embed_type is not None or config.class_embed_type == "projection"
        prompt = prompt_of(cond, "UNet2DCondition", pooled=pooled)
        extra = None
        if w is not None and config.time_cond_proj_dim is not None:
            extra = guidance_waves(w, config.time_cond_proj_dim)
        embedding = self.time_embedding(self._waves(c_noise, config.block_out_channels[0]), extra)
        if s_noise is not None:
            embedding = embedding + self.target(s_noise)
        if w is not None and self.guidance is not None:
            embedding = embedding + self.guidance(w)
        embedding = embedding + self._of_prompt(prompt)
        mask = None if prompt.mask is None else prompt.mask.astype(bool)
        return _through(self, x, embedding, self._context(prompt), mask, rngs)

    def _waves(self, t: Array, size: int) -> Array:
        return sinusoidal(t, size, flip=self.config.flip_sin_to_cos, shift=self.config.freq_shift)

    def _context(self, prompt: Prompt) -> Array:
        config, given = self.config, prompt.states.shape[-1]
        taken = config.encoder_hid_dim or _per_level(config.cross_attention_dim, 1)[0]
        if given != taken:
            raise ValueError(f"this UNet2DCondition sees texts of {taken} channels; given states of {given}")
        states = prompt.states.astype(self.dtype)
        return states if self.encoder_hid_proj is None else self.encoder_hid_proj(states)

    def _of_prompt(self, prompt: Prompt) -> Array | float:
        """What the prompt adds to the time embedding beside the text."""
        config: Any = self.config
        pooled: Any = prompt.pooled
        if config.class_embed_type == "projection":
            return self.class_embedding(_fitting(pooled, config.projection_class_embeddings_input_dim))
        if self.add_embedding is None and self.class_embedding is None:
            return 0.0
        if prompt.sizes is None:
            what = "SDXL's time ids [B, n]" if self.add_embedding is not None else "its label or number [B, 1]"
            raise ValueError(f"this UNet2DCondition reads {what} from Prompt.sizes, which is None")
        if self.add_embedding is not None:
            ids = self._waves(prompt.sizes.reshape(-1), config.addition_time_embed_dim)
            numbers = jnp.concatenate([pooled, ids.reshape(prompt.sizes.shape[0], -1)], axis=-1)
            return self.add_embedding(_fitting(numbers, config.projection_class_embeddings_input_dim))
        number = prompt.sizes[:, 0]
        if config.class_embed_type == "timestep":
            return self.class_embedding(self._waves(number, config.block_out_channels[0]))
        return _embed_labels(self.class_embedding, number.astype(jnp.int32), number.shape[0])


def time_waves(s: Array) -> Array:
    """[B] -> [B, 256]: the second time of a student, in timesteps up to a thousand or so."""
    return sinusoidal(s, 256)


def log_waves(s: Array) -> Array:
    """[B] -> [B, 256]: the second time of a student, as a noise level, 0 included."""
    return sinusoidal(250 * jnp.log(s + 1e-3), 256)


def guidance_waves(w: Array, size: int = 256) -> Array:
    """[B] -> [B, size]: LCM's embedding of w − 1 (Luo et al. 2023), w being Imagen's and diffusers' scale."""
    return sinusoidal(w - 1, size, flip=False, shift=1, scale=1000)


def _through(
    network: UNet2D | UNet2DCondition,
    x: Array,
    embedding: Array,
    context: Array | None,
    mask: Array | None,
    rngs: nnx.Rngs | None,
) -> Array:
    h = network.conv_in(x)
    skips = [h]
    for block in network.down_blocks:
        h, left = block(h, embedding, context, mask, rngs)
        skips += left
    if network.mid_block is not None:
        h = network.mid_block(h, embedding, context, mask, rngs)
    for block in network.up_blocks:
        h = block(h, skips, embedding, context, mask, rngs)
    out = network.conv_out(jax.nn.silu(network.conv_norm_out(h.astype(jnp.float32))))
    return out[..., : network.config.in_channels]


def _style(config: UNet2DConfig | UNet2DConditionConfig, width: int, dtype: jnp.dtype, remat: Remat) -> Style:
    return Style(
        embedding=width,
        groups=config.norm_num_groups,
        epsilon=config.norm_eps,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        dropout=config.dropout,
        dtype=dtype,
        remat=remat,
    )


def _class_embedding(config: Any, size: int, width: int, rngs: nnx.Rngs):
    if config.class_embed_type == "timestep":
        return TimestepEmbedding(size, width, rngs=rngs)
    if config.class_embed_type == "projection":
        return TimestepEmbedding(config.projection_class_embeddings_input_dim, width, rngs=rngs)
    return None if config.num_class_embeds is None else nnx.Embed(config.num_class_embeds, width, rngs=rngs)


def _embed_labels(embed: nnx.Embed, labels: Array | None, batch: int) -> Array:
    none = embed.num_embeddings
    labels = labels_or_none(labels, batch, none)
    return jnp.where(labels[:, None] == none, 0.0, embed(jnp.minimum(labels, none - 1)))


def _per_level(given: Any, levels: int) -> tuple:
    return given if isinstance(given, tuple) else (given,) * levels


def _heads_of_size(width: int, size: int | None) -> int:
    if size is not None and width % size:
        raise ValueError(f"{width} channels do not split into attention heads of {size}")
    return 1 if size is None else width // size


def _fitting(vectors: Array, size: int) -> Array:
    if vectors.shape[-1] != size:
        raise ValueError(
            f"pooled and sizes of this prompt make vectors of {vectors.shape[-1]} numbers, this UNet2DCondition reads "
            f"{size}: give what its text encoder and pipeline give"
        )
    return vectors


def _check_image(x: Array, config: UNet2DConfig | UNet2DConditionConfig, network: str) -> None:
    if x.ndim != 4 or x.shape[-1] != config.in_channels:
        raise ValueError(f"{network} takes images [B, H, W, {config.in_channels}]; given {list(x.shape)}")


def _check_choice(config: object, name: str, *accepted: object) -> None:
    if getattr(config, name) not in accepted:
        raise ValueError(f"{name} is {getattr(config, name)!r}; {type(config).__name__} supports {list(accepted)}")


def _check_levels(config: UNet2DConfig | UNet2DConditionConfig, attention: str) -> None:
    supported = [name for name, (kind, _) in BLOCKS.items() if kind in (None, attention)]
    for name, way in (("down_block_types", "Down"), ("up_block_types", "Up")):
        kinds = getattr(config, name)
        accepted = [kind for kind in supported if way in kind and (attention == PIXELS or "Resnet" not in kind)]
        if len(kinds) != len(config.block_out_channels):
            raise ValueError(f"{name} has {len(kinds)} entries for {len(config.block_out_channels)} block_out_channels")
        if unknown := sorted(set(kinds) - set(accepted)):
            raise ValueError(f"{name} has {unknown}; {type(config).__name__} supports {accepted}")
    _check_choice(config, "resnet_time_scale_shift", "default", "scale_shift")
    if config.out_channels < config.in_channels:
        raise ValueError(
            f"a network of {config.in_channels} channels in and {config.out_channels} out sees another image too "
            "(inpainting, editing, upscaling), which is not supported"
        )
