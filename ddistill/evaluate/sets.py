"""Sample sets as checked float64 arrays [N, d], and the distances between their samples."""

import numpy as np


def flat(x) -> np.ndarray:
    """Samples [N, ...] as float64 [N, d]."""
    x = np.asarray(x)
    return x.astype(np.float64).reshape(len(x), int(np.prod(x.shape[1:])))


def pair(a, b, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets, flat.

    Raises ValueError for NaN or Inf, unequal dimensions, fewer than `least` samples.
    """
    a, b = flat(a), flat(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"Samples have {a.shape[1]} and {b.shape[1]} coordinates; both sets need the same number.")
    for which, x in (("first", a), ("second", b)):
        check(x, which, least)
    return a, b


def check(x: np.ndarray, which: str, least: int) -> None:
    """Raise ValueError where the set x [N, d] has NaN or Inf, or fewer than `least` samples."""
    if len(x) < least:
        raise ValueError(f"The {which} set has {len(x)} samples; at least {least} are needed.")
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        count = f"{bad.sum()} of {len(x)} samples"
        raise ValueError(f"The {which} set has NaN or Inf in {count}, the first at index {np.argmax(bad)}.")


def centred_pair(real, fake, k: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Two sets, flat, about the mean of `real`, and the rounding error of a squared distance between their samples.

    Raises ValueError as `pair`, with more than k samples in each, and for k below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; at least 1 neighbour is needed.")
    real, fake = pair(real, fake, least=k + 1)
    middle = real.mean(0)  # distances as differences of squares lose digits far from the origin
    real, fake = real - middle, fake - middle
    # Without it a copy of a sample could fall outside a ball of radius 0.
    return real, fake, 1e-12 * max(np.einsum("nd,nd->n", x, x).max() for x in (real, fake))


def blocks(rows: int, columns: int) -> list[slice]:
    """Slices of the rows whose distances to so many columns fill 32 MiB."""
    size = max(1, 2**22 // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def distance2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [N, M] of a [N, d] and b [M, d], off by about 1e-16 of their squared lengths."""
    squares = a @ (-2 * b.T)
    squares += np.einsum("nd,nd->n", a, a)[:, None]
    squares += np.einsum("nd,nd->n", b, b)
    return squares
