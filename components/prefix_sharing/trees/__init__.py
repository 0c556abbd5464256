"""Prefix trees of token sequences, and the Rows of trees that a model reads."""

from prefix_sharing.trees.row import Row, RowOptions, bucket_length
from prefix_sharing.trees.tree import (
    NO_RESPONSE,
    Chain,
    PrefixTree,
    Response,
    Span,
    TreeSize,
    TreeSizes,
    common_prefix_length,
)

__all__ = [
    "NO_RESPONSE",
    "Chain",
    "PrefixTree",
    "Response",
    "Row",
    "RowOptions",
    "Span",
    "TreeSize",
    "TreeSizes",
    "bucket_length",
    "common_prefix_length",
]
