"""Tree attention as one call to scaled dot product attention per chain: any device, with a backward everywhere.

Holds no token x token mask of the Row and computes no masked-out score but those above the diagonal.
"""

import itertools

import torch
import torch.nn.functional as F
from typing_extensions import override

from prefix_sharing.attention.tree_mask import TreeMask, padded_values
from prefix_sharing.trees import Row


class ChainsMask(TreeMask):
    """The mask of one Row as chains: which keys each sees, and small masks for those that see more than their own."""

    def __init__(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> None:
        length = row.tokens.shape[1]
        chains = row.chains
        # Keys are split wherever a chain begins or a set of ancestors ends, and put together again for each chain.
        spans = [span for chain in chains for span in (chain.span, *chain.ancestors)]
        cuts = sorted({0, length, *itertools.chain.from_iterable(spans)})
        self._key_sizes = [end - start for start, end in itertools.pairwise(cuts)]
        piece_at = {start: piece for piece, start in enumerate(cuts)}

        self._query_sizes: list[int] = []
        self._key_pieces: list[list[int]] = []
        self._masks: list[torch.Tensor | None] = []
        for chain, predictors in zip(chains, row.predictor_spans, strict=True):
            (start, end), ancestors = chain.span, chain.ancestors
            size = sum(b - a for a, b in predictors) if at_predictors else end - start
            if size == 0:
                continue
            self._query_sizes.append(size)
            self._key_pieces.append(
                [piece for a, b in (*ancestors, chain.span) for piece in range(piece_at[a], piece_at[b])]
            )
            # The keys of a chain are a path from the root: the position of each is its index.
            num_ancestors = sum(b - a for a, b in ancestors)
            num_keys = num_ancestors + end - start
            if num_ancestors == 0 and not at_predictors and (window is None or num_keys <= window):
                self._masks.append(None)  # plain causal attention
                continue
            query_index = torch.arange(start, end, device=row.tokens.device)
            if at_predictors:
                first = sum(self._query_sizes[:-1])
                query_index = row.predictor_index[first : first + size]
            position = (query_index - start + num_ancestors)[:, None]
            keys = torch.arange(num_keys, device=query_index.device)
            visible = keys <= position
            self._masks.append(visible if window is None else visible & (keys > position - window))
        self._padding = 0 if at_predictors else length - sum(self._query_sizes)

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
        """Zero at padding."""
        value_size, v = v.shape[3], padded_values(k, v)
        # split, not slices: the backward of a slice fills a whole Row with zeros.
        *queries, padding = q.split([*self._query_sizes, self._padding], dim=2)
        keys, values = k.split(self._key_sizes, dim=2), v.split(self._key_sizes, dim=2)
        outputs = []
        for query, pieces, mask in zip(queries, self._key_pieces, self._masks, strict=True):
            key, value = _join(keys, pieces), _join(values, pieces)
            if softcap is None:
                attended = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            else:
                attended = _softcapped_attention(query, key, value, mask, scale, softcap)
            outputs.append(attended)
        return torch.cat([*outputs, padding.new_zeros(*padding.shape[:3], v.shape[3])], dim=2)[..., :value_size]


def _join(pieces: tuple[torch.Tensor, ...], indices: list[int]) -> torch.Tensor:
    return torch.cat([pieces[i] for i in indices], dim=2) if len(indices) > 1 else pieces[indices[0]]


def _softcapped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, softcap: float
) -> torch.Tensor:
    """What scaled dot product attention cannot do; holds the scores of one chain."""
    num_queries, num_keys, num_groups = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if mask is None:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril()
    # The queries of heads that share K and V go one below the other.
    q = q.unflatten(1, (-1, num_groups)).flatten(2, 3)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    output = scores.masked_fill(~mask.repeat(num_groups, 1), float("-inf")).softmax(-1) @ v
    return output.unflatten(2, (num_groups, -1)).flatten(1, 2)
