"""Two methods for one student: their losses added."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from ddistill.methods.base import Loss, Made, Method
from ddistill.methods.sharing import derived
from ddistill.process import Process


@dataclass(frozen=True)
class Together:
    """L_main + weight · L_other for every network that both train, such as `Together(DMD(), KD(steps=(1,)), 0.25)`.

    How networks start, their update ratios, rates, averages and the sampler are the main method's, and so is the
    process that both live in; the other adds the networks, averages and memories that it lacks, whose losses stay as
    they are. To a main method of several rounds it is added in the last one. Batches have what both need: where one
    brings teacher pairs, their x is the data of both. Three methods are a pair one of which is a pair.
    Raises ValueError for another method of several rounds or of a process of its own, and where both bring pairs.
    """

    main: Callable[[Process], Made]
    other: Callable[[Process], Made]
    weight: float = 1.0

    def __call__(self, process: Process) -> Made:
        """The method on a process."""
        made = self.main(process)
        if isinstance(made, Method):
            return self._added(made, made.process or process)
        *before, last = made
        return (*before, dataclasses.replace(last, method=self._added(last.method, last.method.process or process)))

    def _added(self, main: Method, process: Process) -> Method:
        other = self.other(process)
        if not isinstance(other, Method):
            raise ValueError("a method of several rounds cannot be added to another: make it the main one")
        if (other.process or process) != process:
            raise ValueError(f"the methods live in different processes, {process} and {other.process}: swap them")
        if main.pairs and other.pairs and main.pairs != other.pairs:
            raise ValueError(f"both methods bring teacher pairs, {main.pairs} and {other.pairs}: make them the same")
        main, other = _keyed(main, 0), _keyed(other, 1)
        losses = {**other.losses, **main.losses}
        losses |= {n: _sum(main.losses[n], other.losses[n], self.weight) for n in set(main.losses) & set(other.losses)}
        return dataclasses.replace(
            main,
            losses=losses,
            init={**other.init, **main.init},
            every=_completed(main.every, other.every, main),
            rate=_completed(main.rate, other.rate, main),
            memory={**other.memory, **main.memory},
            ema={**other.ema, **main.ema},
            needs=main.needs | other.needs,
            pairs=main.pairs or other.pairs,
        )


def _completed(main: Mapping[str, Any], other: Mapping[str, Any], method: Method) -> dict[str, Any]:
    return {**{name: value for name, value in other.items() if name not in method.losses}, **main}


def _keyed(method: Method, which: int) -> Method:
    """The method with random numbers of its own, the same for all its losses and memories."""

    def own(nets, key: Array) -> Array:
        return derived(nets, key, lambda: tuple(jax.random.split(key)))[which]

    def loss_of(loss: Loss) -> Loss:
        return lambda nets, batch, progress, key: loss(nets, batch, progress, own(nets, key))

    def update_of(update):
        return lambda old, nets, batch, progress, key: update(old, nets, batch, progress, own(nets, key))

    memory = {n: dataclasses.replace(m, update=update_of(m.update)) for n, m in method.memory.items()}
    return dataclasses.replace(method, losses={n: loss_of(f) for n, f in method.losses.items()}, memory=memory)


def _sum(main: Loss, other: Loss, weight: float) -> Loss:
    def loss(nets, batch, progress, key):
        a, of_a = main(nets, batch, progress, key)
        b, of_b = other(nets, batch, progress, key)
        return a + weight * b, {**of_b, **of_a, "main": a, "other": b}

    return loss
