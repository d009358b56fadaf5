"""Text encoders of latent diffusion, with the names and the numbers of transformers' checkpoints.

`CLIPTextModel` and `CLIPTextModelWithProjection` (Radford et al. 2021) are those of Stable Diffusion, SDXL, SD3 and
FLUX; `T5EncoderModel` (Raffel et al. 2020) is that of PixArt, SD3 and FLUX. They take the numbers of tokens and answer
a `Prompt`, in float32. Equal blocks are a `Stack`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from ddistill.networks.conditions import Prompt
from ddistill.networks.layers import Linear, Stack, attention

T = TypeVar("T")

LEGACY_EOS = 2
"""The eos_token_id of old CLIP configurations, which is not the end's: there the end is the largest number."""

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of transformers' CLIPTextConfig that numbers depend on, under their names and with their defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    FIXED: ClassVar[Mapping[str, tuple]] = {"attention_dropout": (0.0,), "use_attention_mask": (False,)}

    def __post_init__(self):
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"hidden_act = {self.hidden_act!r}: a CLIP text model has 'quick_gelu' or 'gelu'")
        if not isinstance(self.eos_token_id, int):
            raise ValueError(f"eos_token_id = {self.eos_token_id}: pooling needs one number, that of the end of a text")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} does not split into {self.num_attention_heads} attention heads"
            )


