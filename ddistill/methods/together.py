"""Two methods for one student: their losses added."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from ddistill.methods.base import Loss, Made, Memory, Method
from ddistill.methods.sharing import derived
from ddistill.process import Process


@dataclass(frozen=True)
class Together:
    """L_main + weight · L_other for every network that both train, such as `Together(DMD(), KD(steps=(1,)), 0.25)`.

    How networks start, their update ratios, rates, averages and the sampler are the main method's; the other adds the
    networks, averages and memories that it lacks, whose losses stay as they are. Batches have what both need: where one
    brings teacher pairs, their x is the data of both. Three methods are a pair one of which is a pair.
    Raises ValueError for methods of several rounds, in different processes, or that both bring pairs.
    """

    main: Callable[[Process], Made]
    other: Callable[[Process], Made]
    weight: float = 1.0

    def __call__(self, process: Process) -> Method:
        """The method on a process."""
        main, other = self.main(process), self.other(process)
        if not isinstance(main, Method) or not isinstance(other, Method):
            raise ValueError("methods of several rounds cannot be added; add to the method of one of their rounds")
        if (main.process or process) != (other.process or process):
            raise ValueError(f"the methods live in different processes, {main.process} and {other.process}")
        if main.pairs and other.pairs and main.pairs != other.pairs:
            raise ValueError(f"both methods bring teacher pairs, {main.pairs} and {other.pairs}: make them the same")
        beside = {name: _beside(loss) for name, loss in other.losses.items()}
        losses = {**beside, **main.losses}
        losses |= {n: _sum(main.losses[n], beside[n], self.weight) for n in set(main.losses) & set(beside)}
        kept = {name: dataclasses.replace(m, update=_updated(m)) for name, m in other.memory.items()}
        return dataclasses.replace(
            main,
            losses=losses,
            init={**other.init, **main.init},
            every=_completed(main.every, other.every, main),
            rate=_completed(main.rate, other.rate, main),
            memory={**kept, **main.memory},
            ema={**other.ema, **main.ema},
            needs=main.needs | other.needs,
            pairs=main.pairs or other.pairs,
        )


def _completed(main: Mapping[str, Any], other: Mapping[str, Any], method: Method) -> dict[str, Any]:
    return {**{name: value for name, value in other.items() if name not in method.losses}, **main}


def _beside(loss: Loss) -> Loss:
    """The other method's loss, with random numbers of its own, which all of that method's losses share."""

    def of_other(nets, batch, progress, key):
        return loss(nets, batch, progress, derived(nets, key, lambda: jax.random.fold_in(key, 1)))

    return of_other


def _updated(memory: Memory) -> Callable[..., Any]:
    return lambda old, nets, batch, progress, key: memory.update(old, nets, batch, progress, jax.random.fold_in(key, 1))


def _sum(main: Loss, other: Loss, weight: float) -> Loss:
    def loss(nets, batch, progress, key):
        a, of_a = main(nets, batch, progress, key)
        b, of_b = other(nets, batch, progress, key)
        return a + weight * b, {**of_b, **of_a, "main": a, "other": b}

    return loss
