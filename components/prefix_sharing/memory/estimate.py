"""How much memory a training step will take on each of many devices, found out on one machine that has none of them.

The real model takes a step on tensors without values, on one rank of a process group that does not exist, while
PyTorch's memory trackers watch. What they see is what the tensors take; what an allocator wastes, kernels use as
scratch space and NCCL keeps comes on top. Attention is that of ``chains``, which keeps as much for the backward pass as
``flex``.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

from prefix_sharing.config import explained, instantiate
from prefix_sharing.distributed import device_mesh, local_part, shard, sync_gradients
from prefix_sharing.hosts import TreeModel
from prefix_sharing.run.kl import loss_of_row
from prefix_sharing.run.optimization import weights_cast_once
from prefix_sharing.run.setup import build_loss, build_model, compute_dtype
from prefix_sharing.torch_private import (
    FakeStore,
    FakeTensorMode,
    FSDPMemTracker,
    MemTracker,
    ShapesOfGroupedProducts,
)
from prefix_sharing.trees import Response, Row

_CPU = torch.device("cpu")

MOST_TOKENS = 131_072
"""Longest Row that is tried."""

_MOST_EXAMPLES = 64
"""Examples in a Row that is tried: each takes time, while memory depends on tokens."""

_PARAMETERS = ("Parameter", "Sharded Param", "Unsharded Param", "All Gather")
_GRADIENTS = ("Gradient", "Sharded Grad", "Unsharded Grad", "Reduce Scatter")
_OPTIMIZER_STATE = ("Optstate", "OptState")


@dataclass(frozen=True)
class PeakMemory:
    """What a rank holds when it holds most, in bytes.

    Attributes:
        parameters (int): its share of them, and those gathered for the layers at work.
        gradients (int): of the Rows before and of this one.
        optimizer_state (int): the optimizer's state.
        activations (int): what is kept for the backward pass, the gradients of that, tables such as those of RoPE, and
            what is temporary and does not depend on the Row: copies of weights in bf16, what an update computes with.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer_state + self.activations


