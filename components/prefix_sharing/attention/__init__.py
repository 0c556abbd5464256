"""Tree attention: the mask of a Row, and the backends that compute with it."""

from prefix_sharing.attention.backend import (
    AttentionBackend,
    choose_attention_backend,
    mask_builder,
    rounding_of,
)
from prefix_sharing.attention.block_mask import tree_block_mask
from prefix_sharing.attention.chains import ChainsMask
from prefix_sharing.attention.flex import FlexMask
from prefix_sharing.attention.tree_mask import TreeMask
from prefix_sharing.attention.varlen import VarlenMask

__all__ = [
    "AttentionBackend",
    "ChainsMask",
    "FlexMask",
    "TreeMask",
    "VarlenMask",
    "choose_attention_backend",
    "mask_builder",
    "rounding_of",
    "tree_block_mask",
]