@dataclass(frozen=True)
class T5Config:
    """The fields of transformers' T5Config that an encoder's numbers depend on, with their names and defaults."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    FIXED: ClassVar[Mapping[str, tuple]] = {"model_type": ("t5",)}

    def __post_init__(self):
        if self.feed_forward_proj not in ("relu", "gated-gelu"):
            raise ValueError(
                f"feed_forward_proj = {self.feed_forward_proj!r}: a T5 encoder has 'relu' (the first T5) or "
                "'gated-gelu' (version 1.1)"
            )


class CLIPTextModel(nnx.Module):
    """CLIP's text transformer, transformers' CLIPTextModel: causal, with a position for each token."""

    def __init__(self, config: CLIPTextConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.embeddings = CLIPEmbeddings(config, rngs=rngs)
        self.encoder = CLIPEncoder(config, dtype=dtype, remat=remat, rngs=rngs)
        self.final_layer_norm = _layer_norm(config, rngs)

    def __call__(self, tokens: Array, mask: Array | None = None, *, skip: int = 0, norm: bool = True) -> Prompt:
        """Tokens [B, L] -> Prompt(states [B, L, hidden_size], pooled [B, hidden_size]).

        mask: [B, L], 1 for tokens that others see; the pipelines give none. skip: the states are those before the last
        `skip` blocks (1 is the penultimate layer). norm: the final norm is applied to them, as it always is to pooled,
        the last block's state of the first end-of-text token. Raises ValueError for more tokens than there are
        positions and for a skip beyond the depth.
        """
        depth, length = self.config.num_hidden_layers, self.config.max_position_embeddings
        if tokens.ndim != 2 or tokens.shape[1] > length:
            raise ValueError(f"this text model takes tokens [B, L] with L up to {length}; given {list(tokens.shape)}")
        if not 0 <= skip <= depth:
            raise ValueError(f"skip = {skip}: this text model has {depth} layers to skip, from the last")
        x = self.embeddings(tokens).astype(self.dtype)
        last, kept = self.encoder(x, mask, depth - skip)
        last = self.final_layer_norm(last)
        states = last if norm and not skip else self.final_layer_norm(kept) if norm else kept
        is_end = tokens if self.config.eos_token_id == LEGACY_EOS else tokens == self.config.eos_token_id
        pooled = jnp.take_along_axis(last, jnp.argmax(is_end, axis=1)[:, None, None], axis=1)[:, 0]
        return Prompt(states.astype(jnp.float32), pooled=pooled)


class CLIPTextModelWithProjection(nnx.Module):
    """A `CLIPTextModel` whose pooled state goes through a linear map to [B, projection_dim]."""

    def __init__(self, config: CLIPTextConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextModel(config, dtype=dtype, remat=remat, rngs=rngs)
        self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: Array, mask: Array | None = None, *, skip: int = 0, norm: bool = True) -> Prompt:
        """As `CLIPTextModel`, with pooled [B, projection_dim]."""
        prompt = self.text_model(tokens, mask, skip=skip, norm=norm)
        pooled: Any = prompt.pooled
        return Prompt(prompt.states, pooled=self.text_projection(pooled).astype(jnp.float32))


class T5EncoderModel(nnx.Module):
    """The encoder of T5, transformers' T5EncoderModel."""

    def __init__(self, config: T5Config, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        self.config = config
        self.shared = nnx.Embed(config.vocab_size, config.d_model, dtype=jnp.float32, rngs=rngs)
        self.encoder = T5Encoder(config, dtype=dtype, remat=remat, rngs=rngs)

    def __call__(self, tokens: Array, mask: Array | None = None) -> Prompt:
        """Tokens [B, L] -> Prompt(states [B, L, d_model], mask); mask: [B, L], 1 for tokens that others see."""
        if tokens.ndim != 2:
            raise ValueError(f"a T5 encoder takes tokens [B, L]; given {list(tokens.shape)}")
        return Prompt(self.encoder(self.shared(tokens), mask), mask)


def clip_tensors(tensors: Mapping[str, T], projection: bool) -> dict[str, T]:
    """A checkpoint of a CLIP text model, under the names of `CLIPTextModelWithProjection` or of `CLIPTextModel`.

    Files have the prefix text_model. or lack it, and perhaps buffers of positions, which are computed here.
    """
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    bare.pop("embeddings.position_ids", None)
    head = {name: bare.pop(name) for name in ["text_projection.weight"] if name in bare}
    return {f"text_model.{name}": tensor for name, tensor in bare.items()} | head if projection else bare


def t5_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """A checkpoint of T5 under the names of `T5EncoderModel`.

    Files hold the embedding under one of two names or both; a decoder is left out.
    """
    kept = {name: t for name, t in tensors.items() if not name.startswith(("decoder.", "lm_head."))}
    tied = kept.pop("encoder.embed_tokens.weight", None)
    return kept if tied is None or "shared.weight" in kept else {"shared.weight": tied, **kept}


class CLIPEmbeddings(nnx.Module):
    """Token plus position."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        make = partial(nnx.Embed, features=config.hidden_size, embedding_init=normal, dtype=jnp.float32, rngs=rngs)
        self.token_embedding = make(config.vocab_size)
        self.position_embedding = make(config.max_position_embeddings)

    def __call__(self, tokens: Array) -> Array:
        """[B, L] -> [B, L, hidden_size], float32."""
        return self.token_embedding(tokens) + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPEncoder(nnx.Module):
    """The blocks of a CLIP text model."""

    def __init__(self, config: CLIPTextConfig, *, dtype, remat: bool, rngs: nnx.Rngs):
        self.layers = Stack(
            lambda rngs: CLIPLayer(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, remat=remat, rngs=rngs
        )

    def __call__(self, x: Array, mask: Array | None, keep: int) -> tuple[Array, Array]:
        """[B, L, C] -> the same after all blocks, and after the first `keep`."""
        seen = None if mask is None else mask[:, None, None, :].astype(bool)
        last, kept, _ = self.layers((x, x, jnp.zeros((), jnp.int32)), seen, keep)
        return last, kept


class CLIPLayer(nnx.Module):
    """A block, x + attention(norm(x)), then x + mlp(norm(x)), that counts itself and keeps the state after one block.

    One state beside the last is what pipelines read; keeping all of them would cost depth times the memory.
    """

    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        self.layer_norm1 = _layer_norm(config, rngs)
        self.self_attn = CLIPAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = _layer_norm(config, rngs)
        self.mlp = CLIPMLP(config, dtype=dtype, rngs=rngs)

    def __call__(self, carry: tuple[Array, Array, Array], seen: Array | None, keep: int) -> tuple[Array, Array, Array]:
        """(x, kept, number of blocks before) -> the same after this block."""
        x, kept, number = carry
        x = x + self.self_attn(self.layer_norm1(x), seen)
        x = x + self.mlp(self.layer_norm2(x))
        return x, jnp.where(number + 1 == keep, x, kept), number + 1


class CLIPAttention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        linear = partial(Linear, config.hidden_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = linear(), linear(), linear(), linear()

    def __call__(self, x: Array, seen: Array | None) -> Array:
        """[B, L, C] -> the same."""
        q, k, v = (_split(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, mask=seen, causal=True).reshape(x.shape))


class CLIPMLP(nnx.Module):
    """Linear, activation, linear."""

    def __init__(self, config: CLIPTextConfig, *, dtype, rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, L, C] -> the same."""
        return self.fc2(self.activation(self.fc1(x)))


class T5Encoder(nnx.Module):
    """The blocks of a T5 encoder and the norm after them."""

    def __init__(self, config: T5Config, *, dtype, remat: bool, rngs: nnx.Rngs):
        self.dtype = dtype
        self.block = Stack(
            lambda rngs: T5Block(config, dtype=dtype, rngs=rngs), config.num_layers, remat=remat, rngs=rngs
        )
        # Checkpoints keep the bias, which all blocks share, in the attention of the first.
        bias = nnx.Dict(SelfAttention=nnx.Dict(relative_attention_bias=RelativePositions(config, rngs=rngs)))
        setattr(self.block, "0", nnx.Dict(layer=nnx.List([bias])))
        self.final_layer_norm = _rms_norm(config, rngs)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """Embedded tokens [B, L, d_model] -> states, float32."""
        first: Any = getattr(self.block, "0")
        bias = first.layer[0].SelfAttention.relative_attention_bias(x.shape[1])
        seen = None if mask is None else mask[:, None, None, :].astype(bool)
        # float32 from block to block: the sums of T5 1.1 grow to thousands.
        return self.final_layer_norm(self.block(x.astype(jnp.float32), bias, seen))


class RelativePositions(nnx.Module):
    """What attention adds for the distance of two tokens, a number for each head (Raffel et al. 2020, sec. 2.1)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.distance = config.relative_attention_max_distance
        self.embedding = nnx.Param(
            nnx.initializers.normal(config.d_model**-0.5)(
                rngs.params(), (config.relative_attention_num_buckets, config.num_heads)
            )
        )

    def __call__(self, length: int) -> Array:
        """[1, heads, length, length] for queries and keys, float32."""
        place = np.arange(length)
        bucket = buckets(place[None, :] - place[:, None], len(self.embedding), self.distance)
        return jnp.moveaxis(self.embedding[bucket].astype(jnp.float32), -1, 0)[None]


def buckets(offset: np.ndarray, count: int, distance: int) -> np.ndarray:
    """The bucket, 0 to count − 1, of the offset of a key from its query.

    Half of them are for keys to the right. Of each half the first half are single offsets, and the others widen by a
    constant factor up to `distance`, beyond which all share the last.
    """
    half = count // 2
    exact = half // 2
    away = np.abs(offset)
    far = np.log(np.maximum(away, exact).astype(np.float32) / exact) / np.float32(math.log(distance / exact))
    wide = np.minimum(exact + (far * (half - exact)).astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(away < exact, away, wide)


class T5Block(nnx.Module):
    """Self-attention and feed-forward layer, whose sum with x is float32."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.layer = nnx.List(
            [T5AttentionLayer(config, dtype=dtype, rngs=rngs), T5FeedForwardLayer(config, dtype=dtype, rngs=rngs)]
        )

    def __call__(self, x: Array, bias: Array, seen: Array | None) -> Array:
        """[B, L, d_model] -> the same, float32."""
        attend, feed = self.layer
        x = x + attend(x, bias, seen)
        return x + feed(x)


