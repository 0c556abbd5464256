"""What is done to a model layer by layer, whatever library it is of: compilation and activation checkpointing."""

import functools
import logging

from torch.utils.checkpoint import create_selective_checkpoint_contexts

from prefix_sharing.hosts.tree_model import TreeModel
from prefix_sharing.torch_private import (
    apply_activation_checkpointing,
    attention_operators,
    checkpoint_wrapper,
    raise_recompile_limits,
)

log = logging.getLogger(__name__)


def compile_layers(model: TreeModel) -> None:
    """Compiles each layer with ``torch.compile``, at its first forward pass.

    Args:
        model (TreeModel): before it is checkpointed or sharded.
    """
    log.info("Compiling %d layers with torch.compile", len(model.layers))
    # All layers share the graphs of one function, and a library that wraps each layer's forward in the same function
    # more than once, as transformers does, comes to more than dynamo's 8.
    raise_recompile_limits(64, accumulated=1024)
    for layer in model.layers:
        layer.compile(dynamic=True)  # lengths differ from Row to Row


def checkpoint_activations(model: TreeModel, ac_mode: str) -> None:
    """Has layers compute their activations again in the backward pass.

    Args:
        model (TreeModel): before it is sharded.
        ac_mode (str): ``full`` keeps nothing but each layer's input. ``selective`` also keeps the output of attention,
            the costliest to compute again for its size, and all of the last layer, which is computed for few tokens.
    """
    wrap, layers = checkpoint_wrapper, set(model.layers)
    if ac_mode == "selective":
        keep_attention = functools.partial(create_selective_checkpoint_contexts, attention_operators())
        wrap = functools.partial(checkpoint_wrapper, context_fn=keep_attention)
        layers.remove(model.layers[-1])
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=layers.__contains__)
