"""Items from array files: .npy, mapped and not loaded, and .npz."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddistill.data.images import from_bytes
from ddistill.data.loading import Unreadable

_LABELS = ("labels", "label", "cond", "y")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of an array as items: x float32, bytes brought to [-1, 1], and cond, the label, where there are labels.

    x: [N, ...], uint8 (images in [N, H, W, C]) or floats in the data's scale. labels: [N] from 0 on. flip: mirror
    every other image, at random, along the axis of its width. A row with NaN or infinity is unreadable.
    """

    x: np.ndarray
    labels: np.ndarray | None = None
    flip: bool = False

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int | None]:
        """Row i and its label."""
        row = np.asarray(self.x[i])
        row = from_bytes(row) if row.dtype == np.uint8 else row.astype(np.float32)
        if not np.isfinite(row).all():
            raise Unreadable(f"row {i}: it holds NaN or infinity")
        return row, None if self.labels is None else int(self.labels[i])

    def finish(self, item: tuple[np.ndarray, int | None], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The row, perhaps mirrored."""
        x, label = item
        row = {"x": x[:, ::-1] if self.flip and rng.random() < 0.5 else x}
        return row if label is None else {**row, "cond": np.asarray(label, np.int32)}


def array_rows(
    file: Path, *, labels: Path | None = None, num_classes: int = 0, flip: bool = False
) -> tuple[Rows, tuple[int, ...], int]:
    """The rows of a file, the shape of each and the number of classes.

    file: .npy with x [N, ...], or .npz with x (or arr_0, or a single array) and perhaps labels (label, cond, y); bytes
    of shape [N, H, W] get a channel. labels: .npy with labels [N]. num_classes: one more than the largest label by
    default. flip needs rows [H, W, C].
    Raises FileNotFoundError for no file, ValueError for other contents and for labels that do not fit.
    """
    x, told = _read(file)
    told = told if labels is None else _read(labels)[0]
    if x.ndim == 0 or not len(x):
        raise ValueError(f"{file} holds no rows: its array has shape {list(x.shape)}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{file} holds {x.dtype}: expected uint8 for images from 0 to 255, or floats")
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[..., None]
    if flip and x.ndim != 4:
        raise ValueError(f"flip needs images [N, H, W, C], and {file} holds rows of shape {list(x.shape[1:])}")
    if told is None:
        return Rows(x, None, flip), x.shape[1:], 0
    if told.shape != (len(x),) or not np.issubdtype(told.dtype, np.integer):
        raise ValueError(
            f"labels of {file} are {told.dtype} {list(told.shape)}; expected whole numbers for its {len(x)} rows"
        )
    count = num_classes or int(told.max()) + 1
    if told.min() < 0 or told.max() >= count:
        raise ValueError(f"labels of {file} run from {told.min()} to {told.max()}; expected 0 to {max(count, 1) - 1}")
    return Rows(x, told, flip), x.shape[1:], count


def _read(file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The array of a file, and the labels beside it in an .npz."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} {'is no file' if file.exists() else 'does not exist'}: give .npy or .npz")
    try:
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r"), None
        with np.load(file) as arrays:
            names = list(arrays.files)
            labels = next((name for name in _LABELS if name in names), None)
            rest = [name for name in names if name not in _LABELS]
            x = next((name for name in ("x", "arr_0") if name in names), rest[0] if len(rest) == 1 else None)
            if x is None:
                raise ValueError(f"expected an array x among {', '.join(names) or 'none'}")
            return arrays[x], None if labels is None else arrays[labels]
    except Exception as error:  # NumPy and zipfile raise many kinds for a damaged file
        raise ValueError(f"{file} cannot be read as .npy or .npz: {error}") from error
