"""Hosts: libraries whose models are trained here. Nothing outside this room touches the code of a model.

A host turns a model into a ``TreeModel``, which takes a Row and returns the log-probs of its responses, and reads and
writes its weights.
"""

from prefix_sharing.hosts.dispatch import (
    build_answer_model,
    check_arithmetic,
    load_checkpoint,
    load_trained_checkpoint,
    merged_weights,
    paired_model,
    read_weight_file,
    save_checkpoint,
    to_tree_model,
)
from prefix_sharing.hosts.layers import checkpoint_activations, compile_layers
from prefix_sharing.hosts.torchtune import missing_window
from prefix_sharing.hosts.tree_model import TreeModel

__all__ = [
    "TreeModel",
    "build_answer_model",
    "check_arithmetic",
    "checkpoint_activations",
    "compile_layers",
    "load_checkpoint",
    "load_trained_checkpoint",
    "merged_weights",
    "missing_window",
    "paired_model",
    "read_weight_file",
    "save_checkpoint",
    "to_tree_model",
]
