"""The rows of a run's optimizer steps, built ahead of the loop from memory-mapped tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prefix_sharing.datasets.preference import PrefixPreferenceDataset
from prefix_sharing.rows import Epoch, Row


@dataclass(frozen=True)
class StepRows:
    """What one rank computes in one optimizer step.

    Attributes:
        rows (list[Row]): as many as on every other rank; one without examples is padding.
        examples (np.ndarray): the examples of the step over all ranks.
        num_terms (int): their terms of the loss, such as pairs, which the step's loss is the mean over.
    """

    rows: list[Row]
    examples: np.ndarray
    num_terms: int

    def pin_memory(self) -> "StepRows":
        """The same with tensors in pinned memory."""
        return StepRows([row.pin_memory() for row in self.rows], self.examples, self.num_terms)


class PackedPreferenceDataset(Dataset):
    """The optimizer steps of an epoch, each as rows of prefix trees: item t is step t.

    Which examples share a row is the plan's business: as many as fit into ``pack_len`` tokens, or ``batch_size``.

    Args:
        dataset (PrefixPreferenceDataset): the examples.
        steps (Epoch): the steps of an epoch, ``plan.epoch(epoch)``.
        share_prefix (bool): False computes every response on its own. Default: True.
        ld_alpha (float): see ``Row.from_examples``. Default: 1.0.
        score_whole (bool): see ``Row.from_examples``. Default: False.
        round_length (Callable[[int], int] | None): the row length for a number of tokens. Default: None, no padding.

    Example:
        >>> plan = Plan(sizes=sizes, examples_per_step=64, pack_len=4096, shuffle=True)
        >>> for step in DataLoader(PackedPreferenceDataset(dataset, plan.epoch(0)), batch_size=None):
        >>>     for row in step.rows:
        >>>         output = model(row)
    """

    def __init__(
        self,
        dataset: PrefixPreferenceDataset,
        steps: Epoch,
        *,
        share_prefix: bool = True,
        ld_alpha: float = 1.0,
        score_whole: bool = False,
        round_length: Callable[[int], int] | None = None,
    ) -> None:
        self._dataset = dataset
        self._steps = steps
        self._share_prefix = share_prefix
        self._ld_alpha = ld_alpha
        self._score_whole = score_whole
        self._round_length = round_length

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> StepRows:
        """This rank's rows of a step."""
        step = self._steps[index]
        rows = [
            Row.from_examples(
                [self._dataset[i] for i in examples],
                pairs=[self._dataset.pairs(i) for i in examples],
                indices=examples,
                share_prefix=self._share_prefix,
                ld_alpha=self._ld_alpha,
                score_whole=self._score_whole,
                num_responses=self._dataset.num_responses,
                round_length=self._round_length,
            )
            for examples in step.rows
        ]
        return StepRows(rows, step.examples, step.num_terms)


@dataclass(frozen=True)
class StepLoader:
    """Builds rows ahead of whoever loops over them.

    Args:
        device (torch.device): where the rows are going.
        share_prefix (bool): False computes every response on its own. Default: True.
        ld_alpha (float): see ``Row.from_examples``. Default: 1.0.
        score_whole (bool): see ``Row.from_examples``. Default: False.
        round_length (Callable[[int], int] | None): the row length for a number of tokens. Default: None, no padding.
        num_workers (int): processes that build them; 0 builds them in the loop. Default: 0.
    """

    device: torch.device
    share_prefix: bool = True
    ld_alpha: float = 1.0
    score_whole: bool = False
    round_length: Callable[[int], int] | None = None
    num_workers: int = 0

    def __call__(self, dataset: PrefixPreferenceDataset, steps: Epoch, first_step: int = 0) -> Iterator[StepRows]:
        """Goes through the steps of an epoch.

        Args:
            dataset (PrefixPreferenceDataset): the examples.
            steps (Epoch): the steps.
            first_step (int): where to begin: all there is to remember of an interrupted epoch. Default: 0.

        Returns:
            Iterator[StepRows]: one at a time, on the CPU, in pinned memory if they go to a GPU.
        """
        packed = PackedPreferenceDataset(
            dataset,
            steps,
            share_prefix=self.share_prefix,
            ld_alpha=self.ld_alpha,
            score_whole=self.score_whole,
            round_length=self.round_length,
        )
        return iter(
            DataLoader(
                packed,
                batch_size=None,
                sampler=range(first_step, len(packed)),
                num_workers=min(self.num_workers, len(packed) - first_step),
                pin_memory=self.device.type == "cuda",
            )
        )
