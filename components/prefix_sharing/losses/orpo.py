"""Odds ratio preference optimization."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossNeeds, LossOutput
from prefix_sharing.losses.pairs import average_log_probs, chosen_and_rejected, require, take_pairs
from prefix_sharing.scoring import ResponseLogProbs


@dataclass(frozen=True)
class ORPOLoss(Loss):
    r"""The loss of [ORPO: Monolithic Preference Optimization without Reference Model](https://arxiv.org/abs/2403.07691).

    With $\log p(y) = \frac{1}{|y|}\log\pi(y|x)$ and $odds(y) = p(y) / (1 - p(y))$:

    $$L = -\log p(y_w) - \beta \log\sigma\left(\log\frac{odds(y_w)}{odds(y_l)}\right)$$

    The first term is the negative log-likelihood over the chosen response's scored tokens, averaged within the pair, so
    every pair weighs the same. The reward of a response is $\beta \log p(y)$.

    Args:
        beta (float): weight of the odds ratio, the paper's $\lambda$. Default: 0.1.
        nll_over_prompt (bool): whether the first term is over the tokens of prompt and chosen response, as TRL's
            trainer has it; for pairs. Default: False.

    Raises:
        ValueError: if ``beta`` is negative.
    """

    beta: float = 0.1
    nll_over_prompt: bool = False

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, but is {self.beta}.")

    @property
    @override
    def needs(self) -> LossNeeds:
        """The log-prob of prompt and chosen response, with ``nll_over_prompt``."""
        return LossNeeds(whole_sequence=self.nll_over_prompt)

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        log_probs, num_scored = take_pairs(pairs, policy.log_probs, policy.num_scored)
        chosen, rejected = chosen_and_rejected(average_log_probs(log_probs, num_scored))
        log_odds_ratio = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
        nll = -chosen
        if self.nll_over_prompt:
            whole = require(policy.whole_log_probs, "log-probs of the whole sequence for nll_over_prompt", self)
            counts = require(policy.whole_num_scored, "numbers of their tokens", self)
            nll = -average_log_probs(whole, counts)
            if pairs is not None:
                nll = nll[pairs[:, 0] // policy.log_probs.shape[1]]
        losses = nll - self.beta * F.logsigmoid(log_odds_ratio)
        return LossOutput(losses, self.beta * chosen.detach(), self.beta * rejected.detach())


def _log1mexp(log_p: torch.Tensor) -> torch.Tensor:
    """``log(1 - p)`` from ``log p <= 0``, exact at both ends; a probability of one counts as the largest below it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    near_one = log_p > -math.log(2)
    # Each branch sees only the inputs it is exact for, so that neither sends a NaN into the gradient of the other.
    large = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    small = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p)))
    return torch.where(near_one, large, small)
