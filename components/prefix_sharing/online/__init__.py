"""Rounds of sampling, judging and training."""

from prefix_sharing.online.agreement import sampler_differences
from prefix_sharing.online.answering import answer_prompts
from prefix_sharing.online.dataset import dataset_of_answers, describe_pairs, sampled_preference_dataset
from prefix_sharing.online.judged import judged_answers
from prefix_sharing.online.prompts import make_prompts, prompt_dataset
from prefix_sharing.online.tables import RoundTable, read_rows, row_of

__all__ = [
    "RoundTable",
    "answer_prompts",
    "dataset_of_answers",
    "describe_pairs",
    "judged_answers",
    "make_prompts",
    "prompt_dataset",
    "read_rows",
    "row_of",
    "sampled_preference_dataset",
    "sampler_differences",
]
