"""The table of methods, name -> method."""

from collections.abc import Callable
from dataclasses import dataclass

from ddistill.methods.base import Made, Method, Round
from ddistill.methods.consistency import Consistency
from ddistill.methods.denoising import Denoising
from ddistill.methods.kd import KD
from ddistill.process import Process


@dataclass(frozen=True)
class Entry:
    """A method of the table: its configuration (called with a process it gives a Method or Rounds), and its source.

    steps: the numbers of sampling steps that the benchmark judges. guided: the student takes a guidance scale.
    """

    make: Callable[..., Callable[[Process], Made]]
    title: str
    paper: str
    steps: tuple[int, ...] = (1, 2, 4, 8)
    guided: bool = False

    @property
    def file(self) -> str:
        """The file that holds it, from the root of the repository."""
        return self.make.__module__.replace(".", "/") + ".py"


METHODS = {
    "kd": Entry(KD, "Naive knowledge distillation", "Luhman & Luhman 2021, arXiv:2101.02388", (1,)),
    "consistency": Entry(Consistency, "Consistency distillation", "Song et al. 2023, arXiv:2303.01469", (1, 2, 4, 8)),
}
"""Methods that make a student, by their name on the command line; `steps`: the numbers of sampling steps they serve."""

__all__ = ["KD", "METHODS", "Consistency", "Denoising", "Entry", "Method", "Round"]
