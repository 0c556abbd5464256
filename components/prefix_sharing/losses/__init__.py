"""Losses: functions of the policy's log-probs, of those of the reference where needed, and of pairs; one per file."""

from prefix_sharing.losses.cpo import CPOLoss
from prefix_sharing.losses.dpo import DPOLoss
from prefix_sharing.losses.kto import KTOLoss
from prefix_sharing.losses.loss import Loss, LossNeeds, LossOutput
from prefix_sharing.losses.nll import NLLLoss
from prefix_sharing.losses.orpo import ORPOLoss
from prefix_sharing.losses.pairs import average_log_probs, chosen_and_rejected, take_pairs
from prefix_sharing.losses.plackett_luce import PlackettLuceLoss
from prefix_sharing.losses.simpo import SimPOLoss

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "KTOLoss",
    "Loss",
    "LossNeeds",
    "LossOutput",
    "NLLLoss",
    "ORPOLoss",
    "PlackettLuceLoss",
    "SimPOLoss",
    "average_log_probs",
    "chosen_and_rejected",
    "take_pairs",
]
