"""Judges: what says which of several answers is better."""

from prefix_sharing.judging.functions import function_judge, length_judge
from prefix_sharing.judging.implicit_reward import implicit_reward_judge
from prefix_sharing.judging.judge import Judge
from prefix_sharing.judging.pair_ranker import pair_ranker_judge
from prefix_sharing.judging.reward_model import reward_model_judge
from prefix_sharing.judging.served import served_judge

__all__ = [
    "Judge",
    "function_judge",
    "implicit_reward_judge",
    "length_judge",
    "pair_ranker_judge",
    "reward_model_judge",
    "served_judge",
]