def full_row(num_tokens: int, example: Sequence[int]) -> Row:
    """A Row full of examples that are all alike.

    Args:
        num_tokens (int): maximum number of tokens in the Row.
        example (Sequence[int]): tokens of prefix, chosen and rejected.

    Returns:
        Row: at least one example, cut to fit if it alone is longer; instead of very many, fewer that are longer.
    """
    scale = min(1, num_tokens / sum(example)) * max(1, num_tokens / sum(example) / _MOST_EXAMPLES)
    prefix, *branches = (int(length * scale) for length in example)
    responses = []
    for k, branch in enumerate(branches):
        tokens = np.concatenate([np.zeros(prefix, dtype=np.int64), np.full(branch + 1, k + 1)])  # the last is not read
        responses.append(Response(tokens, np.arange(len(tokens)) >= prefix))
    return Row.from_examples([responses] * max(1, num_tokens // (prefix + sum(branches))))


@contextlib.contextmanager
def peak_memory_estimate(cfg: DictConfig, world_size: int) -> Iterator[Callable[[Row], PeakMemory]]:
    """Builds model and optimizer without memory, on which steps are taken without computing anything.

    Args:
        cfg (DictConfig): a training config.
        world_size (int): devices to shard over with FSDP2; 1 is the single-device recipe.

    Yields:
        Callable[[Row], PeakMemory]: the peak, on each rank, of an optimizer step of two such Rows, after the first
            step.
    """
    sharded = world_size > 1
    with _imagined_ranks(world_size):
        loss = build_loss(cfg)
        model = build_model(cfg, _CPU, sharded=sharded)
        mesh = device_mesh(_CPU, cfg.data_parallel_replicate_dim) if sharded else None
        fake = FakeTensorMode(allow_non_fake_inputs=True)  # the tables of rotary embeddings are not fake
        with fake:
            if mesh is not None:
                shard(
                    model,
                    list(model.layers),
                    mesh=mesh,
                    compute_dtype=compute_dtype(cfg),
                    reshard_after_forward=cfg.fsdp_reshard_after_forward,
                )
            model.materialize(_CPU)
            optimizer = _build_optimizer(cfg, model)

        def take_row(row: Row, *, is_last: bool) -> None:
            if sharded:
                sync_gradients(model, cfg.fsdp_sync_every_row or is_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bf16" and not sharded):
                output = model(row)
            zeros = torch.zeros_like(output.log_probs)
            loss_of_row(loss, row, output, lambda _: zeros, kl=zeros.sum()).losses.sum().backward()

        def peak_of(row: Row) -> PeakMemory:
            with fake, ShapesOfGroupedProducts():
                row = row.map_tensors(fake.from_tensor)
                tracker = _tracker(model, optimizer, sharded)
                with tracker:
                    with weights_cast_once(_CPU):
                        take_row(row, is_last=False)
                        gradients = _held_between_rows(tracker) if sharded else 0
                        tracker.reset_mod_stats()
                        take_row(row, is_last=True)
                    _update(optimizer, [local_part(p.grad) for p in model.trainable_parameters() if p.grad is not None])
                    model.zero_grad(set_to_none=True)
            return _by_kind(_snapshot(tracker, "peak"), gradients)

        yield peak_of


def _build_optimizer(cfg: DictConfig, model: TreeModel) -> torch.optim.Optimizer:
    """The optimizer with the state that later steps have.

    Of the local parts: DTensor works out what an update would do to the whole, which the tracker would count.
    """
    local_parameters = [nn.Parameter(local_part(p).detach()) for p in model.trainable_parameters()]
    optimizer = instantiate("optimizer", cfg.optimizer, local_parameters)
    with explained("optimizer", f"memory of {cfg.optimizer._component_} cannot be estimated"):
        _update(optimizer, [torch.zeros_like(p) for p in local_parameters])
    return optimizer


def longest_row(
    peak_of: Callable[[int], int], num_tokens: int, usable: float, step: int = 128, most: int = MOST_TOKENS
) -> int | None:
    """The longest Row that fits, by trying: each one where the line through two others says that it just fits.

    Args:
        peak_of (Callable[[int], int]): bytes that a Row of so many tokens takes at its peak.
        num_tokens (int): where to begin.
        usable (float): bytes there are.
        step (int): the result is a multiple of this. Default: 128.
        most (int): tokens beyond which nothing is tried. Default: ``MOST_TOKENS``.

    Returns:
        int | None: tokens, within an eighth of the longest that fits; None if not even ``step`` tokens fit.
    """
    peaks: dict[int, int] = {}
    fits, too_long, length = 0, most // step + 1, max(num_tokens // step, 1)  # in units of step
    while not peaks or fits + fits // 8 < min(length, too_long - 1):
        peaks[length] = peak_of(length * step)
        if peaks[length] <= usable:
            fits = length
        else:
            too_long = length
        length = _where_it_just_fits(peaks, fits, too_long, usable)
    return fits * step or None


def _where_it_just_fits(peaks: dict[int, int], fits: int, too_long: int, usable: float) -> int:
    """Where the line through the two longest that fit reaches what is usable, or that through the two around it."""
    longest = sorted(length for length in peaks if length <= fits)[-2:]
    if not longest:
        return too_long // 2
    if len(longest) == 2:
        guess = _where_line_reaches(usable, peaks, *longest)
        if guess < too_long:
            return guess
    if too_long in peaks:
        return max(_where_line_reaches(usable, peaks, fits, too_long), fits + fits // 8 + 1)
    return min(2 * fits, too_long - 1) if len(longest) == 1 else too_long - 1


def _where_line_reaches(usable: float, peaks: dict[int, int], a: int, b: int) -> int:
    per_unit = (peaks[b] - peaks[a]) / (b - a)
    return a + int((usable - peaks[a]) / per_unit) if per_unit > 0 else MOST_TOKENS


class _OnlyThePeak:
    """Has a tracker keep the peak of all, not that of every module: time grows with layers, not with their square."""

    # What the trackers have.
    _curr_mem_snap: dict[torch.device, dict[str, int]]
    _peak_mem: dict[torch.device, int]
    _peak_mem_snap: dict[torch.device, dict[str, int]]

    def _update_peak_stats(self, peak_state: object) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)


class _Tracker(_OnlyThePeak, MemTracker):
    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        # It would put its hooks on frozen parameters, too.
        trained = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trained)


class _ShardedTracker(_OnlyThePeak, FSDPMemTracker):
    pass


def _tracker(model: nn.Module, optimizer: torch.optim.Optimizer, sharded: bool) -> MemTracker:
    if sharded:
        return _ShardedTracker(model, optimizer)
    tracker = _Tracker()
    tracker.track_external(model, optimizer)
    return tracker


@contextlib.contextmanager
def _imagined_ranks(world_size: int) -> Iterator[None]:
    if world_size == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _update(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor]) -> None:
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held_between_rows(tracker: MemTracker) -> int:
    """Bytes of gradients after a Row: what is held and is neither parameter nor optimizer state nor table."""
    now = _snapshot(tracker, "current")
    return sum(now.get(kind, 0) for kind in (*_GRADIENTS, "Temp", "Activation"))


def _snapshot(tracker: MemTracker, moment: str) -> dict[str, int]:
    """Bytes that were held, by what the tracker calls their kind."""
    return {getattr(kind, "value", kind): size for kind, size in tracker.get_tracker_snapshot(moment)[_CPU].items()}


def _by_kind(found: dict[str, int], gradients_before: int) -> PeakMemory:
    parameters, gradients, state = (
        sum(found.get(kind, 0) for kind in kinds) for kinds in (_PARAMETERS, _GRADIENTS, _OPTIMIZER_STATE)
    )
    rest = found["Total"] - parameters - gradients - state
    # Gradients that wait unsharded for the last Row count as temporary with the tracker.
    waiting = min(rest, max(0, gradients_before - gradients))
    return PeakMemory(parameters, gradients + waiting, state, rest - waiting)
