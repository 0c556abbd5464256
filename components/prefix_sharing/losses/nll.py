"""Negative log-likelihood: supervised fine-tuning."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from prefix_sharing.losses.pairs import LossOutput


@dataclass(frozen=True)
class NLLLoss:
    """The loss of supervised fine-tuning, for examples of one response, such as ``format: chat`` reads.

    The mean over the scored tokens of a step, whichever examples they are in, as torchtune's recipes take it.
    """

    needs_reference: ClassVar[bool] = False
    mean_over: ClassVar[str] = "tokens"

    def __call__(
        self,
        log_probs: torch.Tensor,
        num_scored: torch.Tensor,
        reference_log_probs: torch.Tensor | None = None,
        pairs: torch.Tensor | None = None,
    ) -> LossOutput:
        """Computes the loss of each response, the sum over its tokens.

        Args:
            log_probs (torch.Tensor): summed log-probs under the policy, shape ``[E, K]``.
            num_scored (torch.Tensor): not used.
            reference_log_probs (torch.Tensor | None): not used.
            pairs (torch.Tensor | None): not used.

        Returns:
            LossOutput: losses of shape ``[E * K]``; no rewards.
        """
        none = log_probs.new_zeros(0)
        return LossOutput(-log_probs.flatten(), none, none)
