"""Batches from items that are read one by one: shuffled, read ahead, and each a pure function of the step.

grain's `MapDataset` is random access by position through shuffling, repetition and augmentation, so that the state of
its iterator is a number, and the step of a checkpoint is that number: resuming needs nothing else to be saved.
"""

import operator
import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from ddistill.data.arrays import part_size

PyTree = Any
T = TypeVar("T")
Made = TypeVar("Made")


class Unreadable(ValueError):
    """An item that cannot be used: its name and why."""


class Items(Protocol):
    """Random access to the items of a dataset, by several threads at a time."""

    def __len__(self) -> int:
        """Their number."""

    def __getitem__(self, i: int) -> Any:
        """Read item i. Raises Unreadable where it is damaged."""

    def finish(self, item: Any, rng: np.random.Generator) -> dict[str, PyTree]:
        """A row of a batch from an item that was read, with what is random about it."""


class Readable:
    """Items in which others, drawn for each, stand in for those that cannot be read; `skipped` names these, and why.

    Raises ValueError, naming the first of them, when `tries` draws in a row give none that can be read.
    """

    def __init__(self, items: Items, tries: int = 100):
        self.items, self.tries = items, tries
        self.skipped: dict[int, str] = {}
        self.finish = items.finish

    def __len__(self) -> int:
        """The number of items, those that cannot be read included."""
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        """Item i, or the one that stands in for it."""
        i = operator.index(i)
        if i not in self.skipped and (item := self._read(i)) is not None:
            return item
        others = np.random.default_rng(i).integers(len(self), size=self.tries)
        for other in map(int, others):
            if other not in self.skipped and (item := self._read(other)) is not None:
                return item
        raise ValueError(
            f"none of {self.tries} items drawn in a row can be read, and {len(self.skipped)} of {len(self)} are known "
            f"not to be; the first: {self.skipped[i]}"
        )

    def _read(self, i: int) -> Any:
        try:
            return self.items[i]
        except Unreadable as error:
            self.skipped[i] = str(error)
            return None

    def told(self) -> str | None:
        """Those that this process met and could not read, in words; None if there were none."""
        words, of = told(list(self.skipped.values())), jax.process_count()
        if words is None or of == 1:
            return words
        return f"in the part of batches that process {jax.process_index()} of {of} reads, {words}"


def told(skipped: list[str]) -> str | None:
    """Items that were skipped, in words: how many, and every one; None for none."""
    lines = "".join(f"\n  {line}" for line in sorted(skipped))
    return f"{len(skipped)} items could not be read and were skipped:{lines}" if skipped else None


def loader(
    items: Items,
    batch_size: int,
    seed: int = 0,
    *,
    part: tuple[int, int] = (0, 1),
    threads: int | None = None,
    ahead: int = 2,
) -> "Loader":
    """Shuffled batches of items, each item once in an epoch; a batch that crosses an epoch goes on in the next one.

    Row r of step n is the item at position n batch_size + r of an endless stream, finished with random numbers of
    (seed, position): batches depend on the seed and the step alone. part: (p, P) gives part p of P of each batch, equal
    numbers of rows in order, for P processes that share it. threads: that read, as many as there are cores by default;
    they keep `ahead` batches ready after the last one asked for until the source is closed, and asking for another step
    than the next starts anew from there.
    Raises ValueError for counts below 1, a negative seed, and where P does not divide batch_size.
    """
    index, rows = part[0], part_size(batch_size, part)
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be 0 or larger.")
    if not len(items):
        raise ValueError("there are no items to read")
    stream = _grain().MapDataset.source(items).seed(seed).shuffle().repeat().random_map(items.finish)

    def read(i: int) -> dict[str, PyTree]:
        step, row = divmod(i, rows)
        return stream[step * batch_size + index * rows + row]

    return Loader(rows, lambda step: read_ahead(read, step * rows, sys.maxsize, ahead * rows, threads))


class Loader:
    """A source whose rows are read ahead by threads, which `close` lets end; asked again it starts them anew."""

    def __init__(self, rows: int, begin: "Callable[[int], Reading]"):
        self._rows, self._begin = rows, begin
        self._running: tuple[int, Reading] | None = None

    def __call__(self, step: int) -> dict[str, PyTree]:
        """The batch of a step. Raises ValueError for one below 0."""
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step is {step}; steps count from 0.")
        if self._running is None or self._running[0] != step:
            self.close()
            self._running = step, self._begin(step)
        _, reading = self._running
        try:
            batch = [next(reading) for _ in range(self._rows)]
        except BaseException:
            self.close()  # what raised is not asked again
            raise
        self._running = step + 1, reading
        return jax.tree.map(lambda *parts: np.stack(parts), *batch)

    def close(self) -> None:
        """Let the threads end."""
        running, self._running = self._running, None
        if running is not None:
            running[1].close()


@contextmanager
def released(source: T) -> Iterator[T]:
    """A source, or what draws from one, which is closed when the block ends, where it has something to close."""
    try:
        yield source
    finally:
        if (close := getattr(source, "close", None)) is not None:
            close()


class Reading:
    """An iterator whose values several threads make ahead of it; close it, or use it as a context manager."""

    def __init__(self, values: Any):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._values)

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads end."""
        self._values.close()


def read_ahead(read: Callable[[int], Any], first: int, stop: int, ahead: int, threads: int | None = None) -> Reading:
    """read(first), …, read(stop − 1), `ahead` of which `threads` make before they are asked for.

    threads: as many as there are cores, up to 32, by default.
    """
    threads = min(os.cpu_count() or 1, 32) if threads is None else threads
    options = _grain().ReadOptions(threads, max(threads, ahead))
    return Reading(iter(_grain().MapDataset.range(first, stop).map(read).to_iter_dataset(options)))


def prefetched(make: Callable[[T], Made], items: Iterable[T], ahead: int) -> Generator[tuple[T, Made]]:
    """(item, make(item)) for each item in order, `ahead` of which a thread makes before they are asked for.

    With ahead = 0 each is made when it is asked for. What `make` raises is raised when its item's turn comes. Close the
    iterator where it is not read to its end, so that the thread ends.
    """
    if not ahead:
        yield from ((item, make(item)) for item in items)
        return
    items = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        coming = deque((item, thread.submit(make, item)) for item in islice(items, ahead))
        try:
            while coming:
                item, made = coming.popleft()
                value = made.result()
                coming.extend((item, thread.submit(make, item)) for item in islice(items, 1))
                yield item, value
                del made, value  # a batch on the devices is not kept until the next one comes
        finally:
            for _, made in coming:
                made.cancel()


def _grain():
    try:
        import grain  # slow, and optional
    except ImportError as error:
        raise ImportError('data that is read one by one needs grain: pip install "ddistill[images]"') from error
    return grain
