"""The policy on held-out examples: metrics, and the log-probs of each response."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.distributed import is_rank_zero, reshard, sum_over_ranks
from prefix_sharing.hosts import TreeModel
from prefix_sharing.losses import Loss, LossOutput
from prefix_sharing.planning import Plan
from prefix_sharing.reference import Reference
from prefix_sharing.run.kl import estimate_kl
from prefix_sharing.run.metrics import StepMetrics
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row


class Evaluation(NamedTuple):
    """What an evaluation found, the same on every rank.

    Attributes:
        metrics (dict[str, float]): the metrics of ``StepMetrics`` under ``eval/``.
        log_probs (torch.Tensor): summed log-probs of each example's responses, on the CPU, fp64, shape ``[N, K]``.
        num_scored (torch.Tensor): number of scored tokens, likewise; 0 where an example has fewer than K responses.
    """

    metrics: dict[str, float]
    log_probs: torch.Tensor
    num_scored: torch.Tensor


@torch.no_grad()
def evaluate(
    model: TreeModel,
    forward: Callable[[TreeModel, Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    step_loader: StepLoader,
    loss: Loss,
    loss_of: Callable[..., LossOutput],
    reference: Reference | None,
) -> Evaluation:
    """Evaluates the model as it is now on every example, over all ranks.

    Args:
        model (TreeModel): the model, sharded or not; it is trained afterwards.
        forward (Callable[[TreeModel, Row], ResponseLogProbs]): its forward pass.
        dataset (PrefixPreferenceDataset): the held-out data set.
        plan (Plan): of a pass over it.
        step_loader (StepLoader): builds the Rows.
        loss (Loss): the loss, which says what it is the mean over, and whether it needs the distance of policy and
            reference on the whole data set.
        loss_of (Callable[..., LossOutput]): the loss of a Row, given the model's output, the reference and, if it needs
            it, that distance.
        reference (Reference | None): reference log-probs, of a Row, if the loss needs them.

    Returns:
        Evaluation: metrics, and values of each response.
    """
    metrics = StepMetrics(step_loader.device, loss.mean_over)
    found = torch.zeros(2, len(dataset), dataset.num_responses, dtype=torch.float64, device=step_loader.device)
    steps = plan.epoch()
    progress = tqdm(
        step_loader(dataset, steps),
        total=len(steps),
        desc="Evaluating",
        unit="step",
        leave=False,
        disable=not is_rank_zero(),
    )
    model.eval()
    waiting: list[tuple[Row, ResponseLogProbs]] = []  # for what the whole data set has to say first
    for step in progress:
        for row in step.rows:
            on_cpu, row = row, row.to(step_loader.device)
            output = forward(model, row)
            if loss.needs.kl:
                waiting.append((on_cpu, output))
            else:
                metrics.add(row, output, loss_of(row, output, reference))
            values = torch.stack([output.log_probs.to(found.dtype), output.num_scored.to(found.dtype)])
            found[:, row.example_index] = values
    if loss.needs.kl:
        kl = estimate_kl(((row.to(step_loader.device), output) for row, output in waiting), reference)
        metrics.add_kl(kl)
        for row, output in waiting:
            row = row.to(step_loader.device)
            metrics.add(row, output, loss_of(row, output, reference, kl))
    model.train()
    reshard(model)
    log_probs, num_scored = sum_over_ranks(found).cpu()
    named = {f"eval/{name}": value for name, value in metrics.compute().items()}
    return Evaluation(named, log_probs, num_scored.long())
