"""Metrics on held-out examples."""

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.losses import PairwiseLoss
from prefix_sharing.model import ResponseLogProbs
from prefix_sharing.rows import Row, deal_rows
from prefix_sharing.training.distributed import is_rank_zero, rank_and_world_size
from prefix_sharing.training.metrics import StepMetrics


@torch.no_grad()
def evaluate(
    forward: Callable[[Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset,
    loss_of: Callable[[ResponseLogProbs, Sequence[int]], PairwiseLoss],
    make_row: Callable[[PrefixPreferenceDataset, Sequence[int]], Row],
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Evaluates the model as it is now on every example, over all ranks.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): the model's forward pass.
        dataset (PrefixPreferenceDataset): the held-out data set.
        loss_of (Callable[[ResponseLogProbs, Sequence[int]], PairwiseLoss]): the loss of a row's examples, given what
            the model returned and their indices.
        make_row (Callable[[PrefixPreferenceDataset, Sequence[int]], Row]): makes a row of examples.
        batch_size (int): examples a row.
        device (torch.device): where the model runs.

    Returns:
        dict[str, float]: the metrics of ``StepMetrics`` under ``eval/``.
    """
    metrics = StepMetrics(device)
    rows = deal_rows(list(range(len(dataset))), batch_size, *rank_and_world_size())
    for ids in tqdm(rows, desc="Evaluating", unit="row", leave=False, disable=not is_rank_zero()):
        row = make_row(dataset, ids)
        output = forward(row)
        metrics.add(row, output, loss_of(output, ids))
    return {f"eval/{name}": value for name, value in metrics.compute().items()}
