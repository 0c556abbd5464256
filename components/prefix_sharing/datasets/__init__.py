"""Preference data sets: from records as people have them to tokenized response sequences, and Rows of them."""

from prefix_sharing.datasets.builders import (
    packed_preference_dataset,
    preference_dataset_from_records,
    prefix_preference_dataset,
)
from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.datasets.mixture import preference_mixture
from prefix_sharing.datasets.steps import StepDataset, StepLoader, StepRows
from prefix_sharing.datasets.subset import random_subset
from prefix_sharing.datasets.tokenizing import PreferenceOptions

__all__ = [
    "PreferenceOptions",
    "PrefixPreferenceDataset",
    "StepDataset",
    "StepLoader",
    "StepRows",
    "packed_preference_dataset",
    "preference_dataset_from_records",
    "preference_mixture",
    "prefix_preference_dataset",
    "random_subset",
]
