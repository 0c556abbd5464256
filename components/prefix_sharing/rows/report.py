"""What a plan comes to: how full its rows are, how even its ranks, and how many shapes the model will see."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from prefix_sharing.rows.packing import lower_bound
from prefix_sharing.rows.plan import Plan


@dataclass(frozen=True)
class PlanReport:
    """Figures over the steps of an epoch and all ranks.

    Attributes:
        num_rows (int): rows with examples.
        least_rows (int): rows that no packing of the same steps can do without.
        num_empty_rows (int): rows without examples, computed so that ranks keep step.
        fill (float): share of the computed tokens that are not padding.
        mean_imbalance (float): time of a step over what it would be if all ranks were equally busy at every forward
            pass, by cost, the mean over the steps.
        worst_imbalance (float): the same of the worst step.
        row_lengths (tuple[int, ...]): the distinct row lengths, where they are rounded for attention that is compiled
            for each; else none.
    """

    num_rows: int
    least_rows: int
    num_empty_rows: int
    fill: float
    mean_imbalance: float
    worst_imbalance: float
    row_lengths: tuple[int, ...]

    def __str__(self) -> str:
        shapes = ""
        if self.row_lengths:
            shortest, longest = self.row_lengths[0], self.row_lengths[-1]
            shapes = f", {len(self.row_lengths)} row lengths for compiled attention, {shortest:,} to {longest:,} tokens"
        return (
            f"{self.num_rows:,} rows an epoch (no packing takes fewer than {self.least_rows:,}) and "
            f"{self.num_empty_rows:,} empty ones, fill {self.fill:.3f}, "
            f"cost imbalance between ranks {self.mean_imbalance:.3f} (worst step {self.worst_imbalance:.3f}){shapes}"
        )


def report_plan(plan: Plan, round_length: Callable[[int], int] | None = None, epoch: int = 0) -> PlanReport:
    """Goes through the steps of an epoch.

    Args:
        plan (Plan): the plan.
        round_length (Callable[[int], int] | None): as ``Row.from_examples`` gets it. Default: None, no padding.
        epoch (int): which epoch. Default: 0.

    Returns:
        PlanReport: the figures.
    """
    sizes, steps = plan.sizes, plan.epoch(epoch)
    num_rows = least_rows = num_empty = num_tokens = num_computed = 0
    imbalances, lengths_seen = [], set()
    for step in tqdm(range(len(steps)), desc="Planning", unit="step", delay=5, leave=False):
        ranks = steps.rows_of_ranks(step)
        examples = steps.examples(step)
        costs = np.array([[sizes.cost[row].sum() for row in rows] for rows in ranks])
        # Ranks wait for one another at each forward pass.
        imbalances.append(costs.max(axis=0).sum() / costs.sum(axis=1).mean())
        for rows in ranks:
            for row in rows:
                tokens = int(sizes.num_tokens[row].sum())
                length = max(tokens, 1) if round_length is None else round_length(tokens)
                lengths_seen.add(length)
                num_computed += length
                num_tokens += tokens
                num_rows += bool(row)
                num_empty += not row
        if plan.pack_len is not None:
            least_rows += lower_bound(sizes.num_tokens[examples], plan.pack_len)
        else:
            least_rows += -(-len(examples) // plan.batch_size)
    return PlanReport(
        num_rows=num_rows,
        least_rows=least_rows,
        num_empty_rows=num_empty,
        fill=num_tokens / num_computed,
        mean_imbalance=float(np.mean(imbalances)),
        worst_imbalance=float(np.max(imbalances)),
        row_lengths=() if round_length is None else tuple(sorted(lengths_seen)),
    )
