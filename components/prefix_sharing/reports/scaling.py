"""How data and steps pay off: runs that are done, on data sets of several sizes, in one picture.

    python -m prefix_sharing.reports.scaling out/10k out/100k --metric eval/rewards/accuracies --png scaling.png

For each size there is what was measured on held-out examples over the steps, and a fit of degree 2, as in
[LIONs](https://arxiv.org/abs/2407.06542). Runs on data sets of one size are put together.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prefix_sharing.errors import UserError
from prefix_sharing.reports.curves import read_log_of_last_run
from prefix_sharing.run.directory import examples_of_run


@dataclass(frozen=True)
class ScalingCurve:
    """What was measured of runs on data sets of one size.

    Attributes:
        num_examples (int): the size.
        steps (np.ndarray): optimizer steps, in ascending order, shape ``[n]``.
        values (np.ndarray): what was measured after them, shape ``[n]``.
        fit (np.polynomial.Polynomial | None): of degree 2 in the step, by least squares; None for less than three
            different steps.
    """

    num_examples: int
    steps: np.ndarray
    values: np.ndarray
    fit: np.polynomial.Polynomial | None

    @property
    def turns_at(self) -> float | None:
        """The step at which the fit has its best or worst value, if that is within what was measured."""
        if self.fit is None:
            return None
        bend = self.fit.deriv(2)(0.0) * np.ptp(self.steps) ** 2
        if abs(bend) <= 1e-9 * np.abs(self.values).max():  # a line but for rounding
            return None
        at = float(self.fit.deriv().roots()[0])
        return at if self.steps[0] <= at <= self.steps[-1] else None


def read_scaling(directories: Sequence[Path], metric: str) -> list[ScalingCurve]:
    """Reads what runs have logged.

    Args:
        directories (Sequence[Path]): the ``output_dir`` of each, with logs of torchtune's ``DiskLogger`` in ``logs``.
        metric (str): what is compared; values from before training are left out.

    Returns:
        list[ScalingCurve]: a curve for each size of data set, the smallest first.

    Raises:
        UserError: if a directory is not that of a run, or its log has no such metric.
    """
    points: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for directory in directories:
        num_examples = examples_of_run(directory)
        entries = read_log_of_last_run(sorted((directory / "logs").glob("log_*.txt")))
        found = [(step, values[metric]) for step, values in entries if step > 0 and metric in values]
        if not found:
            known = sorted({name for _, values in entries for name in values if name.startswith("eval/")})
            instead = f"it has {', '.join(known)}" if known else "set dataset_val and run_val_every_n_steps"
            raise UserError(f"The logs in {directory / 'logs'} have no {metric} after step 0; {instead}.")
        points[num_examples] += found
    curves = []
    for num_examples, found in sorted(points.items()):
        steps, values = (np.array(column, dtype=np.float64) for column in zip(*sorted(found), strict=True))
        fit = np.polynomial.Polynomial.fit(steps, values, 2) if len(np.unique(steps)) > 2 else None
        curves.append(ScalingCurve(num_examples, steps, values, fit))
    return curves


def describe_scaling(curves: Sequence[ScalingCurve], metric: str) -> str:
    """The curves as a table.

    Args:
        curves (Sequence[ScalingCurve]): as ``read_scaling`` returns them.
        metric (str): what was compared.

    Returns:
        str: a line for each: examples, last step, what was measured there, error of the fit (root of the mean square),
        and the step at which the fit turns, if it does.
    """
    columns = ("examples", "last step", "measured there", "error of fit", "turns at step")
    lines = [metric, "".join(f"{title:>16}" for title in columns)]
    for curve in curves:
        last = curve.values[curve.steps == curve.steps[-1]].mean()
        error = None if curve.fit is None else np.sqrt(np.mean((curve.fit(curve.steps) - curve.values) ** 2))
        cells = (
            f"{curve.num_examples:,}",
            f"{int(curve.steps[-1]):,}",
            f"{last:.4f}",
            "-" if error is None else f"{error:.4f}",
            "-" if curve.turns_at is None else f"{curve.turns_at:,.0f}",
        )
        lines.append("".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def plot_scaling(curves: Sequence[ScalingCurve], metric: str, file: Path) -> None:
    """Draws what was measured as dots and the fits as lines, a color for each size of data set.

    Args:
        curves (Sequence[ScalingCurve]): as ``read_scaling`` returns them.
        metric (str): what was compared.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        axes.plot(curve.steps, curve.values, "o", color=f"C{i}", label=f"{curve.num_examples:,} examples")
        if curve.fit is not None:
            places = np.linspace(curve.steps[0], curve.steps[-1], 100)
            axes.plot(places, curve.fit(places), color=f"C{i}")
    axes.set(xlabel="optimizer step", ylabel=metric, title="dots: measured; lines: fits of degree 2")
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


def main() -> None:
    """Reads the command line, prints the table and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR", help="the output_dir of a run")
    parser.add_argument(
        "--metric", default="eval/rewards/accuracies", help="a metric of the log (default: %(default)s)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture, too")
    options = parser.parse_args()
    try:
        curves = read_scaling(options.runs, options.metric)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    print(describe_scaling(curves, options.metric))
    if options.png:
        plot_scaling(curves, options.metric, options.png)


if __name__ == "__main__":
    main()
