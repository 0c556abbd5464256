"""Negative log-likelihood: supervised fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossOutput, MeanOver
from prefix_sharing.scoring import ResponseLogProbs


@dataclass(frozen=True)
class NLLLoss(Loss):
    """The loss of supervised fine-tuning, for examples of one response, such as ``format: chat`` reads.

    The mean over the scored tokens of a step, whichever examples they are in, as torchtune's recipes take it.
    """

    mean_over: ClassVar[MeanOver] = "tokens"

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        """See ``Loss``; losses of shape ``[E * K]``, the sum over each response's tokens, and no rewards."""
        none = policy.log_probs.new_zeros(0)
        return LossOutput(-policy.log_probs.flatten(), none, none)
