"""What a method is: losses, initial networks, update ratios and averages; no training loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from ddistill.integrators import dpmpp_3m
from ddistill.net import Net
from ddistill.process import Process

Batch = Mapping[str, Any]
Metrics = Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """Where training is: step number `step` of the `steps` of round number `round`. Traced, so that none recompiles."""

    step: Array | int
    steps: Array | int = 1
    round: Array | int = 0

    @property
    def share(self) -> Array:
        """The share of the round that is done, in [0, 1)."""
        return jnp.asarray(self.step, jnp.float32) / self.steps


Decay = float | Callable[[Progress], Array]
"""How much of an average stays at a step; a number in [0, 1), or one that depends on the progress."""


Loss = Callable[[Mapping[str, Net], Batch, Progress, Array], tuple[Array, Metrics]]
"""loss(nets, batch, progress, key) -> (scalar, metrics), differentiated by the network it is named after."""


@dataclass(frozen=True)
class Sampling:
    """How a method's student is sampled: times for a number of steps, from the noise to the data, and γ.

    guidance: the scale that a student which embeds it is sampled with by default (its cond is then `net.Scaled`).
    """

    times: Callable[[int], Any]
    gamma: float = 0.0
    guidance: float | None = None


@dataclass(frozen=True)
class Pairs:
    """Teacher pairs (noise, x) to be made before training: how many, with which integrator and how many steps.

    points: with n > 0 the batch also holds `path` [B, n + 1, ...], the trajectory at the n + 1 nodes of Karras' grid of
    n intervals, from the noise to the data; steps are rounded up so that these are among the integrator's nodes.
    inverted: the share of each batch whose x is data and whose noise is where the integrator takes it (rf++). count = 0
    makes the pairs of a batch when it is needed, for the conditions of a batch of data, prompts too, and keeps none.
    Raises ValueError for a share outside [0, 1], for one together with points, and for either where count is 0.
    """

    count: int
    steps: int
    integrator: Callable = dpmpp_3m
    points: int = 0
    inverted: float = 0.0

    def __post_init__(self):
        if not 0 <= self.inverted <= 1 or (self.inverted and self.points):
            raise ValueError(f"inverted = {self.inverted} is a share of pairs without path; points = {self.points}")
        if not self.count and (self.inverted or self.points):
            raise ValueError("pairs made batch by batch (count = 0) have no path and none that are inverted")


@dataclass(frozen=True)
class Space:
    """What samples are: shape, number of classes; null is the condition that means none where it is no label."""

    shape: tuple[int, ...] = ()
    num_classes: int = 0
    null: Any = None


UNKNOWN = Space()

Init = Callable[[Net, Array, Space], Net]
"""init(teacher, key, space) -> a network before its training."""


@dataclass(frozen=True)
class Memory:
    """Arrays that training carries from step to step, such as a queue of samples; losses find them in their batch.

    init: (nets, space) -> pytree before the first step. update: (pytree, nets, batch, progress, key) -> pytree after
    each step, with the nets, batch and key that the step's losses saw, of accumulated steps the whole batch and a key
    of its own.
    """

    init: Callable[[Mapping[str, Net], Space], Any]
    update: Callable[[Any, Mapping[str, Net], Batch, Progress, Array], Any]


@dataclass(frozen=True)
class Method:
    """A distillation method as data.

    losses: one for each trained network. init: how each trained network starts. every: a network is updated at the
    steps that its number divides. rate: learning rates as multiples of the optimiser's. memory: what training carries
    along, as batch entries of these names. ema: averages as name -> (network, decay), visible to the
    losses under their name. needs: the batch entries it reads, of {"x", "noise", "path"}; cond is always welcome.
    result: the network or average that samples. inverse: one that jumps from the data to the noise; the result is then
    both in one (`net.two_way`). sampling: how. pairs: teacher pairs that supply noise, x and path. process: where the
    student lives if not where its teacher does; the losses see the teacher there. finish: what is done to the trained
    result, such as merging an adapter into it.
    """

    losses: Mapping[str, Loss]
    init: Mapping[str, Init]
    sampling: Sampling
    every: Mapping[str, int] = field(default_factory=dict)
    rate: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, Memory] = field(default_factory=dict)
    ema: Mapping[str, tuple[str, Decay]] = field(default_factory=dict)
    needs: frozenset[str] = frozenset()
    result: str = "student"
    inverse: str | None = None
    pairs: Pairs | None = None
    process: Process | None = None
    finish: Callable[[Net], Net] = lambda net: net

    def __post_init__(self):
        if set(self.losses) != set(self.init):
            raise ValueError(f"losses name {sorted(self.losses)} but init names {sorted(self.init)}: they must agree")
        for name, (source, decay) in self.ema.items():
            if source not in self.losses or name in self.losses or not (callable(decay) or 0 <= decay < 1):
                raise ValueError(
                    f"ema {name!r} = ({source!r}, {decay}) must average one of {sorted(self.losses)} under another "
                    "name, with a decay in [0, 1)"
                )
        unknown = set(self.every) - set(self.losses)
        if unknown or any(n < 1 for n in self.every.values()):
            trained = sorted(self.losses)
            raise ValueError(f"every = {dict(self.every)} must give trained networks {trained} numbers >= 1")
        if set(self.rate) - set(self.losses) or any(r <= 0 for r in self.rate.values()):
            raise ValueError(f"rate = {dict(self.rate)} must give trained networks {sorted(self.losses)} numbers > 0")
        for which in (self.result, self.inverse):
            if which is not None and which not in {*self.losses, *self.ema}:
                raise ValueError(f"result {which!r} is neither a trained network nor an average")

    def turn(self, step: int) -> tuple[str, ...]:
        """Names of the networks that step updates."""
        return tuple(name for name in sorted(self.losses) if step % self.every.get(name, 1) == 0)


@dataclass(frozen=True)
class Round:
    """One of several trainings that make up a method; its result is the teacher of the next.

    name: unique among the rounds. share: of the method's steps, relative to the others'. number: what the losses see as
    `progress.round`. Rounds with the same `method` object and share are compiled once.
    """

    name: str
    method: Method
    share: float = 1.0
    number: int = 0


Made = Method | Sequence[Round]
"""What a method's configuration gives on a process."""


def rounds(made: Made) -> tuple[Round, ...]:
    """The rounds of a method; a single Method is one round."""
    return (Round("student", made),) if isinstance(made, Method) else tuple(made)


def home(made: Made, process: Process) -> Process:
    """Where the final student lives, given the first teacher's process."""
    for part in rounds(made):
        process = part.method.process or process
    return process


def sampling_of(made: Made) -> Sampling:
    """How the final student is sampled."""
    return rounds(made)[-1].method.sampling


def split_steps(parts: Sequence[Round], steps: int) -> list[int]:
    """Share a number of training steps out among rounds, each at least one."""
    total = sum(part.share for part in parts)
    return [max(1, round(steps * part.share / total)) for part in parts]


def from_teacher(teacher: Net, key: Array, space: Space) -> Net:
    """Start a network as a copy of the teacher."""
    del key, space
    return teacher
