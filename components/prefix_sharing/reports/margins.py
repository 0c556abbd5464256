"""What training did to each held-out pair: a table, and a picture that tells too little training from too much.

The margin of a pair is the log-prob of its chosen response less that of its rejected one. The picture shows its change
over what it was, as [LIONs](https://arxiv.org/abs/2407.06542) compares models: one trained too little leaves the
points at the line of no change; one trained too much throws them far off on both sides of it. ``read_margins`` says
the same in figures.
"""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from prefix_sharing.config import component_name
from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.distributed import is_rank_zero
from prefix_sharing.run import Evaluation

log = logging.getLogger(__name__)


def margins_table(dataset: PrefixPreferenceDataset, before: Evaluation, after: Evaluation) -> pa.Table:
    """A line for each pair.

    Args:
        dataset (PrefixPreferenceDataset): the held-out data set.
        before (Evaluation): the evaluation before training.
        after (Evaluation): the evaluation after it.

    Returns:
        pa.Table: ``record`` (index in the split), ``chosen`` and ``rejected`` (which of the example's responses),
        ``<which>_tokens`` (scored), ``<which>_log_prob_<when>`` and ``margin_<when>``, for ``chosen`` and ``rejected``,
        ``before`` and ``after``. A run that was resumed begins with what it was resumed from.
    """
    pairs = [dataset.pairs(i) for i in range(len(dataset))]
    examples = np.repeat(np.arange(len(dataset)), [len(of_one) for of_one in pairs])
    responses = dict(zip(("chosen", "rejected"), np.concatenate(pairs).T, strict=True))
    columns = {"record": dataset.record_index[examples], **responses}
    for which, response in responses.items():
        columns[f"{which}_tokens"] = before.num_scored.numpy()[examples, response]
    for when, evaluation in (("before", before), ("after", after)):
        log_probs = evaluation.log_probs.numpy()
        for which, response in responses.items():
            columns[f"{which}_log_prob_{when}"] = log_probs[examples, response]
        columns[f"margin_{when}"] = columns[f"chosen_log_prob_{when}"] - columns[f"rejected_log_prob_{when}"]
    return pa.table(columns)


def read_margins(table: pa.Table) -> dict[str, float]:
    """What the picture shows, as figures by which runs can be compared.

    Args:
        table (pa.Table): as ``margins_table`` makes it.

    Returns:
        dict[str, float]: ``num_pairs``; ``share_flipped``, pairs whose more likely response is another one after
        training, and of these ``share_flipped_to_chosen`` and ``share_flipped_to_rejected``; ``mean_change`` of the
        margin in nats, and ``spread_of_change``, its standard deviation over that of the margins before;
        ``correlation`` of change and margin before; ``curvature``, the quadratic coefficient of the margin after fitted
        to the margin before, in 1/nats. The last three are NaN where margins before do not differ enough, and the
        correlation where changes do not differ.
    """
    before, after = (table[f"margin_{when}"].to_numpy() for when in ("before", "after"))
    change = after - before
    to_chosen, to_rejected = (after > 0) & (before <= 0), (after <= 0) & (before > 0)
    differ, nan = np.ptp(before) > 0, float("nan")
    return {
        "num_pairs": len(table),
        "share_flipped": float((to_chosen | to_rejected).mean()),
        "share_flipped_to_chosen": float(to_chosen.mean()),
        "share_flipped_to_rejected": float(to_rejected.mean()),
        "mean_change": float(change.mean()),
        "spread_of_change": float(np.std(change) / np.std(before)) if differ else nan,
        "correlation": float(np.corrcoef(before, change)[0, 1]) if differ and np.ptp(change) > 0 else nan,
        "curvature": float(_quadratic(before, after).deriv(2)(0.0) / 2) if len(np.unique(before)) > 2 else nan,
    }


def plot_margins(table: pa.Table, title: str, file: Path) -> None:
    """Draws the change of each pair's margin over the margin before.

    Args:
        table (pa.Table): as ``margins_table`` makes it.
        title (str): what was trained.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    before, after = (table[f"margin_{when}"].to_numpy() for when in ("before", "after"))
    change = after - before
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    gained = change > 0
    axes.scatter(before[gained], change[gained], s=12, alpha=0.6, label=f"gained: {gained.mean():.1%} of pairs")
    axes.scatter(before[~gained], change[~gained], s=12, alpha=0.6, label=f"did not: {1 - gained.mean():.1%}")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axline((0, 0), slope=-1, color="grey", linestyle="--", label="above: chosen is more likely after training")
    if len(np.unique(before)) > 2:
        places = np.linspace(before.min(), before.max(), 100)
        axes.plot(places, _quadratic(before, after)(places) - places, color="C3", label="fit of degree 2")
    # The diagonal must not decide what is shown.
    axes.set_xlim(*_around(before))
    axes.set_ylim(*_around(change))
    axes.set_xlabel("margin before training: log-prob of chosen less rejected (nats)")
    axes.set_ylabel("change of the margin (nats)")
    axes.set_title(
        f"{title}\n{len(table):,} held-out pairs; chosen is more likely in {(before > 0).mean():.1%} before, "
        f"{(after > 0).mean():.1%} after",
        fontsize=9,
    )
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def report_margins(
    cfg: DictConfig, dataset: PrefixPreferenceDataset | None, before: Evaluation | None, after: Evaluation | None
) -> None:
    """Writes margins to ``output_dir``, on rank 0, if held-out examples have pairs: table, picture and figures.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset | None): the held-out data set.
        before (Evaluation | None): the evaluation before training.
        after (Evaluation | None): the evaluation after it.
    """
    if dataset is None or before is None or after is None or dataset.num_pairs.sum() == 0 or not is_rank_zero():
        return
    table = margins_table(dataset, before, after)
    output_dir = Path(cfg.output_dir)
    pq.write_table(table, output_dir / "margins.parquet")
    log.info("Margins of held-out pairs saved to %s", output_dir / "margins.parquet")
    if not np.isfinite(table["margin_after"].to_numpy()).all():
        log.warning("Some margins are not finite: the run has diverged, so margins.png is not drawn.")
        return
    found = read_margins(table)
    # NaN is no JSON.
    figures = {name: value if np.isfinite(value) else None for name, value in found.items()}
    (output_dir / "margins.json").write_text(json.dumps(figures, indent=2) + "\n")
    log.info(
        "Held-out margins: %.1f %% of pairs changed sign (%.1f %% now prefer chosen, %.1f %% rejected); more in %s",
        *(100 * found[name] for name in ("share_flipped", "share_flipped_to_chosen", "share_flipped_to_rejected")),
        output_dir / "margins.json",
    )
    plot_margins(table, f"{component_name(cfg.loss)}, {cfg.output_dir}", output_dir / "margins.png")


def _quadratic(before: np.ndarray, after: np.ndarray) -> np.polynomial.Polynomial:
    """The margin after training as a polynomial of the second degree in the margin before, by least squares."""
    return np.polynomial.Polynomial.fit(before, after, 2)


def _around(values: np.ndarray) -> tuple[float, float]:
    """Limits of an axis with some room on both sides, zero included."""
    low, high = min(values.min(), 0), max(values.max(), 0)
    room = 0.05 * max(high - low, 1e-6)
    return low - room, high + room
