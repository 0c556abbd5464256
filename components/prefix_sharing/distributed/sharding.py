"""Sharding a model over ranks with FSDP2."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from prefix_sharing.distributed.ranks import this_rank
from prefix_sharing.errors import ConfigError


def device_mesh(device: torch.device, replicate_dim: int = 1) -> DeviceMesh:
    """How the ranks share a model.

    Args:
        device (torch.device): where the model runs.
        replicate_dim (int): groups of ranks with a full copy each (HSDP). Default: 1, sharded over all ranks.

    Returns:
        DeviceMesh: of one dimension, or of two if there are several groups.

    Raises:
        ConfigError: if the ranks cannot be divided so.
    """
    world_size = dist.get_world_size()
    if world_size % replicate_dim:
        raise ConfigError(
            "data_parallel_replicate_dim",
            f"is {replicate_dim}, which does not divide the {world_size} processes; choose a divisor",
        )
    if replicate_dim == 1:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(
        device.type, (replicate_dim, world_size // replicate_dim), mesh_dim_names=("replicate", "shard")
    )


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    reshard_after_forward: bool = True,
    cpu_offload: bool = False,
) -> None:
    """Shards a model layer by layer and as a whole.

    Parameters, gradients and optimizer state are fp32; layers compute in ``compute_dtype``. What is in no layer, such
    as the output projection, belongs to the root, so ranks may project different numbers of chunks.

    Args:
        model (nn.Module): on the meta device, its layers compiled and wrapped for activation checkpointing already.
        layers (Sequence[nn.Module]): its layers, in the order of the forward pass.
        mesh (DeviceMesh): as ``device_mesh`` makes it.
        compute_dtype (torch.dtype): what layers compute in.
        reshard_after_forward (bool): whether gathered parameters are freed after a forward pass. Default: True.
        cpu_offload (bool): whether parameters, gradients and optimizer state live on the CPU. Default: False.

    Raises:
        ConfigError: if there is no device to offload from.
    """
    if cpu_offload and mesh.device_type == "cpu":
        raise ConfigError("fsdp_cpu_offload", "needs a CUDA device; the model is on the CPU already")
    mp_policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    offload_policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for module in (*layers, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=mp_policy,
            reshard_after_forward=reshard_after_forward,
            offload_policy=offload_policy,
        )
    for layer, following in itertools.pairwise(layers):
        assert isinstance(layer, FSDPModule)
        assert isinstance(following, FSDPModule)
        layer.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([layer])


def sync_gradients(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward pass adds up gradients over ranks, or leaves them for a later one to add up.

    Args:
        model (nn.Module): a sharded model.
        enabled (bool): whether it does.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(enabled)


def reshard(model: nn.Module) -> None:
    """Frees what a forward pass without a backward left gathered.

    Args:
        model (nn.Module): sharded or not.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_on_rank_zero(tensor: torch.Tensor) -> torch.Tensor | None:
    """All of a tensor, on rank 0 alone, where each rank's part arrives in its place; a collective if it is sharded.

    ``DTensor.full_tensor`` gives all of it to every rank, and takes twice its memory there.

    Args:
        tensor (torch.Tensor): a parameter as ``shard`` leaves it, or a tensor that every rank has.

    Returns:
        torch.Tensor | None: None on other ranks.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor if this_rank().rank == 0 else None
    *_, placement = tensor.placements
    assert isinstance(placement, Shard)
    assert placement.dim == 0
    ranks = tensor.device_mesh.mesh.view(-1, tensor.device_mesh.size(-1))[0].tolist()  # those with one whole copy
    mine, full = this_rank().rank, None
    if mine == 0:
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    for position, rank in enumerate(ranks):
        size, offset = Shard.local_shard_size_and_offset(len(tensor), len(ranks), position)
        if size == 0:
            continue
        if full is not None and rank == 0:
            full[offset : offset + size] = tensor.to_local()
        elif full is not None:
            dist.recv(full[offset : offset + size], src=rank)
        elif mine == rank:
            dist.send(tensor.to_local().contiguous(), dst=0)
    return full
