"""What networks see of sets of images: moments and rows of their features, over all devices and processes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from ddistill.evaluate.moments import Moments, gathered, moments_of, of_all_processes
from ddistill.hub.features import Features
from ddistill.sharding import batch_sharding, local_mesh

Batches = Iterable[tuple[np.ndarray, np.ndarray]]
"""Numbers [n] of images in their set, and the images [n, H, W, 3], uint8: those of this process."""

CHUNK = 1024
"""Rows whose products are taken at once."""


@dataclass(frozen=True)
class Wanted:
    """Features by "network.output", such as "inception.pool", of which moments, and of which every row is needed."""

    moments: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()

    def outputs(self, network: str) -> tuple[str, ...]:
        """The outputs of a network that are needed."""
        keys = (key.split(".", 1) for key in sorted(self.moments | self.rows))
        return tuple(output for kind, output in keys if kind == network)


@dataclass(frozen=True, eq=False)
class Seen:
    """Features of `count` images: moments, and rows [n, d] float32 of all or some of them, in the images' order.

    numbers: [n], which images have rows.
    """

    count: int
    moments: Mapping[str, Moments]
    rows: Mapping[str, np.ndarray]
    numbers: np.ndarray

    def __add__(self, other: "Seen") -> "Seen":
        """Of both sets together, in the order of their numbers."""
        order = np.argsort(numbers := np.concatenate([self.numbers, other.numbers]), kind="stable")
        rows = {key: np.concatenate([self.rows[key], other.rows[key]])[order] for key in self.rows}
        moments = {key: self.moments[key] + other.moments[key] for key in self.moments}
        return Seen(self.count + other.count, moments, rows, numbers[order])


def look(
    networks: Mapping[str, Features],
    batches: Batches,
    wanted: Wanted,
    *,
    batch_size: int,
    groups: np.ndarray | None = None,
    keep: np.ndarray | None = None,
) -> list[Seen]:
    """What the networks see of images, one Seen for each group.

    batches: of at most batch_size images of one shape, which lie on the devices of this process. groups: [N] the group
    of each image, from 0 on; one by default. keep: [N], whether to keep its rows; all by default. All processes must
    call it, each with images of its own, and get the same answer. Raises ValueError where one has none.
    """
    mesh = local_mesh()
    size = -(-batch_size // mesh.size) * mesh.size
    placed = {kind: features.on(mesh) for kind, features in networks.items() if wanted.outputs(kind)}
    widths: dict[str, int] = {}

    def outputs() -> Iterator[tuple[np.ndarray, dict[str, Array]]]:
        for numbers, images in batches:
            filled = np.concatenate([images, np.repeat(images[-1:], size - len(images), axis=0)])
            there = jax.device_put(filled, batch_sharding(mesh))
            found = {kind: _applied(features, there, wanted.outputs(kind)) for kind, features in placed.items()}
            yield numbers, {f"{kind}.{name}": a for kind, out in found.items() for name, a in out.items()}

    count = 1 if groups is None else int(groups.max()) + 1
    sums = [_Sums(wanted) for _ in range(count)]
    for numbers, features in _one_behind(outputs()):
        rows = {key: np.asarray(a)[: len(numbers)] for key, a in features.items()}
        widths |= {key: a.shape[1] for key, a in rows.items()}
        of = np.zeros(len(numbers), int) if groups is None else groups[numbers]
        for group in np.unique(of):
            here = of == group
            kept = np.ones(here.sum(), bool) if keep is None else keep[numbers[here]]
            sums[group].add(numbers[here], {key: a[here] for key, a in rows.items()}, kept)
    if not gathered(np.asarray([sum(part.count for part in sums)])).all():
        raise ValueError("no images were given, or too few for all processes to have some")
    return [part.seen(widths) for part in sums]


class _Sums:
    """A set of images whose features come in batches."""

    def __init__(self, wanted: Wanted):
        self.wanted, self.count = wanted, 0
        self.moments: dict[str, Moments] = {}
        self.waiting: dict[str, list[np.ndarray]] = {key: [] for key in wanted.moments}
        self.rows: dict[str, list[np.ndarray]] = {key: [] for key in wanted.rows}
        self.numbers: list[np.ndarray] = []

    def add(self, numbers: np.ndarray, features: Mapping[str, np.ndarray], kept: np.ndarray) -> None:
        self.count += len(numbers)
        self.numbers.append(numbers[kept])
        for key, rows in self.rows.items():
            rows.append(features[key][kept])
        for key, waiting in self.waiting.items():
            waiting.append(features[key])
            if sum(map(len, waiting)) >= CHUNK:
                self._sum(key)

    def _sum(self, key: str) -> None:
        if self.waiting[key]:
            of = moments_of(np.concatenate(self.waiting[key]))
            self.moments[key] = self.moments[key] + of if key in self.moments else of
            self.waiting[key] = []

    def seen(self, widths: Mapping[str, int]) -> Seen:
        moments = {}
        for key in sorted(self.wanted.moments):
            self._sum(key)
            none = np.zeros((0, widths.get(key, 0)))
            moments[key] = of_all_processes(self.moments[key] if key in self.moments else moments_of(none))
        numbers = all_rows(np.concatenate([np.zeros(0, np.int64), *self.numbers]))
        order = np.argsort(numbers, kind="stable")
        rows = {}
        for key in sorted(self.wanted.rows):
            none = np.zeros((0, widths.get(key, 0)), np.float32)
            rows[key] = all_rows(np.concatenate([none, *self.rows[key]]))[order]
        return Seen(int(gathered(np.asarray([self.count])).sum()), moments, rows, numbers[order])


def all_rows(x: np.ndarray) -> np.ndarray:
    """The rows [n, ...] of each process one after another, however many each has, in all of them."""
    if jax.process_count() == 1:
        return x
    counts = gathered(np.asarray([len(x)]))
    filled = np.zeros((counts.max(), *x.shape[1:]), x.dtype)
    filled[: len(x)] = x
    parts = gathered(filled[None])
    return np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])


def part_of_process(count: int) -> range:
    """The numbers of the images, of so many, that this process looks at."""
    here, of = jax.process_index(), jax.process_count()
    return range(count * here // of, count * (here + 1) // of)


def _one_behind(values: Iterable[Any]) -> Iterator[Any]:
    """The values, each after the next one was asked for: devices compute while the host adds up."""
    before = None
    for value in values:
        if before is not None:
            yield before
        before = value
    if before is not None:
        yield before


@partial(jax.jit, static_argnums=2)
def _applied(features: Features, images: Array, names: tuple[str, ...]) -> dict[str, Array]:
    found = features.apply(images)
    return {name: found[name] for name in names}
