"""The least that fully sharded data parallelism must send: each parameter gathered once per use, gradients summed once.

A use is a product; several products in one checkpoint, or in one pass of a loop over blocks, are one, since there the
parameter stays gathered (Rajbhandari et al. 2020, ZeRO-3). Parameters are followed through the jaxpr from the program's
arguments to there. Of branches that of the most bytes counts, of a loop without a known number of passes one pass; rows
that are looked up in a table are not counted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ddistill.plan.work import bodies, is_call

_PRODUCTS = ("dot_general", "conv_general_dilated")
_CHECKPOINTS = ("checkpoint", "remat", "remat2")
_SLICES = ("slice", "dynamic_slice", "squeeze", "split")

_Parts = frozenset[tuple[int, str]]
"""The numbers of the arguments that an array is made of, and which slices of them."""
_NONE: _Parts = frozenset()


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
    uses.follow(closed.jaxpr, [frozenset({(i, "")}) if n > 1 else _NONE for i, n in enumerate(parts)], 1.0, None)
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

    def follow(self, jaxpr: Jaxpr, given: Sequence[_Parts], times: float, body: int | None) -> list[_Parts]:
        """Where parameters go; body: the number of the checkpoint, or of the loop over blocks, that this is part of."""
        known: dict[Any, _Parts] = dict(zip(jaxpr.invars, given, strict=True))
        for equation in jaxpr.eqns:
            into = [_NONE if isinstance(v, Literal) else known.get(v, _NONE) for v in equation.invars]
            name = equation.primitive.name
            if not any(into):
                continue
            if name in _PRODUCTS:
                for v, which in zip(equation.invars, into, strict=True):
                    if which:
                        self._use(v.aval, which, times, body)
                continue
            if name == "scan":
                outs = self._scan(equation, into, times, body)
            elif name == "while":
                outs = self._while(equation, into, times, body)
            elif name == "cond":
                outs = self._cond(equation, into, times, body)
            elif is_call(equation):
                again = self._number() if name in _CHECKPOINTS else body
                outs = self.follow(bodies(equation)[0], into, times, again)
            elif bodies(equation):
                continue
            else:
                together = _NONE.union(*into)
                outs = [_part(v, i, equation, together) for i, v in enumerate(equation.outvars)]
            known.update(zip(equation.outvars, outs, strict=True))
        return [_NONE if isinstance(v, Literal) else known.get(v, _NONE) for v in jaxpr.outvars]

    def _scan(self, equation: Any, into: Sequence[_Parts], times: float, body: int | None) -> list[_Parts]:
        params = equation.params
        length, inner = params["length"], params["jaxpr"].jaxpr
        # What is carried from pass to pass are samples and sums of gradients, no parameters.
        fixed, carry = params["num_consts"], params["num_carry"]
        blocks = into[fixed + carry :]
        before = len(self.found)
        # A loop that has no block of its own in each pass, as an integrator's, may call a whole network several times.
        given = [*into[:fixed], *[_NONE] * carry, *blocks]
        outs = self.follow(inner, given, times * length, self._number() if any(blocks) else body)
        if len(self.found) > before and any(blocks):
            tokens = sum(_size(v.aval) for v in equation.invars[fixed : fixed + carry] if len(v.aval.shape) > 2)
            again = any(e.primitive.name in _CHECKPOINTS for e in inner.eqns)
            self.carried += times * length * tokens * (2 if again else 1)
        # What passes leave for the backward one may be parameters, cast.
        return [*[_NONE] * carry, *outs[carry:]]

    def _while(self, equation: Any, into: Sequence[_Parts], times: float, body: int | None) -> list[_Parts]:
        start = 0
        for part in ("cond", "body"):
            inner, end = equation.params[f"{part}_jaxpr"].jaxpr, start + equation.params[f"{part}_nconsts"]
            self.follow(inner, [*into[start:end], *[_NONE] * (len(inner.invars) - (end - start))], times, body)
            start = end
        return [_NONE] * len(equation.outvars)

    def _cond(self, equation: Any, into: Sequence[_Parts], times: float, body: int | None) -> list[_Parts]:
        before, carried = self.found, self.carried
        seen = []
        for branch in bodies(equation):
            self.found, self.carried = dict(before), carried
            outs = self.follow(branch, into[1:], times, body)
            seen.append((sum(self.found.values()), self.found, self.carried, outs))
        _, self.found, self.carried, _ = max(seen, key=lambda one: one[0])
        return [_NONE.union(*which) for which in zip(*(one[3] for one in seen), strict=True)]

    def _use(self, aval: Any, which: _Parts, times: float, body: int | None) -> None:
        key = self._number() if body is None else body, which
        self.found[key] = max(self.found.get(key, 0.0), _size(aval) * times)

    def _number(self) -> int:
        self.count += 1
        return self.count


def _size(aval: Any) -> float:
    return float(math.prod(aval.shape) * aval.dtype.itemsize)


def _part(v: Any, i: int, equation: Any, which: _Parts) -> _Parts:
    """What a result is made of where it is parameters in another form, or changed: as large as they, or a slice."""
    largest = max(getattr(operand.aval, "size", 0) for operand in equation.invars)
    if v.aval.size == largest:
        return which
    if equation.primitive.name in _SLICES:
        return frozenset((n, f"{slices} {i} {equation.params}") for n, slices in which)
    return _NONE
