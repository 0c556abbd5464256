"""Timings as a table, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def summarize(seconds: dict[str, list[float]], num_pairs: int, baseline: str) -> dict[str, dict[str, float]]:
    """Medians, and their ratio to the baseline with its spread.

    Args:
        seconds (dict[str, list[float]]): seconds a step, for each format as many as there were rounds.
        num_pairs (int): pairs a step.
        baseline (str): the format that the others are compared with.

    Returns:
        dict[str, dict[str, float]]: for each format ``examples_per_s``, ``seconds``, and ``speed_up`` with the lowest
        and the highest of any round.
    """
    of_baseline = np.array(seconds[baseline])
    summary = {}
    for name, values in seconds.items():
        by_round = of_baseline / np.array(values)
        median = float(np.median(values))
        summary[name] = {
            "examples_per_s": num_pairs / median,
            "seconds": median,
            "speed_up": float(np.median(of_baseline)) / median,
            "speed_up_lowest": float(by_round.min()),
            "speed_up_highest": float(by_round.max()),
        }
    return summary


def as_table(workloads: list[dict[str, Any]]) -> str:
    """The results for a terminal.

    Args:
        workloads (list[dict[str, Any]]): ``name`` and ``formats`` of each, as in ``benchmark.json``.

    Returns:
        str: a line for each workload and format.
    """
    lines = [
        f"{'workload':15} {'format':14} {'examples/s':>10} {'speed-up':>9} {'(rounds)':>12} {'tokens':>8} "
        f"{'padding':>8} {'GFLOP':>8} {'memory':>9}"
    ]
    for workload in workloads:
        for name, found in workload["formats"].items():
            memory = found.get("peak_memory")
            lines.append(
                f"{workload['name']:15} {name:14} {found['examples_per_s']:10.2f} {found['speed_up']:8.2f}x "
                f"{found['speed_up_lowest']:5.2f}-{found['speed_up_highest']:5.2f} {found['num_tokens']:8,} "
                f"{1 - found['num_tokens'] / found['num_computed']:8.1%} {found['flops'] / 1e9:8.0f} "
                + ("" if memory is None else f"{memory:6.2f} GiB")
            )
    return "\n".join(lines)


def save_results(output_dir: str, about: dict[str, Any], workloads: list[dict[str, Any]]) -> Path:
    """Writes ``benchmark.json`` and ``benchmark.png``.

    Args:
        output_dir (str): where to.
        about (dict[str, Any]): device, versions, model.
        workloads (list[dict[str, Any]]): ``name`` and ``formats`` of each.

    Returns:
        Path: the JSON file.
    """
    from matplotlib.figure import Figure

    file = Path(output_dir) / "benchmark.json"
    file.write_text(json.dumps({**about, "workloads": workloads}, indent=2) + "\n")

    figure = Figure(figsize=(1.5 + 1.6 * len(workloads), 4), layout="constrained")
    axes = figure.subplots()
    names = list(workloads[0]["formats"])
    width = 0.8 / len(names)
    places = np.arange(len(workloads))
    for i, name in enumerate(names):
        found = [workload["formats"][name] for workload in workloads]
        bars = axes.bar(
            places + (i - (len(names) - 1) / 2) * width,
            [each["speed_up"] for each in found],
            width,
            label=name,
            yerr=np.array(
                [
                    (
                        max(0.0, each["speed_up"] - each["speed_up_lowest"]),
                        max(0.0, each["speed_up_highest"] - each["speed_up"]),
                    )
                    for each in found
                ]
            ).T,
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    axes.set_xticks(places, [workload["name"] for workload in workloads])
    axes.set_ylabel(f"examples/s over {names[0]}'s")
    axes.set_title(f"Training step, {about['model']}, {about['device']}", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file.with_suffix(".png"), dpi=150)
    return file
