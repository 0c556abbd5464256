"""What the pairwise losses share: their result, and how a pair is read from ``[E, K]`` log-probs."""

from typing import NamedTuple

import torch


class PairwiseLoss(NamedTuple):
    """The loss of each example, not reduced, with the implicit rewards of its two responses.

    Attributes:
        losses (torch.Tensor): shape ``[E]``.
        chosen_rewards (torch.Tensor): detached, shape ``[E]``.
        rejected_rewards (torch.Tensor): detached, shape ``[E]``.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def chosen_and_rejected(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits ``[E, 2]`` into chosen and rejected, each ``[E]``.

    Raises:
        ValueError: if the examples are not pairs.
    """
    if values.shape[1] != 2:
        raise ValueError(f"A pairwise loss needs 2 responses an example, but there are {values.shape[1]}.")
    return values[:, 0], values[:, 1]


def average_log_probs(log_probs: torch.Tensor, num_scored: torch.Tensor) -> torch.Tensor:
    """Log-probs per scored token, ``[E, K]``; 0 for a response with none."""
    return log_probs / num_scored.clamp(min=1)
