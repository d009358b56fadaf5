"""What networks are conditioned on beside labels."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.net import PyTree, Scaled


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompt:
    """An encoded text: states [B, L, C] of its tokens and what else a network takes.

    mask: [B, L], 1 for tokens that count. pooled: [B, P], one vector of the text. sizes: [B, n] about the image,
    SDXL's time ids for example.
    """

    states: Array
    mask: Array | None = None
    pooled: Array | None = None
    sizes: Array | None = field(default=None)


def unscaled(cond: PyTree) -> tuple[PyTree, Array | None]:
    """A condition, and the guidance scale [B] that comes with it if there is one."""
    return (cond.cond, cond.w) if isinstance(cond, Scaled) else (cond, None)


def labels_or_none(cond: Array | None, batch: int, none: int) -> Array:
    """Labels [B] in which −1, and no labels at all, have become `none`."""
    return jnp.full(batch, none) if cond is None else jnp.where(cond < 0, none, jnp.minimum(cond, none))


def prompt_of(cond: PyTree, network: str, pooled: bool = False) -> Prompt:
    """The prompt that a network needs. Raises ValueError, naming the network, for anything else."""
    if not isinstance(cond, Prompt) or (pooled and cond.pooled is None):
        what = "Prompt(states, pooled=...)" if pooled else "Prompt(states)"
        given = type(cond).__name__ if not isinstance(cond, Prompt) else "a Prompt without pooled"
        raise ValueError(f"{network} is conditioned on a text, cond = {what}; given {given}")
    return cond
