"""The FlexAttention block mask of a Row, by arithmetic from ``subtree_end``.

Token ``i`` may see token ``j`` exactly if ``j <= i < subtree_end[j]``. So a block of keys whose subtrees all end at or
before the first query of a later block is invisible to it, one whose subtrees all reach past its last query is seen
whole, and anything else is looked at token by token. No block of scores is ever built, and the host never waits for
the device.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask


def tree_block_mask(
    subtree_end: torch.Tensor,
    block_size: int = 128,
    query_index: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    window: int | None = None,
) -> BlockMask:
    """Builds the mask that ``create_block_mask`` would find by trying every pair of tokens.

    Args:
        subtree_end (torch.Tensor): index just past the subtree of each token, shape ``[s]``. Padding sees itself
            alone, ``subtree_end[j] = j + 1``.
        block_size (int): tokens in a block of queries and of keys. Default: 128.
        query_index (torch.Tensor | None): the tokens that look, ascending, shape ``[p]``. A block of them is then
            judged by its first and its last token, so some blocks are looked at token by token that need not be.
            Default: None, all tokens.
        positions (torch.Tensor | None): position of each token in its response, shape ``[s]``; needed with ``window``.
            Default: None.
        window (int | None): how many positions a token may see, its own included. Default: None, all.

    Returns:
        BlockMask: for one Row and all heads, on the device of ``subtree_end``.
    """
    length, device = len(subtree_end), subtree_end.device
    num_blocks = -(-length // block_size)
    end = torch.arange(1, num_blocks * block_size + 1, device=device)
    end[:length] = subtree_end
    end = end.view(num_blocks, block_size)
    first_key = torch.arange(num_blocks, device=device) * block_size
    last_key = first_key + block_size - 1
    if query_index is None:
        first_query, last_query = first_key, last_key
    else:
        first_in_block = torch.arange(0, len(query_index), block_size, device=device)
        first_query = query_index[first_in_block]
        last_query = query_index[(first_in_block + block_size - 1).clamp_(max=len(query_index) - 1)]

    # [query block, key block]
    seen = (first_key[None, :] <= last_query[:, None]) & (end.amax(1)[None, :] > first_query[:, None])
    full = (last_key[None, :] <= first_query[:, None]) & (end.amin(1)[None, :] > last_query[:, None])

    if window is not None:
        assert positions is not None
        of_keys = _by_block(positions, block_size)
        of_queries = of_keys if query_index is None else _by_block(positions[query_index], block_size)
        # The nearest and the farthest that a key of the block can be, in positions.
        seen &= of_queries.amin(1)[:, None] - of_keys.amax(1)[None, :] < window
        full &= of_queries.amax(1)[:, None] - of_keys.amin(1)[None, :] < window

    def visible(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        i = q_idx if query_index is None else query_index[q_idx]
        in_subtree = (kv_idx <= i) & (i < subtree_end[kv_idx])
        if window is None or positions is None:
            return in_subtree
        return in_subtree & (positions[i] - positions[kv_idx] < window)

    return BlockMask.from_kv_blocks(
        *_counts_and_indices(seen & ~full),
        *_counts_and_indices(full),
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(length if query_index is None else len(query_index), length),
    )


def _by_block(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """As ``[n, block_size]``, the last block filled up with the last value."""
    missing = -len(values) % block_size
    return torch.cat([values, values[-1:].expand(missing)]).view(-1, block_size)


def _counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block meets, ``[1, 1, m]``, and which, those met first, ``[1, 1, m, n]``."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
