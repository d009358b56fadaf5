"""Real images to compare samples with: a folder, tar files, arrays, or the data that a run was trained on."""

import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddistill.config import Data
from ddistill.data.images import Pictures, cache_folder, centre_crop, folder_images, tar_images
from ddistill.data.loading import Unreadable
from ddistill.data.rows import array_rows
from ddistill.evaluate.seen import part_of_process

Decode = Callable[[np.ndarray], np.ndarray]
"""Samples [n, ...] in the scale of the data -> brightness in [0, 1], [n, H, W, C]."""


@dataclass(eq=False)
class Images:
    """Images of one shape [H, W, C] by their number.

    source: what results call them. read: number -> item, by several threads; raises Unreadable. finish: items [n, ...]
    -> uint8 [n, H, W, C]. labels: [N], where there are classes. notes: what is to be said about them. skipped: those
    that were met and could not be read, and why. names: of the images, where they have some.
    """

    source: str
    shape: tuple[int, ...]
    count: int
    read: Callable[[int], np.ndarray]
    finish: Callable[[np.ndarray], np.ndarray] = lambda items: items
    labels: np.ndarray | None = None
    names: Sequence[str] = ()
    notes: tuple[str, ...] = ()
    skipped: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Their number, those that cannot be read included."""
        return self.count

    def batches(self, size: int, numbers: Sequence[int] | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Numbers [n] and images [n, H, W, C], uint8, of up to `size` readable ones that are this process's.

        numbers: which; by default all. Threads read ahead.
        """
        mine = part_of_process(self.count) if numbers is None else numbers

        def read(i: int) -> tuple[int, np.ndarray] | None:
            try:
                return i, self.read(i)
            except Unreadable as error:
                self.skipped[i] = str(error)
                return None

        with ThreadPoolExecutor(min(os.cpu_count() or 1, 32)) as pool:
            ahead = pool.map(read, mine[:size])
            for start in range(size, len(mine) + size, size):
                rows = [row for row in ahead if row is not None]
                ahead = pool.map(read, mine[start : start + size])  # while this batch is looked at
                if rows:
                    yield self._batch(rows)

    def _batch(self, rows: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray([i for i, _ in rows]), self.finish(np.stack([item for _, item in rows]))


def to_bytes(brightness: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] as uint8, rounded, as it is when samples are saved as pictures."""
    return np.rint(np.clip(np.asarray(brightness, np.float32), 0, 1) * 255).astype(np.uint8)


def in_colour(images: np.ndarray) -> np.ndarray:
    """Images [n, H, W, 1 or 3] as [n, H, W, 3]. Raises ValueError for what is no image."""
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"networks look at images [n, H, W, 1 or 3]; these are {list(images.shape)}")
    return np.repeat(images, 3, axis=3) if images.shape[3] == 1 else images


def images_at(path: Path, shape: tuple[int, ...], *, crop: bool = False) -> Images:
    """The images below a folder, in tar files, or in .npy or .npz with bytes [N, H, W, C], of shape [H, W, C].

    crop: larger images are cut to their middle square and resized as for training (`data.images`); otherwise one of
    another size is an error. Damaged files are skipped, grey ones among colours are made RGB, and both are told.
    Raises FileNotFoundError where there is nothing, ValueError for no images and for those of other shapes.
    """
    path = Path(path)
    if path.suffix in (".npy", ".npz"):
        rows, found, _ = array_rows(path)
        if rows.x.dtype != np.uint8 or found != shape:
            raise ValueError(
                f"{path} holds {rows.x.dtype} {list(found)}; reference images are bytes (uint8) {list(shape)}, as the "
                "samples are"
            )
        return Images(str(path), shape, len(rows), lambda i: np.asarray(rows.x[i]), labels=rows.labels)
    height, width, channels = shape
    if height != width:
        raise ValueError(f"samples of {height} x {width} pixels have no reference in {path}: squares are compared")
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        pictures, _ = tar_images(path, height, channels=channels, flip=False, cache=cache_folder())
        notes = _check_sizes(path, pictures, crop, lambda i: io.BytesIO(pictures.read(i)))
    else:
        pictures, _ = folder_images(path, height, channels=channels, flip=False, classes=False)
        notes = _check_sizes(path, pictures, crop, lambda i: path / pictures.names[i])
    read = _reader(pictures, crop)
    return Images(str(path), shape, len(pictures), read, labels=pictures.labels, names=pictures.names, notes=notes)


def images_of(data: Data, source: str, decode: Decode | None = None) -> Images:
    """The images that a run was trained on, neither mirrored nor cut at random.

    decode: from a sample to brightness, by default the data's own. Raises ValueError where samples are no images.
    """
    decode = data.to_unit if decode is None else decode
    items: Any = None if data.items is None else data.items.items
    if items is None:
        x, labels = data.arrays["x"], data.arrays.get("cond")
        first, count, read = np.asarray(x[:1], np.float32), len(x), lambda i: np.asarray(x[i], np.float32)
    else:
        if isinstance(items, Pictures):
            items = replace(items, flip=False, crop="centre")
        elif hasattr(items, "flip"):
            items = replace(items, flip=False)
        labels, count = getattr(items, "labels", None), len(items)

        def read(i: int) -> np.ndarray:
            return items.finish(items[i], np.random.default_rng(i))["x"]

        first = np.zeros((1, *data.shape), np.float32)
    shape = to_bytes(decode(first)).shape
    in_colour(np.zeros(shape, np.uint8))
    return Images(source, shape[1:], count, read, lambda x: to_bytes(decode(x)), labels)


def _reader(pictures: Pictures, crop: bool) -> Callable[[int], np.ndarray]:
    side = pictures.size

    def read(i: int) -> np.ndarray:
        image, _ = pictures[i]
        if not crop and image.size != (side, side):
            raise ValueError(_of_other_size(f"{pictures.names[i]} is {image.width} x {image.height}", side))
        return np.asarray(centre_crop(image, side), np.uint8).reshape(side, side, pictures.channels)

    return read


def _of_other_size(what: str, side: int) -> str:
    return (
        f"{what}, and the samples are {side} x {side}: give images of that size, or --crop to cut larger ones to their "
        "middle square and resize them as for training"
    )


def _check_sizes(
    path: Path, pictures: Pictures, crop: bool, file: Callable[[int], Path | io.BytesIO]
) -> tuple[str, ...]:
    """Look at the heads of all files: what is grey among colours. Raises ValueError for other sizes."""
    side, channels = pictures.size, pictures.channels
    sizes: dict[tuple[int, int], list[str]] = {}
    grey = []
    for i, name in enumerate(pictures.names):
        try:
            with Image.open(file(i)) as head:
                turned = Image.Image.getexif(head).get(0x0112, 1) >= 5  # a PNG's own decodes all of it
                sizes.setdefault(head.size[::-1] if turned else head.size, []).append(name)
                if head.mode in ("1", "L", "LA", "I", "I;16"):
                    grey.append(name)
        except Exception:  # told when it is read
            continue
    other = {size: names for size, names in sizes.items() if size != (side, side)}
    if other and not crop:
        tally = Counter({size: len(names) for size, names in sizes.items()})
        parts = [f"{n} of {w} x {h} ({sizes[w, h][0]})" for (w, h), n in tally.most_common(4)]
        more = f" and {len(tally) - 4} other sizes" * (len(tally) > 4)
        raise ValueError(_of_other_size(f"{path} holds images of {len(tally)} sizes: {', '.join(parts)}{more}", side))
    if not grey or channels == 1:
        return ()
    return (f"{len(grey)} of {len(pictures)} images are grey, and were made RGB: {listed(grey)}",)


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names, and how many more there are."""
    return ", ".join(names[:most]) + f" and {len(names) - most} more" * (len(names) > most)


def told(images: Images) -> tuple[str, ...]:
    """What is to be said about images once they were read."""
    skipped = [images.skipped[i] for i in sorted(images.skipped)]
    if not skipped:
        return images.notes
    return (
        *images.notes,
        f"{len(skipped)} of {len(images)} images could not be read and were skipped: {listed(skipped)}",
    )
