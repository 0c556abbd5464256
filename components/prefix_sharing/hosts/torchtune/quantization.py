"""NF4, in which QLoRA keeps the frozen base: tensors that have no views and cannot be sharded like others."""

from typing import Any, TypeGuard

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from prefix_sharing.distributed import broadcast_from_rank_zero, is_rank_zero, local_part
from prefix_sharing.torch_private import CHECKPOINT_PREFIX, local_dtensor


def is_quantized(weight: object) -> TypeGuard[torch.Tensor]:
    """Whether a weight is NF4, sharded or not."""
    return isinstance(weight, torch.Tensor) and isinstance(local_part(weight), NF4Tensor)


def materialize_quantized(model: nn.Module, device: torch.device) -> None:
    """Gives quantized weights memory on ``device``: ``to_empty`` leaves them where their parts are.

    Args:
        model (nn.Module): sharded or not.
        device (torch.device): where it runs.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if is_quantized(weight):
            local: torch.Tensor = _quantize_like(weight, torch.zeros(weight.shape, device=device))
            if isinstance(weight, DTensor):  # from_local would take a view, which there is none of
                local = local_dtensor(local, weight)
            module.weight = nn.Parameter(local, requires_grad=False)


def load_quantized(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> bool:
    """Takes the weights that are NF4 in a sharded model out of rank 0's state dict, and loads them.

    Args:
        model (nn.Module): a sharded model.
        state_dict (dict[str, torch.Tensor]): full tensors on rank 0; changed.

    Returns:
        bool: whether there are any.
    """
    names = {name.replace(CHECKPOINT_PREFIX, ""): parameter for name, parameter in model.named_parameters()}
    quantized = {name: parameter for name, parameter in names.items() if is_quantized(parameter)}
    for name, parameter in quantized.items():
        values = torch.empty(parameter.shape, device=parameter.device)
        if is_rank_zero():
            values.copy_(state_dict.pop(name))
        local_part(parameter).copy_(_quantize_like(parameter, broadcast_from_rank_zero(values)))
    return bool(quantized)


def dequantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """The numbers that quantized weights stand for. torchtune's state dict has them rounded to bf16.

    Args:
        model (nn.Module): not sharded.

    Returns:
        dict[str, torch.Tensor]: those that are quantized, by name, in fp32 on the CPU.
    """
    names = {name.replace(CHECKPOINT_PREFIX, ""): parameter for name, parameter in model.named_parameters()}
    return {name: weight.to(torch.float32).cpu() for name, weight in names.items() if is_quantized(weight)}


def _quantize_like(weight: torch.Tensor, values: torch.Tensor) -> NF4Tensor:
    """Quantizes values, the same on every rank, as a weight is, and keeps this rank's part of them."""
    local: Any = local_part(weight)
    whole = to_nf4(values, block_size=local.block_size, scaler_block_size=local.scaler_block_size)
    if not isinstance(weight, DTensor):
        return whole
    return torch.chunk(whole, weight.device_mesh.size())[weight.device_mesh.get_local_rank()]
