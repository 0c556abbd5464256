"""Parts of an optimizer step that need care: random numbers, the gradient's norm, and numbers that are not finite."""

import logging

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from prefix_sharing.checkpoint import TrainingCheckpoint
from prefix_sharing.datasets import PrefixPreferenceDataset, StepRows
from prefix_sharing.distributed import broadcast_object, sum_over_ranks, this_rank
from prefix_sharing.errors import UserError
from prefix_sharing.trees import Row

log = logging.getLogger(__name__)

_EXAMPLES_TO_NAME = 8


def choose_seed(seed: int | None, resumed: TrainingCheckpoint | None = None) -> int:
    """The run's seed: the config's, or else that of the run which is continued, or one that is drawn and logged.

    Args:
        seed (int | None): the config's.
        resumed (TrainingCheckpoint | None): what the run continues from. Default: None.

    Returns:
        int: the same on every rank.
    """
    if seed is None and resumed is not None:
        seed = resumed.values["seed"]
    if seed is None:
        seed = broadcast_object(int(np.random.SeedSequence().generate_state(1)[0]))
        log.info("seed: %d", seed)
    return seed


def seed_step(seed: int, step: int) -> None:
    """Starts torch's random numbers anew, so that seed, step and rank decide them and nothing that happened before.

    Dropout is then the same whether or not reference log-probs came from the cache, and after a resume.

    Args:
        seed (int): the run's seed.
        step (int): optimizer steps done.
    """
    state = np.random.SeedSequence([seed, step, this_rank().rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Measures the gradient's norm over all ranks, and scales the gradient down where the norm is larger than allowed.

    Args:
        model (nn.Module): the model, sharded or not.
        max_norm (float | None): the maximum norm; None changes no gradient.

    Returns:
        torch.Tensor: the norm before, a scalar.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class FiniteCheck:
    """Stops a run before a loss or gradient that is not finite reaches the optimizer. Made anew for each step.

    Args:
        device (torch.device): where the model runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._losses: list[tuple[Row, torch.Tensor]] = []

    def add(self, row: Row, losses: torch.Tensor) -> None:
        """Remembers the losses of a Row; nothing waits for the device.

        Args:
            row (Row): the Row, for the examples it holds.
            losses (torch.Tensor): ``LossOutput.losses`` of it.
        """
        losses = losses.detach()
        self._losses.append((row, losses))
        self._total += losses.sum()

    def check(self, grad_norm: torch.Tensor, step: StepRows, dataset: PrefixPreferenceDataset, number: int) -> None:
        """Compares notes with all ranks: a collective.

        Args:
            grad_norm (torch.Tensor): the gradient's norm over all ranks, a scalar.
            step (StepRows): what the ranks have just computed.
            dataset (PrefixPreferenceDataset): the data set it is of.
            number (int): the step's number in the run, from 1.

        Raises:
            UserError: on every rank, if a loss or the norm is not finite on any; it names step and examples.
        """
        diverged = torch.stack([~self._total.isfinite(), ~grad_norm.isfinite().to(self._total.device)]).double()
        loss_diverged, norm_diverged = sum_over_ranks(diverged).tolist()
        if not loss_diverged and not norm_diverged:
            return
        flags = torch.zeros(len(dataset), dtype=torch.float64, device=self._total.device)
        for row, losses in self._losses:
            flags[row.example_index[_examples_of(row, losses)[~losses.isfinite()]]] = 1
        found = sum_over_ranks(flags).nonzero()[:, 0].tolist() or sorted(step.example_index.tolist())
        named = ", ".join(dataset.describe(i) for i in found[:_EXAMPLES_TO_NAME])
        others = f" and {len(found) - _EXAMPLES_TO_NAME:,} more" if len(found) > _EXAMPLES_TO_NAME else ""
        what = "loss" if loss_diverged else "norm of the gradient"
        raise UserError(
            f"Training diverged at step {number:,}: the {what} is not finite. Its examples are {named}{others}. "
            "Nothing was updated or saved since the step before; lower optimizer.lr, or look at these examples."
        )


def _examples_of(row: Row, losses: torch.Tensor) -> torch.Tensor:
    """Which of a Row's examples each loss is of: losses are of pairs, or of all ``E * K`` responses."""
    num_responses = max(row.num_scored.shape[1], 1)
    numbers = row.pairs[:, 0] if len(losses) == len(row.pairs) else torch.arange(len(losses), device=losses.device)
    return numbers // num_responses
