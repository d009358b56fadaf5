"""cuDNN's flash attention, differentiable forwards too.

JAX gives it a rule for reverse mode alone, and a function with such a rule refuses `jax.jvp`, which the likelihood and
the curvature of trajectories need. Here its derivative is a primitive, linear in the tangents: XLA's attention
differentiated where it is computed, cuDNN's backward pass where it is transposed.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def on_cuda() -> bool:
    """Whether programs go to an NVIDIA GPU that cuDNN's flash attention runs on, of Ampere or later.

    Asked when a program is traced: `jax.lax.platform_dependent`, which would wait for the lowering, traces all of its
    branches, and cuDNN's cannot be traced on a machine without cuDNN. It would also keep XLA's L × M weights for the
    backward pass, as zeros.
    """
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = chosen if isinstance(chosen, jax.Device) else jax.devices(chosen)[0]
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx90a" of AMD
    return device.platform == "gpu" and capability.partition(".")[0].isdigit() and float(capability) >= 8.0


def fits(q: Array) -> bool:
    """Whether cuDNN takes such arrays: 16 bits, a head size divisible by 8, at most 128 (256 on Hopper, not used)."""
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def attention(q: Array, k: Array, v: Array, causal: bool = False) -> Array:
    """softmax(q kᵀ/√D) v of [B, L, H, D] without ever holding the L × M weights, unless forward mode is asked for.

    For arrays that fit (`fits`), `on_cuda` (Dao et al. 2022).
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


@attention.defjvp
def _derivative(causal: bool, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Array, Array]:
    out, back = _forward(*primals, causal)
    return out, _along(primals, tangents, back, causal)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _forward(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, Any]:
    """The answer, and cuDNN's way back from it."""
    return jax.vjp(functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn"), q, k, v)


@_forward.defjvp
def _second_derivative(causal: bool, primals: Sequence[Array], tangents: Sequence[Array]) -> tuple[Any, Any]:
    out, back = _forward(*primals, causal)
    # The way back serves `_tangent` alone, which is differentiated as XLA's attention.
    return (out, back), (_along(primals, tangents, back, causal), jax.tree.map(jnp.zeros_like, back))


def _along(primals: Sequence[Array], tangents: Sequence[Array], back: Any, causal: bool) -> Array:
    kept, structure = jax.tree.flatten(back)
    return _tangent.bind(*primals, *tangents, *kept, causal=causal, structure=structure)


_tangent = Primitive("flash_attention_tangent")
"""Arguments: q, k, v, their tangents, and what cuDNN's backward pass keeps."""


def _plain(*args: Array, causal: bool, structure: Any = None) -> Array:
    xla = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="xla")
    return jax.jvp(xla, args[:3], args[3:6])[1]


def _transposed(cotangent: Any, *args: Any, causal: bool, structure: Any) -> list[Any]:
    wanted = [ad.is_undefined_primal(a) for a in args]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(a.aval) if w else None for a, w in zip(args, wanted, strict=True)]
    gradients = jax.tree.unflatten(structure, args[6:])(cotangent)
    return [g if w else None for g, w in zip((None, None, None, *gradients, *args[6:]), wanted, strict=True)]


def _batched(args: Sequence[Array], axes: Sequence[int | None], *, causal: bool, structure: Any) -> tuple[Array, int]:
    return jax.vmap(functools.partial(_plain, causal=causal), axes[:6])(*args[:6]), 0


def _twice(primals: Sequence[Array], tangents: Sequence[Any], *, causal: bool, structure: Any) -> tuple[Array, Array]:
    along = [ad.instantiate_zeros(t) for t in tangents[:6]]
    return jax.jvp(functools.partial(_plain, causal=causal), tuple(primals[:6]), tuple(along))


_tangent.def_impl(_plain)
_tangent.def_abstract_eval(lambda q, *_, causal, structure: q)
mlir.register_lowering(_tangent, mlir.lower_fun(_plain, multiple_results=False))
ad.primitive_transposes[_tangent] = _transposed
ad.primitive_jvps[_tangent] = _twice
batching.primitive_batchers[_tangent] = _batched
