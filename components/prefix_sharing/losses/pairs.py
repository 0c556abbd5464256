"""What the losses share: their result, and how pairs are read from the log-probs of responses."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class LossOutput(NamedTuple):
    """The loss, not reduced, with the implicit rewards of the two responses of each pair.

    Attributes:
        losses (torch.Tensor): its sum is to be divided by the number of ``mean_over`` of the loss, so shape ``[P]``
            for a loss that is a mean over pairs.
        chosen_rewards (torch.Tensor): detached, shape ``[P]``.
        rejected_rewards (torch.Tensor): detached, shape ``[P]``.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def take_pairs(pairs: torch.Tensor | None, *values: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Reads pairs off values of responses, so that each response is computed once whatever the number of its pairs.

    Args:
        pairs (torch.Tensor | None): ``example * K + response`` of chosen and rejected, shape ``[P, 2]``; None if the
            values are of pairs already.
        *values (torch.Tensor | None): values of each response, shape ``[E, K]``.

    Returns:
        list[torch.Tensor | None]: for each its values of the pairs, shape ``[P, 2]``; None for None.
    """
    return [value if value is None or pairs is None else value.flatten()[pairs] for value in values]


def weigh_by_confidence(loss: LossOutput, confidence: torch.Tensor | None, pairs: torch.Tensor) -> LossOutput:
    """Weighs each pair by how likely the policy itself were to give its responses.

    That is eq. 2 of `WPO: Enhancing RLHF with Weighted Preference Optimization <https://arxiv.org/abs/2406.11827>`_.

    Args:
        loss (LossOutput): of pairs.
        confidence (torch.Tensor | None): what the model returned with the log-probs, shape ``[E, K]``; None leaves the
            loss as it is.
        pairs (torch.Tensor): as for ``take_pairs``.

    Returns:
        LossOutput: with the losses weighed.
    """
    if confidence is None:
        return loss
    (of_pairs,) = take_pairs(pairs, confidence)
    return loss._replace(losses=loss.losses * of_pairs.sum(dim=1).exp())


def chosen_and_rejected(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits ``[P, 2]`` into chosen and rejected, each ``[P]``.

    Raises:
        ValueError: if these are not pairs.
    """
    if values.shape[1] != 2:
        raise ValueError(f"A pairwise loss needs pairs, but there are {values.shape[1]} values.")
    return values[:, 0], values[:, 1]


def average_log_probs(log_probs: torch.Tensor, num_scored: torch.Tensor) -> torch.Tensor:
    """Log-probs per scored token, ``[P, 2]``; 0 for a response with none."""
    return log_probs / num_scored.clamp(min=1)


def smoothed_log_sigmoid_loss(h: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """``-log sigmoid(h)``, where a preference is the wrong way round with probability ``label_smoothing``."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def check_beta_and_label_smoothing(beta: float, label_smoothing: float = 0.0) -> None:
    """Refuses what is out of range.

    Raises:
        ValueError: if ``beta`` is not positive or ``label_smoothing`` not in [0, 0.5).
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, not {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}.")
