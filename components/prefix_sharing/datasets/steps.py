"""The Rows of a run's optimizer steps, built ahead of the loop from memory-mapped tokens."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.distributed.processes import belong_to_parent
from prefix_sharing.planning import Epoch
from prefix_sharing.trees import NO_RESPONSE, Row, RowOptions


@dataclass(frozen=True, eq=False)
class StepRows:
    """What one rank computes in one optimizer step.

    Attributes:
        rows (list[Row]): as many as on every other rank; one without examples is padding.
        example_index (np.ndarray): the examples of the step over all ranks.
        num_terms (int): their terms of the loss, such as pairs, which the step's loss is the mean over.
        kl_rows (list[Row]): the answers to other prompts, for a loss that has to know the distance of policy and
            reference on the whole step before it can say what that of any Row is. Empty if ``rows`` hold them.
    """

    rows: list[Row]
    example_index: np.ndarray
    num_terms: int
    kl_rows: list[Row] = field(default_factory=list)

    def pin_memory(self) -> "StepRows":
        """The same with tensors in pinned memory."""
        rows, kl_rows = ([row.pin_memory() for row in some] for some in (self.rows, self.kl_rows))
        return StepRows(rows, self.example_index, self.num_terms, kl_rows)


class StepDataset(Dataset):
    """The optimizer steps of an epoch, each as Rows of prefix trees: item t is step t.

    Which examples share a Row is the plan's business: as many as fit into ``pack_len`` tokens, or ``batch_size``.

    Args:
        dataset (PrefixPreferenceDataset): the examples.
        steps (Epoch): the steps of an epoch, ``plan.epoch(epoch)``.
        options (RowOptions): how Rows are laid out, and what is computed from them.
        kl_apart (bool): whether a step of several Rows has its answers to other prompts in Rows of their own. A single
            Row holds all, so that their prompts are shared. Default: False.

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
        kl_apart: bool = False,
    ) -> None:
        self._dataset = dataset
        self._steps = steps
        self._options = options
        self._kl_apart = kl_apart

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> StepRows:
        """This rank's Rows of a step."""
        step = self._steps[index]
        if not self._kl_apart or len(step.rows) == 1:
            rows = [self._row(examples) for examples in step.rows]
            return StepRows(rows, step.example_index, step.num_terms)
        rows, kl_rows = ([self._row(examples, part) for examples in step.rows] for part in ("labelled", "mismatched"))
        return StepRows(rows, step.example_index, step.num_terms, kl_rows)

    def _row(self, examples: Sequence[int], part: Literal["all", "labelled", "mismatched"] = "all") -> Row:
        labels = [self._dataset.labels(i) for i in examples]
        responses = [self._dataset[i] for i in examples]
        if part != "all":
            responses = [
                [r if (label != 0) == (part == "labelled") else NO_RESPONSE for r, label in zip(some, of, strict=True)]
                for some, of in zip(responses, labels, strict=True)
            ]
        return Row.from_examples(
            responses,
            pairs=[self._dataset.pairs(i) for i in examples],
            labels=labels,
            example_index=examples,
            num_responses=self._dataset.num_responses,
            options=self._options,
        )


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

    def __call__(
        self, dataset: PrefixPreferenceDataset, steps: Epoch, first_step: int = 0, *, kl_apart: bool = False
    ) -> Iterator[StepRows]:
        """Goes through the steps of an epoch.

        Args:
            dataset (PrefixPreferenceDataset): the examples.
            steps (Epoch): the steps.
            first_step (int): where to begin: all there is to remember of an interrupted epoch. Default: 0.
            kl_apart (bool): see ``StepDataset``. Default: False.

        Returns:
            Iterator[StepRows]: one at a time, on the CPU, in pinned memory if they go to a GPU.
        """
        step_dataset = StepDataset(dataset, steps, self.options, kl_apart)
        return iter(
            DataLoader(
                step_dataset,
                batch_size=None,
                sampler=range(first_step, len(step_dataset)),
                num_workers=min(self.num_workers, len(step_dataset) - first_step),
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_set_up_worker,
                # Its own: a loader draws a seed for its workers, which must not change the numbers of the training
                # loop.
                generator=torch.Generator(),
            )
        )


def _set_up_worker(worker_id: int) -> None:
    belong_to_parent()
    # A SIGTERM to the whole group ends the run after its step, which still needs its Rows; only another one is for us.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
