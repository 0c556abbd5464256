"""What people look at: masks, lengths of a data set, curves and margins of a run, and what the benchmark measured."""

from prefix_sharing.reports.curves import draw_curves
from prefix_sharing.reports.margins import report_margins

__all__ = ["draw_curves", "report_margins"]
