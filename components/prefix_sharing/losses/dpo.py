"""Direct preference optimization and its relatives, which compare log-ratios of the policy to the reference."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from typing_extensions import override

from prefix_sharing.losses.loss import Loss, LossNeeds, LossOutput
from prefix_sharing.losses.pairs import (
    average_log_probs,
    check_beta_and_label_smoothing,
    chosen_and_rejected,
    require,
    smoothed_log_sigmoid_loss,
    take_pairs,
)
from prefix_sharing.scoring import ResponseLogProbs


def _robust(h: torch.Tensor, eps: float) -> torch.Tensor:
    return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)


def _exo_pair(h: torch.Tensor, eps: float) -> torch.Tensor:
    right = torch.sigmoid(h) * (F.logsigmoid(h) - math.log1p(-eps))
    return right + torch.sigmoid(-h) * (F.logsigmoid(-h) - math.log(eps))


# Of h, beta times the difference of the two scores, and of label_smoothing.
_OF_DIFFERENCE: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "sigmoid": smoothed_log_sigmoid_loss,
    "sigmoid_norm": smoothed_log_sigmoid_loss,
    "hinge": lambda h, eps: torch.relu(1 - h),
    "aot": smoothed_log_sigmoid_loss,
    "aot_unpaired": smoothed_log_sigmoid_loss,
    "robust": _robust,
    "exo_pair": _exo_pair,
}

# Of the rewards of chosen and rejected, beta times their log-ratios, and of beta.
_OF_REWARDS: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "bco_pair": lambda c, r, beta: -F.logsigmoid(c) - F.logsigmoid(-r),
    "nca_pair": lambda c, r, beta: -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r),
    "sppo_hard": lambda c, r, beta: ((c - 0.5) ** 2 + (r + 0.5) ** 2) / beta**2,
    "apo_zero": lambda c, r, beta: torch.sigmoid(-c) + torch.sigmoid(r),
    "apo_down": lambda c, r, beta: torch.sigmoid(c) + torch.sigmoid(r - c),
}

_SMOOTHED = tuple(name for name in _OF_DIFFERENCE if name != "hinge")
"""What makes use of label_smoothing."""

_NORMALIZED = ("sigmoid_norm", "ipo")
"""What compares log-ratios per token."""

LOSS_TYPES = (*_OF_DIFFERENCE, "ipo", *_OF_REWARDS)
"""Values of ``loss_type``."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Values of ``f_divergence``."""


