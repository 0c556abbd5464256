"""Preference losses: pure functions of log-probs ``[P, 2]``, counts ``[P, 2]`` and, where needed, reference log-probs.

Each has ``needs_reference``, which says whether it wants the last, and returns one loss a pair; ``take_pairs`` reads
the pairs off what the model returns for responses.
"""

from prefix_sharing.losses.cpo import CPOLoss
from prefix_sharing.losses.dpo import DPOLoss
from prefix_sharing.losses.orpo import ORPOLoss
from prefix_sharing.losses.pairs import PairwiseLoss, take_pairs
from prefix_sharing.losses.simpo import SimPOLoss

__all__ = ["CPOLoss", "DPOLoss", "ORPOLoss", "PairwiseLoss", "SimPOLoss", "take_pairs"]
