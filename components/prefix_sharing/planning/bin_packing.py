"""Packing examples into Rows of at most ``pack_len`` tokens, and dealing Rows to ranks.

All ranks run the same number of forward passes per step, so what counts is Rows per rank, not Rows. ``pack`` starts
from the fewest that the lower bound allows and tries, in this order,

1. *spread*: the costliest example first, each to the cheapest Row that has room, so that Rows come out equally costly;
   then the same by length.
2. *best fit*: the longest example first, each to the fullest Row that has room (best-fit decreasing).
3. *fill*: one Row after the other, each with the longest example left and, of the others, those that fill it best
   (a subset sum; the minimum bin slack heuristic of Gupta and Ho, 1999).

Only if none of them fits does it take one Row per rank more. Where Rows did not come out equally costly, examples are
then exchanged between the costliest Row and the cheapest ones for as long as that evens them out.
"""

import heapq
from collections.abc import Sequence

import numpy as np

_ROWS_TO_TRY = 32
"""Rows without room that ``_spread`` passes over before it gives up."""

_EXAMPLES_TO_FILL_WITH = 256
"""Examples among which ``_fill`` looks for those that fill a Row; with more, nearly every Row is full anyway."""

_MOST_EXAMPLES_TO_FILL = 8192
"""Examples beyond which ``_fill`` takes longer than the Rows it saves are worth."""

_EVEN_ENOUGH = 1.01
"""The costliest Row over the mean at which ``_even_out`` stops."""

_ROWS_TO_EXCHANGE_WITH = 8
"""Cheapest Rows that ``_even_out`` looks at before it gives up."""

Bins = list[list[int]]
"""The examples of each Row."""


