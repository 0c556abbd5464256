"""Tree attention by compiled FlexAttention with a block mask: the default on CUDA.

K and V are never expanded to the query heads. On CPU, FlexAttention has no backward; its forward works there.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention
from typing_extensions import override

from prefix_sharing.attention.block_mask import tree_block_mask
from prefix_sharing.attention.tree_mask import TreeMask
from prefix_sharing.torch_private import raise_recompile_limits
from prefix_sharing.trees import Row


@functools.cache
def _compiled_flex_attention(dynamic: bool) -> Callable[..., torch.Tensor]:
    # Past the limit dynamo falls back to the eager operator, which builds all scores. Lengths are symbols on CUDA, so
    # that a handful of kernels serve every Row. On CPU, where only the forward runs, such code does not compile.
    raise_recompile_limits(256, accumulated=1024)
    # Seen as one operator by selective activation checkpointing, which then keeps its output.
    return torch.compile(flex_attention, dynamic=dynamic, options={"wrap_inductor_compiled_regions": True})


class FlexMask(TreeMask):
    """The mask of one Row as a block mask.

    Args:
        row (Row): see ``TreeMask``.
        at_predictors (bool): see ``TreeMask``.
        window (int | None): see ``TreeMask``.
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
        self.block_mask = tree_block_mask(
            row.subtree_end,
            query_index=row.predictor_index if at_predictors else None,
            positions=row.input_pos[0],
            window=window,
        )
        self._on_cuda = row.tokens.is_cuda
        if self._on_cuda and all(length % 128 == 0 for length in self.block_mask.seq_lengths):
            # The compiler cannot tell from a symbol, and would check the bounds of every load.
            kernel_options = {"IS_DIVISIBLE": True} | (kernel_options or {})
        self._kernel_options = kernel_options

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
        return _compiled_flex_attention(dynamic=self._on_cuda)(
            q,
            k,
            v,
            score_mod=None if softcap is None else _capped_at(softcap, q.device),
            block_mask=self.block_mask,
            scale=scale,
            enable_gqa=True,
            kernel_options=self._kernel_options,
        )


@functools.cache
def _capped_at(softcap: float, device: torch.device) -> Callable[..., torch.Tensor]:
    """The same function each time, so that attention is not compiled anew."""
    # A number would become a symbol where lengths are, and the backward would not be compiled at all.
    most = torch.tensor(softcap, device=device)

    def capped(score: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        return most * torch.tanh(score / most)

    return capped
