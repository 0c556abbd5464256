"""Which examples an optimizer step takes, which of them share a row, and which rank computes the row.

Step t of an epoch takes the next ``examples_per_step`` examples of a seeded permutation: the same set whatever the row
length and the number of ranks, so that every way of running follows the same loss curve. The plan is a pure function of
its numbers: all that has to be remembered of a run is which step it is at.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from prefix_sharing.rows.packing import Rows, deal, first_fit_decreasing, pack

_ROWS_IN_A_PASS_STEP = 8
"""Rows a rank in a step of a pass: enough to fill and share out well, few enough to hold in memory."""


class ExampleSizes(NamedTuple):
    """What the plan knows of each example of a data set.

    Attributes:
        num_tokens (np.ndarray): tokens in a row, shape ``[N]``.
        cost (np.ndarray): what it costs the model, in any unit, shape ``[N]``.
        num_terms (np.ndarray): terms it contributes to the loss, such as pairs, shape ``[N]``.
    """

    num_tokens: np.ndarray
    cost: np.ndarray
    num_terms: np.ndarray

    @classmethod
    def uniform(cls, num_examples: int) -> "ExampleSizes":
        """Examples that are all alike."""
        ones = np.ones(num_examples, dtype=np.int64)
        return cls(ones, ones.astype(np.float64), ones)


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one rank sees it.

    Attributes:
        rows (Rows): the examples of each of this rank's rows; every rank has the same number of rows, and one without
            examples is computed as padding.
        examples (np.ndarray): the examples of the step over all ranks.
        num_terms (int): their terms of the loss.
    """

    rows: Rows
    examples: np.ndarray
    num_terms: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Deals the examples of a data set to steps, rows and ranks.

    Args:
        sizes (ExampleSizes): of every example in the data set.
        examples_per_step (int | None): examples an optimizer step takes over all ranks. The last step of an epoch takes
            what is left. None if ``rows_per_step`` is given.
        batch_size (int | None): examples a row, in the order of the step. Default: None, rows are packed.
        pack_len (int | None): most tokens in a packed row. Default: None, rows are not packed.
        rows_per_step (int | None): packs the whole data set first, by first-fit decreasing, then takes so many rows a
            step over all ranks, however many examples they hold: the mode of https://arxiv.org/abs/2410.20305.
            Default: None.
        examples (np.ndarray | None): the examples to take. Default: None, all.
        seed (int): decides the order, together with the epoch. Default: 0.
        shuffle (bool): False keeps the order of the data set. Default: False.
        drop_last (bool): whether to leave out the last step of an epoch if it is incomplete. Default: False.
        max_steps (int | None): most steps an epoch. Default: None.
        rank (int): this process. Default: 0.
        world_size (int): processes. Default: 1.

    Raises:
        ValueError: if an example is longer than ``pack_len``.
    """

    sizes: ExampleSizes
    examples_per_step: int | None = None
    batch_size: int | None = None
    pack_len: int | None = None
    rows_per_step: int | None = None
    examples: np.ndarray | None = None
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False
    max_steps: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.pack_len is not None and self.sizes.num_tokens.max() > self.pack_len:
            longest = int(self.sizes.num_tokens.argmax())
            num_tokens = self.sizes.num_tokens[longest]
            raise ValueError(f"Example {longest} has {num_tokens:,} tokens, more than pack_len {self.pack_len:,}.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        num_units, units_per_step = self._num_units()
        steps = num_units // units_per_step if self.drop_last else math.ceil(num_units / units_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch(self, epoch: int = 0) -> "Epoch":
        """The steps of an epoch.

        Args:
            epoch (int): which, from 0. Default: 0.

        Returns:
            Epoch: a sequence of ``Step``.
        """
        num_units, _ = self._num_units()
        order = np.arange(num_units)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(num_units)
        return Epoch(self, order)

    def of_pass(self, examples: np.ndarray | None = None) -> "Plan":
        """A plan of one pass in the same rows, without a gradient: evaluation, or reference log-probs.

        Args:
            examples (np.ndarray | None): the examples to take. Default: None, this plan's.

        Returns:
            Plan: in the order of the data set; its steps are long enough to fill rows and ranks.
        """
        per_row = self.batch_size
        if self.pack_len is not None:
            per_row = max(1, int(self.pack_len / self.sizes.num_tokens.mean()))
        return Plan(
            sizes=self.sizes,
            examples_per_step=_ROWS_IN_A_PASS_STEP * self.world_size * per_row,
            batch_size=self.batch_size,
            pack_len=self.pack_len,
            examples=self.examples if examples is None else examples,
            rank=self.rank,
            world_size=self.world_size,
        )

    @functools.cached_property
    def all_examples(self) -> np.ndarray:
        """The examples there are to take."""
        return np.arange(len(self.sizes.num_tokens)) if self.examples is None else self.examples

    def examples_visited(self, first_epoch: int, last_epoch: int) -> np.ndarray:
        """The examples that a run over some epochs takes.

        Args:
            first_epoch (int): the first epoch.
            last_epoch (int): the one past the last.

        Returns:
            np.ndarray: indices, ascending.
        """
        if self.max_steps is None and not self.drop_last:
            return np.sort(self.all_examples)
        epochs = [self.epoch(epoch) for epoch in range(first_epoch, last_epoch)]
        visited = [epoch.examples(step) for epoch in epochs for step in range(len(epoch))]
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *visited]))

    @functools.cached_property
    def rows_of_dataset(self) -> Rows:
        """The rows of ``rows_per_step``: the whole data set, packed once."""
        chosen = self.all_examples
        rows = first_fit_decreasing(self.sizes.num_tokens[chosen], self.pack_len)
        return [chosen[row].tolist() for row in rows]

    def _num_units(self) -> tuple[int, int]:
        """How many things there are to be dealt to steps, and how many a step takes: examples, or rows."""
        if self.rows_per_step is not None:
            return len(self.rows_of_dataset), self.rows_per_step
        return len(self.all_examples), self.examples_per_step


@dataclass(frozen=True)
class Epoch(Sequence):
    """The steps of one epoch, each computed when it is asked for.

    Args:
        plan (Plan): the plan.
        order (np.ndarray): the order of the plan's examples, or of its rows.
    """

    plan: Plan
    order: np.ndarray

    def __len__(self) -> int:
        return self.plan.steps_per_epoch

    def __getitem__(self, step: int) -> Step:
        """This rank's share of a step."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        rows = self.rows_of_ranks(step)[self.plan.rank]
        examples = self.examples(step)
        return Step(rows, examples, int(self.plan.sizes.num_terms[examples].sum()))

    def __iter__(self) -> Iterator[Step]:
        return (self[step] for step in range(len(self)))

    def examples(self, step: int) -> np.ndarray:
        """The examples of a step over all ranks."""
        units = self._units(step)
        if self.plan.rows_per_step is not None:
            return np.concatenate([self.plan.rows_of_dataset[row] for row in units])
        return self.plan.all_examples[units]

    def rows_of_ranks(self, step: int) -> list[Rows]:
        """The rows of every rank in a step."""
        plan, sizes = self.plan, self.plan.sizes
        if plan.rows_per_step is not None:
            rows = [plan.rows_of_dataset[row] for row in self._units(step)]
        else:
            examples = self.examples(step)
            if plan.pack_len is not None:
                packed = pack(sizes.num_tokens[examples], sizes.cost[examples], plan.pack_len, plan.world_size)
                rows = [examples[row].tolist() for row in packed]
            else:
                rows = [examples[i : i + plan.batch_size].tolist() for i in range(0, len(examples), plan.batch_size)]
        return deal(rows, [sizes.cost[row].sum() for row in rows], plan.world_size)

    def _units(self, step: int) -> np.ndarray:
        _, units_per_step = self.plan._num_units()
        return self.order[step * units_per_step : (step + 1) * units_per_step]
