"""Preference data sets: from rows as people have them to tokenized response sequences."""

from prefix_sharing.datasets.preference import (
    PrefixPreferenceDataset,
    preference_dataset_from_rows,
    prefix_preference_dataset,
)

__all__ = ["PrefixPreferenceDataset", "preference_dataset_from_rows", "prefix_preference_dataset"]