def pack(lengths: np.ndarray, costs: np.ndarray, pack_len: int, world_size: int = 1) -> Bins:
    """Packs examples into as few Rows per rank as the heuristics above find.

    Args:
        lengths (np.ndarray): tokens of each example, none above ``pack_len``, shape ``[n]``.
        costs (np.ndarray): what each costs the model, in any unit, shape ``[n]``.
        pack_len (int): maximum number of tokens in a Row.
        world_size (int): ranks. Default: 1.

    Returns:
        Bins: indices into ``lengths``, each once; no Row is empty.
    """
    rows_per_rank = -(-lower_bound(lengths, pack_len) // world_size)
    by_cost = np.argsort(-costs, kind="stable").tolist()
    by_length = np.argsort(-lengths, kind="stable").tolist()
    length_list, cost_list = lengths.tolist(), costs.tolist()
    best_fit = None
    while True:
        most_rows = rows_per_rank * world_size
        rows = _spread(by_cost, length_list, cost_list, pack_len, most_rows)
        if rows:
            return rows
        rows = _spread(by_length, length_list, length_list, pack_len, most_rows)
        if not rows:
            best_fit = best_fit or _best_fit(by_length, length_list, pack_len)
            rows = best_fit if len(best_fit) <= most_rows else None
        if not rows and len(by_length) <= _MOST_EXAMPLES_TO_FILL:
            rows = _fill(by_length, length_list, pack_len, most_rows)
        if rows:
            return rows if world_size == 1 else _even_out(rows, lengths, costs, pack_len, most_rows)
        rows_per_rank += 1


def lower_bound(lengths: np.ndarray, pack_len: int) -> int:
    """Rows that no packing can do without: Martello and Toth's bound L2.

    For each threshold: examples that leave less than it need a Row each, those above half a Row do too, and the ones
    between the threshold and a half fill what those leave before they need Rows of their own.

    Args:
        lengths (np.ndarray): tokens of each example, shape ``[n]``.
        pack_len (int): maximum number of tokens in a Row.

    Returns:
        int: the bound.
    """
    ordered = np.sort(lengths)[::-1].astype(np.int64)
    totals = np.concatenate([[0], np.cumsum(ordered)])

    def number_above(length: np.ndarray) -> np.ndarray:
        return np.searchsorted(-ordered, -length, side="left")

    half = pack_len // 2
    thresholds = np.unique(np.concatenate([[0], ordered[ordered <= half]]))
    huge, large = number_above(pack_len - thresholds), number_above(np.array(half))
    upto = np.searchsorted(-ordered, -thresholds, side="right")
    free_beside_large = (large - huge) * pack_len - (totals[large] - totals[huge])
    left_over = np.maximum(0, totals[np.maximum(upto, large)] - totals[large] - free_beside_large)
    return int((large + -(-left_over // pack_len)).max())


def first_fit_decreasing(lengths: np.ndarray, pack_len: int) -> Bins:
    """Packs a whole data set: the longest example first, each into the first Row that has room.

    Args:
        lengths (np.ndarray): tokens of each example, none above ``pack_len``, shape ``[n]``.
        pack_len (int): maximum number of tokens in a Row.

    Returns:
        Bins: indices into ``lengths``, each once.
    """
    leaves = 1 << max(len(lengths) - 1, 0).bit_length()
    free = [pack_len] * (2 * leaves)  # a binary tree: the most room in any Row below each node
    rows: Bins = []
    length_list = lengths.tolist()
    for i in np.argsort(-lengths, kind="stable").tolist():
        length, node = length_list[i], 1
        while node < leaves:
            node *= 2
            if free[node] < length:
                node += 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(i)
        free[node] -= length
        while node > 1:
            node //= 2
            most = max(free[2 * node], free[2 * node + 1])
            if free[node] == most:
                break
            free[node] = most
    return rows


def deal(rows: Bins, costs: Sequence[float], world_size: int = 1) -> list[Bins]:
    """Deals Rows to the ranks, the same number to each.

    Ranks wait for one another at every forward pass, so Rows of about the same cost are computed at the same time;
    among those the costliest goes to the rank that has least so far.

    Args:
        rows (Bins): the Rows.
        costs (Sequence[float]): what each costs, as many as Rows.
        world_size (int): ranks. Default: 1.

    Returns:
        list[Bins]: each rank's Rows, the costliest first; empty ones fill up.
    """
    order = sorted(range(len(rows)), key=lambda row: -costs[row])
    dealt: list[Bins] = [[] for _ in range(world_size)]
    totals = [0.0] * world_size
    for first in range(0, len(rows), world_size):
        together = order[first : first + world_size]
        for place, rank in enumerate(sorted(range(world_size), key=lambda rank: totals[rank])):
            if place < len(together):
                dealt[rank].append(rows[together[place]])
                totals[rank] += costs[together[place]]
            else:
                dealt[rank].append([])
    return dealt


def _spread(order: list[int], lengths: list[int], costs: list[float], pack_len: int, num_rows: int) -> Bins | None:
    cheapest = [(0.0, row) for row in range(num_rows)]
    free = [pack_len] * num_rows
    rows: Bins = [[] for _ in range(num_rows)]
    for i in order:
        length = lengths[i]
        without_room = []
        while free[cheapest[0][1]] < length:
            without_room.append(heapq.heappop(cheapest))
            if not cheapest or len(without_room) > _ROWS_TO_TRY:
                return None
        cost, row = cheapest[0]
        heapq.heapreplace(cheapest, (cost + costs[i], row))
        rows[row].append(i)
        free[row] -= length
        for entry in without_room:
            heapq.heappush(cheapest, entry)
    return [row for row in rows if row]


def _best_fit(order: list[int], lengths: list[int], pack_len: int) -> Bins:
    rows: Bins = []
    with_room: list[list[int]] = [[] for _ in range(pack_len + 1)]  # Rows by the tokens they have room for
    there_are = 0  # bit n: some Row has room for exactly n tokens
    for i in order:
        length = lengths[i]
        enough = there_are >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                there_are ^= 1 << room
        else:
            room, row = pack_len, len(rows)
            rows.append([])
        rows[row].append(i)
        with_room[room - length].append(row)
        there_are |= 1 << (room - length)
    return rows


def _fill(order: list[int], lengths: list[int], pack_len: int, num_rows: int) -> Bins | None:
    left = list(order)
    rows: Bins = []
    while left:
        if len(rows) == num_rows:
            return None
        room = pack_len - lengths[left[0]]
        others = [i for i in left[1:] if lengths[i] <= room][:_EXAMPLES_TO_FILL_WITH]
        # Bit n of sums[j]: some of the first j others have n tokens together.
        sums, upto_room = [1], (1 << (room + 1)) - 1
        for i in others:
            sums.append((sums[-1] | sums[-1] << lengths[i]) & upto_room)
            if sums[-1] >> room:
                break
        filled, row = sums[-1].bit_length() - 1, [left[0]]
        for j in range(len(sums) - 2, -1, -1):
            if not sums[j] >> filled & 1:
                row.append(others[j])
                filled -= lengths[others[j]]
        rows.append(row)
        taken = set(row)
        left = [i for i in left if i not in taken]
    return rows


def _even_out(rows: Bins, lengths: np.ndarray, costs: np.ndarray, pack_len: int, num_rows: int) -> Bins:
    rows = [*rows, *([] for _ in range(num_rows - len(rows)))]
    cost = np.array([costs[row].sum() for row in rows])
    room = np.array([pack_len - lengths[row].sum() for row in rows])
    # An example of no length and no cost: exchanging it for another one moves that one.
    lengths, costs, nothing = np.append(lengths, 0), np.append(costs, 0.0), len(lengths)
    for _ in range(4 * num_rows):
        costliest = int(cost.argmax())
        if cost[costliest] <= _EVEN_ENOUGH * cost.mean():
            break
        for other in np.argsort(cost, kind="stable")[:_ROWS_TO_EXCHANGE_WITH].tolist():
            gap = cost[costliest] - cost[other]
            ours, theirs = np.array(rows[costliest]), np.array([*rows[other], nothing])
            saved = costs[ours][:, None] - costs[theirs]
            longer = lengths[ours][:, None] - lengths[theirs]
            allowed = (saved > 0) & (saved < gap) & (longer <= room[other]) & (-longer <= room[costliest])
            if allowed.any():
                i, j = np.unravel_index(np.where(allowed, np.abs(saved - gap / 2), np.inf).argmin(), saved.shape)
                break
        else:
            break
        rows[costliest] = [k for k in [*rows[costliest], int(theirs[j])] if k not in (ours[i], nothing)]
        rows[other] = [k for k in [*rows[other], int(ours[i])] if k != theirs[j]]
        cost[costliest] -= saved[i, j]
        cost[other] += saved[i, j]
        room[costliest] += longer[i, j]
        room[other] -= longer[i, j]
    return [row for row in rows if row]
