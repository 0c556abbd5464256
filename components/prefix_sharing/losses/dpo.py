"""Direct preference optimization."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from prefix_sharing.losses.pairs import PairwiseLoss, chosen_and_rejected


@dataclass(frozen=True)
class DPOLoss:
    r"""The sigmoid loss of `Direct Preference Optimization <https://arxiv.org/abs/2305.18290>`_.

    With :math:`h = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)} - \log\frac{\pi(y_l|x)}{\pi_{ref}(y_l|x)}`:

    .. math::
        L = -(1 - \epsilon) \log\sigma(\beta h) - \epsilon \log\sigma(-\beta h)

    The reward of a response is :math:`\beta \log(\pi / \pi_{ref})`.

    Args:
        beta (float): how strongly the policy is held to the reference; 0.1 to 0.5 are usual. Default: 0.1.
        label_smoothing (float): probability :math:`\epsilon` that a preference is the wrong way round, as in
            `conservative DPO <https://ericmitchell.ai/cdpo.pdf>`_. Default: 0.0.

    Raises:
        ValueError: if ``beta`` is not positive or ``label_smoothing`` not in [0, 0.5).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta must be positive, not {self.beta}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {self.label_smoothing}.")

    def __call__(
        self, log_probs: torch.Tensor, num_scored: torch.Tensor, reference_log_probs: torch.Tensor
    ) -> PairwiseLoss:
        """Computes the loss of each pair.

        Args:
            log_probs (torch.Tensor): summed log-probs under the policy, chosen first, shape ``[P, 2]``.
            num_scored (torch.Tensor): number of scored tokens, shape ``[P, 2]``; not used.
            reference_log_probs (torch.Tensor): summed log-probs under the reference, shape ``[P, 2]``.

        Returns:
            PairwiseLoss: losses and rewards, each of shape ``[P]``.
        """
        chosen_rewards, rejected_rewards = chosen_and_rejected(self.beta * (log_probs - reference_log_probs))
        logits = chosen_rewards - rejected_rewards
        losses = -(1 - self.label_smoothing) * F.logsigmoid(logits) - self.label_smoothing * F.logsigmoid(-logits)
        return PairwiseLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())
