"""What all plots share: colours, a figure without a window, plain axes, and the file that it becomes."""

import io
from pathlib import Path

INK, FAINT = "#1f2328", "#6e7781"
# Okabe & Ito's palette, told apart by colour-blind readers too, without its yellow, which is too pale for lines.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#555555")


def figure(width: float, height: float):
    """A matplotlib figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, and no display needed.
    made = Figure(figsize=(width, height), dpi=150, facecolor="white")
    made.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)  # inches
    FigureCanvasAgg(made)
    return made


def plain(axes, title: str, xlabel: str, ylabel: str) -> None:
    """Axes with a title on the left, names, a faint grid behind the data, and one line below."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=10)
    axes.set_xlabel(xlabel, fontsize=11, color=INK)
    axes.set_ylabel(ylabel, fontsize=11, color=INK)
    axes.grid(which="major", color="#d0d7de", linewidth=0.7)
    axes.grid(which="minor", axis="y", color="#eaeef2", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=10, colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def save(path: str | Path, made) -> None:
    """Write a figure as PNG, and the folders on the way. Raises OSError where `path` cannot be written."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png")
    write(path, buffer)


def write(path: str | Path, buffer: io.BytesIO) -> None:
    """Write a picture's bytes, and the folders on the way. Raises OSError where `path` cannot be written."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"Cannot write the picture {path}: {reason}. Give a file in a folder you may write to."
        ) from error
