"""Metrics on held-out examples."""

from collections.abc import Callable

import torch
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.losses import PairwiseLoss
from prefix_sharing.model import ResponseLogProbs
from prefix_sharing.rows import Plan, Row
from prefix_sharing.training.distributed import is_rank_zero
from prefix_sharing.training.metrics import StepMetrics


@torch.no_grad()
def evaluate(
    forward: Callable[[Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    load: StepLoader,
    loss_of: Callable[[Row, ResponseLogProbs], PairwiseLoss],
) -> dict[str, float]:
    """Evaluates the model as it is now on every example, over all ranks.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): the model's forward pass.
        dataset (PrefixPreferenceDataset): the held-out data set.
        plan (Plan): of a pass over it.
        load (StepLoader): builds the rows.
        loss_of (Callable[[Row, ResponseLogProbs], PairwiseLoss]): the loss of a row's pairs, given what the model
            returned for it.

    Returns:
        dict[str, float]: the metrics of ``StepMetrics`` under ``eval/``.
    """
    metrics = StepMetrics(load.device)
    steps = plan.epoch()
    progress = tqdm(
        load(dataset, steps), total=len(steps), desc="Evaluating", unit="step", leave=False, disable=not is_rank_zero()
    )
    for step in progress:
        for row in step.rows:
            row = row.to(load.device)
            output = forward(row)
            metrics.add(row, output, loss_of(row, output))
    return {f"eval/{name}": value for name, value in metrics.compute().items()}
