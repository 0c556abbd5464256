"""Preference losses: pure functions of log-probs ``[E, K]``, counts ``[E, K]`` and, where needed, reference log-probs.

Each has ``needs_reference``, which says whether it wants the last, and returns one loss an example.
"""

from prefix_sharing.losses.dpo import DPOLoss
from prefix_sharing.losses.orpo import ORPOLoss
from prefix_sharing.losses.pairs import PairwiseLoss
from prefix_sharing.losses.simpo import SimPOLoss

__all__ = ["DPOLoss", "ORPOLoss", "PairwiseLoss", "SimPOLoss"]
