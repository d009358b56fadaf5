"""What a method is: losses, initial networks, update ratios and averages; no training loop."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jax import Array

from ddistill.net import Net

Batch = Mapping[str, Any]
Metrics = Mapping[str, Array]
Loss = Callable[[Mapping[str, Net], Batch, Array, Array], tuple[Array, Metrics]]
"""loss(nets, batch, step, key) -> (scalar, metrics); differentiated with respect to the network it is named after."""


@dataclass(frozen=True)
class Sampling:
    """How a method's student is sampled: times for a number of steps, from the noise to the data, and γ."""

    times: Callable[[int], Any]
    gamma: float = 0.0


@dataclass(frozen=True)
class Pairs:
    """Teacher pairs (noise, x) to be made before training: how many, and how finely the teacher integrates."""

    count: int
    steps: int


@dataclass(frozen=True)
class Method:
    """A distillation method as data.

    losses: one for each trained network. init: how each trained network starts, from the teacher and a key. every: a
    network is updated at the steps that its number divides. ema: averages as name -> (network, decay), visible to the
    losses under their name. needs: the batch entries it reads, of {"x", "noise"}; cond is always welcome. result: the
    network or average that samples. sampling: how. pairs: teacher pairs that supply noise and x.
    """

    losses: Mapping[str, Loss]
    init: Mapping[str, Callable[[Net, Array], Net]]
    sampling: Sampling
    every: Mapping[str, int] = field(default_factory=dict)
    ema: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    result: str = "student"
    pairs: Pairs | None = None

    def __post_init__(self):
        if set(self.losses) != set(self.init):
            raise ValueError(f"losses name {sorted(self.losses)} but init names {sorted(self.init)}: they must agree")
        for name, (source, decay) in self.ema.items():
            if source not in self.losses or name in self.losses or not 0 <= decay < 1:
                raise ValueError(
                    f"ema {name!r} = ({source!r}, {decay}) must average one of {sorted(self.losses)} under another "
                    "name, with a decay in [0, 1)"
                )
        unknown = set(self.every) - set(self.losses)
        if unknown or any(n < 1 for n in self.every.values()):
            trained = sorted(self.losses)
            raise ValueError(f"every = {dict(self.every)} must give trained networks {trained} numbers >= 1")
        if self.result not in {*self.losses, *self.ema}:
            raise ValueError(f"result {self.result!r} is neither a trained network nor an average")

    def turn(self, step: int) -> tuple[str, ...]:
        """Names of the networks that step updates."""
        return tuple(name for name in sorted(self.losses) if step % self.every.get(name, 1) == 0)


def from_teacher(teacher: Net, key: Array) -> Net:
    """Start a network as a copy of the teacher."""
    del key
    return teacher
