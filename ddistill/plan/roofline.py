"""How long a step takes at the least: the slowest of what a chip multiplies, moves to and from memory, and receives.

Williams et al. 2009, with the links between chips as a third roof. Nothing runs at its published peak: times are lower
bounds, and all that is derived from them (utilisation an upper one, cost a lower one).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ddistill.plan.analysis import Analysed
from ddistill.plan.chips import Chip
from ddistill.plan.work import BFLOAT16, FLOAT32, HIGHEST

MATRIX, MEMORY, LINKS = "matrix units", "memory", "interconnect"


@dataclass(frozen=True)
class Roofline:
    """Seconds that each resource is busy at its peak."""

    matrix: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The least that a step takes, with all three at once."""
        return max(self.matrix, self.memory, self.links)

    @property
    def serial(self) -> float:
        """What it takes at these rates if nothing overlaps."""
        return self.matrix + self.memory + self.links

    @property
    def bound(self) -> str:
        """The resource that the step waits for."""
        times = {MATRIX: self.matrix, MEMORY: self.memory, LINKS: self.links}
        return max(times, key=lambda name: times[name])


def roofline(chip: Chip, kinds: Mapping[str, float], traffic: float, received: float) -> Roofline:
    """The roofline of one chip: operations by the kind of product, bytes to and from memory, bytes received."""
    rates = {BFLOAT16: chip.flops, FLOAT32: chip.tf32, HIGHEST: chip.highest}
    matrix = sum(flops / rates[kind] for kind, flops in kinds.items())
    return Roofline(matrix, traffic / chip.bandwidth, received / chip.links)


def per_million(seconds: float, images: int, chips: int, price: float) -> float:
    """What a million images cost where `images` take so many seconds on so many chips of a price per hour."""
    return 1e6 * seconds * chips * price / 3600 / images


def average(times: Iterable[tuple[Analysed, float]]) -> float:
    """Seconds of a step, from those of each program, as often as it runs."""
    rows = [(row.steps * row.share, seconds) for row, seconds in times]
    return sum(n * seconds for n, seconds in rows) / sum(n for n, _ in rows)
