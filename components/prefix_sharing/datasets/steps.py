"""The Rows of a run's optimizer steps, built ahead of the loop from memory-mapped tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.planning import Epoch
from prefix_sharing.trees import Row, RowOptions


@dataclass(frozen=True, eq=False)
class StepRows:
    """What one rank computes in one optimizer step.

    Attributes:
        rows (list[Row]): as many as on every other rank; one without examples is padding.
        example_index (np.ndarray): the examples of the step over all ranks.
        num_terms (int): their terms of the loss, such as pairs, which the step's loss is the mean over.
    """

    rows: list[Row]
    example_index: np.ndarray
    num_terms: int

    def pin_memory(self) -> "StepRows":
        """The same with tensors in pinned memory."""
        return StepRows([row.pin_memory() for row in self.rows], self.example_index, self.num_terms)


class StepDataset(Dataset):
    """The optimizer steps of an epoch, each as Rows of prefix trees: item t is step t.

    Which examples share a Row is the plan's business: as many as fit into ``pack_len`` tokens, or ``batch_size``.

    Args:
        dataset (PrefixPreferenceDataset): the examples.
        steps (Epoch): the steps of an epoch, ``plan.epoch(epoch)``.
        options (RowOptions): how Rows are laid out, and what is computed from them.

    Example:
        >>> plan = Plan(sizes=sizes, packing=ByLength(4096), examples_per_step=64, shuffle=True)
        >>> for step in DataLoader(StepDataset(dataset, plan.epoch(0)), batch_size=None):
        >>>     for row in step.rows:
        >>>         output = model(row)
    """

    def __init__(
        self,
        dataset: PrefixPreferenceDataset,
        steps: Epoch,
        options: RowOptions = RowOptions(),  # noqa: B008, it is frozen
    ) -> None:
        self._dataset = dataset
        self._steps = steps
        self._options = options

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> StepRows:
        """This rank's Rows of a step."""
        step = self._steps[index]
        rows = [
            Row.from_examples(
                [self._dataset[i] for i in examples],
                pairs=[self._dataset.pairs(i) for i in examples],
                example_index=examples,
                num_responses=self._dataset.num_responses,
                options=self._options,
            )
            for examples in step.rows
        ]
        return StepRows(rows, step.example_index, step.num_terms)


@dataclass(frozen=True)
class StepLoader:
    """Builds Rows ahead of whoever loops over them.

    Args:
        device (torch.device): where the Rows are going.
        options (RowOptions): how they are laid out, and what is computed from them. Default: a shared prefix.
        num_workers (int): processes that build them; 0 builds them in the loop. Default: 0.
    """

    device: torch.device
    options: RowOptions = field(default_factory=RowOptions)
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
        step_dataset = StepDataset(dataset, steps, self.options)
        return iter(
            DataLoader(
                step_dataset,
                batch_size=None,
                sampler=range(first_step, len(step_dataset)),
                num_workers=min(self.num_workers, len(step_dataset) - first_step),
                pin_memory=self.device.type == "cuda",
                # Its own: a loader draws a seed for its workers, which must not change the numbers of the training
                # loop.
                generator=torch.Generator(),
            )
        )
