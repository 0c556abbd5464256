"""Judges: what says which of several answers is better."""

from prefix_sharing.judging.functions import function_judge, length_judge
from prefix_sharing.judging.judge import Judge

__all__ = ["Judge", "function_judge", "length_judge"]