class T5AttentionLayer(nnx.Module):
    """Attention of the normalised x."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.SelfAttention = T5Attention(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _rms_norm(config, rngs)

    def __call__(self, x: Array, bias: Array, seen: Array | None) -> Array:
        """[B, L, d_model] -> the same."""
        return self.SelfAttention(self.layer_norm(x), bias, seen)


class T5Attention(nnx.Module):
    """Self-attention with a bias and without a scale, which T5 has in its initial weights."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.heads = config.num_heads
        width, inner = config.d_model, config.num_heads * config.d_kv

        def linear(inputs, outputs, std):
            init = nnx.initializers.normal(std)
            return Linear(inputs, outputs, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)

        self.q = linear(width, inner, (width * config.d_kv) ** -0.5)
        self.k = linear(width, inner, width**-0.5)
        self.v = linear(width, inner, width**-0.5)
        self.o = linear(inner, width, inner**-0.5)

    def __call__(self, x: Array, bias: Array, seen: Array | None) -> Array:
        """[B, L, d_model] -> the same."""
        q, k, v = (_split(project(x), self.heads) for project in (self.q, self.k, self.v))
        # not `layers.attention`, which has no bias: flash attention would need its gradient
        out = jax.nn.dot_product_attention(q, k, v, bias, seen, scale=1.0, implementation="xla")
        return self.o(out.reshape(*x.shape[:-1], -1))


class T5FeedForwardLayer(nnx.Module):
    """The feed-forward map of the normalised x."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        make = T5DenseGatedActDense if config.feed_forward_proj.startswith("gated-") else T5DenseActDense
        self.DenseReluDense = make(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _rms_norm(config, rngs)

    def __call__(self, x: Array) -> Array:
        """[B, L, d_model] -> the same."""
        return self.DenseReluDense(self.layer_norm(x))


class T5DenseActDense(nnx.Module):
    """Linear, ReLU, linear: the first T5."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.wi = Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, L, d_model] -> the same."""
        return self.wo(jax.nn.relu(self.wi(x)))


class T5DenseGatedActDense(nnx.Module):
    """A linear map gated by the GELU of another, then one more (Shazeer 2020): T5 1.1."""

    def __init__(self, config: T5Config, *, dtype, rngs: nnx.Rngs):
        self.wi_0 = Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.wi_1 = Linear(config.d_model, config.d_ff, use_bias=False, dtype=dtype, rngs=rngs)
        self.wo = Linear(config.d_ff, config.d_model, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """[B, L, d_model] -> the same."""
        return self.wo(ACTIVATIONS["gelu_new"](self.wi_0(x)) * self.wi_1(x))


def _split(x: Array, heads: int) -> Array:
    return x.reshape(*x.shape[:-1], heads, -1)


def _layer_norm(config: CLIPTextConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )  # fmt: skip


def _rms_norm(config: T5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=jnp.float32, rngs=rngs)
