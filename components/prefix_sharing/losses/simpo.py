"""Simple preference optimization."""

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
class SimPOLoss(Loss):
    r"""The loss of [SimPO: Simple Preference Optimization with a Reference-Free Reward](https://arxiv.org/abs/2405.14734).

    With $h = \frac{1}{|y_w|}\log\pi(y_w|x) - \frac{1}{|y_l|}\log\pi(y_l|x)$:

    $$L = -(1 - \epsilon) \log\sigma(\beta h - \gamma) - \epsilon \log\sigma(-(\beta h - \gamma))$$

    The reward of a response is $\frac{\beta}{|y|}\log\pi(y|x)$; $|y|$ counts scored tokens.

    Args:
        beta (float): scale of the rewards; the paper uses 2.0 to 10. Default: 2.0.
        gamma (float | None): margin by which the chosen reward has to lead. Default: None, taken from
            ``gamma_beta_ratio``.
        gamma_beta_ratio (float | None): the margin as a share of ``beta``, as the paper tunes it. Default: None, which is
            0.25 unless ``gamma`` is given.
        label_smoothing (float): probability $\epsilon$ that a preference is the wrong way round. Default: 0.0.

    Raises:
        ValueError: if ``beta`` is not positive, ``label_smoothing`` not in [0, 0.5), or both margins are given.
    """  # noqa: E501

    beta: float = 2.0
    gamma: float | None = None
    gamma_beta_ratio: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_beta_and_label_smoothing(self.beta, self.label_smoothing)
        if self.gamma is not None and self.gamma_beta_ratio is not None:
            raise ValueError("gamma and gamma_beta_ratio both set the margin; give one of them.")

    @property
    def margin(self) -> float:
        """By how much the chosen reward has to lead, whichever way it was given."""
        if self.gamma is not None:
            return self.gamma
        return self.beta * (0.25 if self.gamma_beta_ratio is None else self.gamma_beta_ratio)

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        log_probs, num_scored = take_pairs(pairs, policy.log_probs, policy.num_scored)
        chosen_rewards, rejected_rewards = chosen_and_rejected(self.beta * average_log_probs(log_probs, num_scored))
        logits = chosen_rewards - rejected_rewards - self.margin
        losses = smoothed_log_sigmoid_loss(logits, self.label_smoothing)
        return LossOutput(losses, chosen_rewards.detach(), rejected_rewards.detach())
