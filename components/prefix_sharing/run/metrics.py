"""Metrics of the steps since the last log entry, over all ranks, under torchtune's names where it has them."""

import contextlib
import time
from collections.abc import Iterator, Mapping

import torch

from prefix_sharing.distributed import sum_over_ranks, this_rank
from prefix_sharing.losses import LossOutput, take_pairs
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row

_PER_PAIR = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "log_probs/chosen",
    "log_probs/rejected",
)


class StepMetrics:
    """Sums what the Rows of one or more steps contribute; nothing waits for the device before ``compute``.

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
        """Adds one Row.

        Args:
            row (Row): the Row, on the device of ``output``.
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
        self._num_examples += len(row.example_index)
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
        world_size = this_rank().world_size

        metrics = {"loss": loss / num_terms}
        if num_pairs > 0:
            metrics |= {name: total / num_pairs for name, total in zip(_PER_PAIR, totals, strict=True)}
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["examples_per_second"] = num_examples / seconds
        metrics["tokens_per_second_per_gpu"] = num_tokens / seconds / world_size
        metrics["tokens_saved"] = 1 - num_tokens / max(paired_tokens, 1)
        return metrics

    @staticmethod
    def shown(metrics: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows of ``compute``'s metrics: the loss, and the accuracy where there are pairs."""
        names = {"loss": "loss", "accuracy": "rewards/accuracies"}
        return {short: f"{metrics[name]:.4f}" for short, name in names.items() if name in metrics}
