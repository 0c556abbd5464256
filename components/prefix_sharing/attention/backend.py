"""Which implementation of tree attention runs where.

======== ============================== ==================================================================
backend  runs on                        how
======== ============================== ==================================================================
flex     CUDA; CPU without gradients    compiled FlexAttention with a block mask
chains   any device                     one scaled dot product attention per chain
varlen   CUDA, in bf16                  all chains as the sequences of one call to FlashAttention
======== ============================== ==================================================================
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch

from prefix_sharing.attention.chains import ChainsMask
from prefix_sharing.attention.flex import FlexMask
from prefix_sharing.attention.tree_mask import TreeMask
from prefix_sharing.attention.varlen import VarlenMask, has_grouped_queries
from prefix_sharing.errors import ConfigError
from prefix_sharing.trees import bucket_length

AttentionBackend = Literal["flex", "chains", "varlen"]

_MASKS: dict[str, type[TreeMask]] = {"flex": FlexMask, "chains": ChainsMask, "varlen": VarlenMask}


def mask_builder(backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None) -> Callable[..., TreeMask]:
    """What makes the mask of a Row.

    Args:
        backend (AttentionBackend): the backend.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None, its own choice.

    Returns:
        Callable[..., TreeMask]: takes the arguments of ``TreeMask``.
    """
    if backend == "flex" and kernel_options is not None:
        return functools.partial(FlexMask, kernel_options=dict(kernel_options))
    return _MASKS[backend]


def rounding_of(backend: AttentionBackend) -> Callable[[int], int] | None:
    """How Row lengths are rounded: compiled attention needs them to be few."""
    return bucket_length if backend == "flex" else None


def choose_attention_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend for training on ``device``.

    Args:
        name (str | None): ``flex``, ``chains`` or ``varlen``; None chooses ``flex`` on CUDA and ``chains`` elsewhere.
        device (torch.device): where the model runs.
        dtype (torch.dtype): what its layers compute in.

    Returns:
        AttentionBackend: the name of a backend that can run there.

    Raises:
        UserError: if there is no such backend, or it cannot train there.
    """
    if name is None:
        return "flex" if device.type == "cuda" else "chains"
    if name not in _MASKS:
        raise ConfigError("attention_backend", f"unknown backend '{name}'; choose from {', '.join(_MASKS)}")
    if name == "flex" and device.type != "cuda":
        problem = (
            f"flex cannot train on {device.type}, where FlexAttention has no backward; use chains or remove the key"
        )
        raise ConfigError("attention_backend", problem)
    if name == "varlen" and (device.type != "cuda" or dtype != torch.bfloat16):
        problem = (
            f"varlen needs CUDA and dtype: bf16, but this is {device.type} and {str(dtype).removeprefix('torch.')}; "
            "use chains or remove the key"
        )
        raise ConfigError("attention_backend", problem)
    if name == "varlen" and not has_grouped_queries():
        raise ConfigError("attention_backend", f"varlen needs torch 2.12 or newer, but this is {torch.__version__}")
    return cast(AttentionBackend, name)
