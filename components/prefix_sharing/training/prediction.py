"""How much memory a training step will take on each of many devices, found out on one machine that has none of them.

The real model takes a step on tensors without values, on one rank of a process group that is not there, while PyTorch's
memory trackers watch. What they see is what the tensors take; what an allocator wastes, kernels use as scratch space
and NCCL keeps comes on top. Attention is that of ``chains``, which keeps as much for the backward pass as ``flex``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from prefix_sharing.config import explained, instantiate
from prefix_sharing.rows import Response, Row
from prefix_sharing.training.adapters import trainable_parameters
from prefix_sharing.training.distributed import device_mesh, local_part, materialize, shard_model
from prefix_sharing.training.setup import build_model, compute_dtype

_CPU = torch.device("cpu")

_PARAMETERS = ("Parameter", "Sharded Param", "Unsharded Param", "All Gather")
_GRADIENTS = ("Gradient", "Sharded Grad", "Unsharded Grad", "Reduce Scatter")
_OPTIMIZER_STATE = ("Optstate", "OptState")


@dataclass(frozen=True)
class PeakMemory:
    """What a rank holds when it holds most, in bytes.

    Attributes:
        parameters (int): its share of them, and those gathered for the layers at work.
        gradients (int): of the rows before and of this one.
        optimizer_state (int): the optimizer's state.
        activations (int): kept for the backward pass, the gradients of those, and tables such as those of RoPE.
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
    """A row full of examples that are all alike.

    Args:
        num_tokens (int): most tokens in the row.
        example (Sequence[int]): tokens of prefix, chosen and rejected.

    Returns:
        Row: at least one example, cut to fit if it alone is longer.
    """
    prefix, *branches = (int(length * min(1, num_tokens / sum(example))) for length in example)
    responses = []
    for k, branch in enumerate(branches):
        tokens = np.concatenate([np.zeros(prefix, dtype=np.int64), np.full(branch + 1, k + 1)])  # the last is not read
        responses.append(Response(tokens, np.arange(len(tokens)) >= prefix))
    return Row.from_examples([responses] * max(1, num_tokens // (prefix + sum(branches))))


def predict_peak_memory(cfg: DictConfig, world_size: int, rows: Sequence[Row]) -> list[PeakMemory]:
    """Takes optimizer steps of two equal rows each, without computing anything.

    Args:
        cfg (DictConfig): a training config.
        world_size (int): devices to shard over with FSDP2; 1 is the single-device recipe.
        rows (Sequence[Row]): rows to try, one after the other.

    Returns:
        list[PeakMemory]: for each row, the peak of a step after the first.
    """
    with _ranks_that_are_not_there(world_size):
        sharded = world_size > 1
        mesh = device_mesh(_CPU, cfg.data_parallel_replicate_dim) if sharded else None
        model = build_model(cfg, _CPU)
        # What is not fake are the tables of rotary embeddings.
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            if sharded:
                options = {"compute_dtype": compute_dtype(cfg), "reshard_after_forward": cfg.fsdp_reshard_after_forward}
                shard_model(model, _CPU, mesh=mesh, **options)
            else:
                materialize(model, _CPU)
            parameters = trainable_parameters(model)
            # Of the local parts: DTensor works out what an update would do to the whole, which the tracker would count.
            optimizer = instantiate(
                "optimizer", cfg.optimizer, [nn.Parameter(local_part(p).detach()) for p in parameters]
            )
            with explained(f"optimizer: {cfg.optimizer._component_} cannot be planned for"):
                _update(
                    optimizer, [torch.zeros_like(local_part(p)) for p in parameters]
                )  # the state that later steps have
            loss = instantiate("loss", cfg.loss)
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bf16" and not sharded)

            peaks = []
            for row in rows:
                row = row.map_tensors(fake.from_tensor)
                tracker = _tracker(model, optimizer, sharded)
                with tracker:
                    for i in range(2):
                        if sharded:
                            model.set_requires_gradient_sync(cfg.fsdp_sync_every_row or i == 1)
                        with autocast:
                            output = model(row)
                        reference = torch.zeros_like(output.log_probs)
                        losses = loss(output.log_probs, output.num_scored, reference, row.pairs).losses
                        losses.sum().backward()
                        del output, reference, losses
                        if i == 0:
                            gradients = _held_between_rows(tracker)
                            tracker.reset_mod_stats()
                    _update(optimizer, [local_part(p.grad) for p in parameters])
                    model.zero_grad(set_to_none=True)
                peaks.append(_by_kind(_snapshot(tracker, "peak"), gradients))
    return peaks


class _OnlyThePeak:
    """Has a tracker keep the peak of all, not that of every module: time grows with layers, not with their square."""

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
def _ranks_that_are_not_there(world_size: int) -> Iterator[None]:
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
    """Bytes of gradients after a row: what is there and is neither parameter nor optimizer state nor table."""
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
    # Gradients that wait unsharded for the last row count as temporary with the tracker.
    waiting = min(rest, max(0, gradients_before - gradients))
    return PeakMemory(parameters, gradients + waiting, state, rest - waiting)
