"""What a backend is: a class of masks, of which one is made per Row, and with which every layer attends."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F

from prefix_sharing.trees import Row


class TreeMask(ABC):
    """The mask of one Row.

    Args:
        row (Row): the Row, on the device that computes it.
        at_predictors (bool): whether the queries are those of ``row.predictor_index`` only, as in the last layer.
            Default: False, those of every token.
        window (int | None): how many positions a token may see, its own included. Default: None, all.
    """

    @abstractmethod
    def __init__(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> None: ...

    @abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """Attention of the queries to the tokens they may see; K and V are never expanded to the query heads.

        Args:
            q (torch.Tensor): queries, shape ``[1, heads, s, head_dim]``, or ``p`` in place of s.
            k (torch.Tensor): keys, shape ``[1, kv_heads, s, head_dim]``.
            v (torch.Tensor): values, shape ``[1, kv_heads, s, head_dim]``, or another size in place of ``head_dim``.
            scale (float | None): what scores are multiplied with. Default: None, ``head_dim ** -0.5``.
            softcap (float | None): bounds scores to ``softcap * tanh(score / softcap)``, as in Gemma 2. Default: None.

        Returns:
            torch.Tensor: the shape of ``q`` with the last dimension of ``v``; what it holds at padding means nothing,
            but is finite.
        """


def padded_values(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Values with zeros up to the head size of keys, where it is larger, as in multi-head latent attention.

    Kernels of FlashAttention take one size only; scaled dot product attention would fall back to making all scores.

    Args:
        k (torch.Tensor): keys.
        v (torch.Tensor): values.

    Returns:
        torch.Tensor: values whose outputs have zeros at the end.
    """
    missing = k.shape[-1] - v.shape[-1]
    return F.pad(v, (0, missing)) if missing > 0 else v
