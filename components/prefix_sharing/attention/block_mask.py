"""The FlexAttention block mask of a row, by arithmetic from ``subtree_end``.

Row ``i`` may see row ``j`` exactly if ``j <= i < subtree_end[j]``. So a block of keys whose subtrees all end at or
before the first query of a later block is invisible to it, one whose subtrees all reach past its last query is seen
whole, and anything else is looked at token by token. No block of scores is ever built, and the host never waits for
the device.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask


def tree_block_mask(subtree_end: torch.Tensor, block_size: int = 128, queries: torch.Tensor | None = None) -> BlockMask:
    """Builds the mask that ``create_block_mask`` would find by trying every pair of tokens.

    Args:
        subtree_end (torch.Tensor): row index just past the subtree of each token, shape ``[s]``. Padding sees itself
            alone, ``subtree_end[j] = j + 1``.
        block_size (int): tokens in a block of queries and of keys. Default: 128.
        queries (torch.Tensor | None): the rows that look, ascending, shape ``[p]``. A block of them is then judged by
            its first and its last row, so some blocks are looked at token by token that need not be. Default: None,
            all rows.

    Returns:
        BlockMask: for one row and all heads, on the device of ``subtree_end``.
    """
    length, device = len(subtree_end), subtree_end.device
    num_blocks = -(-length // block_size)
    end = torch.arange(1, num_blocks * block_size + 1, device=device)
    end[:length] = subtree_end
    end = end.view(num_blocks, block_size)
    first_key = torch.arange(num_blocks, device=device) * block_size
    last_key = first_key + block_size - 1
    if queries is None:
        first_query, last_query = first_key, last_key
    else:
        first_in_block = torch.arange(0, len(queries), block_size, device=device)
        first_query = queries[first_in_block]
        last_query = queries[(first_in_block + block_size - 1).clamp_(max=len(queries) - 1)]

    # [query block, key block]
    seen = (first_key[None, :] <= last_query[:, None]) & (end.amax(1)[None, :] > first_query[:, None])
    full = (last_key[None, :] <= first_query[:, None]) & (end.amin(1)[None, :] > last_query[:, None])

    def visible(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        row = q_idx if queries is None else queries[q_idx]
        return (kv_idx <= row) & (row < subtree_end[kv_idx])

    return BlockMask.from_kv_blocks(
        *_counts_and_indices(seen & ~full),
        *_counts_and_indices(full),
        BLOCK_SIZE=block_size,
        mask_mod=visible,
        seq_lengths=(length if queries is None else len(queries), length),
    )


def _counts_and_indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block meets, ``[1, 1, m]``, and which, those met first, ``[1, 1, m, n]``."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
