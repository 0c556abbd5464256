"""Which host a model belongs to."""

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from prefix_sharing.attention import AttentionBackend
from prefix_sharing.hosts import torchtune
from prefix_sharing.hosts.tree_model import TreeModel


def to_tree_model(
    model: nn.Module, attention_backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None
) -> TreeModel:
    """Turns a built model of a host's library, in place, into one that takes a Row and returns its log-probs.

    Call it before compilation, activation checkpointing and sharding.

    Args:
        model (nn.Module): as torchtune's builders or ``prefix_sharing.hosts.transformers.causal_lm`` return it.
        attention_backend (AttentionBackend): see ``prefix_sharing.attention.choose_attention_backend``.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None.

    Returns:
        TreeModel: the same object.

    Raises:
        ConfigError: if the model has parts whose arithmetic tree attention does not cover.
    """
    if type(model).__module__.partition(".")[0] == "transformers":
        from prefix_sharing.hosts import transformers  # the library takes seconds to import

        return transformers.to_tree_model(cast(Any, model), attention_backend, kernel_options)
    return torchtune.to_tree_model(model, attention_backend, kernel_options)
