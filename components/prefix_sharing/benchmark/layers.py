"""Parts of a layer by themselves, prompt shared against prompt repeated: Figures 3 to 5 of arXiv 2410.20305.

=============== ====================================================================
part            what is timed, forward and backward
=============== ====================================================================
mlp             the MLP
attention       attention alone, from queries, keys and values, with each backend
attention_layer projections, rotary embeddings and attention, with each backend
=============== ====================================================================
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from prefix_sharing.attention import AttentionBackend, TreeMask, mask_builder, rounding_of
from prefix_sharing.hosts.torchtune import TreeAttention, TreeTransformerLayer
from prefix_sharing.trees import PrefixTree, Response, Row, RowOptions

PARTS = ("mlp", "attention", "attention_layer")


def one_pair(prefix: int, completion: int) -> list[Response]:
    """A pair that makes a tree of ``prefix`` and twice ``completion`` tokens.

    Args:
        prefix (int): tokens in the prompt.
        completion (int): tokens of each response that the model reads.

    Returns:
        list[Response]: chosen and rejected.
    """
    scored = np.arange(prefix + completion + 1) >= prefix  # the last one is a target only
    return [Response(np.repeat([0, token], [prefix, completion + 1]), scored) for token in (1, 2)]


def first_layer(model: nn.Module) -> TreeTransformerLayer:
    """The first layer of a model, checkpointed or not."""
    return next(module for module in model.modules() if isinstance(module, TreeTransformerLayer))


def random_qkv(attn: TreeAttention, length: int, device: torch.device, autocast: torch.autocast) -> list[torch.Tensor]:
    """Queries, keys and values of a Row, in the precision that projections give.

    Args:
        attn (TreeAttention): torchtune's attention, for its numbers of heads.
        length (int): tokens in the Row.
        device (torch.device): where they lie.
        autocast (torch.autocast): the precision.

    Returns:
        list[torch.Tensor]: each of shape ``[1, heads, length, head_dim]``, with gradients.
    """
    with autocast:
        enabled = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if enabled else torch.float32
    return [
        torch.randn(1, heads, length, attn.head_dim, device=device, dtype=dtype, requires_grad=True)
        for heads in (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads)
    ]


def synchronize(device: torch.device) -> None:
    """Waits for the device; a CPU has nothing to wait for."""
    torch.get_device_module(device).synchronize()


def time_layers(
    layer: TreeTransformerLayer,
    device: torch.device,
    *,
    backends: Sequence[AttentionBackend],
    prefix_lengths: Sequence[int],
    completion_lengths: Sequence[int],
    rounds: int,
    autocast: torch.autocast,
    progress: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    """Times each part on one pair, shared and repeated in turns.

    Args:
        layer (TreeTransformerLayer): any layer of a tree model.
        device (torch.device): where it is.
        backends (Sequence[AttentionBackend]): those that can train there.
        prefix_lengths (Sequence[int]): lengths of the prompt.
        completion_lengths (Sequence[int]): lengths of each response.
        rounds (int): times that count, after one that does not.
        autocast (torch.autocast): the precision.
        progress (Callable[[], None]): called after each measurement.

    Yields:
        dict[str, Any]: ``part, backend, prefix, completion``; medians ``shared_s`` and ``repeated_s``; their ratio
        ``speed_up``; and ``ideal``, the ratio of the floating-point operations.
    """
    for prefix in prefix_lengths:
        for completion in completion_lengths:
            pair = one_pair(prefix, completion)
            for part in PARTS:
                for backend in [None] if part == "mlp" else backends:
                    runs = [_run(layer, part, backend, pair, share, device, autocast) for share in (True, False)]
                    shared, repeated = _medians_in_turns(runs, rounds, device)
                    yield {
                        "part": part,
                        "backend": backend,
                        "prefix": prefix,
                        "completion": completion,
                        "shared_s": shared,
                        "repeated_s": repeated,
                        "speed_up": repeated / shared,
                        "ideal": _flops(layer, part, pair, False) / _flops(layer, part, pair, True),
                    }
                    progress()


def _run(
    layer: TreeTransformerLayer,
    part: str,
    backend: AttentionBackend | None,
    pair: list[Response],
    share_prefix: bool,
    device: torch.device,
    autocast: torch.autocast,
) -> Callable[[], None]:
    """One forward and backward pass of a part."""
    options = RowOptions(share_prefix, None if backend is None else rounding_of(backend))
    row = Row.from_examples([pair], options=options).to(device)
    length, attn = row.tokens.shape[1], layer.attn
    hidden = [torch.randn(1, length, attn.embed_dim, device=device, requires_grad=True)]
    forward: Callable[..., torch.Tensor]
    if backend is None:
        forward, inputs = layer.mlp, hidden
    else:
        mask = mask_builder(backend)(row)
        if part == "attention":
            forward, inputs = mask.attend, random_qkv(attn, length, device, autocast)
        else:
            forward, inputs = functools.partial(_attention_layer, attn, mask, row), hidden
    with torch.no_grad(), autocast:
        gradient = torch.randn_like(forward(*inputs))

    def run() -> None:
        with autocast:
            output = forward(*inputs)
        output.backward(gradient)
        for tensor in (*inputs, *layer.parameters()):
            tensor.grad = None

    return run


def _attention_layer(attn: TreeAttention, mask: TreeMask, row: Row, x: torch.Tensor) -> torch.Tensor:
    return attn(x, x, mask=mask, input_pos=row.input_pos, query_pos=row.input_pos)


def _medians_in_turns(runs: Sequence[Callable[[], None]], rounds: int, device: torch.device) -> list[float]:
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for of_run, run in zip(seconds, runs, strict=True):
            start = time.perf_counter()
            run()
            synchronize(device)
            of_run.append(time.perf_counter() - start)
    return [statistics.median(of_run[1:]) for of_run in seconds]


def _flops(layer: TreeTransformerLayer, part: str, pair: list[Response], share_prefix: bool) -> float:
    """Forward; the backward pass costs the same multiple of it, shared or not."""
    size = PrefixTree.from_responses(pair, share_prefix=share_prefix).size
    attn = layer.attn
    scores = 4.0 * attn.num_heads * attn.head_dim * size.num_visible
    if part == "attention":
        return scores
    weights = sum(p.numel() for p in (layer.mlp if part == "mlp" else attn).parameters() if p.dim() > 1)
    return 2.0 * weights * size.num_tokens + (scores if part == "attention_layer" else 0.0)
