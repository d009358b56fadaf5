"""Pictures of what a run produced: sheets of samples, loss curves, scatter plots."""

from ddistill.report.pictures import image_grid, save_loss_plot, save_sample_sheet, save_scatter

__all__ = ["image_grid", "save_loss_plot", "save_sample_sheet", "save_scatter"]
