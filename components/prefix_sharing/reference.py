"""Log-probs under the reference: computed in one pass before the first update, by the model that is about to train.

There is never a second model. Values are indexed by the example, never by a position in some rank's stream.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.model import ResponseLogProbs
from prefix_sharing.rows import Row, deal_rows
from prefix_sharing.training.checkpoint import load_checkpoint
from prefix_sharing.training.distributed import is_rank_zero, rank_and_world_size, sum_over_ranks


def load_reference_checkpoint(cfg: DictConfig) -> dict[str, Any] | None:
    """Reads the reference's checkpoint, where it is not what the run itself starts from.

    A run that resumes has the policy it first began with as its reference, not the one it goes on from.

    Args:
        cfg (DictConfig): the run's config.

    Returns:
        dict[str, Any] | None: the checkpoint; None if the initial policy is the reference.
    """
    if cfg.ref_checkpointer is not None:
        return load_checkpoint("ref_checkpointer", cfg.ref_checkpointer)[1]
    if cfg.resume_from_checkpoint:
        return load_checkpoint("checkpointer", cfg.checkpointer)[1]
    return None


@torch.no_grad()
def reference_log_probs(
    forward: Callable[[Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset | None,
    make_row: Callable[[PrefixPreferenceDataset, Sequence[int]], Row],
    batch_size: int,
    examples: Sequence[int] | None = None,
) -> torch.Tensor | None:
    """Computes the log-probs of the examples' responses with the model as it is now, over all ranks.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): the model's forward pass.
        dataset (PrefixPreferenceDataset | None): the data set.
        make_row (Callable[[PrefixPreferenceDataset, Sequence[int]], Row]): makes a row of examples.
        batch_size (int): examples a row.
        examples (Sequence[int] | None): indices of those that the run will read. Default: None, all.

    Returns:
        torch.Tensor | None: log-probs, shape ``[len(dataset), K]``, on the CPU; NaN for examples that were not asked
        for; None where there is no data set.
    """
    if dataset is None:
        return None
    examples = list(range(len(dataset)) if examples is None else examples)
    totals = torch.zeros(len(dataset), dataset.num_responses)
    rows = deal_rows(examples, batch_size, *rank_and_world_size())
    for ids in tqdm(rows, desc=f"Reference log-probs, {dataset.name}", unit="row", disable=not is_rank_zero()):
        totals[ids] = forward(make_row(dataset, ids)).log_probs.float().cpu()
    log_probs = torch.full_like(totals, math.nan)
    log_probs[examples] = sum_over_ranks(totals)[examples]
    return log_probs
