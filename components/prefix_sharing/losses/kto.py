"""Kahneman-Tversky optimization, which learns from single answers that are desirable or not."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossNeeds, LossOutput, MeanOver
from prefix_sharing.losses.pairs import require
from prefix_sharing.scoring import ResponseLogProbs

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")
"""Values of ``loss_type``."""


@dataclass(frozen=True)
class KTOLoss(Loss):
    r"""The loss of [KTO: Model Alignment as Prospect Theoretic Optimization](https://arxiv.org/abs/2402.01306).

    With the log-ratio $r = \log\frac{\pi(y|x)}{\pi_{ref}(y|x)}$ of a response and $z$, how far the policy is from
    the reference:

    | ``loss_type`` | desirable | undesirable | from |
    | --- | --- | --- | --- |
    | ``kto`` | $1 - \sigma(\beta (r - z))$ | $1 - \sigma(\beta (z - r))$ | arXiv 2402.01306 |
    | ``apo_zero_unpaired`` | $1 - \sigma(\beta r)$ | $\sigma(\beta r)$ | arXiv 2408.06266 |

    $z$ is the mean log-ratio of answers to other prompts, at least 0, over the whole step and all ranks. The loss is
    the mean over the step's responses with a label. The reward of a response is $\beta r$.

    Args:
        beta (float): how strongly the policy is held to the reference. Default: 0.1.
        desirable_weight (float): weight of desirable responses. Default: 1.0.
        undesirable_weight (float): weight of undesirable responses. The paper recommends a ratio of the two for which
            weight times number is about as large for one as for the other. Default: 1.0.
        loss_type (str): see the table. Default: "kto".

    Raises:
        ValueError: if an argument is out of range.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    loss_type: str = "kto"

    mean_over: ClassVar[MeanOver] = "responses"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"beta must not be negative, but is {self.beta}.")
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if self.loss_type not in KTO_LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(KTO_LOSS_TYPES)}, not {self.loss_type}.")

    @property
    @override
    def needs(self) -> LossNeeds:
        """Log-probs under the reference, labels, and for ``kto`` the distance of the two models."""
        return LossNeeds(reference=True, labels=True, kl=self.loss_type == "kto")

    @override
    def __call__(
        self,
        policy: ResponseLogProbs,
        reference: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        kl: torch.Tensor | None = None,
    ) -> LossOutput:
        """See ``Loss``.

        Args:
            policy (ResponseLogProbs): what the policy makes of a Row, values of shape ``[E, K]``.
            reference (torch.Tensor | None): summed log-probs under the reference, shape ``[E, K]``.
            pairs (torch.Tensor | None): not used. Default: None.
            labels (torch.Tensor | None): 1 for a desirable response, -1 for an undesirable one and 0 for another,
                shape ``[E, K]``.
            kl (torch.Tensor | None): z, a scalar without a gradient; not used by ``apo_zero_unpaired``.

        Returns:
            LossOutput: losses and rewards of shape ``[E * K]``.

        Raises:
            ValueError: if something is missing.
        """
        labels = require(labels, "labels of responses", self).flatten()
        log_ratios = (policy.log_probs - require(reference, "log-probs under the reference", self)).flatten()
        distance = require(kl, "the distance of policy and reference", self) if self.needs.kl else 0.0
        # 1 - sigmoid(x) is sigmoid(-x), without the rounding.
        losses = torch.sigmoid(-self.beta * (log_ratios - distance) * labels)
        desirable, undesirable = ((labels == sign).to(losses.dtype) for sign in (1, -1))
        weights = self.desirable_weight * desirable + self.undesirable_weight * undesirable
        rewards = self.beta * log_ratios.detach()
        return LossOutput(losses * weights, rewards * desirable, rewards * undesirable)
