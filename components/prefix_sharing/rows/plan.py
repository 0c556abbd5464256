"""Which examples an optimizer step takes, and which of them share a row.

Step t of an epoch takes the next ``examples_per_step`` examples of a seeded permutation: the same set whatever the
number of ranks, so that every way of running follows the same loss curve. The plan is a pure function of its numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    """One optimizer step, as one rank sees it.

    Attributes:
        rows (list[list[int]]): the examples of each of this rank's rows; every rank has the same number of rows, and
            one without examples is computed as padding.
        num_examples (int): examples of the step over all ranks.
    """

    rows: list[list[int]]
    num_examples: int


@dataclass(frozen=True)
class Plan:
    """Deals the examples of a data set to steps, rows and ranks.

    Args:
        num_examples (int): examples in the data set.
        examples_per_step (int): examples an optimizer step takes over all ranks. The last step of an epoch takes what
            is left.
        batch_size (int): examples a row.
        seed (int): decides the order, together with the epoch. Default: 0.
        shuffle (bool): False keeps the order of the data set. Default: False.
        max_steps (int | None): most steps an epoch. Default: None.
        rank (int): this process. Default: 0.
        world_size (int): processes. Default: 1.
    """

    num_examples: int
    examples_per_step: int
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    max_steps: int | None = None
    rank: int = 0
    world_size: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        steps = math.ceil(self.num_examples / self.examples_per_step)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def epoch(self, epoch: int) -> Iterator[Step]:
        """The steps of an epoch.

        Args:
            epoch (int): which epoch, from 0.

        Yields:
            Step: one optimizer step.
        """
        for examples in self._examples_of_steps(epoch):
            yield Step(deal_rows(examples, self.batch_size, self.rank, self.world_size), len(examples))

    def examples_visited(self, first_epoch: int, last_epoch: int) -> list[int]:
        """The examples that a run over some epochs takes.

        Args:
            first_epoch (int): the first epoch.
            last_epoch (int): the one past the last.

        Returns:
            list[int]: indices, ascending.
        """
        if self.max_steps is None:
            return list(range(self.num_examples))
        epochs = range(first_epoch, last_epoch)
        return sorted({i for epoch in epochs for examples in self._examples_of_steps(epoch) for i in examples})

    def _examples_of_steps(self, epoch: int) -> Iterator[list[int]]:
        order = np.arange(self.num_examples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        for step in range(self.steps_per_epoch):
            yield order[step * self.examples_per_step : (step + 1) * self.examples_per_step].tolist()


def deal_rows(examples: list[int], batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Groups examples into rows and deals the rows to the ranks in turn, as many to each.

    Args:
        examples (list[int]): the examples.
        batch_size (int): examples a row.
        rank (int): this process. Default: 0.
        world_size (int): processes. Default: 1.

    Returns:
        list[list[int]]: this rank's rows, empty ones last.
    """
    rows = [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
    rows += [[] for _ in range(-len(rows) % world_size)]
    return rows[rank::world_size]
