"""Contrastive preference optimization."""

from dataclasses import dataclass

import torch
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossOutput
from prefix_sharing.losses.pairs import (
    average_log_probs,
    check_beta_and_label_smoothing,
    chosen_and_rejected,
    smoothed_log_sigmoid_loss,
    take_pairs,
)
from prefix_sharing.scoring import ResponseLogProbs


@dataclass(frozen=True)
class CPOLoss(Loss):
    r"""The loss of [Contrastive Preference Optimization](https://arxiv.org/abs/2401.08417), without a reference.

    With $h = \beta (\log\pi(y_w|x) - \log\pi(y_l|x))$:

    $$L = -(1 - \epsilon) \log\sigma(h) - \epsilon \log\sigma(-h) - \frac{\alpha}{|y_w|} \log\pi(y_w|x)$$

    The last term is averaged within the pair, so every pair weighs the same. The reward of a response is
    $\beta \log\pi(y|x)$; $|y|$ counts scored tokens.

    Args:
        beta (float): scale of the log-probs. Default: 0.1.
        cpo_alpha (float): weight of the negative log-likelihood of the chosen response. Default: 1.0.
        label_smoothing (float): probability $\epsilon$ that a preference is the wrong way round. Default: 0.0.

    Raises:
        ValueError: if ``beta`` is not positive, ``cpo_alpha`` negative, or ``label_smoothing`` not in [0, 0.5).
    """

    beta: float = 0.1
    cpo_alpha: float = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta_and_label_smoothing(self.beta, self.label_smoothing)
        if self.cpo_alpha < 0:
            raise ValueError(f"cpo_alpha must not be negative, but is {self.cpo_alpha}.")

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        log_probs, num_scored = take_pairs(pairs, policy.log_probs, policy.num_scored)
        chosen_rewards, rejected_rewards = chosen_and_rejected(self.beta * log_probs)
        losses = smoothed_log_sigmoid_loss(chosen_rewards - rejected_rewards, self.label_smoothing)
        losses = losses - self.cpo_alpha * average_log_probs(log_probs, num_scored)[:, 0]
        return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())
