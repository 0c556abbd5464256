"""What a sweep has come to: a table, what it does and does not show, and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefix_sharing.config.sweeping import Point, label
from prefix_sharing.reports.noise import least_difference

CAUTION = (
    "Loss and margin on held-out pairs do not predict benchmarks (arXiv 2407.06542), and a margin is in units of beta: "
    "choose between the best by a judge or a benchmark."
)
"""What goes under every table."""

_LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "kl", "nll", "byte")


@dataclass(frozen=True)
class Measured:
    """What was measured at a point of a sweep's grid.

    Attributes:
        point (Point): a value of each axis.
        values (dict[str, list[float]]): by measure, one for each seed whose run has it.
    """

    point: Point
    values: dict[str, list[float]]


def is_better_lower(measure: str) -> bool:
    """Whether less of a measure is better, told by the last word of its name."""
    name = measure.rpartition("/")[2].partition(",")[0]  # lm-eval puts a filter behind a metric
    return name.rpartition("_")[2] in _LOWER_IS_BETTER


def best_of(found: Sequence[Measured], measure: str) -> Measured | None:
    """The point with the best mean, the first of equal ones.

    Args:
        found (Sequence[Measured]): the points.
        measure (str): by what.

    Returns:
        Measured | None: None if no run has the measure.
    """
    having = [one for one in found if one.values[measure]]
    sign = -1 if is_better_lower(measure) else 1
    return max(having, key=lambda one: sign * float(np.mean(one.values[measure])), default=None)


def table_of(names: Sequence[str], found: Sequence[Measured], measures: Sequence[str]) -> str:
    """The points as a table in Markdown: means over seeds, with the standard deviation.

    The best is bold where runs can be told apart.

    Args:
        names (Sequence[str]): of the axes.
        found (Sequence[Measured]): the points.
        measures (Sequence[str]): the columns.

    Returns:
        str: its lines.
    """
    best = {
        measure: None if what_it_shows(names, found, measure)[1] else best_of(found, measure) for measure in measures
    }
    rows = [[*names, *measures]]
    for one in found:
        cells = [label(value) for value in one.point]
        for measure in measures:
            text = _mean_of(one.values[measure])
            cells.append(f"**{text}**" if best[measure] is one else text)
        rows.append(cells)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * width for width in widths), *lines[1:]])


def _mean_of(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def what_it_shows(names: Sequence[str], found: Sequence[Measured], measure: str) -> tuple[str, bool]:
    """Which point is best, and whether the others differ from it by more than noise.

    Args:
        names (Sequence[str]): of the axes.
        found (Sequence[Measured]): the points.
        measure (str): by what.

    Returns:
        tuple[str, bool]: a sentence or two, and whether they say that no two points can be told apart.
    """
    best = best_of(found, measure)
    having = [one for one in found if one.values[measure]]
    if best is None or len(having) < 2:
        return f"{measure}: fewer than two points have it, so there is nothing to compare.", False
    what = f"{measure}: best at {_named(names, best.point)}"
    least = least_difference([one.values[measure] for one in having])
    means = {id(one): float(np.mean(one.values[measure])) for one in having}
    spread = max(means.values()) - min(means.values())
    if least is None and spread > 0:
        return f"{what}. With one seed there is no telling whether that is noise; seeds=2 measures it.", False
    if spread == 0:
        return f"{measure}: all runs have the same value; use more examples, to train on or held out.", True
    if spread <= (least or 0.0):
        noise = f"by {spread:.2g}; noise between seeds alone makes {least:.2g}"
        problem = f"{measure}: the runs do not differ by more than noise ({noise})"
        return f"{problem}; use more examples, to train on or held out.", True
    alike = [one for one in having if one is not best and abs(means[id(one)] - means[id(best)]) <= (least or 0.0)]
    if alike:
        others = "; ".join(_named(names, one.point) for one in alike)
        return f"{what}, which noise between seeds does not tell from {others}.", False
    return f"{what}, by more than noise between seeds.", False


def _named(names: Sequence[str], point: Point) -> str:
    return ", ".join(f"{name}={label(value)}" for name, value in zip(names, point, strict=True))


def plot_sweep(
    names: Sequence[str], found: Sequence[Measured], measures: Sequence[str], title: str, file: Path
) -> None:
    """Each measure over the first axis: dots are runs, lines go through the means, one for each value of the others.

    Args:
        names (Sequence[str]): of the axes.
        found (Sequence[Measured]): the points.
        measures (Sequence[str]): a panel for each.
        title (str): what was trained.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    firsts = [one.point[0] for one in found]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in firsts)
    places = list(dict.fromkeys(map(label, firsts)))
    figure = Figure(figsize=(5 * len(measures), 4), layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        lines: dict[str, list[tuple[float, list[float]]]] = {}
        for one in found:
            x = one.point[0] if are_numbers else places.index(label(one.point[0]))
            if one.values[measure]:
                lines.setdefault(_named(names[1:], one.point[1:]), []).append((x, one.values[measure]))
        for i, (name, points) in enumerate(lines.items()):
            points.sort(key=lambda place: place[0])
            means = [float(np.mean(values)) for _, values in points]
            axes.plot([x for x, _ in points], means, "-" if are_numbers else " ", color=f"C{i}", label=name, marker="_")
            dots = [(x, value) for x, values in points for value in values]
            axes.scatter(*zip(*dots, strict=True), s=14, color=f"C{i}")
        axes.set(xlabel=names[0], ylabel=measure)
        if are_numbers and min(firsts) > 0 and max(firsts) >= 10 * min(firsts):
            axes.set_xscale("log")
        if not are_numbers:
            axes.set_xticks(range(len(places)), [place[:30] for place in places])
        if len(names) > 1 and lines:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)
