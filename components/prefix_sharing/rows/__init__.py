"""From token sequences to the rows the model reads: tree, row, and which examples share a row."""

from prefix_sharing.rows.packing import deal, first_fit_decreasing, lower_bound, pack
from prefix_sharing.rows.plan import Epoch, ExampleSizes, Plan, Step
from prefix_sharing.rows.report import PlanReport, report_plan
from prefix_sharing.rows.row import Row, bucket_length
from prefix_sharing.rows.tree import Chain, PrefixTree, Response, TreeSize, common_prefix_length

__all__ = [
    "Chain",
    "Epoch",
    "ExampleSizes",
    "Plan",
    "PlanReport",
    "PrefixTree",
    "Response",
    "Row",
    "Step",
    "TreeSize",
    "bucket_length",
    "common_prefix_length",
    "deal",
    "first_fit_decreasing",
    "lower_bound",
    "pack",
    "report_plan",
]
