"""What a page carries inside itself: pictures, points and curves, as small as they may be, and how much they are."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddistill.report.page import Drawn, Group, Motion, Sheet
from ddistill.report.pictures import pixels

_LARGEST = 160  # pixels of an image's side on the page
_LOSSLESS = 64  # larger images are photographs, for which PNG takes ten times WebP's bytes
_GRID = 32767  # points lie on a grid of so many places to each side of the frame's middle


def picture(x: np.ndarray) -> dict[str, Any]:
    """Images [n, H, W, C] as one picture of nearly square shape with clear gaps: its address, columns, rows, count.

    x: as for `thumbnails`.
    """
    from PIL import Image

    x = thumbnails(x)
    n, tall, wide, channels = x.shape
    gap = max(1, round(max(tall, wide) / 24))
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    mode = "LA" if channels == 1 else "RGBA"
    sheet = Image.new(mode, (columns * (wide + gap) - gap, rows * (tall + gap) - gap), (0,) * len(mode))
    for i, image in enumerate(x):
        tile = Image.fromarray(image.squeeze(2) if channels == 1 else image).convert(mode)
        sheet.paste(tile, ((i % columns) * (wide + gap), (i // columns) * (tall + gap)))
    buffer = io.BytesIO()
    kind = "png" if max(tall, wide) <= _LOSSLESS else "webp"
    sheet.save(buffer, format=kind, optimize=True, quality=85)  # PNG has no quality, WebP nothing to optimise
    address = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {
        "src": address, "n": n, "columns": columns, "rows": rows, "width": sheet.width, "height": sheet.height,
        "pixelated": max(tall, wide) <= _LOSSLESS,
    }  # fmt: skip


def thumbnails(x: np.ndarray) -> np.ndarray:
    """Images [n, H, W, C] in [0, 1] as bytes, those of more than 160 pixels shrunk; bytes are such images already.

    What is NaN becomes black. Raises ValueError for other shapes.
    """
    from PIL import Image

    if x.dtype == np.uint8:
        return x
    x = pixels(np.nan_to_num(x, nan=0.0, posinf=1.0, neginf=0.0), "a sheet")
    height, width, channels = x.shape[1:]
    shrink = _LARGEST / max(height, width)
    if shrink >= 1:
        return x
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    images = (Image.fromarray(image.squeeze(2) if channels == 1 else image) for image in x)
    small = [np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for image in images]
    return np.stack(small).reshape(len(x), size[1], size[0], channels)


def points(x: np.ndarray, frame: Sequence[float]) -> str:
    """Points [..., 2] as base64 of 16-bit integers, little-endian, in the frame (middle x, middle y, half its side).

    Points outside three frames, and those that are not finite, become -32768.
    """
    scaled = (np.asarray(x, np.float64) - np.asarray(frame[:2])) / (3 * frame[2]) * _GRID
    inside = np.isfinite(scaled).all(-1, keepdims=True) & (np.abs(scaled) <= _GRID).all(-1, keepdims=True)
    whole = np.where(inside, np.rint(np.where(inside, scaled, 0)), -_GRID - 1).astype("<i2")
    return base64.b64encode(whole.tobytes()).decode()


def frame(group: Group) -> tuple[float, float, float] | None:
    """The square that shows the group's points: middle and half side, around its centres and its first sheet.

    Put the truth first, as a student that has gone astray would set the scale. None where there are no points.
    """
    sheets = [sheet.x for drawn in group.drawn for sheet in drawn.sheets.values() if sheet.x.ndim == 2]
    clouds = sheets[:1] or [motion.x[-1] for motion in group.motions[:1]]
    if group.centres is not None:
        clouds = [*clouds, group.centres]
    if not clouds:
        return None
    first = np.asarray(clouds[0], np.float64)
    first = first[np.isfinite(first).all(1)]
    corners = [np.quantile(first, [0.002, 0.998], axis=0)] if len(first) else [np.array([[-1.0, -1.0], [1.0, 1.0]])]
    corners += [np.asarray(c, np.float64) for c in clouds[1:]]
    low, high = np.concatenate(corners).min(0), np.concatenate(corners).max(0)
    half = max(float((high - low).max()) / 2, 1e-6) * 1.12
    return float((low[0] + high[0]) / 2), float((low[1] + high[1]) / 2), half


def curve(steps: Sequence[float], values: Sequence[float], most: int = 160) -> dict[str, list[float]]:
    """A curve of at most so many points, each the mean of the finite values in its stretch; stretches without are cut.

    Numbers have four digits.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    parts = np.array_split(np.arange(len(x)), min(most, len(x))) if len(x) else []
    kept = [(x[part[-1]], y[part][np.isfinite(y[part])].mean()) for part in parts if np.isfinite(y[part]).any()]
    return {"x": [float(f"{a:.6g}") for a, _ in kept], "y": [float(f"{b:.4g}") for _, b in kept]}


def drawn(one: Drawn, of: Sequence[float] | None, most: int) -> dict[str, Any]:
    """A sampler's sheets for the page, of at most so many samples each."""
    return {"label": one.label, "kind": one.kind, "steps": {str(n): _sheet(s, of, most) for n, s in one.sheets.items()}}


def _sheet(sheet: Sheet, of: Sequence[float] | None, most: int) -> dict[str, Any]:
    x = np.asarray(sheet.x)
    lost = {"lost": [int(k) for k in sheet.lost]}
    if x.ndim == 2:
        assert of is not None
        x = x[: 12 * most]  # a point takes far less than an image
        away = np.abs(x - np.asarray(of[:2])) > of[2]
        outside = int((~np.isfinite(x).all(1) | away.any(1)).sum())
        return {"points": points(x, of), "n": len(x), "outside": outside, **lost}
    return {**picture(x[:most]), **lost}


def motion(one: Motion, of: Sequence[float]) -> dict[str, Any]:
    """A sampler's paths for the page."""
    noise = [round(float(a), 4) for a in one.noise]
    x = np.asarray(one.x)
    return {"label": one.label, "kind": one.kind, "noise": noise, "n": int(x.shape[1]), "points": points(x, of)}


def size(value: Any) -> int:
    """How many characters the pictures and points of a value take."""
    if isinstance(value, Mapping):
        return sum(size(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(size(v) for v in value)
    return len(value) if isinstance(value, str) else 0
