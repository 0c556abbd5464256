"""Ranks of a run: the process group, and values that all of them share.

Every function works with one process, too, so that both recipes call the same code.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from prefix_sharing.distributed.processes import end_with_parent
from prefix_sharing.distributed.watch import Watch, describe
from prefix_sharing.errors import UserError

_STEP_TIMEOUT = timedelta(minutes=10)
"""How long ranks wait for one another in a step: one that hangs must not hold the others for hours."""

_SETUP_TIMEOUT = timedelta(hours=3)
"""How long they wait while one of them tokenizes a data set, reads weights or writes them."""

_setup_group: dist.ProcessGroup | None = None
"""The group of ``wait_for_all_ranks``. It belongs to the process as torch's default group does."""


class Ranks(NamedTuple):
    """Which of how many processes this one is.

    Attributes:
        rank (int): from 0.
        world_size (int): processes.
    """

    rank: int = 0
    world_size: int = 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the process group that ``tune run --nproc_per_node`` started: NCCL on CUDA, gloo on CPU.

    After an error the group is left as it is: the process ends, and does not wait for the others.

    Args:
        device (torch.device): where the model runs.

    Yields:
        None: to the run.

    Raises:
        UserError: if the process was not started by a distributed launcher, or another rank ended or hangs.
    """
    global _setup_group
    if not dist.is_torchelastic_launched():
        raise UserError(
            "prefix_dpo_distributed needs a launcher: tune run --nproc_per_node N prefix_dpo_distributed ..."
        )
    end_with_parent(signal.SIGTERM)  # which a launcher that is killed with -9 cannot send
    # The CPU's backend serves parameters that are offloaded to the CPU.
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_STEP_TIMEOUT)
    _setup_group = dist.new_group(backend="gloo", timeout=_SETUP_TIMEOUT)
    watch = Watch(*this_rank()) if dist.get_world_size() > 1 else None
    wait_for_all_ranks()
    if watch is not None:
        watch.start()
    try:
        yield
    except Exception as error:
        if watch is None or not _is_of_communication(error):
            raise
        # A launcher that has seen the other rank end asks this one to end as well, before it can tell which it was.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        gone = watch.silent()
        if not gone:
            raise
        raise UserError(describe(gone)) from error
    # Meanwhile gloo's threads release the tensors of the last collective. If they came to that only when the
    # interpreter is shutting down, they would abort the process.
    wait_for_all_ranks()
    if watch is not None:
        watch.end()
    _setup_group = None
    dist.destroy_process_group()


def _is_of_communication(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is that another rank was waited for in vain."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_processes_joined() -> None:
    """Checks that processes that were started together are in one process group.

    Otherwise each would do the whole run, and all of them would write to the same files.

    Raises:
        UserError: if they are not.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and not dist.is_initialized():
        raise UserError(
            f"This recipe runs on one process, but {world_size} were started; leave out --nproc_per_node, or train on "
            "several with prefix_dpo_distributed."
        )


def is_rank_zero() -> bool:
    """Whether this process is the first, or the only one."""
    return this_rank().rank == 0


def this_rank() -> Ranks:
    """This process's rank, and how many there are; ``(0, 1)`` without a process group."""
    return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()


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


def all_gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in their order.

    Args:
        value (Any): anything small that can be pickled.

    Returns:
        list[Any]: as long as there are ranks.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def wait_for_all_ranks() -> None:
    """Waits until every rank has come here, for as long as set-up may take."""
    if dist.is_initialized():
        dist.barrier(group=_setup_group)


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """One process of each machine runs the body before the others, which then find its work in a cache."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        wait_for_all_ranks()
    yield
    if is_first:
        wait_for_all_ranks()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks.

    Args:
        tensor (torch.Tensor): one of the same shape on each rank, on the CPU or the model's device; overwritten.

    Returns:
        torch.Tensor: the sum; with one process the tensor itself.
    """
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor
