"""What a program computes, counted from its jaxpr: exact, and the same for every compiler and device.

Products of matrices and convolutions are counted, two operations for each multiply-add, at every pass of a loop; what
no output needs is not. XLA's own count sees a loop's body once.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

BFLOAT16, FLOAT32, HIGHEST = "bfloat16", "float32", "highest"
"""How a product is multiplied: operands of 16 bits, of 32 at the default precision, of 32 at a higher one."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations by the kind of product, and the bytes that products read and write.

    bytes: operands and results at their own sizes, as where everything between two products is fused into them. flash:
    the same where attention never writes its weights. unknown: loops whose number of passes the program decides as it
    runs; their bodies are counted once.
    """

    kinds: Mapping[str, float] = field(default_factory=dict)
    bytes: float = 0.0
    flash: float = 0.0
    unknown: int = 0

    @property
    def flops(self) -> float:
        """All operations."""
        return sum(self.kinds.values())

    def __add__(self, other: "Work") -> "Work":
        kinds = {k: self.kinds.get(k, 0) + other.kinds.get(k, 0) for k in {*self.kinds, *other.kinds}}
        return Work(kinds, self.bytes + other.bytes, self.flash + other.flash, self.unknown + other.unknown)

    def times(self, n: float) -> "Work":
        """The work of n such programs."""
        return Work({k: v * n for k, v in self.kinds.items()}, self.bytes * n, self.flash * n, self.unknown)


def work_of(function: Callable, *args: Any, **kwargs: Any) -> Work:
    """The work of function(*args), of arrays or their shapes."""
    return count(jax.make_jaxpr(function)(*args, **kwargs))


def count(closed: ClosedJaxpr) -> Work:
    """The work of a program that all of whose outputs are wanted."""
    return _count(closed.jaxpr, (True,) * len(closed.jaxpr.outvars), {})[0]


def bodies(equation: Any) -> list[Jaxpr]:
    """The programs inside an equation: a loop's body, a function's, the branches of a condition."""
    found: list[Jaxpr] = []
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(part, "jaxpr", part)
            if isinstance(inner, Jaxpr):
                found.append(inner)
    return found


def is_call(equation: Any) -> bool:
    """Whether an equation runs one program on its own operands: a jitted or checkpointed function and their like."""
    inside = bodies(equation)
    return (
        equation.primitive.name not in ("scan", "while", "cond", "shard_map", "pallas_call")
        and len(inside) > 0
        and len(inside[0].invars) == len(equation.invars)
        and len(inside[0].outvars) == len(equation.outvars)
    )


Wanted = tuple[bool, ...]


def _count(jaxpr: Jaxpr, wanted: Wanted, seen: dict[Any, Any]) -> tuple[Work, Wanted]:
    """The work of the wanted outputs, and which inputs they need."""
    if (id(jaxpr), wanted) in seen:
        return seen[id(jaxpr), wanted]
    needed = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, Literal)}
    total = Work()
    for equation in reversed(jaxpr.eqns):
        outs = tuple(v in needed for v in equation.outvars)
        if not any(outs) and not equation.effects:
            continue
        work, ins = _equation(equation, outs, seen)
        total += work
        needed |= {v for v, n in zip(equation.invars, ins, strict=True) if n and not isinstance(v, Literal)}
    seen[id(jaxpr), wanted] = total, tuple(v in needed for v in jaxpr.invars)
    return seen[id(jaxpr), wanted]


def _equation(equation: Any, outs: Wanted, seen: dict[Any, Any]) -> tuple[Work, Wanted]:
    every = (True,) * len(equation.invars)
    name = equation.primitive.name
    if name == "dot_general":
        return _dot(equation), every
    if name == "conv_general_dilated":
        return _convolution(equation), every
    if name == "scan":
        return _scan(equation, outs, seen)
    inside = bodies(equation)
    if not inside:
        return Work(), every
    if is_call(equation):
        return _count(inside[0], outs, seen)
    works = [_count(body, (True,) * len(body.outvars), seen)[0] for body in inside]
    if name == "cond":
        return max(works, key=lambda work: work.flops), every
    total = sum(works, Work())
    if name == "while":
        return Work(total.kinds, total.bytes, total.flash, total.unknown + (total.flops > 0)), every
    if name == "shard_map":  # a program on each device's part
        manual = equation.params.get("manual_axes", equation.params["mesh"].axis_names)
        total = total.times(math.prod(equation.params["mesh"].shape[axis] for axis in manual))
    if name == "pallas_call":
        total = total.times(math.prod(equation.params["grid_mapping"].grid))
    return total, every


def _scan(equation: Any, outs: Wanted, seen: dict[Any, Any]) -> tuple[Work, Wanted]:
    params = equation.params
    consts, carry, body = params["num_consts"], params["num_carry"], params["jaxpr"].jaxpr
    wanted = outs
    while True:  # what the next pass needs of the carry, this one must make
        work, ins = _count(body, wanted, seen)
        after = tuple(w or (i < carry and ins[consts + i]) for i, w in enumerate(wanted))
        if after == wanted:
            return work.times(params["length"]), ins
        wanted = after


def _dot(equation: Any) -> Work:
    (a, b), out = equation.invars, equation.outvars[0]
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    flops = 2.0 * math.prod(out.aval.shape) * math.prod(a.aval.shape[i] for i in contracted)
    sizes = [_bytes(v.aval) for v in (a, b, out)]
    # Products of heads: the largest of the three arrays is attention's weights, if it is no operand of a linear map.
    kept = sum(sizes) - (max(sizes) if len(batch) > 1 else 0)
    return Work({_kind(equation): flops}, sum(sizes), kept)


def _convolution(equation: Any) -> Work:
    params, (x, kernel), out = equation.params, equation.invars, equation.outvars[0]
    numbers = params["dimension_numbers"]
    groups = params["feature_group_count"] * params["batch_group_count"]
    batch = x.aval.shape[numbers.lhs_spec[0]]
    channels = x.aval.shape[numbers.lhs_spec[1]]
    features = kernel.aval.shape[numbers.rhs_spec[0]]
    places = 1
    for i in range(len(params["window_strides"])):
        places *= _meetings(
            x.aval.shape[numbers.lhs_spec[2 + i]], kernel.aval.shape[numbers.rhs_spec[2 + i]],
            out.aval.shape[numbers.out_spec[2 + i]], params["window_strides"][i], params["padding"][i][0],
            params["lhs_dilation"][i], params["rhs_dilation"][i],
        )  # fmt: skip
    flops = 2.0 * batch * channels * features * places / groups
    size = float(sum(_bytes(v.aval) for v in (x, kernel, out)))
    return Work({_kind(equation): flops}, size, size)


def _meetings(size: int, taps: int, out: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How often a tap of the kernel lies on an entry of the input, along one axis: not on padding, nor in between."""
    at = np.arange(out)[:, None] * stride + np.arange(taps)[None, :] * dilation - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0)))


def _kind(equation: Any) -> str:
    if all(v.aval.dtype.itemsize <= 2 for v in equation.invars):
        return BFLOAT16
    precision = equation.params["precision"]
    asked = precision if isinstance(precision, Sequence) else (precision,)
    high = (jax.lax.Precision.HIGH, jax.lax.Precision.HIGHEST)
    return HIGHEST if any(p in high for p in asked) else FLOAT32


def _bytes(aval: Any) -> float:
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def equations(jaxpr: Jaxpr, times: float = 1.0) -> Iterator[tuple[Any, float]]:
    """Every equation that holds no others, with the number of times that it runs."""
    for equation in jaxpr.eqns:
        inside = bodies(equation)
        if not inside:
            yield equation, times
        for body in inside:
            yield from equations(body, times * equation.params.get("length", 1))
