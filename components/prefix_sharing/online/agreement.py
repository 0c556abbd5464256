"""Whether sampler and trainer mean the same: the log-probs of an answer by the one and by the other."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prefix_sharing.datasets import PrefixPreferenceDataset


def sampler_differences(
    dataset: PrefixPreferenceDataset, rows: Sequence[Mapping[str, Any]], log_probs: np.ndarray
) -> np.ndarray:
    """How far apart an answer's log-probs are, by the sampler and by the trainer.

    Args:
        dataset (PrefixPreferenceDataset): what ``sampled_preference_dataset`` made of the rows, first of a mixture if
            it is in one.
        rows (Sequence[Mapping[str, Any]]): of a round's table.
        log_probs (np.ndarray): of each example's responses by the trainer's model, with the weights that sampled them,
            shape ``[N, K]``; NaN where it has none.

    Returns:
        np.ndarray: absolute differences a token, of the answers for which both have one, shape ``[answers]``.
    """
    found = []
    for i in np.flatnonzero(dataset.record_index < len(rows)).tolist():
        row = rows[dataset.record_index[i]]
        of_answer = {tuple(answer): k for k, answer in enumerate(row["answers"])}
        for response, log_prob in zip(dataset[i], log_probs[i], strict=False):  # others have more responses
            answer = tuple(response.tokens[len(row["prompt_tokens"]) :].tolist())
            if answer in of_answer:  # KTO adds answers to other prompts
                found.append(abs(log_prob - row["log_probs"][of_answer[answer]]) / len(answer))
    differences = np.array(found, dtype=np.float64)
    return differences[~np.isnan(differences)]
