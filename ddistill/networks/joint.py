"""Joint attention: image and text tokens that attend to each other, each with weights of their own.

The block of SD3 (Esser et al. 2024, fig. 2b), which FLUX shares, and what conditions it. Names of parameters are
diffusers'.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ddistill.net import PyTree
from ddistill.networks.conditions import prompt_of
from ddistill.networks.layers import Linear, Sinusoidal, TimestepEmbedding, attention
from ddistill.networks.tokens import ZEROS, FeedForward, gated, modulated, text_of

EPSILON = 1e-6

Rotary = tuple[Array, Array]
"""Cosines and sines [L, D/2] of the angles by which the pairs of a head's D numbers are turned, token by token."""


class Modulation(nnx.Module):
    """The shifts, scales and gates of a block, `parts` vectors: a linear map, 0 at first, of the embedding."""

    def __init__(self, width: int, parts: int, *, rngs: nnx.Rngs):
        self.parts = parts
        self.linear = nnx.Linear(width, parts * width, kernel_init=ZEROS, rngs=rngs)

    def __call__(self, embedding: Array) -> list[Array]:
        """[B, width] -> parts times [B, width], float32."""
        return jnp.split(self.linear(embedding), self.parts, axis=-1)


class TimeAndText(nnx.Module):
    """The embedding of time, pooled text and, where `guided`, the guidance scale, in float32.

    waves: of the time and of the scale.
    """

    def __init__(self, waves: Sinusoidal, pooled: int, width: int, guided: bool = False, *, rngs: nnx.Rngs):
        self.waves = waves
        self.timestep_embedder = TimestepEmbedding(waves.size, width, rngs=rngs)
        self.guidance_embedder = TimestepEmbedding(waves.size, width, rngs=rngs) if guided else None
        self.text_embedder = TimestepEmbedding(pooled, width, rngs=rngs)

    def __call__(self, t: Array, pooled: Array, w: Array | None = None) -> Array:
        """t, w: [B], pooled: [B, pooled] -> [B, width]."""
        embedding = self.timestep_embedder(self.waves(t)) + self.text_embedder(pooled)
        if self.guidance_embedder is not None and w is not None:
            embedding = embedding + self.guidance_embedder(self.waves(w))
        return embedding


class JointAttention(nnx.Module):
    """Attention among the tokens of an image and, where `joint`, those of a text.

    norm: root-mean-square normalisation of queries and keys, head by head. answers: whether the text's tokens learn
    from it too, or are only seen. project: whether a linear map follows.
    """

    def __init__(
        self,
        heads: int,
        head_size: int,
        *,
        joint: bool,
        norm: bool,
        answers: bool = True,
        project: bool = True,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        width = heads * head_size

        def linear():
            return Linear(width, width, dtype=dtype, rngs=rngs)

        def rms_norm():
            return nnx.RMSNorm(head_size, epsilon=EPSILON, dtype=jnp.float32, rngs=rngs) if norm else None

        self.heads = heads
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = rms_norm(), rms_norm()
        self.to_out = nnx.List([linear()]) if project else None
        self.to_add_out = linear() if joint and answers else None
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q, self.norm_added_k = rms_norm(), rms_norm()

    def __call__(self, x: Array, context: Array | None = None, rotary: Rotary | None = None) -> tuple[Array, Array]:
        """x: [B, N, width], context: [B, L, width], rotary: of the L + N tokens, text first -> like x and context.

        Without answers, and without a text, the second is empty.
        """
        q = self._split(x, self.to_q, self.norm_q)
        k = self._split(x, self.to_k, self.norm_k)
        v = self._split(x, self.to_v)
        if context is not None:
            asked = self._split(context, self.add_q_proj, self.norm_added_q)
            q = jnp.concatenate([asked, q], axis=1) if self.to_add_out is not None else q
            k = jnp.concatenate([self._split(context, self.add_k_proj, self.norm_added_k), k], axis=1)
            v = jnp.concatenate([self._split(context, self.add_v_proj), v], axis=1)
        if rotary is not None:
            q, k = rotated(q, rotary), rotated(k, rotary)
        out = attention(q.astype(v.dtype), k.astype(v.dtype), v)
        out = out.reshape(*out.shape[:2], -1)
        told = out[:, : -x.shape[1]]
        out = out[:, -x.shape[1] :]
        out = out if self.to_out is None else self.to_out[0](out)
        return out, told if context is None or self.to_add_out is None else self.to_add_out(told)

    def _split(self, tokens: Array, linear: Linear, norm: nnx.RMSNorm | None = None) -> Array:
        heads = linear(tokens).reshape(*tokens.shape[:2], self.heads, -1)
        return heads if norm is None else norm(heads)


def rotated(x: Array, rotary: Rotary) -> Array:
    """Rotary positions (Su et al. 2021, sec. 3.2.2): neighbouring pairs of x [B, L, H, D] turned, in float32."""
    cos, sin = (a[:, None, :] for a in rotary)
    a, b = jnp.moveaxis(x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2), -1, 0)
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


