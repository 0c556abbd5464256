"""The self-check of a model of torchtune, by torchtune's own forward."""

import torch
from torch import nn
from torchtune.modules import TransformerDecoder
from torchtune.modules.low_precision import FrozenNF4Linear

from prefix_sharing.hosts.self_check import (
    NARROW_MLP,
    SHORT_WINDOW,
    SMALL_VOCAB,
    Differences,
    compare,
    num_layers_to_try,
)
from prefix_sharing.hosts.torchtune.dora import leave_biases_alone
from prefix_sharing.hosts.torchtune.model import materialize, refuse_unsupported, to_tree_model
from prefix_sharing.hosts.torchtune.quantization import is_quantized


def check_arithmetic(name: str, model: TransformerDecoder, *, gradients: bool = False) -> Differences:
    """Compares a small random tree with its sequences one by one, on the model made small.

    QLoRA's base is checked without its quantization, which decides which numbers weights are, not what is computed.

    Args:
        name (str): what the model is called, for messages.
        model (TransformerDecoder): as its builder returns it, on the meta device; of no use afterwards.
        gradients (bool): whether gradients are compared, too. Default: False.

    Returns:
        Differences: what is found, if it is no more than rounding.

    Raises:
        ConfigError: if it is more.
    """
    refuse_unsupported(model)
    leave_biases_alone(model)
    return compare(
        name,
        build_small=lambda: _made_small(model),
        plain_logits=lambda small, tokens: small(tokens),
        to_tree_model=lambda small: to_tree_model(small, "chains"),
        vocab_size=min(model.tok_embeddings.num_embeddings, SMALL_VOCAB),
        gradients=gradients,
    )


def _made_small(model: TransformerDecoder) -> TransformerDecoder:
    model.layers = model.layers[: num_layers_to_try(model.layers)]
    vocab_size, width = model.tok_embeddings.weight.shape
    _narrow(model.tok_embeddings, vocab_size, SMALL_VOCAB, width)
    if isinstance(model.output, nn.Module):  # else tied
        _narrow(model.output, vocab_size, SMALL_VOCAB, width)
    model.tok_embeddings.num_embeddings = len(model.tok_embeddings.weight)
    for layer in model.layers:
        _narrow(layer.mlp, layer.mlp.w1.weight.shape[0], NARROW_MLP, width)
        if getattr(layer.attn, "sliding_window_size", None) is not None:
            layer.attn.sliding_window_size = min(layer.attn.sliding_window_size, SHORT_WINDOW)
    for module in model.modules():
        if hasattr(module, "rope_init"):
            module.max_seq_len = 64  # positions in its table
        if isinstance(module, FrozenNF4Linear):
            module.__class__ = nn.Linear
        if getattr(module, "_quantize_base", False):
            module._quantize_base = False
        if is_quantized(getattr(module, "weight", None)):
            module.weight = nn.Parameter(torch.empty(module.weight.shape, device="meta"))
    materialize(model, torch.device("cpu"))
    return model


def _narrow(part: nn.Module, size: int, most: int, width: int) -> None:
    """Cuts off every dimension of that size, if it is not also the width of hidden states, which stays."""
    if size == width:
        return
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shape = [most if length == size > most else length for length in parameter.shape]
            setattr(module, name, nn.Parameter(torch.empty(shape, device="meta")))
