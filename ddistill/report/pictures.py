"""Sample sheets, loss curves and scatter plots as PNG files. Images are [N, H, W, C] in [0, 1], with C = 1 or 3."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ddistill.report import canvas
from ddistill.report.canvas import COLOURS, FAINT, INK

_SHEET = "#3d444d"


def image_grid(x, columns: int) -> np.ndarray:
    """Lay x [N, H, W, C] out row by row: uint8 [ceil(N / columns) H, columns W, C]; cells left over are black.

    Values outside [0, 1] are clipped. Raises ValueError for other shapes, NaN or Inf, no images, `columns` below 1.
    """
    x = pixels(x, "image_grid")
    if columns < 1:
        raise ValueError(f"columns is {columns}; at least 1 is needed.")
    n, height, width, channels = x.shape
    rows = math.ceil(n / columns)
    cells = np.zeros((rows * columns, height, width, channels), np.uint8)
    cells[:n] = x
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def save_sample_sheet(
    path: str | Path,
    rows: Sequence[tuple[str, np.ndarray]],
    scale: int | None = None,
    *,
    title: str | None = None,
    headings: Sequence[str] | None = None,
) -> None:
    """Save a PNG with one labelled row of images per sampler; images of one column should start from the same noise.

    `rows`: (label, images [n, H, W, C] in [0, 1]); grey and colour may be mixed, all have one H and W. `scale` enlarges
    every pixel to scale x scale (default: images of about 40 pixels or more). `headings`: a word above each column.
    Folders on the way to `path` are created.

    Raises ValueError for no rows, wrong shapes, NaN or Inf, `scale` below 1, more headings than columns; OSError where
    `path` cannot be written.
    """
    from PIL import Image, ImageDraw

    if not rows:
        raise ValueError("No rows to draw; expected a list of (label, images [n, H, W, C]).")
    sets = [(label, pixels(images, f"row {label!r}")) for label, images in rows]
    sizes = {label: images.shape[1:3] for label, images in sets}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Rows have images of different sizes {sizes}; all must have the same height and width.")
    height, width = sets[0][1].shape[1:3]
    columns = max(len(images) for _, images in sets)
    if headings is not None and len(headings) > columns:
        raise ValueError(f"{len(headings)} headings for {columns} columns; give one per column at most.")
    if scale is None:
        scale = max(1, math.ceil(40 / min(height, width)))
    if scale < 1:
        raise ValueError(f"scale is {scale}; it must be a whole number of at least 1.")

    height, width, gap, margin = height * scale, width * scale, 2, 14
    size = min(20, max(13, round(height * 0.36)))
    text, bold = _font(size), _font(size + 1, bold=True)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    boxes = [measure.multiline_textbbox((0, 0), label, font=text) for label, _ in sets]
    gutter = margin + math.ceil(max(right for _, _, right, _ in boxes)) + margin
    top = margin + (round(size * 1.9) if title else 0) + (round(size * 1.5) if headings else 0)
    step = max(height, math.ceil(max(bottom - upper for _, upper, _, bottom in boxes))) + gap
    title_end = 2 * margin + math.ceil(measure.textlength(title, font=bold)) if title else 0
    sheet = Image.new(
        "RGB",
        (max(gutter + columns * (width + gap) - gap + margin, title_end), top + len(sets) * step - gap + margin),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    # White pixels at the edge of an image must not run into the gaps.
    draw.rectangle(
        (gutter - gap, top - gap, gutter + columns * (width + gap) - 1, top + len(sets) * step - 1), fill=_SHEET
    )
    if title:
        draw.text((margin, margin), title, font=bold, fill=INK)
    for column, heading in enumerate(headings or ()):
        middle = gutter + column * (width + gap) + width / 2
        draw.text((middle, top - gap - size * 0.4), heading, font=text, fill=FAINT, anchor="ms")
    for row, (label, images) in enumerate(sets):
        y = top + row * step
        draw.multiline_text((margin, y + (step - gap) / 2), label, font=text, fill=INK, anchor="lm")
        for column, image in enumerate(images):
            rgb = np.broadcast_to(image, (*image.shape[:2], 3))
            tile = Image.fromarray(np.ascontiguousarray(rgb)).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gutter + column * (width + gap), y + (step - gap - height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    canvas.write(path, buffer)


def save_loss_plot(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "Training loss",
    xlabel: str = "optimiser steps",
    ylabel: str = "loss (dimensionless)",
) -> None:
    """Save a PNG of curves name -> (steps [n], values [n]): running means over 1/25 of the points on faint raw traces.

    The vertical axis is logarithmic if every finite value is positive, else linear; NaN and Inf leave gaps in the raw
    trace and do not enter the mean. Raises ValueError for no series or unequal lengths; OSError where `path` cannot be
    written.
    """
    from matplotlib.ticker import EngFormatter

    if not series:
        raise ValueError("No series to plot; expected a mapping of names to (steps, values).")
    curves = {name: tuple(np.asarray(a, np.float64).ravel() for a in curve) for name, curve in series.items()}
    for name, (steps, values) in curves.items():
        if len(steps) != len(values) or not len(steps):
            raise ValueError(
                f"Series {name!r} has {len(steps)} steps and {len(values)} values; expected as many of each."
            )
    positive = all((values[np.isfinite(values)] > 0).all() for _, values in curves.values())

    figure = canvas.figure(8, 4.2)
    axes = figure.add_subplot()
    lows, highs = [], []
    for index, (name, (steps, values)) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        mean = _running_mean(values, max(1, len(values) // 25))
        axes.plot(steps, np.where(np.isfinite(values), values, np.nan), color=colour, alpha=0.22, linewidth=0.7)
        dot = "o" if len(steps) == 1 else None
        axes.plot(
            steps, mean, color=colour, linewidth=2, label=name, solid_capstyle="round", marker=dot, clip_on=not dot
        )
        finite = values[np.isfinite(values)]
        if finite.size:
            # A single spike of the raw trace must not press the curves flat.
            low, high = np.quantile(finite, [0.002, 0.998])
            lows.append(min(low, np.nanmin(mean)))
            highs.append(max(high, np.nanmax(mean)))
    axes.set_yscale("log" if positive else "linear")
    if lows:
        low, high = min(lows), max(highs)
        if positive:
            axes.set_ylim(low / 1.15, high * 1.15)
        elif high > low:
            axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.set_xlim(min(s.min() for s, _ in curves.values()), max(max(s.max() for s, _ in curves.values()), 1))
    canvas.plain(axes, title, xlabel, ylabel + (", log scale" if positive else ""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    above = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.99), "borderaxespad": 0.2}  # beside the title
    axes.legend(frameon=False, fontsize=11, labelcolor=INK, ncols=min(4, len(curves)), **above)
    canvas.save(path, figure)


def save_scatter(path: str | Path, panels: Sequence[tuple[str, np.ndarray]], centres: np.ndarray | None = None) -> None:
    """Save a PNG of point clouds side by side, panels of (title, xy [N, 2]), with a cross at each of `centres` [K, 2].

    All panels show the same square, around the centres and all but the outermost 0.2 % of the first panel: put the
    truth first. Points outside it, NaN and Inf are counted in the panel's corner.

    Raises ValueError for no panels or other shapes; OSError where `path` cannot be written.
    """
    if not panels:
        raise ValueError("No panels to draw; expected a list of (title, xy [N, 2]).")
    clouds = [(title, _points(xy, f"panel {title!r}")) for title, xy in panels]
    marks = np.zeros((0, 2)) if centres is None else _points(centres, "centres")
    truth = clouds[0][1][np.isfinite(clouds[0][1]).all(1)]
    if not len(truth) + len(marks):
        truth = np.array([[-1.0, -1.0], [1.0, 1.0]])
    corners = np.concatenate([np.quantile(truth, [0.001, 0.999], axis=0), marks] if len(truth) else [marks])
    low, high = corners.min(0), corners.max(0)
    middle, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * 1.12

    rows = math.ceil(len(clouds) / 4)
    columns = math.ceil(len(clouds) / rows)
    figure = canvas.figure(2.7 * columns, 3.0 * rows)
    for index, (title, xy) in enumerate(clouds):
        axes = figure.add_subplot(rows, columns, index + 1)
        inside = (np.abs(xy - middle) <= half).all(1)
        shown = xy[inside]
        alpha = float(np.clip(900 / max(len(shown), 1), 0.12, 0.8))
        axes.scatter(shown[:, 0], shown[:, 1], s=3, alpha=alpha, color=COLOURS[0], linewidths=0)
        axes.scatter(marks[:, 0], marks[:, 1], s=26, marker="+", color=COLOURS[1], linewidths=0.9)
        if not inside.all():
            note = f"{(~inside).sum()} of {len(xy)} points outside"
            corner = {"ha": "right", "va": "bottom", "transform": axes.transAxes}
            box = {"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 2}
            axes.text(0.975, 0.025, note, fontsize=8, color=INK, bbox=box, **corner)
        axes.set_xlim(middle[0] - half, middle[0] + half)
        axes.set_ylim(middle[1] - half, middle[1] + half)
        axes.set_aspect("equal")
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set_color("#d0d7de")
    canvas.save(path, figure)


def pixels(x, what: str) -> np.ndarray:
    """Images [N, H, W, C] in [0, 1] as bytes; ValueError, naming `what`, for other shapes, NaN or Inf, or none."""
    x = np.asarray(x)
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape:
        raise ValueError(f"Images of {what} have shape {x.shape}; expected [N, H, W, C] with C = 1 or 3 and N >= 1.")
    bad = ~np.isfinite(x).all(axis=(1, 2, 3))
    if bad.any():
        raise ValueError(f"Images of {what}: {bad.sum()} of {len(x)} hold NaN or Inf, the first is {np.argmax(bad)}.")
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)


def _points(xy, what: str) -> np.ndarray:
    xy = np.asarray(xy, np.float64)
    if xy.ndim != 2 or xy.shape[1] != 2:
        raise ValueError(f"Points of {what} have shape {xy.shape}; expected [N, 2].")
    return xy


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the `window` around each, fewer at the ends; NaN where there are none."""
    finite = np.isfinite(values)
    sums, counts = (
        np.concatenate([[0.0], np.cumsum(a)]) for a in (np.where(finite, values, 0.0), finite.astype(np.float64))
    )
    index = np.arange(len(values))
    start, end = np.maximum(index - (window - 1) // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    count = counts[end] - counts[start]
    return np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)


def _font(size: int, bold: bool = False):
    import matplotlib
    from PIL import ImageFont

    # Pillow's own font has no Greek; matplotlib always brings DejaVu.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
