"""What a plan comes to: how full its Rows are, how even its ranks, and how many shapes the model will see."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from prefix_sharing.planning.plan import ByLength, Plan
from prefix_sharing.wording import counted


@dataclass(frozen=True)
class PlanReport:
    """Figures over some steps of an epoch and all ranks.

    Attributes:
        num_steps (int): the steps.
        num_rows (int): Rows with examples.
        fewest_rows (int): Rows that no packing of the same steps can do without.
        num_empty_rows (int): Rows without examples, computed so that ranks keep step.
        fill (float | None): how full Rows with examples are: tokens over Rows times ``pack_len``; None where Rows
            are not packed.
        padding (float): share of the computed tokens that are padding, for compiled attention or in empty Rows.
        mean_imbalance (float): time of a step over what it would be if all ranks were equally busy at every forward
            pass, by cost, the mean over the steps.
        worst_imbalance (float): the same of the worst step.
        row_lengths (tuple[int, ...]): the distinct Row lengths, where they are rounded for compiled attention; else
            none.
    """

    num_steps: int
    num_rows: int
    fewest_rows: int
    num_empty_rows: int
    fill: float | None
    padding: float
    mean_imbalance: float
    worst_imbalance: float
    row_lengths: tuple[int, ...]

    def __str__(self) -> str:
        shapes = ""
        if self.row_lengths:
            shortest, longest = self.row_lengths[0], self.row_lengths[-1]
            shapes = (
                f", {counted(len(self.row_lengths), 'Row length')} for compiled attention "
                f"({shortest:,} to {longest:,} tokens, {self.padding:.1%} of them padding)"
            )
        full = "" if self.fill is None else f"{self.fill:.1%} full, "
        return (
            f"{counted(self.num_rows, 'Row')} in {counted(self.num_steps, 'step')} (no fewer than {self.fewest_rows:,} "
            f"would do), {full}{counted(self.num_empty_rows, 'empty Row')}, "
            f"cost imbalance between ranks {self.mean_imbalance:.3f} (worst step {self.worst_imbalance:.3f}){shapes}"
        )


def report_plan(
    plan: Plan, round_length: Callable[[int], int] | None = None, max_steps: int | None = None
) -> PlanReport:
    """Goes through the steps of the first epoch.

    Args:
        plan (Plan): the plan.
        round_length (Callable[[int], int] | None): see ``RowOptions``. Default: None, no padding.
        max_steps (int | None): how many steps to look at. Default: None, all.

    Returns:
        PlanReport: the figures.
    """
    sizes, steps = plan.sizes, plan.epoch()
    num_steps = len(steps) if max_steps is None else min(len(steps), max_steps)
    num_rows = fewest_rows = num_empty = num_tokens = num_computed = 0
    imbalances: list[float] = []
    lengths_seen: set[int] = set()
    for step in tqdm(range(num_steps), desc="Planning", unit="step", delay=5, leave=False):
        ranks = steps.rows_of_ranks(step)
        costs = np.array([[sizes.cost[row].sum() for row in rows] for rows in ranks])
        # Ranks wait for one another at each forward pass.
        imbalances.append(costs.max(axis=0).sum() / costs.sum(axis=1).mean())
        for row in (row for rows in ranks for row in rows):
            tokens = int(sizes.num_tokens[row].sum())
            length = max(tokens, 1) if round_length is None else round_length(tokens)
            lengths_seen.add(length)
            num_computed += length
            num_tokens += tokens
            num_rows += bool(row)
            num_empty += not row
        fewest_rows += plan.packing.fewest_rows(steps.example_index(step), sizes)
    return PlanReport(
        num_steps=num_steps,
        num_rows=num_rows,
        fewest_rows=fewest_rows,
        num_empty_rows=num_empty,
        fill=num_tokens / (num_rows * plan.packing.pack_len) if isinstance(plan.packing, ByLength) else None,
        padding=1 - num_tokens / num_computed,
        mean_imbalance=float(np.mean(imbalances)),
        worst_imbalance=float(np.max(imbalances)),
        row_lengths=() if round_length is None else tuple(sorted(lengths_seen)),
    )
