"""The 1797 scanned handwritten digits of 8x8 pixels that scikit-learn carries: real data without a download."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Digits:
    """Scans split into a part to train on and a part to judge by, both float32 [n, 8, 8, 1] with labels int32 [n].

    x = (u - centre) scale, where u in [-1, 1] is the pixel's brightness. The one pair (centre, scale) gives the
    training part mean 0 and root-mean-square 0.5 over all coordinates. `variance` is the training part's variance about
    its mean scan, averaged over pixels: Fréchet distances over it are the same for every affine scaling of the data,
    which those over 0.5² are not, since half of 0.5² is the mean scan itself.
    """

    train_x: np.ndarray
    train_labels: np.ndarray
    held_out_x: np.ndarray
    held_out_labels: np.ndarray
    centre: float
    scale: float
    variance: float
    num_classes: int = 10

    def to_unit(self, x) -> np.ndarray:
        """Brightness in [0, 1] for pictures, clipped; x of any shape in the scale of the data."""
        return np.clip((np.asarray(x) / self.scale + self.centre + 1) / 2, 0, 1).astype(np.float32)


def load_digits(seed: int = 0) -> Digits:
    """Load the scans, 70 % to train and 30 % held out, every class split in this proportion; `seed` picks the split.

    Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits (the UCI test set), as bundled with scikit-learn.
    """
    from sklearn.datasets import load_digits as bundled
    from sklearn.model_selection import train_test_split

    pixels, labels = bundled(return_X_y=True)  # brightness 0 to 16
    u = (pixels / 8 - 1).reshape(-1, 8, 8, 1)
    train, held_out, train_labels, held_out_labels = train_test_split(
        u, labels.astype(np.int32), test_size=0.3, stratify=labels, random_state=seed
    )
    centre, scale = float(train.mean()), float(0.5 / train.std())
    return Digits(
        train_x=((train - centre) * scale).astype(np.float32),
        train_labels=train_labels,
        held_out_x=((held_out - centre) * scale).astype(np.float32),
        held_out_labels=held_out_labels,
        centre=centre,
        scale=scale,
        variance=float(train.var(axis=0).mean() * scale**2),
    )
