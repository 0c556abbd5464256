"""Tree attention as one call to FlashAttention over sequences of different lengths: CUDA, bf16.

Every chain is one such sequence: its queries are its own rows, its keys those of its ancestors and its own, causal and
aligned at the lower right. FlashAttention has to find the keys of a sequence side by side, so K and V are gathered once
per layer, those of a shared prefix once for each chain below it.
"""

import functools
import inspect
import itertools

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from typing_extensions import override

from prefix_sharing.attention.tree_mask import TreeMask, padded_values
from prefix_sharing.trees import Row


@functools.cache
def has_grouped_queries() -> bool:
    """Whether this torch's ``varlen_attn`` takes fewer heads of keys than of queries."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


class VarlenMask(TreeMask):
    """The mask of one Row as sequences: its chains or, at predictors, each run of predictors within a chain."""

    def __init__(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> None:
        # The keys of a chain are a path from the root, so positions and places in the sequence are the same.
        self._window_size = (-1 if window is None else window - 1, 0)
        device = row.tokens.device
        query_sizes, key_spans, key_sizes = [], [], []
        for chain, predictors in zip(row.chains, row.predictor_spans, strict=True):
            for start, end in predictors if at_predictors else [chain.span]:
                spans = [*chain.ancestors, (chain.span[0], end)]
                query_sizes.append(end - start)
                key_spans += spans
                key_sizes.append(sum(b - a for a, b in spans))
        self._num_queries = sum(query_sizes)
        self._max_queries, self._max_keys = max(query_sizes), max(key_sizes)

        def on_device(values: torch.Tensor) -> torch.Tensor:
            # From pinned memory, or the host would wait for the copy.
            return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)

        def offsets(sizes: list[int]) -> torch.Tensor:
            return on_device(torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32))

        self._query_offsets, self._key_offsets = offsets(query_sizes), offsets(key_sizes)
        self._keys = on_device(torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in key_spans])))

    @override
    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """As the base class says.

        Raises:
            NotImplementedError: if scores are to be capped, which this kernel cannot do.
        """
        if softcap is not None:
            raise NotImplementedError("varlen_attn cannot cap scores")
        value_size, v = v.shape[3], padded_values(k, v)
        # [1, heads, s, head_dim] -> [s, heads, head_dim]
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        queries, padding = q.split([self._num_queries, len(q) - self._num_queries])
        output = varlen_attn(
            queries,
            k.index_select(0, self._keys),
            v.index_select(0, self._keys),
            self._query_offsets,
            self._key_offsets,
            self._max_queries,
            self._max_keys,
            scale=scale,
            window_size=self._window_size,
            enable_gqa=True,
        )
        assert isinstance(output, torch.Tensor)  # not with its logsumexp
        output = torch.cat([output, padding.new_zeros(*padding.shape[:2], v.shape[2])])
        return output.transpose(0, 1)[None, ..., :value_size]
