"""Which examples an optimizer step takes, which of them share a Row, and which rank computes the Row."""

from prefix_sharing.planning.plan import ByLength, Epoch, ExampleSizes, Fixed, Packing, Plan, Step, WholeDataset
from prefix_sharing.planning.report import PlanReport, report_plan

__all__ = [
    "ByLength",
    "Epoch",
    "ExampleSizes",
    "Fixed",
    "Packing",
    "Plan",
    "PlanReport",
    "Step",
    "WholeDataset",
    "report_plan",
]
