"""Metrics of the steps since the last entry of the log, over their rows and all ranks, under torchtune's names."""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from prefix_sharing.losses import LossOutput, take_pairs
from prefix_sharing.model import ResponseLogProbs
from prefix_sharing.rows import Row
from prefix_sharing.training.distributed import sum_over_ranks

_PER_PAIR = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "log_probs/chosen",
    "log_probs/rejected",
)


class StepMetrics:
    """Sums what the rows of one or more steps contribute; nothing waits for the device before ``compute``.

    ``rewards/accuracies`` is the share of pairs whose chosen response has the higher reward; a tie counts half, so that
    a policy that still equals its reference scores what a coin would.

    Args:
        device (torch.device): where the model runs.
        mean_over (str): what the loss is the mean over: ``pairs``, ``examples`` or ``tokens``. Default: "pairs".
    """

    def __init__(self, device: torch.device, mean_over: str = "pairs") -> None:
        self._mean_over = mean_over
        self._sums = torch.zeros(1 + len(_PER_PAIR), dtype=torch.float64, device=device)
        self._num_terms = 0
        self._num_pairs = 0
        self._num_examples = 0
        self._num_tokens = 0
        self._paired_tokens = 0
        self._start = time.perf_counter()

    def add(self, row: Row, output: ResponseLogProbs, loss: LossOutput) -> None:
        """Adds one row.

        Args:
            row (Row): the row.
            output (ResponseLogProbs): what the model returned for it.
            loss (LossOutput): what the loss returned for that.
        """
        losses, chosen, rejected = loss
        accuracies = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        (log_probs,) = take_pairs(row.pairs, output.log_probs)
        values = (losses, chosen, rejected, accuracies, log_probs[:, 0], log_probs[:, 1])
        self._sums += torch.stack([value.detach().double().sum() for value in values])
        self._num_terms += row.num_terms(self._mean_over)
        self._num_pairs += len(row.pairs)
        self._num_examples += len(row.examples)
        self._num_tokens += row.num_tokens
        self._paired_tokens += row.paired_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time that the body takes out of the throughput."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks: a collective, so every rank has to call it.

        Returns:
            dict[str, float]: the loss, means over pairs if there are any, ``tokens_saved`` (share of the paired
            format's tokens that sharing avoided), ``examples_per_second``, and ``tokens_per_second_per_gpu`` (tokens
            computed).
        """
        counts = [self._num_terms, self._num_pairs, self._num_examples, self._num_tokens, self._paired_tokens]
        sums = torch.cat([self._sums, self._sums.new_tensor(counts)])
        loss, *totals, num_terms, num_pairs, num_examples, num_tokens, paired_tokens = sum_over_ranks(sums).tolist()
        seconds = time.perf_counter() - self._start
        world_size = dist.get_world_size() if dist.is_initialized() else 1

        metrics = {"loss": loss / num_terms}
        if num_pairs > 0:
            metrics |= {name: total / num_pairs for name, total in zip(_PER_PAIR, totals, strict=True)}
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["examples_per_second"] = num_examples / seconds
        metrics["tokens_per_second_per_gpu"] = num_tokens / seconds / world_size
        metrics["tokens_saved"] = 1 - num_tokens / max(paired_tokens, 1)
        return metrics
