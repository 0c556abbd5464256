"""Losses: pure functions of log-probs ``[E, K]``, counts ``[E, K]``, where needed reference log-probs, and pairs.

Each has ``needs_reference``, which says whether it wants reference log-probs, and ``mean_over``: the loss of a step is
the sum of what it returns over the number of the step's ``pairs``, ``examples`` or scored ``tokens``.
"""

from prefix_sharing.losses.cpo import CPOLoss
from prefix_sharing.losses.dpo import DPOLoss
from prefix_sharing.losses.nll import NLLLoss
from prefix_sharing.losses.orpo import ORPOLoss
from prefix_sharing.losses.pairs import LossOutput, take_pairs, weigh_by_confidence
from prefix_sharing.losses.plackett_luce import PlackettLuceLoss
from prefix_sharing.losses.simpo import SimPOLoss

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "LossOutput",
    "NLLLoss",
    "ORPOLoss",
    "PlackettLuceLoss",
    "SimPOLoss",
    "take_pairs",
    "weigh_by_confidence",
]
