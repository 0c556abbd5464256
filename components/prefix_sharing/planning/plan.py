"""The plan of a run: which examples a step takes, which of them share a Row, and which rank computes the Row.

Step t of an epoch takes the next ``examples_per_step`` examples of a seeded permutation: the same set whatever the Row
length and the number of ranks, so that every way of running follows the same loss curve. The plan is a pure function of
its numbers: all that has to be remembered of a run is which step it is at.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prefix_sharing.planning.bin_packing import Bins, deal, first_fit_decreasing, lower_bound, pack

_ROWS_IN_A_PASS_STEP = 8
"""Rows per rank in a step of a pass: enough to fill and share out well, few enough to hold in memory."""


@dataclass(frozen=True, eq=False)
class ExampleSizes:
    """What the plan knows of each example of a data set.

    Attributes:
        num_tokens (np.ndarray): tokens in a Row, shape ``[N]``.
        cost (np.ndarray): what it costs the model, in any unit, shape ``[N]``.
        num_terms (np.ndarray): terms it contributes to the loss, such as pairs, shape ``[N]``.
    """

    num_tokens: np.ndarray
    cost: np.ndarray
    num_terms: np.ndarray


@dataclass(frozen=True)
class Fixed:
    """Rows of a fixed number of examples, in the order of the step.

    Attributes:
        batch_size (int): examples per Row.
    """

    batch_size: int

    def rows(self, examples: np.ndarray, sizes: ExampleSizes, world_size: int) -> Bins:
        """The Rows of a step's examples."""
        return [examples[i : i + self.batch_size].tolist() for i in range(0, len(examples), self.batch_size)]

    def fewest_rows(self, examples: np.ndarray, sizes: ExampleSizes) -> int:
        """Rows that a step cannot do without."""
        return math.ceil(len(examples) / self.batch_size)

    def examples_per_row(self, sizes: ExampleSizes) -> int:
        """About how many examples a Row holds."""
        return self.batch_size


@dataclass(frozen=True)
class ByLength:
    """Rows filled with the examples of a step.

    Attributes:
        pack_len (int): maximum number of tokens in a Row.
    """

    pack_len: int

    def rows(self, examples: np.ndarray, sizes: ExampleSizes, world_size: int) -> Bins:
        """The Rows of a step's examples."""
        packed = pack(sizes.num_tokens[examples], sizes.cost[examples], self.pack_len, world_size)
        return [examples[row].tolist() for row in packed]

    def fewest_rows(self, examples: np.ndarray, sizes: ExampleSizes) -> int:
        """Rows that a step cannot do without."""
        return lower_bound(sizes.num_tokens[examples], self.pack_len)

    def examples_per_row(self, sizes: ExampleSizes) -> int:
        """About how many examples a Row holds."""
        return max(1, int(self.pack_len / sizes.num_tokens.mean()))


@dataclass(frozen=True)
class WholeDataset(ByLength):
    """Rows packed from the whole data set, by first-fit decreasing: the mode of https://arxiv.org/abs/2410.20305.

    Attributes:
        pack_len (int): maximum number of tokens in a Row.
        rows_per_step (int): Rows an optimizer step takes over all ranks, however many examples they hold.
    """

    rows_per_step: int


Packing = Fixed | ByLength | WholeDataset
"""Which examples share a Row."""


