"""Running on several processes: ranks and what they share, and sharding a model with FSDP2."""

from prefix_sharing.distributed.ranks import (
    Ranks,
    broadcast_from_rank_zero,
    broadcast_object,
    check_processes_joined,
    is_rank_zero,
    process_group,
    rank_zero_first,
    sum_over_ranks,
    this_rank,
    wait_for_all_ranks,
)
from prefix_sharing.distributed.sharding import device_mesh, local_part, reshard, shard, sync_gradients

__all__ = [
    "Ranks",
    "broadcast_from_rank_zero",
    "broadcast_object",
    "check_processes_joined",
    "device_mesh",
    "is_rank_zero",
    "local_part",
    "process_group",
    "rank_zero_first",
    "reshard",
    "shard",
    "sum_over_ranks",
    "sync_gradients",
    "this_rank",
    "wait_for_all_ranks",
]
