"""Metrics of the steps since the last log entry, over all ranks, under torchtune's names where it has them."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from prefix_sharing.distributed import is_rank_zero, sum_over_ranks, this_rank
from prefix_sharing.losses import LossOutput, take_pairs
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row

_OF_CHOSEN = ("rewards/chosen", "log_probs/chosen")
_OF_REJECTED = ("rewards/rejected", "log_probs/rejected")
_OF_PAIRS = ("rewards/accuracies",)


class StepMetrics:
    """Sums what the Rows of one or more steps contribute; nothing waits for the device before ``compute``.

    ``rewards/accuracies`` is the share of pairs whose chosen response has the higher reward; a tie counts half, so that
    a policy that still equals its reference scores what a coin would.

    ``aux_loss`` is the part of the loss that keeps a mixture's experts evenly used.

    Without pairs, desirable responses count as chosen and undesirable ones as rejected, and ``kl`` is the mean over the
    steps.

    Args:
        device (torch.device): where the model runs.
        mean_over (str): what the loss is the mean over, see ``Loss.mean_over``. Default: "pairs".
    """

    def __init__(self, device: torch.device, mean_over: str = "pairs") -> None:
        self._mean_over = mean_over
        names = ("loss", "aux_loss", *_OF_CHOSEN, *_OF_REJECTED, *_OF_PAIRS, "num_chosen", "num_rejected", "num_pairs")
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self._kl: list[torch.Tensor] = []
        self._has_aux_loss = False
        self._num_terms = 0
        self._num_examples = 0
        self._num_tokens = 0
        self._paired_tokens = 0
        self._start = time.perf_counter()
        self.begin_step()

    def begin_step(self) -> None:
        """Marks where ``forget_step`` goes back to."""
        counts = (self._num_terms, self._num_examples, self._num_tokens, self._paired_tokens)
        self._before = (dict(self._sums), list(self._kl), counts)  # sums are replaced, never changed

    def forget_step(self) -> None:
        """Takes back what was added since ``begin_step``."""
        self._sums, self._kl, counts = self._before
        self._num_terms, self._num_examples, self._num_tokens, self._paired_tokens = counts

    def add(self, row: Row, output: ResponseLogProbs, loss: LossOutput) -> None:
        """Adds one Row.

        Args:
            row (Row): the Row, on the device of ``output``.
            output (ResponseLogProbs): what the model returned for it.
            loss (LossOutput): what the loss returned for that.
        """
        _, chosen, rejected = loss
        if row.num_labels:
            is_chosen, is_rejected = row.labels == 1, row.labels == -1
            log_probs = [torch.where(which, output.log_probs, 0.0) for which in (is_chosen, is_rejected)]
            counts: list[Any] = [is_chosen.sum(), is_rejected.sum(), 0]
            accuracies = chosen.new_zeros(0)
        else:
            log_probs = list(take_pairs(row.pairs, output.log_probs)[0].T)
            counts = [len(row.pairs)] * 3
            accuracies = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
        values = (loss.losses, chosen, log_probs[0], rejected, log_probs[1], accuracies)
        for name, of_row in zip(("loss", *_OF_CHOSEN, *_OF_REJECTED, *_OF_PAIRS), values, strict=True):
            self._sums[name] = self._sums[name] + of_row.detach().double().sum()
        for name, count in zip(("num_chosen", "num_rejected", "num_pairs"), counts, strict=True):
            self._sums[name] = self._sums[name] + count
        num_terms = row.num_terms(self._mean_over)
        if output.aux_loss is not None:
            self._sums["aux_loss"] = self._sums["aux_loss"] + output.aux_loss.detach() * num_terms
            self._has_aux_loss = True
        self._num_terms += num_terms
        self._num_examples += len(row.example_index)
        self._num_tokens += row.num_tokens
        self._paired_tokens += row.paired_tokens

    def add_kl(self, kl: torch.Tensor) -> None:
        """Adds what was estimated for a step, the same on every rank."""
        self._kl.append(kl)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time that the body takes out of the throughput."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """What has been added so far over all ranks, as JSON can say it: a collective."""
        kl = [value.item() for value in self._kl]
        return {
            "sums": self._over_ranks(),
            "kl": kl,
            "aux": self._has_aux_loss,
            "seconds": time.perf_counter() - self._start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state_dict`` returned, on any number of ranks.

        Args:
            state (Mapping[str, Any]): the state.
        """
        self._start = time.perf_counter() - state["seconds"]
        self._has_aux_loss = state["aux"]
        device = self._sums["loss"].device
        self._kl = [torch.tensor(value, dtype=torch.float64, device=device) for value in state["kl"]]
        if is_rank_zero():  # whose sums count once
            *of_rows, num_terms, num_examples, num_tokens, paired_tokens = state["sums"]
            for name, value in zip(self._sums, of_rows, strict=True):
                self._sums[name] = self._sums[name] + value
            self._num_terms, self._num_examples = int(num_terms), int(num_examples)
            self._num_tokens, self._paired_tokens = int(num_tokens), int(paired_tokens)

    def compute(self) -> dict[str, float]:
        """The metrics over all ranks: a collective, so every rank has to call it.

        Returns:
            dict[str, float]: the loss, means over pairs or labelled responses if there are any, ``tokens_saved`` (share
            of the paired format's tokens that sharing avoided), ``examples_per_second``, and
            ``tokens_per_second_per_gpu`` (tokens computed); nothing if all steps were taken back.
        """
        sums = self._over_ranks()
        totals = dict(zip(self._sums, sums, strict=False))
        num_terms, num_examples, num_tokens, paired_tokens = sums[len(totals) :]
        seconds = time.perf_counter() - self._start
        world_size = this_rank().world_size
        if num_terms == 0:
            return {}

        metrics = {"loss": totals["loss"] / num_terms}
        if self._has_aux_loss:
            metrics["aux_loss"] = totals["aux_loss"] / num_terms
        for names, count in (
            (_OF_CHOSEN, totals["num_chosen"]),
            (_OF_REJECTED, totals["num_rejected"]),
            (_OF_PAIRS, totals["num_pairs"]),
        ):
            if count > 0:
                metrics |= {name: totals[name] / count for name in names}
        if totals["num_chosen"] > 0 and totals["num_rejected"] > 0:
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        if self._kl:
            metrics["kl"] = torch.stack(self._kl).mean().item()
        metrics["examples_per_second"] = num_examples / seconds
        metrics["tokens_per_second_per_gpu"] = num_tokens / seconds / world_size
        metrics["tokens_saved"] = 1 - num_tokens / max(paired_tokens, 1)
        return metrics

    def _over_ranks(self) -> list[float]:
        """The sums, and behind them the counts, over all ranks: a collective."""
        counts = [self._num_terms, self._num_examples, self._num_tokens, self._paired_tokens]
        of_rows = torch.stack(list(self._sums.values()))
        return sum_over_ranks(torch.cat([of_rows, of_rows.new_tensor(counts)])).tolist()

    @staticmethod
    def shown(metrics: Mapping[str, float]) -> dict[str, str]:
        """What the progress bar shows of ``compute``'s metrics: the loss, and the accuracy where there are pairs."""
        names = {"loss": "loss", "accuracy": "rewards/accuracies"}
        return {short: f"{metrics[name]:.4f}" for short, name in names.items() if name in metrics}
