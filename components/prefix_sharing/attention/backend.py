"""Which implementation of tree attention runs where.

======== ============================== ==================================================================
backend  runs on                        how
======== ============================== ==================================================================
flex     CUDA; CPU without gradients    compiled FlexAttention with a block mask
chains   any device                     one scaled dot product attention a chain
======== ============================== ==================================================================
"""

from collections.abc import Callable
from typing import Literal

import torch

from prefix_sharing.attention.chains import ChainsMask
from prefix_sharing.attention.flex import FlexMask
from prefix_sharing.errors import UserError
from prefix_sharing.rows import bucket_length

AttentionBackend = Literal["flex", "chains"]

TreeMask = ChainsMask | FlexMask

MASKS: dict[str, type[TreeMask]] = {"flex": FlexMask, "chains": ChainsMask}


def rounding_of(backend: AttentionBackend) -> Callable[[int], int] | None:
    """How row lengths are rounded: compiled attention needs them to be few."""
    return bucket_length if backend == "flex" else None


def choose_attention_backend(name: str | None, device: torch.device) -> AttentionBackend:
    """The backend for training on ``device``.

    Args:
        name (str | None): ``flex`` or ``chains``; None chooses ``flex`` on CUDA and ``chains`` elsewhere.
        device (torch.device): where the model runs.

    Returns:
        AttentionBackend: the name of a backend that can run there.

    Raises:
        UserError: if there is no such backend, or it cannot train on the device.
    """
    if name is None:
        return "flex" if device.type == "cuda" else "chains"
    if name not in MASKS:
        raise UserError(f"attention_backend: there is no backend '{name}'; choose one of {', '.join(MASKS)}.")
    if name == "flex" and device.type != "cuda":
        raise UserError(
            f"attention_backend: flex cannot train on {device.type}, where FlexAttention has no backward; "
            "use chains, or leave the key out."
        )
    return name