@dataclass(frozen=True)
class DPOLoss(Loss):
    r"""The loss of [Direct Preference Optimization](https://arxiv.org/abs/2305.18290), or one of its relatives.

    With the log-ratios $w = \log\frac{\pi(y_w|x)}{\pi_{ref}(y_w|x)}$ of the chosen and $l$ of the rejected
    response, and $h = \beta (w - l)$:

    | ``loss_type`` | loss | from |
    | --- | --- | --- |
    | ``sigmoid`` | $-(1 - \epsilon) \log\sigma(h) - \epsilon \log\sigma(-h)$ | arXiv 2305.18290 |
    | ``sigmoid_norm`` | the same of log-ratios per scored token | arXiv 2411.15124 |
    | ``hinge`` | $\max(0, 1 - h)$ | arXiv 2309.06657 |
    | ``ipo`` | $(w - l - \frac{1}{2\beta})^2$ of log-ratios per scored token | arXiv 2310.12036 |
    | ``aot`` | ``sigmoid`` of sorted margins, those of the policy less those of the reference | arXiv 2406.05882 |
    | ``aot_unpaired`` | ``sigmoid`` of sorted log-ratios, the chosen less the rejected | arXiv 2406.05882 |
    | ``robust`` | ``sigmoid`` less the expected effect of wrong labels | arXiv 2403.00409 |
    | ``exo_pair`` | $KL(p_\theta \Vert p_{r})$ over the pair | arXiv 2402.00856 |
    | ``bco_pair`` | $-\log\sigma(\beta w) - \log\sigma(-\beta l)$ | arXiv 2404.04656 |
    | ``nca_pair`` | $-\log\sigma(\beta w) - \frac12 (\log\sigma(-\beta w) + \log\sigma(-\beta l))$ | arXiv 2402.05369 |
    | ``sppo_hard`` | $(w - \frac{1}{2\beta})^2 + (l + \frac{1}{2\beta})^2$ | arXiv 2405.00675 |
    | ``apo_zero`` | $\sigma(-\beta w) + \sigma(\beta l)$ | arXiv 2408.06266 |
    | ``apo_down`` | $\sigma(\beta w) + \sigma(\beta (l - w))$ | arXiv 2408.06266 |

    The reward of a response is $\beta \log(\pi / \pi_{ref})$, per scored token where the loss is. The two that
    sort compare distributions; as TRL sorts the pairs of a micro-batch, they sort those of a Row, and so are the only
    losses that depend on packing, but for the auxiliary loss of a mixture of experts' routers.

    Args:
        beta (float): how strongly the policy is held to the reference; 0.1 to 0.5 are usual. Default: 0.1.
        label_smoothing (float): probability $\epsilon$ that a preference is the wrong way round, as in
            [conservative DPO](https://ericmitchell.ai/cdpo.pdf); for ``sigmoid``, ``sigmoid_norm``, ``aot``,
            ``aot_unpaired``, ``robust`` and ``exo_pair``, which needs it. Default: 0.0.
        loss_type (str): see the table. Default: ``sigmoid``.
        f_divergence (str): what holds the policy to the reference, of [f-DPO](https://arxiv.org/abs/2309.16240):
            ``reverse_kl``, ``forward_kl``, ``js_divergence`` or ``alpha_divergence``; for losses of $h$.
            Default: ``reverse_kl``.
        f_alpha (float): of ``alpha_divergence``; 1 is ``reverse_kl``. Default: 0.5.
        ld_alpha (float): weight, from 0 to 1, of the tokens by which a response is longer than the other of its pair,
            in all log-probs, as in [LD-DPO](https://arxiv.org/abs/2409.06411); for pairs. Default: 1.0.
        use_weighting (bool): whether each pair is weighted by how likely the policy is to generate its responses,
            eq. 2 of [WPO](https://arxiv.org/abs/2406.11827). Default: False.
        rpo_alpha (float): weight of the negative log-likelihood of the chosen response, per scored token, that
            [RPO](https://arxiv.org/abs/2404.19733) adds. Default: 0.0.

    Raises:
        ValueError: if an argument is out of range or not used, or two do not go together.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss_type: str = "sigmoid"
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float = 1.0
    use_weighting: bool = False
    rpo_alpha: float = 0.0

    def __post_init__(self) -> None:
        check_beta_and_label_smoothing(self.beta, self.label_smoothing)
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, not {self.loss_type}.")
        if self.label_smoothing != 0 and self.loss_type not in _SMOOTHED:
            raise ValueError(f"label_smoothing is not used by loss_type {self.loss_type}; remove it.")
        if self.f_divergence not in F_DIVERGENCES:
            raise ValueError(f"f_divergence must be one of {', '.join(F_DIVERGENCES)}, not {self.f_divergence}.")
        if self.f_alpha != DPOLoss.f_alpha and self.f_divergence != "alpha_divergence":
            raise ValueError(f"f_alpha is not used by f_divergence {self.f_divergence}; remove it.")
        if self.f_divergence != "reverse_kl" and self.loss_type in (*_OF_REWARDS, "aot"):
            raise ValueError(f"f_divergence {self.f_divergence} cannot be combined with loss_type {self.loss_type}.")
        if self.loss_type == "exo_pair" and self.label_smoothing == 0:
            raise ValueError("loss_type exo_pair needs a label_smoothing above 0; its paper recommends 0.001.")
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be at least 0 and at most 1, not {self.ld_alpha}.")
        if self.use_weighting and self.loss_type in ("aot", "aot_unpaired"):
            raise ValueError(f"use_weighting cannot be combined with loss_type {self.loss_type}.")
        if self.rpo_alpha < 0:
            raise ValueError(f"rpo_alpha must not be negative, but is {self.rpo_alpha}.")

    @property
    @override
    def needs(self) -> LossNeeds:
        """Log-probs under the reference, and what ``use_weighting`` and ``ld_alpha`` ask for."""
        return LossNeeds(reference=True, confidence=self.use_weighting, tail_weight=self.ld_alpha)

    @override
    def __call__(
        self, policy: ResponseLogProbs, reference: torch.Tensor | None = None, pairs: torch.Tensor | None = None
    ) -> LossOutput:
        log_probs, num_scored, reference_log_probs = take_pairs(
            pairs, policy.log_probs, policy.num_scored, require(reference, "log-probs under the reference", self)
        )
        log_ratios = log_probs - reference_log_probs
        scores = self._scores(log_ratios)
        if self.loss_type in _NORMALIZED:
            log_ratios, scores = (average_log_probs(values, num_scored) for values in (log_ratios, scores))
        chosen, rejected = chosen_and_rejected(self.beta * log_ratios)
        difference = scores[:, 0] - scores[:, 1]
        if self.loss_type == "aot":
            margins, reference_margins = (values[:, 0] - values[:, 1] for values in (log_probs, reference_log_probs))
            difference = margins.sort().values - reference_margins.sort().values
        elif self.loss_type == "aot_unpaired":
            difference = scores[:, 0].sort().values - scores[:, 1].sort().values
        if self.loss_type == "ipo":
            losses = (difference - 1 / (2 * self.beta)) ** 2
        elif self.loss_type in _OF_DIFFERENCE:
            losses = _OF_DIFFERENCE[self.loss_type](self.beta * difference, self.label_smoothing)
        else:
            losses = _OF_REWARDS[self.loss_type](chosen, rejected, self.beta)
        if self.rpo_alpha > 0:
            losses = losses - self.rpo_alpha * average_log_probs(log_probs, num_scored)[:, 0]
        if self.use_weighting:
            confidence = require(policy.confidence, "the policy's confidence for use_weighting", self)
            losses = losses * take_pairs(pairs, confidence)[0].sum(dim=1).exp()
        return LossOutput(losses, chosen.detach(), rejected.detach())

    def _scores(self, log_ratios: torch.Tensor) -> torch.Tensor:
        """The derivative of the divergence's f at the ratio of policy to reference."""
        if self.f_divergence == "forward_kl":
            return 1 - torch.exp(-log_ratios)
        if self.f_divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(log_ratios)
        if self.f_divergence == "alpha_divergence" and self.f_alpha != 1:
            return torch.expm1((self.f_alpha - 1) * log_ratios) / (self.f_alpha - 1)
        return log_ratios
