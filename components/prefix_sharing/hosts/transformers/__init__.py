"""Decoders of transformers: tree attention within the model's own code, and directories as transformers saves them."""

from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("peft") is None:
    problem = (
        "models of transformers need it: pip install 'torchtune-prefix-sharing[transformers]' (Python 3.11 or newer)"
    )
    raise ImportError(problem)

from prefix_sharing.hosts.transformers.directory import causal_lm, lora_causal_lm
from prefix_sharing.hosts.transformers.generation import AnswerModel
from prefix_sharing.hosts.transformers.model import TreeCausalLM, to_tree_model
from prefix_sharing.hosts.transformers.paired import PairedModel
from prefix_sharing.hosts.transformers.self_check import check_arithmetic
from prefix_sharing.hosts.transformers.weights import (
    checkpointer,
    load_checkpoint,
    load_trained_checkpoint,
    merged_weights,
    read_weight_file,
    save_checkpoint,
)

__all__ = [
    "AnswerModel",
    "PairedModel",
    "TreeCausalLM",
    "causal_lm",
    "check_arithmetic",
    "checkpointer",
    "load_checkpoint",
    "load_trained_checkpoint",
    "lora_causal_lm",
    "merged_weights",
    "read_weight_file",
    "save_checkpoint",
    "to_tree_model",
]
