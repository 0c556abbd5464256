"""What every loss is: a function of the policy's log-probs, which says what it needs computed."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch

from prefix_sharing.scoring import ResponseLogProbs

MeanOver = Literal["pairs", "examples", "tokens", "responses"]


class LossOutput(NamedTuple):
    """The loss, not reduced, with the implicit rewards of the two responses of each pair.

    Attributes:
        losses (torch.Tensor): of the pairs, shape ``[P]``, or of the responses, shape ``[E * K]``. Their sum is to be
            divided by the number of what the loss is a mean over.
        chosen_rewards (torch.Tensor): detached, shape ``[P]``; or ``[E * K]``, 0 for what is not desirable.
        rejected_rewards (torch.Tensor): detached, shape ``[P]``; or ``[E * K]``, 0 for what is not undesirable.
    """

    losses: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


@dataclass(frozen=True)
class LossNeeds:
    """What a loss needs in addition to the policy's log-probs; recipes compute what is asked for here and nothing else.

    Attributes:
        reference (bool): log-probs under the reference. Default: False.
        confidence (bool): ``ResponseLogProbs.confidence``. Default: False.
        tail_weight (float): weight, in all log-probs, of the tokens by which a response is longer than the other of its
            pair. Default: 1.0.
        whole_sequence (bool): ``ResponseLogProbs.whole_log_probs``. Default: False.
        labels (bool): whether each response is desirable or not, in place of pairs. Default: False.
        kl (bool): how far the policy is from the reference, estimated on answers to other prompts. Default: False.
    """

    reference: bool = False
    confidence: bool = False
    tail_weight: float = 1.0
    whole_sequence: bool = False
    labels: bool = False
    kl: bool = False

    @property
    def pairs_only(self) -> bool:
        """Whether examples of more than two responses make no sense."""
        return self.tail_weight != 1.0 or self.whole_sequence


class Loss(ABC):
    """A loss over preferences; subclass it to write yours.

    Attributes:
        mean_over (MeanOver): the loss of a step is the sum of ``LossOutput.losses`` over the number of the step's
            ``pairs``, ``examples``, scored ``tokens`` or ``responses`` with a label. Default: "pairs".
    """

    mean_over: ClassVar[MeanOver] = "pairs"

    @property
    def needs(self) -> LossNeeds:
        """What is to be computed for the loss. Default: the policy's log-probs alone."""
        return LossNeeds()

    @abstractmethod
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        """Computes the loss.

        Args:
            policy (ResponseLogProbs): what the policy makes of a Row, values of shape ``[E, K]``.
            reference (torch.Tensor | None): summed log-probs under the reference, shape ``[E, K]``. Default: None, for
                losses that need none.
            pairs (torch.Tensor | None): ``example * K + response`` of the chosen and the rejected response of each
                pair, shape ``[P, 2]``. Default: None, each example is a pair, chosen first.

        Returns:
            LossOutput: losses ``[P]`` or ``[E * K]``, rewards ``[P]``.

        Raises:
            ValueError: if something that the loss needs is missing.
        """
