"""The least that fully sharded data parallelism must send: each parameter gathered once per use, gradients summed once.

A use is a product, or a loop's or a checkpoint's body that has several: there the parameter is gathered once
(Rajbhandari et al. 2020, ZeRO-3). Parameters are followed through the jaxpr from the program's arguments to there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ddistill.plan.work import bodies, is_call

_PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True)
class Least:
    """Bytes of whole arrays that are gathered and summed, and what each chip receives of them at the least."""

    gathered: float = 0.0
    summed: float = 0.0
    received: float = 0.0


def least(
    closed: ClosedJaxpr, parts: Sequence[int], gradients: Sequence[int], *, data: int, fsdp: int, tensor: int = 1
) -> Least:
    """The least of a program.

    parts: into how many parts each argument lies, 1 where it is whole on each device. gradients: the numbers of the
    arguments that are updated. data, fsdp, tensor: the mesh. With tensor > 1 what is received has an estimate of the
    sums of activations added, two in each pass of a loop over split blocks (Shoeybi et al. 2019, fig. 4) and as many
    where a checkpoint computes it again.
    """
    uses = _Uses()
    uses.follow(closed.jaxpr, [frozenset({i}) if n > 1 else frozenset() for i, n in enumerate(parts)], 1.0, None)
    gathered = sum(uses.found.values())
    received = gathered / tensor * (fsdp - 1) / fsdp + 2 * uses.carried * 2 * (tensor - 1) / tensor
    summed = 0.0
    for i in gradients:
        aval = closed.in_avals[i]
        size = _size(aval)
        summed += size
        if parts[i] > 1:
            received += (size * (fsdp - 1) / fsdp + 2 * size / fsdp * (data - 1) / data) / tensor
        else:
            received += 2 * size * (fsdp * data - 1) / (fsdp * data)
    return Least(gathered, summed, received)


class _Uses:
    def __init__(self) -> None:
        self.found: dict[Any, float] = {}
        self.carried = 0.0
        self.count = 0

    def follow(
        self, jaxpr: Jaxpr, given: Sequence[frozenset[int]], times: float, body: int | None
    ) -> list[frozenset[int]]:
        """Where parameters go; body: the number of the loop's body or checkpoint that this is part of."""
        known: dict[Any, frozenset[int]] = dict(zip(jaxpr.invars, given, strict=True))
        for equation in jaxpr.eqns:
            into = [frozenset() if isinstance(v, Literal) else known.get(v, frozenset()) for v in equation.invars]
            name = equation.primitive.name
            if not any(into):
                continue
            if name in _PRODUCTS:
                for v, which in zip(equation.invars, into, strict=True):
                    if which:
                        self._use(v.aval, which, times, body)
                continue
            if name == "scan":
                outs = self._scan(equation, into, times)
            elif is_call(equation):
                again = self._number() if name in ("checkpoint", "remat", "remat2") else body
                outs = self.follow(bodies(equation)[0], into, times, again)
            elif bodies(equation):
                continue
            else:
                together = frozenset().union(*into)
                outs = [together if _whole(v, equation) else frozenset() for v in equation.outvars]
            known.update(zip(equation.outvars, outs, strict=True))
        return [frozenset() if isinstance(v, Literal) else known.get(v, frozenset()) for v in jaxpr.outvars]

    def _scan(self, equation: Any, into: Sequence[frozenset[int]], times: float) -> list[frozenset[int]]:
        params = equation.params
        length, inner = params["length"], params["jaxpr"].jaxpr
        # What is carried from pass to pass are samples and sums of gradients, no parameters.
        fixed, carry = params["num_consts"], params["num_carry"]
        given = [frozenset() if fixed <= i < fixed + carry else which for i, which in enumerate(into)]
        before = len(self.found)
        self.follow(inner, given, times * length, self._number())
        if len(self.found) > before and sum(len(which) for which in into[fixed + carry :]) > 0:
            tokens = sum(_size(v.aval) for v in equation.invars[fixed : fixed + carry] if len(v.aval.shape) > 2)
            again = any(e.primitive.name in ("checkpoint", "remat", "remat2") for e in inner.eqns)
            self.carried += times * length * tokens * (2 if again else 1)
        return [frozenset()] * len(equation.outvars)

    def _use(self, aval: Any, which: frozenset[int], times: float, body: int | None) -> None:
        key = (self._number() if body is None else body, which, aval.size)
        size = _size(aval) * times
        self.found[key] = max(self.found.get(key, 0.0), size)

    def _number(self) -> int:
        self.count += 1
        return self.count


def _size(aval: Any) -> float:
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def _whole(v: Any, equation: Any) -> bool:
    """Whether a result has as many entries as the largest operand: a parameter in another form, or changed."""
    sizes = [getattr(operand.aval, "size", 0) for operand in equation.invars]
    name = equation.primitive.name
    return v.aval.size == max(sizes, default=0) or name in ("slice", "dynamic_slice", "squeeze", "split")
