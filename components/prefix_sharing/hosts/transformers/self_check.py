"""The self-check of a model of transformers, by its own eager attention."""

import copy
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_sharing.hosts.self_check import (
    NARROW_MLP,
    SHORT_WINDOW,
    SMALL_VOCAB,
    Differences,
    compare,
    num_layers_to_try,
)
from prefix_sharing.hosts.transformers.model import materialize, refuse_unsupported, to_tree_model


def check_arithmetic(model: PreTrainedModel, *, gradients: bool = False) -> Differences:
    """Compares a small random tree with its sequences one by one, on a small model with the same config.

    Args:
        model (PreTrainedModel): the model, on any device; not changed. An adapter of PEFT, which computes each token by
            itself, is left out.
        gradients (bool): whether gradients are compared, too. Default: False.

    Returns:
        Differences: what is found, if it is no more than rounding.

    Raises:
        ConfigError: if it is more.
    """
    refuse_unsupported(model)
    config = _small_config(model.config, num_layers_to_try(model.get_decoder().layers))
    return compare(
        config.model_type,
        build_small=lambda: _build(config),
        plain_logits=lambda small, tokens: small(input_ids=tokens, use_cache=False).logits,
        to_tree_model=lambda small: to_tree_model(cast(PreTrainedModel, small), "chains"),
        vocab_size=config.vocab_size,
        gradients=gradients,
    )


def _build(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    materialize(model, torch.device("cpu"))
    return model


def _small_config(config: Any, num_layers: int) -> Any:
    config = copy.deepcopy(config)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers:  # an entry a layer
            setattr(config, name, value[:num_layers])
        elif isinstance(value, int) and name.endswith("intermediate_size"):
            setattr(config, name, min(value, NARROW_MLP))
    config.num_hidden_layers = num_layers
    if getattr(config, "sliding_window", None):
        config.sliding_window = min(config.sliding_window, SHORT_WINDOW)
    config.vocab_size = min(config.vocab_size, SMALL_VOCAB)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    return config
