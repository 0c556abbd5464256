"""What a run over several processes adds: the process group, FSDP2, and sums over all ranks.

Every function here is a matter of course with one process, so that both recipes call the same code.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import training

from prefix_sharing.errors import UserError
from prefix_sharing.model import TreeTransformerDecoder

_TIMEOUT = timedelta(hours=3)
"""How long ranks wait for one another: while one tokenizes a data set the others do."""


def init_process_group(device: torch.device) -> None:
    """Joins the process group that ``tune run --nproc_per_node`` started: NCCL on CUDA, gloo on CPU.

    Args:
        device (torch.device): where the model runs.

    Raises:
        UserError: if the process was not started by a distributed launcher.
    """
    if not training.is_distributed():
        raise UserError(
            "prefix_dpo_distributed needs a launcher: tune run --nproc_per_node N prefix_dpo_distributed ..."
        )
    # The CPU's backend serves parameters that are offloaded to the CPU.
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def is_rank_zero() -> bool:
    """Whether this process is the first, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank, and how many there are; ``(0, 1)`` without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank.

    Args:
        value (Any): anything small that can be pickled.

    Returns:
        Any: the value that rank 0 passed.
    """
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def broadcast_from_rank_zero(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's values, on every rank.

    Args:
        tensor (torch.Tensor): one of the same shape on each rank, on the model's device; overwritten.

    Returns:
        torch.Tensor: the tensor.
    """
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)
    return tensor


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """One process of each machine runs the body before the others, which then find its work in a cache."""
    if not dist.is_initialized():
        yield
        return
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        dist.barrier()
    yield
    if is_first:
        dist.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks.

    Args:
        tensor (torch.Tensor): one of the same shape on each rank, on the CPU or the model's device.

    Returns:
        torch.Tensor: the sum; with one process the tensor itself.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def device_mesh(device: torch.device, replicate_dim: int = 1) -> DeviceMesh:
    """How the ranks share a model.

    Args:
        device (torch.device): where the model runs.
        replicate_dim (int): groups of ranks with a full copy each (HSDP). Default: 1, sharded over all ranks.

    Returns:
        DeviceMesh: of one dimension, or of two if there are several groups.

    Raises:
        UserError: if the ranks cannot be divided so.
    """
    world_size = dist.get_world_size()
    if world_size % replicate_dim:
        raise UserError(
            f"Config: data_parallel_replicate_dim is {replicate_dim}, which does not divide the {world_size} processes."
        )
    if replicate_dim == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicate_dim, world_size // replicate_dim), mesh_dim_names=("replicate", "shard")
    )


def shard_model(
    model: TreeTransformerDecoder,
    device: torch.device,
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shards a model on the meta device, layer by layer and as a whole, and gives it memory, but no weights.

    Parameters, gradients and optimizer state are fp32; layers compute in ``compute_dtype``. The output projection
    belongs to the root, so ranks may project different numbers of chunks.

    Args:
        model (TreeTransformerDecoder): on the meta device, compiled and checkpointed already.
        device (torch.device): where the model runs.
        mesh (DeviceMesh): as ``device_mesh`` makes it.
        compute_dtype (torch.dtype): what layers compute in.
        reshard_after_forward (bool): whether gathered parameters are freed after a forward pass. Default: True.
        cpu_offload (bool): whether parameters, gradients and optimizer state live on the CPU. Default: False.

    Raises:
        UserError: if offloading has nowhere to offload from, or a quantized model cannot be shared so.
    """
    if (cpu_offload or mesh.ndim > 1) and any(map(is_quantized, model.parameters())):
        raise UserError("Config: QLoRA goes with neither fsdp_cpu_offload nor data_parallel_replicate_dim.")
    if cpu_offload and device.type == "cpu":
        raise UserError("Config: fsdp_cpu_offload: True needs a CUDA device; the model is on the CPU already.")
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy(),
    }
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for layer, following in itertools.pairwise(model.layers):
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])
    materialize(model, device, parameter_device=torch.device("cpu") if cpu_offload else device)


def materialize(model: nn.Module, device: torch.device, parameter_device: torch.device | None = None) -> None:
    """Gives a model on the meta device memory, but no weights.

    Args:
        model (nn.Module): on the meta device, sharded or not.
        device (torch.device): where it runs.
        parameter_device (torch.device | None): where its parameters lie. Default: None, on ``device``.
    """
    model.to_empty(device=parameter_device or device)
    # A quantized tensor stays where its parts are.
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if is_quantized(weight):
            local = quantize_like(weight, torch.zeros(weight.shape, device=device))
            if isinstance(weight, DTensor):  # from_local would take a view, which there is none of
                local = DTensor(local, weight._spec, requires_grad=False)
            module.weight = nn.Parameter(local, requires_grad=False)
    # The tables of rotary embeddings are no parameters: nothing loads them. They are real even in a model without
    # values, that of prefix_dpo_plan, because making them takes a look at some.
    with unset_fake_temporarily(), device:
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()


def local_part(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """What this rank has of a tensor; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_quantized(weight: torch.Tensor | None) -> bool:
    """Whether a weight is NF4, sharded or not."""
    return isinstance(local_part(weight), NF4Tensor)


def quantize_like(weight: torch.Tensor, values: torch.Tensor) -> NF4Tensor:
    """Quantizes values as a weight is, and keeps this rank's part of them.

    Args:
        weight (torch.Tensor): NF4, sharded or not.
        values (torch.Tensor): of the whole weight, the same on every rank.

    Returns:
        NF4Tensor: the part that this rank has of the weight.
    """
    local = local_part(weight)
    whole = to_nf4(values, block_size=local.block_size, scaler_block_size=local.scaler_block_size)
    if not isinstance(weight, DTensor):
        return whole
    return torch.chunk(whole, weight.device_mesh.size())[weight.device_mesh.get_local_rank()]


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward left gathered.

    Args:
        model (nn.Module): sharded or not.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
