"""The best way to lay an experiment on a pod: every candidate counted, and only the best of them compiled."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddistill.config import Experiment
from ddistill.plan.analysis import Analysed, analysed, fixed_of, traced_once, uses_tensor
from ddistill.plan.changes import changed
from ddistill.plan.chips import GIB, Pod
from ddistill.plan.programs import SAMPLER
from ddistill.plan.roofline import average, roofline

FSDP = (1, 2, 4, 8, 16, 32)
"""Parts of more are below the tiles of a TPU's memory for widths as common as 1152; the compiler then sums in place of
gathering."""
TENSOR = (1, 2, 4)
"""The chips of one host are four or more, and those that work on the same samples must be one host's."""
REMAT = (False, "dots", True)
"""Of an imported network's blocks the backward pass computes nothing anew, all but products by weights, or all."""


@dataclass(frozen=True)
class Candidate:
    """A layout: fields of the experiment, and remat, to be set; what it is estimated to take.

    seconds: of an average step, at the least; serial: where nothing overlaps. memory: bytes on each chip, of the
    largest program.
    """

    changes: Mapping[str, Any]
    batch_size: int
    seconds: float
    serial: float
    memory: float

    @property
    def per_image(self) -> float:
        """Seconds of the pod for each image."""
        return self.seconds / self.batch_size


def candidates(experiment: Experiment, pod: Pod, *, most: int = 64, keep_batch: bool = False) -> list[Candidate]:
    """The layouts that the estimate says fit, the fastest for each image first.

    most: samples on a chip. keep_batch: the batch is the experiment's, whatever the layout. Batches of more than 8
    times the experiment's are not looked at, since another batch is another training; of layouts within one per cent
    of each other those nearest to its batch come first, then those without tensor parallelism, then the smaller. Raises
    ValueError, with the least memory that was found, where none fits.
    """
    remats: tuple[Any, ...] = REMAT if hasattr(experiment.network, "remat") else (None,)
    seen = {remat: _Sizes(changed(experiment, {} if remat is None else {"remat": remat})) for remat in remats}
    tensors = TENSOR if uses_tensor(seen[remats[0]].some.built) else (1,)
    found, least = [], float("inf")
    for changes, samples in _layouts(experiment, pod, most, keep_batch, remats, tensors):
        rows = seen[changes.get("remat")].rows(changed(experiment, changes), pod, samples)
        memory = max(row.memory for row in rows)
        least = min(least, memory)
        if memory <= pod.chip.usable:
            found.append(Candidate(changes, changes["batch_size"], *_seconds(rows, pod), memory))
    if not found:
        what = " that splits the batch" if least == float("inf") else f": the least is {least / GIB:.1f} GiB"
        raise ValueError(
            f"{experiment.name} has no layout on {pod.topology}{what}; {pod.chip.name} gives a program "
            f"{pod.chip.usable / GIB:.2f} GiB. Take more chips, larger ones, or a smaller network"
        )
    best = min(c.per_image for c in found)

    def order(c: Candidate) -> tuple[float, ...]:
        far = abs(math.log(c.batch_size / experiment.batch_size))
        return (
            round(c.per_image / best, 2),
            far,
            c.changes["tensor"],
            round(c.serial / c.batch_size / best, 1),
            c.memory,
        )

    return sorted(found, key=order)


def neighbours(chosen: Candidate, among: list[Candidate]) -> list[Candidate]:
    """Candidates that differ from one in a single setting, by one step of it."""
    return [c for c in among if c != chosen and sum(_far(c, chosen, name) for name in chosen.changes) == 1]


def _far(a: Candidate, b: Candidate, name: str) -> int:
    x, y = a.changes[name], b.changes[name]
    if x == y:
        return 0
    if name == "remat":
        return abs(REMAT.index(x) - REMAT.index(y))
    return 1 if max(x, y) <= 2 * min(x, y) else 2


class _Sizes:
    """An experiment traced with 1, 32 and 64 times the fewest samples; others lie on the line through the last two.

    At the peak as much is held as that line says, or as with the fewest samples where that is more: there optimisers
    are at work.
    """

    def __init__(self, experiment: Experiment):
        self.unit = experiment.accumulate
        self.few, self.some, self.more = (traced_once(experiment, n * self.unit) for n in (1, 32, 64))
        fixed = fixed_of(self.some, self.more)
        self.some, self.more = (dataclasses.replace(t, fixed=fixed) for t in (self.some, self.more))
        self.known: dict[Any, Any] = {}

    def rows(self, experiment: Experiment, pod: Pod, samples: int) -> list[Analysed]:
        """The programs of a layout with so many samples on a chip."""
        layout = experiment.fsdp, experiment.tensor
        if layout not in self.known:
            flash = pod.chip.kind == "gpu"
            self.known[layout] = [
                analysed(experiment, pod.chips, t, flash=flash) for t in (self.few, self.some, self.more)
            ]
        place = (samples / self.unit - 32) / 32
        return [_between(few, some, more, place) for few, some, more in zip(*self.known[layout], strict=True)]


def _between(few: Analysed, some: Analysed, more: Analysed, place: float) -> Analysed:
    def line(a: float, b: float) -> float:
        return a + (b - a) * place

    return dataclasses.replace(
        some,
        work=some.work + (more.work + some.work.times(-1)).times(place),
        temporaries=max(few.temporaries, line(some.temporaries, more.temporaries)),
        traffic=line(some.traffic, more.traffic),
        least=dataclasses.replace(some.least, received=line(some.least.received, more.least.received)),
    )


def _layouts(
    experiment: Experiment,
    pod: Pod,
    most: int,
    keep: bool,
    remats: tuple[Any, ...],
    tensors: tuple[int, ...],
) -> Iterator[tuple[dict[str, Any], int]]:
    for tensor, fsdp in itertools.product(tensors, FSDP):
        if pod.chips % (fsdp * tensor):
            continue
        parts = pod.chips // tensor
        for samples, remat in itertools.product(_samples(experiment, parts, most, keep), remats):
            changes: dict[str, Any] = {"batch_size": samples * parts, "fsdp": fsdp, "tensor": tensor}
            if remat is not None:
                changes["remat"] = remat
            if samples % experiment.accumulate == 0:
                yield changes, samples


def _samples(experiment: Experiment, parts: int, most: int, keep: bool) -> list[int]:
    """How many samples a part may get."""
    if keep:
        return [experiment.batch_size // parts] if experiment.batch_size % parts == 0 else []
    sizes = [2**k for k in range(most.bit_length()) if 2**k <= most]
    own = [experiment.batch_size // parts] if experiment.batch_size % parts == 0 else []
    limit = max(8 * experiment.batch_size, parts)
    return sorted({n for n in (*sizes, *own) if n and n * parts <= limit})


def _seconds(rows: list[Analysed], pod: Pod) -> tuple[float, float]:
    """Of an average step: at the least, and where nothing overlaps."""
    times = [
        (row, roofline(pod.chip, row.work.kinds, row.traffic, row.least.received))
        for row in rows if row.stage != SAMPLER
    ]  # fmt: skip
    return average((row, time.seconds) for row, time in times), average((row, time.serial) for row, time in times)