@dataclass(frozen=True, eq=False)
class Step:
    """One optimizer step, as one rank sees it.

    Attributes:
        rows (Bins): the examples of each of this rank's Rows; every rank has the same number of Rows, and one without
            examples is computed as padding.
        example_index (np.ndarray): the examples of the step over all ranks.
        num_terms (int): their terms of the loss.
    """

    rows: Bins
    example_index: np.ndarray
    num_terms: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Deals the examples of a data set to steps, Rows and ranks.

    Args:
        sizes (ExampleSizes): of every example in the data set.
        packing (Packing): which examples share a Row.
        examples_per_step (int | None): examples an optimizer step takes over all ranks. The last step of an epoch takes
            what is left. Default: None, all; ``WholeDataset`` counts Rows instead.
        example_index (np.ndarray | None): the examples to take. Default: None, all.
        seed (int): decides the order, together with the epoch. Default: 0.
        shuffle (bool): False keeps the order of the data set. Default: False.
        drop_last (bool): whether to leave out the last step of an epoch if it is incomplete. Default: False.
        max_steps (int | None): most steps per epoch. Default: None.
        rank (int): this process. Default: 0.
        world_size (int): processes. Default: 1.

    Raises:
        ValueError: if an example is longer than ``pack_len``, or a step is to take a number of examples and of Rows.
    """

    sizes: ExampleSizes
    packing: Packing
    examples_per_step: int | None = None
    example_index: np.ndarray | None = None
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False
    max_steps: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.packing, ByLength) and self.sizes.num_tokens.max() > self.packing.pack_len:
            longest = int(self.sizes.num_tokens.argmax())
            num_tokens = self.sizes.num_tokens[longest]
            raise ValueError(
                f"Example {longest} has {num_tokens:,} tokens, more than pack_len {self.packing.pack_len:,}."
            )
        if isinstance(self.packing, WholeDataset) and self.examples_per_step is not None:
            raise ValueError("WholeDataset takes rows_per_step Rows per step, not examples_per_step examples.")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
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

    def of_pass(self, example_index: np.ndarray | None = None) -> "Plan":
        """A plan of one pass in the same Rows, without a gradient: evaluation, or reference log-probs.

        Args:
            example_index (np.ndarray | None): the examples to take. Default: None, this plan's.

        Returns:
            Plan: in the order of the data set; its steps are long enough to fill Rows and ranks.
        """
        packing = ByLength(self.packing.pack_len) if isinstance(self.packing, WholeDataset) else self.packing
        return Plan(
            sizes=self.sizes,
            packing=packing,
            examples_per_step=_ROWS_IN_A_PASS_STEP * self.world_size * packing.examples_per_row(self.sizes),
            example_index=self.example_index if example_index is None else example_index,
            rank=self.rank,
            world_size=self.world_size,
        )

    @functools.cached_property
    def all_examples(self) -> np.ndarray:
        """The examples there are to take."""
        return np.arange(len(self.sizes.num_tokens)) if self.example_index is None else self.example_index

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
        visited = np.empty(0, dtype=np.int64)
        for number in range(first_epoch, last_epoch):
            epoch = self.epoch(number)
            visited = np.unique(np.concatenate([visited, *map(epoch.example_index, range(len(epoch)))]))
            if len(visited) == len(self.all_examples) or not self.shuffle:
                break  # later epochs take none that is new
        return visited

    @functools.cached_property
    def rows_of_dataset(self) -> Bins:
        """The Rows of ``WholeDataset``: all examples, packed once."""
        assert isinstance(self.packing, WholeDataset)
        chosen = self.all_examples
        rows = first_fit_decreasing(self.sizes.num_tokens[chosen], self.packing.pack_len)
        return [chosen[row].tolist() for row in rows]

    def _num_units(self) -> tuple[int, int]:
        """How many things there are to be dealt to steps, and how many a step takes: examples, or Rows."""
        if isinstance(self.packing, WholeDataset):
            return len(self.rows_of_dataset), self.packing.rows_per_step
        num_examples = len(self.all_examples)
        return num_examples, self.examples_per_step or max(num_examples, 1)


@dataclass(frozen=True, eq=False)
class Epoch:
    """The steps of one epoch, each computed when it is asked for.

    Args:
        plan (Plan): the plan.
        order (np.ndarray): the order of the plan's examples, or of its Rows.
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
        examples = self.example_index(step)
        return Step(rows, examples, int(self.plan.sizes.num_terms[examples].sum()))

    def __iter__(self) -> Iterator[Step]:
        return (self[step] for step in range(len(self)))

    def example_index(self, step: int) -> np.ndarray:
        """The examples of a step over all ranks."""
        units = self._units(step)
        if isinstance(self.plan.packing, WholeDataset):
            return np.concatenate([self.plan.rows_of_dataset[row] for row in units])
        return self.plan.all_examples[units]

    def rows_of_ranks(self, step: int) -> list[Bins]:
        """The Rows of every rank in a step."""
        plan, sizes = self.plan, self.plan.sizes
        if isinstance(plan.packing, WholeDataset):
            rows = [plan.rows_of_dataset[row] for row in self._units(step)]
        else:
            rows = plan.packing.rows(self.example_index(step), sizes, plan.world_size)
        return deal(rows, [sizes.cost[row].sum() for row in rows], plan.world_size)

    def _units(self, step: int) -> np.ndarray:
        _, units_per_step = self.plan._num_units()
        return self.order[step * units_per_step : (step + 1) * units_per_step]
