"""A folder of teacher pairs (`ddistill.data.records`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from ddistill.data.arrays import ArraySource, Source
from ddistill.data.pairs import at_least_one, gathered, pair_maker, whole
from ddistill.data.records import Kind, Records, open_records, write_records
from ddistill.digests import digest_of
from ddistill.gathering import Place
from ddistill.integrators import dpmpp_3m
from ddistill.net import Net
from ddistill.overrides import describe, differences
from ddistill.process import Process

KIND = Kind("ddistill teacher pairs, format 1", "teacher pairs", "pairs", "ddistill pairs")


@dataclass(frozen=True)
class PairStore:
    """A whole store of pairs, opened by `open_pairs`."""

    records: Records

    @property
    def made(self) -> dict[str, Any]:
        """What the manifest says of their making."""
        return self.records.made

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files that hold them."""
        return self.records.shards

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.records)

    def source(self, batch_size: int, seed: int = 0, *, part: tuple[int, int] = (0, 1)) -> Source:
        """Shuffled batches of noise, x, perhaps cond and path; those an `ArraySource` of all the pairs would give.

        Only the rows of a batch are read, and of its parts those of this one: part is as for `ArraySource`.
        """
        numbers = ArraySource({"row": np.arange(len(self))}, batch_size, seed, part=part)
        return lambda step: self.records.rows(numbers(step)["row"])

    def arrays(self) -> dict[str, np.ndarray]:
        """All pairs in memory: noise [count, ...], x [count, ...], perhaps cond [count] and path."""
        return self.records.arrays()

    def check_fits(self, process: Process, shape: tuple[int, ...], num_classes: int, points: int = 0) -> None:
        """Raise ValueError unless the pairs are of this process, shape and classes, with path at so many intervals.

        points = 0 asks for no path.
        """
        wanted = {"process": describe(process), "shape": list(shape), "num_classes": num_classes}
        wanted |= {"points": points} if points else {}
        lines = differences({name: self.made[name] for name in wanted}, wanted)
        if lines:
            told = "; ".join(lines[:8]).replace(" before", " stored").replace(" now", " wanted")
            raise ValueError(
                f"the pairs in {self.records.folder} do not fit: {told}. Make others with `ddistill pairs`"
            )


def write_pairs(
    folder: Path | str,
    teacher: Net,
    process: Process,
    key: Array,
    count: int,
    shape: tuple[int, ...],
    *,
    steps: int = 64,
    num_classes: int = 0,
    integrator: Callable = dpmpp_3m,
    points: int = 0,
    shard_size: int = 4096,
    batch_size: int = 4096,
    report: Callable[[int, int], None] = lambda done, of: None,
    part: tuple[int, int] | None = None,
    place: Place | None = None,
) -> int:
    """Make the pairs of `teacher_pairs` in a folder; answers how many shards this call had to make.

    Shards that are there and whole stay, so that a call that was cut off goes on where it stopped, and one with a
    larger count adds to the store. part: (p, P) makes the shards p, p + P, …; by default those of this process among
    all, which then wait for each other and must share the folder. place: as for `pair_maker`; all processes of its mesh
    call this, make every shard together, and write a part of them each. report: called with the pairs of this part that
    are done, and with their number.
    Raises ValueError where the folder holds other pairs or other things, OSError where it cannot be written.
    """
    at_least_one(count=count, shard_size=shard_size)
    folder = Path(folder)
    teacher = teacher if place is not None else gathered(teacher)
    made = {
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "random": str(jax.random.key_impl(key)),
        "shape": list(shape),
        "num_classes": num_classes,
        "steps": steps,
        "points": points,
        "integrator": describe(integrator),
        "process": describe(process),
        "teacher": fingerprint(teacher),
    }
    make = pair_maker(
        teacher, process, key, shape, steps=steps, num_classes=num_classes, integrator=integrator, points=points,
        batch_size=min(batch_size, shard_size, count), place=place,
    )  # fmt: skip

    def typed(first: int, rows: int) -> dict[str, np.ndarray]:
        kinds = {"i": np.int32, "f": np.float32}
        return {name: a.astype(kinds[a.dtype.kind], copy=False) for name, a in make(first, rows).items()}

    together = place is not None
    return write_records(folder, KIND, made, count, shard_size, typed, report=report, part=part, together=together)


def open_pairs(folder: Path | str) -> PairStore:
    """Open a store, checking every shard's digest.

    Raises FileNotFoundError where there is none, ValueError where it is another kind of folder or a shard is missing or
    damaged.
    """
    return PairStore(open_records(Path(folder), KIND))


def fingerprint(teacher: Net) -> str:
    """A digest of all arrays of a network, by name."""
    return digest_of((teacher.params, teacher.rest), whole)
