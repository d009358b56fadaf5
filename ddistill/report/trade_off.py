"""Quality against diversity: one line per method through its points, over steps or over a weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddistill.report import canvas
from ddistill.report.canvas import COLOURS, FAINT, INK

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":")


@dataclass(frozen=True)
class Point:
    """A measured pair, larger being better in both: give a Fréchet distance with a minus.

    label: what tells the points of a line apart, such as the number of steps. Errors are half their bars.
    """

    quality: float
    diversity: float
    label: str = ""
    quality_error: float | None = None
    diversity_error: float | None = None


def trade_off(
    path: str | Path,
    points: Mapping[str, Sequence[Point]],
    *,
    references: Mapping[str, Point] | None = None,
    quality: str = "precision",
    diversity: str = "recall",
    title: str = "Quality against diversity",
) -> None:
    """Save a PNG of `trade_off_figure`, and the folders on the way. Raises OSError where `path` cannot be written."""
    canvas.save(path, trade_off_figure(points, references, quality=quality, diversity=diversity, title=title))


def trade_off_figure(
    points: Mapping[str, Sequence[Point]],
    references: Mapping[str, Point] | None = None,
    *,
    quality: str = "precision",
    diversity: str = "recall",
    title: str = "Quality against diversity",
):
    """A matplotlib figure with a line for each name of `points`, in the order of its points, and stars for references.

    quality, diversity: the names of the axes, x and y. References are what lines are read against: the teacher, or
    other data. Points that are not finite leave a gap. Raises ValueError where nothing is given, or a line is empty.
    """
    references = references or {}
    empty = [name for name, line in points.items() if not line]
    if empty or not (points or references):
        what = f"{', '.join(empty)} without a point" if empty else "nothing"
        raise ValueError(f"Given {what}; expected a mapping of names to one or more points each.")
    figure = canvas.figure(8, 5)
    axes = figure.add_subplot()
    for index, (name, line) in enumerate(points.items()):
        # Colours return after seven lines with other markers and dashes, so that no two of 147 look alike.
        again = index // len(COLOURS)
        style = {
            "color": COLOURS[index % len(COLOURS)],
            "marker": _MARKERS[(index + again) % len(_MARKERS)],
            "linestyle": _DASHES[again % len(_DASHES)],
        }
        axes.plot([p.quality for p in line], [p.diversity for p in line], label=name, linewidth=1.6, **style)
        for p in line:
            _bars(axes, p, style["color"])
            _name(axes, p)
    for index, (name, p) in enumerate(references.items()):
        colour = (INK, FAINT)[index % 2]
        axes.plot([p.quality], [p.diversity], label=name, color=colour, marker="*", markersize=13, linestyle="none")
        _bars(axes, p, colour)
        _name(axes, p)
    canvas.plain(axes, title, quality, diversity)
    axes.margins(0.08)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, **beside)
    return figure


def _bars(axes, p: Point, colour: str) -> None:
    if p.quality_error is not None or p.diversity_error is not None:
        axes.errorbar(
            p.quality, p.diversity, xerr=p.quality_error, yerr=p.diversity_error,
            fmt="none", ecolor=colour, elinewidth=1, capsize=2, alpha=0.7,
        )  # fmt: skip


def _name(axes, p: Point) -> None:
    if p.label:
        axes.annotate(
            p.label, (p.quality, p.diversity), xytext=(5, 4), textcoords="offset points", fontsize=8, color=FAINT
        )
