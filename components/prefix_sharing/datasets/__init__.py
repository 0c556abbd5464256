"""Preference data sets: from rows as people have them to tokenized response sequences."""

from prefix_sharing.datasets.mixture import preference_mixture
from prefix_sharing.datasets.packed import PackedPreferenceDataset, StepLoader, StepRows
from prefix_sharing.datasets.preference import (
    PrefixPreferenceDataset,
    packed_preference_dataset,
    preference_dataset_from_rows,
    prefix_preference_dataset,
)

__all__ = [
    "PackedPreferenceDataset",
    "PrefixPreferenceDataset",
    "StepLoader",
    "StepRows",
    "packed_preference_dataset",
    "preference_dataset_from_rows",
    "preference_mixture",
    "prefix_preference_dataset",
]
