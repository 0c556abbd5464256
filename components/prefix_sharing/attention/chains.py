"""Tree attention as one call to scaled dot product attention a chain: any device, with a backward everywhere.

Holds no row x row mask and computes no masked-out score but those above the diagonal.
"""

import itertools

import torch
import torch.nn.functional as F

from prefix_sharing.rows import Row


class ChainsMask:
    """The mask of one row, made once and used by every layer.

    Args:
        row (Row): the row.
        at_predictors (bool): whether the queries are those of ``row.predictors`` only, as in the last layer.
            Default: False, those of every row.
    """

    def __init__(self, row: Row, *, at_predictors: bool = False) -> None:
        length = row.tokens.shape[1]
        chains = row.chains
        # Keys are split wherever a chain begins or a set of ancestors ends, and put together again for each chain.
        spans = [span for chain in chains for span in (chain.span, *chain.ancestors)]
        cuts = sorted({0, length, *itertools.chain.from_iterable(spans)})
        self._key_sizes = [end - start for start, end in itertools.pairwise(cuts)]
        piece_at = {start: piece for piece, start in enumerate(cuts)}

        self._query_sizes, self._key_pieces, self._masks = [], [], []
        for chain, predictors in zip(chains, row.predictor_spans, strict=True):
            (start, end), ancestors = chain.span, chain.ancestors
            size = sum(b - a for a, b in predictors) if at_predictors else end - start
            if size == 0:
                continue
            self._query_sizes.append(size)
            self._key_pieces.append(
                [piece for a, b in (*ancestors, chain.span) for piece in range(piece_at[a], piece_at[b])]
            )
            num_ancestors = sum(b - a for a, b in ancestors)
            if at_predictors:
                first = sum(self._query_sizes[:-1])
                last_key = row.predictors[first : first + size] - start + num_ancestors
                keys = torch.arange(num_ancestors + end - start, device=last_key.device)
                self._masks.append(keys <= last_key[:, None])
            else:
                self._masks.append(_lower_right(size, num_ancestors, row))
        self._padding = 0 if at_predictors else length - sum(self._query_sizes)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the queries to the rows they may see.

        Args:
            q (torch.Tensor): queries, shape ``[1, heads, s, head_dim]``, or ``p`` in place of s.
            k (torch.Tensor): keys, shape ``[1, kv_heads, s, head_dim]``.
            v (torch.Tensor): values, shape ``[1, kv_heads, s, head_dim]``.

        Returns:
            torch.Tensor: the shape of ``q``; zero at padding.
        """
        # split, not slices: the backward of a slice fills a whole row with zeros.
        *queries, padding = q.split([*self._query_sizes, self._padding], dim=2)
        keys, values = k.split(self._key_sizes, dim=2), v.split(self._key_sizes, dim=2)
        outputs = [
            F.scaled_dot_product_attention(
                query,
                _join(keys, pieces),
                _join(values, pieces),
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=True,
            )
            for query, pieces, mask in zip(queries, self._key_pieces, self._masks, strict=True)
        ]
        return torch.cat([*outputs, torch.zeros_like(padding)], dim=2)


def _join(pieces: tuple[torch.Tensor, ...], indices: list[int]) -> torch.Tensor:
    return torch.cat([pieces[i] for i in indices], dim=2) if len(indices) > 1 else pieces[indices[0]]


def _lower_right(num_queries: int, num_ancestors: int, row: Row) -> torch.Tensor | None:
    """Causal mask aligned at the lower right, or None where plain causal attention is the same."""
    if num_ancestors == 0:
        return None
    ones = torch.ones(num_queries, num_ancestors + num_queries, dtype=torch.bool, device=row.tokens.device)
    return ones.tril(num_ancestors)
