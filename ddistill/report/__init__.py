"""Pictures of what a run produced: sheets of samples, loss curves, scatter plots, quality against diversity."""

from ddistill.report.pictures import image_grid, save_loss_plot, save_sample_sheet, save_scatter
from ddistill.report.trade_off import Point, trade_off, trade_off_figure

__all__ = [
    "Point",
    "image_grid",
    "save_loss_plot",
    "save_sample_sheet",
    "save_scatter",
    "trade_off",
    "trade_off_figure",
]
