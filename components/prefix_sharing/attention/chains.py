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
        row (Row): the row; its ``chains`` are used, its tensors only for their device.
    """

    def __init__(self, row: Row) -> None:
        length = row.tokens.shape[1]
        chains = row.chains
        self._query_sizes = [end - start for start, end in (chain.span for chain in chains)]
        self._query_sizes.append(length - sum(self._query_sizes))

        # Keys are split wherever a chain begins or a set of ancestors ends, and put together again for each chain.
        spans = [span for chain in chains for span in (chain.span, *chain.ancestors)]
        cuts = sorted({0, length, *itertools.chain.from_iterable(spans)})
        self._key_sizes = [end - start for start, end in itertools.pairwise(cuts)]
        piece_at = {start: piece for piece, start in enumerate(cuts)}
        self._key_pieces = [
            [piece for start, end in (*chain.ancestors, chain.span) for piece in range(piece_at[start], piece_at[end])]
            for chain in chains
        ]
        self._masks = [
            _lower_right(chain.span[1] - chain.span[0], sum(end - start for start, end in chain.ancestors), row)
            for chain in chains
        ]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of every row to the rows it may see.

        Args:
            q (torch.Tensor): queries, shape ``[1, heads, s, head_dim]``.
            k (torch.Tensor): keys, shape ``[1, kv_heads, s, head_dim]``.
            v (torch.Tensor): values, shape ``[1, kv_heads, s, head_dim]``.

        Returns:
            torch.Tensor: shape ``[1, heads, s, head_dim]``; zero at padding.
        """
        # split, not slices: the backward of a slice fills a whole row with zeros.
        *queries, padding = q.split(self._query_sizes, dim=2)
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