class JointBlock(nnx.Module):
    """Joint attention, then a feed-forward map for each kind of token, modulated by an embedding; identity at first.

    norm: of queries and keys. dual: a second attention, among the image's tokens alone (SD3.5 medium). last: the text's
    tokens are not needed any more.
    """

    def __init__(
        self,
        heads: int,
        head_size: int,
        *,
        norm: bool,
        dual: bool = False,
        last: bool = False,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        width = heads * head_size
        self.norm1 = Modulation(width, 9 if dual else 6, rngs=rngs)
        self.norm1_context = Modulation(width, 2 if last else 6, rngs=rngs)
        self.attn = JointAttention(heads, head_size, joint=True, norm=norm, answers=not last, dtype=dtype, rngs=rngs)
        self.attn2 = JointAttention(heads, head_size, joint=False, norm=norm, dtype=dtype, rngs=rngs) if dual else None
        self.ff = FeedForward(width, dtype=dtype, rngs=rngs)
        self.ff_context = None if last else FeedForward(width, dtype=dtype, rngs=rngs)

    def __call__(
        self, tokens: tuple[Array, Array], embedding: Array, rotary: Rotary | None = None
    ) -> tuple[Array, Array]:
        """tokens: the image's [B, N, width] and the text's [B, L, width], embedding: [B, width] -> like tokens."""
        x, context = tokens
        shift, scale, gate, *rest = self.norm1(embedding)
        seen = modulated(x, shift, scale, EPSILON)
        if self.ff_context is None:
            scale, shift = self.norm1_context(embedding)
        else:
            shift, scale, text_gate, *text_rest = self.norm1_context(embedding)
        out, told = self.attn(seen, modulated(context, shift, scale, EPSILON), rotary)
        after = gated(x, gate, out)
        if self.attn2 is not None:
            *rest, shift, scale, gate = rest
            after = gated(after, gate, self.attn2(modulated(x, shift, scale, EPSILON))[0])
        after = _fed(after, self.ff, *rest)
        if self.ff_context is not None:
            context = _fed(gated(context, text_gate, told), self.ff_context, *text_rest)
        return after, context


def _fed(x: Array, feed_forward: FeedForward, shift: Array, scale: Array, gate: Array) -> Array:
    return gated(x, gate, feed_forward(modulated(x, shift, scale, EPSILON)))


def texts_of(cond: PyTree, batch: int, states: int, pooled: int, network: str) -> tuple[Array, Array]:
    """The text that a network of joint attention needs, states [B, L, states] and pooled [B, pooled], of a prompt.

    Raises ValueError, naming the network, for anything else. A mask is not used: these networks see padding too.
    """
    prompt_of(cond, network, pooled=True)
    prompt = text_of(cond, states, network)
    given = prompt.states.shape, getattr(prompt.pooled, "shape", ())
    if prompt.pooled is None or given[0][0] != batch or given[1] != (batch, pooled):
        raise ValueError(
            f"{network} takes, for {batch} images, a text of states [{batch}, L, {states}] and pooled "
            f"[{batch}, {pooled}]; given {list(given[0])} and {list(given[1])}"
        )
    return prompt.states, prompt.pooled
