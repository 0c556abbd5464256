"""Tree attention by compiled FlexAttention with a block mask: the default on CUDA.

K and V are never expanded to the query heads. On CPU, FlexAttention has no backward; its forward works there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from prefix_sharing.attention.block_mask import tree_block_mask
from prefix_sharing.rows import Row


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    # Every row length is a shape of its own, and past the limit dynamo falls back to the eager operator, which builds
    # all scores. Rows come in few lengths (prefix_sharing.rows.bucket_length), each with and without gradients, but in
    # more than the default limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    return torch.compile(flex_attention, dynamic=False)


class FlexMask:
    """The mask of one row, made once and used by every layer.

    Args:
        row (Row): the row, on the device that computes it.
        at_predictors (bool): whether the queries are those of ``row.predictors`` only, as in the last layer.
            Default: False, those of every row.
        window (int | None): how many positions a token may see, its own included. Default: None, all.
        kernel_options (dict[str, Any] | None): see ``torch.nn.attention.flex_attention.flex_attention``. Default: None.
    """

    def __init__(
        self,
        row: Row,
        *,
        at_predictors: bool = False,
        window: int | None = None,
        kernel_options: dict[str, Any] | None = None,
    ) -> None:
        self._kernel_options = kernel_options
        self.block_mask = tree_block_mask(
            row.subtree_end,
            queries=row.predictors if at_predictors else None,
            positions=row.input_pos[0],
            window=window,
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attention of every row to the rows it may see; arguments as of ``ChainsMask.attend``."""
        return _compiled_flex_attention()(
            q,
            k,
            v,
            score_mod=None if softcap is None else _capped_at(softcap),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=self._kernel_options,
        )


@functools.cache
def _capped_at(softcap: float) -> Callable[..., torch.Tensor]:
    """The same function each time, so that attention is not compiled anew."""

    def capped(score: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
