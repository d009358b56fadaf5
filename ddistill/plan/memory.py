"""What a program holds beside its arguments at its peak, estimated from its jaxpr in the order in which it is written.

A compiler fuses what is computed element by element into what reads it, and may reorder; here the first is modelled,
the second is not. The estimate is for choosing what to compile, and for devices whose compiler is not at hand.
"""

import math
from collections.abc import Mapping
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ddistill.plan.work import bodies, is_call

_STORED = {
    "dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "gather", "scatter", "scatter-add",
    "concatenate", "dynamic_update_slice", "reduce_window_sum", "select_and_scatter_add", "cumsum", "argmax", "argmin",
    "custom_call", "linear_call", "shard_map", "pallas_call",
}  # fmt: skip
"""What writes its result to memory, besides functions and reductions; all else is fused into what reads it."""

Shape = tuple[int, ...]


def peak(closed: ClosedJaxpr, split: Mapping[Shape, float], *, flash: bool = False) -> float:
    """Bytes at the peak, beside the program's arguments and the results that take their place.

    split: the shapes of arrays that lie in parts, as gradients do, and into how many; inside a loop's body they are
    whole. flash: attention never writes its weights.
    """
    done = {v for v in closed.jaxpr.outvars if not isinstance(v, Literal)}
    return _Peak(split, flash).of(closed.jaxpr, outer=True, aliased=done)


class _Peak:
    def __init__(self, split: Mapping[Shape, float], flash: bool):
        self.split, self.flash = split, flash
        self.seen: dict[Any, float] = {}

    def of(self, jaxpr: Jaxpr, *, outer: bool, aliased: set[Any] = frozenset()) -> float:  # type: ignore[assignment]
        if (id(jaxpr), outer) in self.seen:
            return self.seen[id(jaxpr), outer]
        users: dict[Any, list[Any]] = {}
        for equation in jaxpr.eqns:
            for v in equation.invars:
                if not isinstance(v, Literal):
                    users.setdefault(v, []).append(equation)
        outs = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
        weights = self._weights(jaxpr)
        roots: dict[Any, frozenset[Any]] = {}
        last: dict[Any, int] = {}
        stored: list[list[Any]] = []
        for i, equation in enumerate(jaxpr.eqns):
            above = frozenset().union(
                *(roots.get(v, frozenset()) for v in equation.invars if not isinstance(v, Literal))
            )
            real = _stores(equation)
            kept = []
            for v in equation.outvars:
                if real or v in outs or any(_stores(user) and not _reduces(user) for user in users.get(v, [])):
                    roots[v] = frozenset({v})
                    kept.append(v)
                else:
                    roots[v] = above
            if real or kept:
                for v in above:
                    last[v] = i
            stored.append(kept)
        for v in outs:
            for root in roots.get(v, ()):
                last[root] = len(jaxpr.eqns)
        ends: dict[int, list[Any]] = {}
        for v, i in last.items():
            ends.setdefault(i, []).append(v)
        live, most, sizes = 0.0, 0.0, dict[Any, float]()
        for i, equation in enumerate(jaxpr.eqns):
            inside = self._inside(equation, outer)
            for v in stored[i]:
                sizes[v] = 0.0 if v in aliased or v in weights else self._size(v, outer)
                live += sizes[v] if v in last else 0.0
            own = sum(sizes[v] for v in stored[i]) if _flat(equation) else 0.0
            most = max(most, live + max(0.0, inside - own))
            live -= sum(sizes.get(v, 0.0) for v in ends.get(i, []))
        self.seen[id(jaxpr), outer] = most
        return most

    def _inside(self, equation: Any, outer: bool) -> float:
        inside = bodies(equation)
        if not inside or equation.primitive.name == "linear_call":
            return 0.0
        return max(self.of(body, outer=outer and _flat(equation)) for body in inside)

    def _size(self, v: Any, outer: bool) -> float:
        size = math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 4)
        return size / self.split.get(tuple(v.aval.shape), 1.0) if outer else size

    def _weights(self, jaxpr: Jaxpr) -> set[Any]:
        """Attention's weights and what they are made of: the largest array of each product of heads."""
        if not self.flash:
            return set()
        found = set()
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general" and len(equation.params["dimension_numbers"][1][0]) > 1:
                arrays: list[Any] = [v for v in (*equation.invars, *equation.outvars) if not isinstance(v, Literal)]
                found.add(max(arrays, key=lambda v: math.prod(v.aval.shape)))
        return found


def _stores(equation: Any) -> bool:
    name = equation.primitive.name
    return name in _STORED or _reduces(equation) or is_call(equation)


def _flat(equation: Any) -> bool:
    """Whether what is inside an equation is as if it were written out."""
    return is_call(equation) or equation.primitive.name == "cond"


def _reduces(equation: Any) -> bool:
    return equation.primitive.name.startswith("reduce_") and equation.primitive.name != "reduce_precision"
