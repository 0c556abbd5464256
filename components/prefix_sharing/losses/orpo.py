"""Odds ratio preference optimization."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefix_sharing.losses.pairs import LossOutput, average_log_probs, chosen_and_rejected, take_pairs


@dataclass(frozen=True)
class ORPOLoss:
    r"""The loss of `ORPO: Monolithic Preference Optimization without Reference Model <https://arxiv.org/abs/2403.07691>`_.

    With :math:`\log p(y) = \frac{1}{|y|}\log\pi(y|x)` and :math:`odds(y) = p(y) / (1 - p(y))`:

    .. math::
        L = -\log p(y_w) - \beta \log\sigma\left(\log\frac{odds(y_w)}{odds(y_l)}\right)

    The first term is the negative log-likelihood over the chosen response's scored tokens, averaged within the pair, so
    every pair weighs the same. The reward of a response is :math:`\beta \log p(y)`.

    Args:
        beta (float): weight of the odds ratio, the paper's :math:`\lambda`. Default: 0.1.
        nll_over_prompt (bool): whether the first term is over the tokens of prompt and chosen response, as TRL's
            trainer has it; for pairs. Default: False.

    Raises:
        ValueError: if ``beta`` is negative.
    """

    beta: float = 0.1
    nll_over_prompt: bool = False

    needs_reference: ClassVar[bool] = False
    mean_over: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, but is {self.beta}.")

    def __call__(
        self,
        log_probs: torch.Tensor,
        num_scored: torch.Tensor,
        reference_log_probs: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
    ) -> LossOutput:
        """Computes the loss of each pair.

        Args:
            log_probs (torch.Tensor): summed log-probs under the policy, shape ``[E, K]``; with ``nll_over_prompt``,
                the last of K is that of prompt and chosen response.
            num_scored (torch.Tensor): number of scored tokens, shape ``[E, K]``.
            reference_log_probs (torch.Tensor | None): not used.
            pairs (torch.Tensor | None): see ``take_pairs``. Default: None, each example is a pair, chosen first.

        Returns:
            LossOutput: losses and rewards, each of shape ``[P]``.
        """
        whole = average_log_probs(log_probs, num_scored)[:, -1]
        if pairs is not None:
            whole = whole[pairs[:, 0] // log_probs.shape[1]]
        elif self.nll_over_prompt:
            log_probs, num_scored = log_probs[:, :2], num_scored[:, :2]
        log_probs, num_scored = take_pairs(pairs, log_probs, num_scored)
        chosen, rejected = chosen_and_rejected(average_log_probs(log_probs, num_scored))
        log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
        losses = -(whole if self.nll_over_prompt else chosen) - self.beta * F.logsigmoid(log_odds_ratio)
        return LossOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


def _log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """``log(1 - p)`` from ``log p <= 0``, exact at both ends; a probability of one counts as the largest below it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    near_one = log_p > -math.log(2)
    # Each branch sees only the inputs it is exact for, so that neither sends a NaN into the gradient of the other.
    large = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    small = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p)))
    return torch.where(near_one, large, small)
