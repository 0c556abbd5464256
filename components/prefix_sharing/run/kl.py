"""How far the policy is from the reference, estimated over a whole step and all ranks, as KTO asks for."""

from collections.abc import Callable, Iterable

import torch

from prefix_sharing.datasets import StepRows
from prefix_sharing.distributed import sum_over_ranks
from prefix_sharing.losses import Loss, LossOutput
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row


@torch.no_grad()
def estimate_kl(
    outputs: Iterable[tuple[Row, ResponseLogProbs]], reference: Callable[[Row], torch.Tensor] | None
) -> torch.Tensor:
    """The mean log-ratio of policy and reference of the answers to other prompts, at least 0: a collective.

    Args:
        outputs (Iterable[tuple[Row, ResponseLogProbs]]): this rank's Rows of a step, with what the policy makes of
            each.
        reference (Callable[[Row], torch.Tensor] | None): log-probs under the reference, of a Row.

    Returns:
        torch.Tensor: a scalar in fp64, the same on every rank.
    """
    assert reference is not None, "a loss that needs the distance from the reference needs a reference"
    sums = []
    for row, output in outputs:
        is_mismatched = (row.labels == 0) & (row.num_scored > 0)
        log_ratios = torch.where(is_mismatched, output.log_probs - reference(row), 0.0)
        sums.append(torch.stack([log_ratios.double().sum(), is_mismatched.double().sum()]))
    total, count = sum_over_ranks(torch.stack(sums).sum(dim=0))
    return (total / count.clamp(min=1)).clamp(min=0)


@torch.no_grad()
def kl_of_step(
    step: StepRows,
    forward: Callable[[Row], ResponseLogProbs],
    reference: Callable[[Row], torch.Tensor] | None,
    device: torch.device,
) -> torch.Tensor | None:
    """``estimate_kl`` of a step of several Rows, whose losses have to know before: a collective.

    Args:
        step (StepRows): what this rank computes in the step.
        forward (Callable[[Row], ResponseLogProbs]): the policy's forward pass.
        reference (Callable[[Row], torch.Tensor] | None): log-probs under the reference, of a Row.
        device (torch.device): where the model runs.

    Returns:
        torch.Tensor | None: None if the step's Rows hold the answers to other prompts, or the loss needs none.
    """
    if not step.kl_rows:
        return None
    rows = (row.to(device) for row in step.kl_rows)
    return estimate_kl(((row, forward(row)) for row in rows), reference)


def loss_of_row(
    loss: Loss,
    row: Row,
    output: ResponseLogProbs,
    reference: Callable[[Row], torch.Tensor] | None,
    kl: torch.Tensor | None = None,
) -> LossOutput:
    """The loss of a Row, given what it needs and nothing else, with the model's own loss where it has one.

    That is spread over the Row's losses such that the mean over a step counts a Row's by what the loss is a mean over.

    Args:
        loss (Loss): the loss.
        row (Row): the Row.
        output (ResponseLogProbs): what the policy makes of it.
        reference (Callable[[Row], torch.Tensor] | None): log-probs under the reference, of a Row, if the loss needs
            them.
        kl (torch.Tensor | None): what ``estimate_kl`` says of the step, if the loss needs it. Default: None.

    Returns:
        LossOutput: not reduced.
    """
    known = None if reference is None else reference(row)
    if loss.needs.labels:
        found = loss(output, known, row.pairs, labels=row.labels, kl=kl)  # type: ignore[call-arg]
    else:
        found = loss(output, known, row.pairs)
    if output.aux_loss is None or found.losses.numel() == 0:
        return found
    share = row.num_terms(loss.mean_over) / found.losses.numel()
    return found._replace(losses=found.losses + share * output.aux_loss)
