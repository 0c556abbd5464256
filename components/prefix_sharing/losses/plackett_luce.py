"""Preference optimization over a ranking of several responses."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossNeeds, LossOutput, MeanOver
from prefix_sharing.losses.pairs import (
    check_beta_and_label_smoothing,
    chosen_and_rejected,
    require,
    take_pairs,
)
from prefix_sharing.scoring import ResponseLogProbs


@dataclass(frozen=True)
class PlackettLuceLoss(Loss):
    r"""DPO's loss of a ranking, [Direct Preference Optimization](https://arxiv.org/abs/2305.18290), appendix A.3.

    With the rewards $r_k = \beta \log\frac{\pi(y_k|x)}{\pi_{ref}(y_k|x)}$ and $W_k$, the responses that
    $y_k$ is paired with as the better one:

    $$L = -\sum_{k: W_k \neq \emptyset} \log\frac{\exp(r_k)}{\exp(r_k) + \sum_{j \in W_k} \exp(r_j)}$$

    The data set's ``pairs`` decides what that is: with ``all`` the Plackett-Luce model of the ranking, in which tied
    responses do not compete; with ``best_vs_rest`` its first factor, the best against all others at once. For K = 2 it
    is DPO. A mean over examples. Prompts that ``group_by_prompt`` merges are one example with one ranking, and a pair
    that several records contain is one.

    Args:
        beta (float): how strongly the policy is held to the reference. Default: 0.1.

    Raises:
        ValueError: if ``beta`` is not positive.
    """

    beta: float = 0.1

    mean_over: ClassVar[MeanOver] = "examples"

    def __post_init__(self) -> None:
        check_beta_and_label_smoothing(self.beta)

    @property
    @override
    def needs(self) -> LossNeeds:
        """Log-probs under the reference."""
        return LossNeeds(reference=True)

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        """See ``Loss``; losses of shape ``[E * K]``, 0 for responses that are better than none."""
        rewards = self.beta * (policy.log_probs - require(reference, "log-probs under the reference", self))
        pairs = require(pairs, "the pairs of each ranking", self)
        chosen, rejected = chosen_and_rejected(*take_pairs(pairs, rewards))
        better, worse = pairs.unique(dim=0).T
        differences = rewards.flatten()[worse] - rewards.flatten()[better]
        # log(1 + sum of exp(differences)) over the pairs of each better response, from its largest term.
        largest = rewards.new_zeros(rewards.numel()).scatter_reduce(0, better, differences.detach(), "amax")
        terms = torch.exp(differences - largest[better])
        losses = largest + torch.log1p(torch.expm1(-largest).index_add(0, better, terms))
        return LossOutput(losses, chosen.detach(), rejected.detach())
