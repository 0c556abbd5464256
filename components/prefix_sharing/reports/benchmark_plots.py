"""What was measured, as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def plot_steps(workloads: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Speed-up of each format on each workload, the spread over rounds as error bars.

    Args:
        workloads (Sequence[dict[str, Any]]): ``name`` and ``formats`` of each, as in ``benchmark.json``.
        title (str): model and device.
        file (Path): where the PNG goes.
    """
    figure = Figure(figsize=(1.5 + 1.6 * len(workloads), 4), layout="constrained")
    axes = figure.subplots()
    names = list(workloads[0]["formats"])
    width = 0.8 / len(names)
    places = np.arange(len(workloads))
    for i, name in enumerate(names):
        found = [workload["formats"][name] for workload in workloads]
        speed_up = np.array([each["speed_up"] for each in found])
        below = speed_up - [each["speed_up_lowest"] for each in found]
        above = [each["speed_up_highest"] for each in found] - speed_up
        bars = axes.bar(
            places + (i - (len(names) - 1) / 2) * width,
            speed_up,
            width,
            label=name,
            yerr=np.clip([below, above], 0, None),
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_xticks(places, [workload["name"] for workload in workloads])
    axes.set_ylabel(f"examples/s over {names[0]}'s")
    axes.set_title(f"Training step, {title}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def plot_layers(layers: Sequence[dict[str, Any]], title: str, file: Path) -> None:
    """Speed-up of each part over the length of the prompt, with what the operations alone would give dashed.

    Args:
        layers (Sequence[dict[str, Any]]): as ``time_layers`` returns them.
        title (str): model and device.
        file (Path): where the PNG goes.
    """
    parts = list(dict.fromkeys(each["part"] for each in layers))
    completions = list(dict.fromkeys(each["completion"] for each in layers))
    backends = [backend for backend in dict.fromkeys(each["backend"] for each in layers) if backend is not None]
    figure = Figure(figsize=(4 * len(parts), 3.6), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for c, completion in enumerate(completions):
            for b, backend in enumerate([None] if part == "mlp" else backends):
                of_line = [
                    each
                    for each in layers
                    if (each["part"], each["completion"], each["backend"]) == (part, completion, backend)
                ]
                prefixes = [each["prefix"] for each in of_line]
                label = f"responses of {completion:,}" + (f", {backend}" if backend else "")
                axes.plot(prefixes, [each["speed_up"] for each in of_line], color=f"C{c}", marker="os^"[b], label=label)
                if b == 0:
                    axes.plot(prefixes, [each["ideal"] for each in of_line], color=f"C{c}", linestyle="--")
        axes.plot([], [], color="grey", linestyle="--", label="ideal")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens in the prompt")
        axes.set_ylabel("speed-up by sharing")
        axes.set_title(part.replace("_", " "), fontsize=10)
        axes.legend(fontsize=7)
    figure.suptitle(f"One pair, forward and backward, {title}", fontsize=10)
    figure.savefig(file, dpi=150)


def plot_scaling(scaling: dict[str, Sequence[dict[str, Any]]], title: str, file: Path) -> None:
    """Time over size, both logarithmic, with a dashed line that grows as the size does.

    Args:
        scaling (dict[str, Sequence[dict[str, Any]]]): ``rows`` and ``examples``, as ``time_rows`` and ``time_examples``
            return them.
        title (str): model and device.
        file (Path): where the PNG goes.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = (
        ("rows", "tokens", "tokens in a Row", "step_s"),
        ("examples", "examples", "examples in the data set", "plan_s"),
    )
    for axes, (what, of, label, compared) in zip(figure.subplots(1, 2), panels, strict=True):
        found = scaling[what]
        sizes = np.array([each[of] for each in found], dtype=float)
        for name in found[0]:
            if name.endswith("_s"):
                seconds = [each[name] for each in found]
                axes.loglog(sizes, seconds, marker="o", label=name.removesuffix("_s").replace("_", " "))
        proportional = found[0][compared] * sizes / sizes[0]
        axes.loglog(sizes, proportional, color="grey", linestyle="--", label=f"proportional to {of}")
        axes.set_xlabel(label)
        axes.set_ylabel("seconds")
        axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
