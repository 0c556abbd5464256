"""What a selection looks like beside as many candidates drawn at random, and beside all of them."""

import logging
from collections import Counter

import numpy as np

from prefix_sharing.datasets.choosing.candidates import Candidates
from prefix_sharing.datasets.choosing.selection import SELECTIONS, Pool, Random, Selection, draw

log = logging.getLogger(__name__)


def log_selection(selection: Selection, pool: Pool, against: np.ndarray, candidates: Candidates, name: str) -> None:
    """Logs what was selected and why the rest was not, and warns where a selection says nothing.

    Args:
        selection (Selection): the method.
        pool (Pool): what it was given.
        against (np.ndarray): why each candidate is left out, shape ``[n]``.
        candidates (Candidates): the same candidates, for their sources.
        name (str): where they come from.
    """
    by = next(by for by, kind in SELECTIONS.items() if isinstance(selection, kind))
    taken = np.flatnonzero(against == "")
    counts = Counter(against[against != ""].tolist())
    why = f" ({', '.join(f'{reason}: {n:,}' for reason, n in sorted(counts.items()))})" if counts else ""
    log.info("%s: select by %s takes %s of %s examples%s", name, by, f"{len(taken):,}", f"{len(against):,}", why)
    if len(taken) < selection.budget:
        problem = f"only {len(taken):,} examples can be selected; all of them are taken"
        log.warning("%s: the budget is %s, but %s", name, f"{selection.budget:,}", problem)
    for needed in selection.needs:
        values = getattr(pool, needed)
        values = values[np.isfinite(values)] if values.ndim == 1 else values[:0]
        if len(values) > 1 and np.all(values == values[0]):
            what = {"lengths": "length of the chosen answer", "chosen": "score of the chosen answer"}
            what |= {"rejected": "score of the rejected answer"}
            log.warning("%s: all have the same %s, %g", name, what.get(needed, needed), values[0])
    if len(taken) and not isinstance(selection, Random):
        groups = {by: taken, "random": draw(len(against), len(taken), seed=0), "all": np.arange(len(against))}
        log.info("%s: beside as many at random, and all of them:\n%s", name, _table(groups, pool, candidates))


def _table(groups: dict[str, np.ndarray], pool: Pool, candidates: Candidates) -> str:
    lines = [["", *groups]]
    for what, values in (
        ("characters of the chosen answer", pool.lengths.astype(np.float64)),
        ("score of the chosen answer", pool.chosen),
        ("difference of the scores", pool.gap),
        ("complexity", pool.complexity),
    ):
        if np.isfinite(values).any():
            lines.append([f"{what}, mean", *(_mean(values[group]) for group in groups.values())])
    if len(candidates.names) > 1:
        sources = candidates.sources
        for i, source in enumerate(candidates.names):
            shares = (f"{100 * np.mean(sources[group] == i):.1f} %" for group in groups.values())
            lines.append([f"share of {source}", *shares])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])
        for cells in lines
    )


def _mean(values: np.ndarray) -> str:
    values = values[np.isfinite(values)]
    return f"{values.mean():.4g}" if len(values) else "none"
