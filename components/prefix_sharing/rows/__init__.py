"""From token sequences to the rows the model reads: tree, row, and which examples share a row."""

from prefix_sharing.rows.plan import Plan, Step, deal_rows
from prefix_sharing.rows.row import Row, bucket_length
from prefix_sharing.rows.tree import Chain, PrefixTree, Response

__all__ = ["Chain", "Plan", "PrefixTree", "Response", "Row", "Step", "bucket_length", "deal_rows"]
