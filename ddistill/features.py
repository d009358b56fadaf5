"""Features of a network: what its modules answer on the way to x̂0."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.net import Apply, Net
from ddistill.process import Time

PyTree = Any


def features(
    net: Net, x: Array, t: Time, cond: PyTree = None, *, layers: Sequence[str] | None = None, s: Time | None = None
) -> dict[str, Array]:
    """Outputs of modules inside a network, by path ("blocks.0"), in the order of `layers`.

    x: [B, ...], t and s: [] or [B], as for the network itself, through whose inputs gradients flow; the rest of the
    network is not computed under jit. Of a module that answers several arrays it is the first, of one called several
    times the last call's. layers: None takes the members of the outermost lists, such as all blocks.
    Raises ValueError for paths that the network lacks, and for networks that are not NNX modules: take the features of
    the network inside a guided one.
    """
    batch = x.shape[:1]
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), batch)
    s = None if s is None else jnp.broadcast_to(jnp.asarray(s, x.dtype), batch)
    found = _recording(net.apply)(net.params, net.rest, x, t, cond, s=s, key=None)
    if layers is None:
        layers = sorted((p for p in found if re.fullmatch(r"\w+\.\d+", p)), key=_in_order)
        if not layers:
            raise ValueError(f"this network keeps no list of blocks: name layers, of {sorted(found)}")
    unknown = [layer for layer in layers if layer not in found]
    if unknown:
        raise ValueError(f"no modules {unknown} in this network, which calls {sorted(found)}")
    return {layer: jax.tree.leaves(found[layer])[0] for layer in layers}


def _in_order(path: str) -> tuple[str, int]:
    name, _, number = path.rpartition(".")
    return name, int(number)


def _recording(apply: Apply) -> Any:
    """The same code, answering all outputs instead of the last."""
    if hasattr(apply, "outputs"):
        return apply.outputs
    if getattr(apply, "transparent", False):  # changes what the network inside sees, not what it answers
        return dataclasses.replace(apply, apply=_recording(apply.apply))  # type: ignore[type-var, attr-defined]
    raise ValueError(
        f"features come from NNX networks (`from_nnx`), as they are, retimed or with adapters; this is a "
        f"{type(apply).__name__.strip('_')}"
    )
