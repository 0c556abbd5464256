"""torchtune's models: tree attention, adapters, quantized weights, and torchtune's checkpointers.

Everything that touches a private name of torchtune's models or checkpoints is in this room.
"""

from prefix_sharing.hosts.torchtune.generation import AnswerModel
from prefix_sharing.hosts.torchtune.geometry import missing_window
from prefix_sharing.hosts.torchtune.model import (
    TreeAttention,
    TreeTransformerDecoder,
    TreeTransformerLayer,
    to_tree_model,
)
from prefix_sharing.hosts.torchtune.paired import PairedModel
from prefix_sharing.hosts.torchtune.self_check import check_arithmetic
from prefix_sharing.hosts.torchtune.weights import (
    load_checkpoint,
    load_trained_checkpoint,
    merged_weights,
    read_weight_file,
    save_checkpoint,
)

__all__ = [
    "AnswerModel",
    "PairedModel",
    "TreeAttention",
    "TreeTransformerDecoder",
    "TreeTransformerLayer",
    "check_arithmetic",
    "load_checkpoint",
    "load_trained_checkpoint",
    "merged_weights",
    "missing_window",
    "read_weight_file",
    "save_checkpoint",
    "to_tree_model",
]
