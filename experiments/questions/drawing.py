"""Pictures of what the experiments on the slides' questions measured, with error bars over seeds."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Okabe & Ito's palette, told apart by colour-blind readers too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")


@dataclass(frozen=True)
class Panel:
    """Lines against x; each line is a value, or an array over seeds, for every x.

    Where x are names, they stand one below the other, and values are horizontal: log and levels are then theirs.
    lines: by label. log: the axes that are logarithmic, "x", "y" or both. levels: what is true, as dashed lines.
    """

    title: str
    xlabel: str
    ylabel: str
    x: Sequence[Any]
    lines: Mapping[str, Sequence[Any]]
    log: str = ""
    levels: Mapping[str, float] = field(default_factory=dict)


def picture(out: str | Path | None, *panels: Panel) -> None:
    """Draw the panels side by side, means with bars of one standard deviation over seeds; nothing where out is None."""
    if out is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for i, panel in enumerate(panels):
        _draw(figure.add_subplot(1, len(panels), i + 1), panel)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=80, format="png")
    Image.open(drawn).convert("RGB").quantize(48).save(out, optimize=True)


def _draw(axes, panel: Panel) -> None:
    names = isinstance(panel.x[0], str)
    place = np.arange(len(panel.x)) if names else np.asarray(panel.x, float)
    for i, (label, values) in enumerate(panel.lines.items()):
        over_seeds = [np.atleast_1d(np.asarray(v, float)) for v in values]
        mean = np.asarray([v.mean() for v in over_seeds])
        std = np.asarray([v.std(ddof=1) if v.size > 1 else 0.0 for v in over_seeds])
        look = {"ms": 3.5, "lw": 1.2, "capsize": 3, "color": _COLOURS[i % len(_COLOURS)], "label": label}
        if names:  # from the top down; next to each other, so that none hides another
            axes.errorbar(mean, place + 0.14 * (i - (len(panel.lines) - 1) / 2), xerr=std, fmt="o", **look)
        else:
            axes.errorbar(place, mean, std, fmt="o-", **look)
    for label, level in panel.levels.items():
        (axes.axvline if names else axes.axhline)(level, color="#6e7781", ls="--", lw=1, label=label)
    if names:
        axes.set_yticks(place, panel.x, fontsize=8)
        axes.invert_yaxis()
    if "x" in panel.log:
        axes.set_xscale("log")
    if "y" in panel.log:
        axes.set_yscale("log")
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    if len(panel.lines) + len(panel.levels) > 1:
        axes.legend(fontsize=7)
