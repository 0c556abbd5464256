"""Weights and training state as full tensors, gathered from a model that may be sharded and put back into one."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What it takes to continue a run, in addition to the weights.

    Attributes:
        epochs_run (int): epochs that are finished.
        seed (int): the run's seed.
        optimizer (dict[str, Any]): full optimizer state; empty on ranks other than 0.
        lr_scheduler (dict[str, Any] | None): the schedule's state, if there is one.
    """

    epochs_run: int
    seed: int
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any] | None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run starts from: full tensors of any precision, by name.

    Attributes:
        weights (Mapping[str, torch.Tensor]): the model's: on rank 0's CPU and none on other ranks, or in files that
            every rank reads.
        adapter (dict[str, torch.Tensor]): those of a trained adapter; empty where there is none.
        state (TrainingState | None): None unless a run is resumed.
        config_file (Path | None): the ``config.json`` that says what model the weights are of, if there is one.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    state: TrainingState | None = None
    config_file: Path | None = None


def full_weights(model: nn.Module, *, trainable_only: bool = False) -> dict[str, Any]:
    """A model's weights on rank 0's CPU; a collective.

    Args:
        model (nn.Module): sharded or not.
        trainable_only (bool): whether to leave out what is frozen, which then need not be gathered. Default: False.

    Returns:
        dict[str, Any]: by name; empty on other ranks.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(model, options=options)


def set_full_weights(model: nn.Module, weights: dict[str, Any], *, strict: bool = True) -> None:
    """Copies rank 0's weights into a model; a collective.

    Args:
        model (nn.Module): sharded or not.
        weights (dict[str, Any]): by name; not looked at on other ranks.
        strict (bool): whether every name must be there. Default: True.
    """
    options = _from_rank_zero()
    options.strict = strict
    set_model_state_dict(model, weights, options=options)


def training_state(
    model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None, *, epochs_run: int, seed: int
) -> TrainingState:
    """Gathers what it takes to continue; a collective.

    Args:
        model (nn.Module): the model.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
        epochs_run (int): epochs that are finished.
        seed (int): the run's seed.

    Returns:
        TrainingState: the state.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return TrainingState(
        epochs_run=epochs_run,
        seed=seed,
        optimizer=get_optimizer_state_dict(model, optimizer, options=options),
        lr_scheduler=None if lr_scheduler is None else lr_scheduler.state_dict(),
    )


def load_training_state(
    state: TrainingState, model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None
) -> None:
    """Puts optimizer and schedule back to where ``training_state`` found them; a collective.

    Args:
        state (TrainingState): the state.
        model (nn.Module): the model.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
    """
    set_optimizer_state_dict(model, optimizer, state.optimizer, options=_from_rank_zero())
    if lr_scheduler is not None and state.lr_scheduler is not None:
        lr_scheduler.load_state_dict(state.lr_scheduler)


def _from_rank_zero() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
