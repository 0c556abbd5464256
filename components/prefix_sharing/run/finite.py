"""What becomes of a step whose loss or gradient is not finite: it never reaches the optimizer."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from prefix_sharing.datasets import PrefixPreferenceDataset, StepRows
from prefix_sharing.distributed import is_rank_zero, sum_over_ranks
from prefix_sharing.distributed.ranks import all_gather_objects
from prefix_sharing.errors import UserError
from prefix_sharing.losses import LossOutput
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row

log = logging.getLogger(__name__)

_EXAMPLES_TO_NAME = 8


class FiniteCheck:
    """Stops a run at a step that is not finite, or leaves its update out, as ``on_nonfinite`` says.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset): what it trains on.
        device (torch.device): where the model runs.
    """

    def __init__(self, cfg: DictConfig, dataset: PrefixPreferenceDataset, device: torch.device) -> None:
        self._skips = cfg.on_nonfinite == "skip"
        self._max_in_a_row = cfg.max_nonfinite_in_a_row
        self._dataset = dataset
        self._num_skipped = self._num_in_a_row = 0
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._rows: list[tuple[Row, torch.Tensor, torch.Tensor]] = []

    def add(self, row: Row, output: ResponseLogProbs, loss: LossOutput) -> None:
        """Remembers a Row of the step; nothing waits for the device.

        Args:
            row (Row): the Row, for the examples it holds.
            output (ResponseLogProbs): what the model made of it.
            loss (LossOutput): what the loss made of that.
        """
        losses = loss.losses.detach()
        self._rows.append((row, output.log_probs.detach(), losses))
        self._total += losses.sum()

    def passes(self, grad_norm: torch.Tensor, step: StepRows, number: int) -> bool:
        """Whether the step may be taken, after comparing notes with all ranks: a collective.

        Args:
            grad_norm (torch.Tensor): the gradient's norm over all ranks, a scalar.
            step (StepRows): what the ranks have just computed.
            number (int): the step's number in the run, from 1.

        Returns:
            bool: the same on every rank; False if its update is to be left out.

        Raises:
            UserError: on every rank, if the run is to stop; it names step and examples.
        """
        diverged = torch.stack([~self._total.isfinite(), ~grad_norm.isfinite().to(self._total.device)]).double()
        loss_diverged, norm_diverged = sum_over_ranks(diverged).tolist()
        rows, self._rows = self._rows, []
        self._total.zero_()
        if not loss_diverged and not norm_diverged:
            self._num_in_a_row = 0
            return True
        self._num_in_a_row += 1
        what = "loss" if loss_diverged else "norm of the gradient"
        found = f"the {what} is not finite. Its examples are {self._named(rows, step)}."
        if not self._skips:
            raise UserError(
                f"Training diverged at step {number:,}: {found} Nothing was updated or saved since the step before; "
                "lower optimizer.lr, look at these examples, or set on_nonfinite: skip."
            )
        if self._num_in_a_row > self._max_in_a_row:
            raise UserError(
                f"Training diverged at step {number:,}: {found} {self._max_in_a_row:,} steps before it were left out, "
                "which is as many as max_nonfinite_in_a_row allows; lower optimizer.lr, or look at these examples."
            )
        self._num_skipped += 1
        if is_rank_zero():
            log.warning("Step %s is left out: %s", f"{number:,}", found)
        return False

    def metrics(self) -> dict[str, float]:
        """Steps left out so far, where steps are."""
        return {"num_skipped_steps": self._num_skipped} if self._skips else {}

    def state_dict(self) -> dict[str, Any]:
        """What has been left out so far, as JSON can say it."""
        return {"skipped": self._num_skipped, "in_a_row": self._num_in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned.

        Args:
            state (Mapping[str, Any]): the state.
        """
        self._num_skipped, self._num_in_a_row = state["skipped"], state["in_a_row"]

    def _named(self, rows: list[tuple[Row, torch.Tensor, torch.Tensor]], step: StepRows) -> str:
        """The examples whose loss is not finite, or else all of the step, with their log-probs: a collective."""
        mine: dict[int, str] = {}
        bad: set[int] = set()
        for row, log_probs, losses in rows:
            examples = row.example_index.tolist()
            for i, of_responses, num_scored in zip(examples, log_probs, row.num_scored, strict=True):
                shown = (f"{value:.4g}" for value in of_responses[num_scored > 0].tolist())
                mine[i] = f"{self._dataset.describe(i)} (log-probs {', '.join(shown)})"
            bad |= {examples[i] for i in _examples_of(row, losses)[~losses.isfinite()].tolist()}
        everyones = all_gather_objects((mine, bad))
        descriptions = {i: text for some, _ in everyones for i, text in some.items()}
        found = sorted(set().union(*(some for _, some in everyones)) or step.example_index.tolist())
        named = ", ".join(descriptions[i] for i in found[:_EXAMPLES_TO_NAME])
        return named + (f" and {len(found) - _EXAMPLES_TO_NAME:,} more" if len(found) > _EXAMPLES_TO_NAME else "")


def _examples_of(row: Row, losses: torch.Tensor) -> torch.Tensor:
    """Which of a Row's examples each loss is of: losses are of pairs, or of all ``E * K`` responses."""
    num_responses = max(row.num_scored.shape[1], 1)
    numbers = row.pairs[:, 0] if len(losses) == len(row.pairs) else torch.arange(len(losses), device=losses.device)
    return numbers // num_responses
