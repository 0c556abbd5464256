"""What was measured, as text for a terminal."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def summarize(seconds: dict[str, list[float]], num_pairs: int, baseline: str) -> dict[str, dict[str, float]]:
    """Medians, and their ratio to the baseline with its spread.

    Args:
        seconds (dict[str, list[float]]): seconds per step, for each format as many as there were rounds.
        num_pairs (int): pairs per step.
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


def as_table(workloads: Sequence[dict[str, Any]]) -> str:
    """The steps.

    Args:
        workloads (Sequence[dict[str, Any]]): ``name`` and ``formats`` of each, as in ``benchmark.json``.

    Returns:
        str: a line for each workload and format. ``products`` is the time of the step's bare matrix products over its
        own, ``building`` that of planning and building its micro-batches.
    """
    lines = [
        f"{'workload':15} {'format':14} {'examples/s':>10} {'speed-up':>9} {'(rounds)':>12} {'tokens':>8} "
        f"{'padding':>8} {'GFLOP':>8} {'products':>8} {'building':>8} {'memory':>9}"
    ]
    for workload in workloads:
        for name, found in workload["formats"].items():
            products, memory = found.get("matrix_share"), found.get("peak_memory")
            lines.append(
                f"{workload['name']:15} {name:14} {found['examples_per_s']:10.2f} {found['speed_up']:8.2f}x "
                f"{found['speed_up_lowest']:5.2f}-{found['speed_up_highest']:5.2f} {found['num_tokens']:8,} "
                f"{1 - found['num_tokens'] / found['num_computed']:8.1%} {found['flops'] / 1e9:8.0f} "
                + ("       -" if products is None else f"{products:8.2f}")
                + f" {found['building_share']:8.2%} "
                + ("" if memory is None else f"{memory:5.2f} GiB")
            )
    return "\n".join(lines)


def describe_layers(layers: Sequence[dict[str, Any]]) -> str:
    """The parts of a layer.

    Args:
        layers (Sequence[dict[str, Any]]): as ``time_layers`` returns them.

    Returns:
        str: a line for each measurement.
    """
    lines = [f"{'part':16} {'backend':8} {'prompt':>7} {'response':>8} {'shared':>10} {'speed-up':>9} {'ideal':>7}"]
    for each in layers:
        lines.append(
            f"{each['part']:16} {each['backend'] or '-':8} {each['prefix']:7,} {each['completion']:8,} "
            f"{each['shared_s'] * 1e3:7.1f} ms {each['speed_up']:8.2f}x {each['ideal']:6.2f}x"
        )
    return "\n".join(lines)


def describe_growth(scaling: dict[str, Sequence[dict[str, Any]]]) -> str:
    """How time grows.

    Args:
        scaling (dict[str, Sequence[dict[str, Any]]]): ``rows`` and ``examples``, as ``time_rows`` and ``time_examples``
            return them.

    Returns:
        str: the times, and for each the power of the size with which it grows.
    """
    lines = []
    for what, of in (("rows", "tokens"), ("examples", "examples")):
        found = scaling[what]
        names = [name for name in found[0] if name != of]
        lines.append(f"{of:>10} " + " ".join(f"{name:>16}" for name in names))
        lines += [f"{each[of]:10,} " + " ".join(f"{each[name]:16.6g}" for name in names) for each in found]
        powers = exponents(found, of)
        lines.append(f"{'power':>10} " + " ".join(f"{powers[name]:16.2f}" for name in names))
    return "\n".join(lines)


def exponents(found: Sequence[dict[str, Any]], of: str) -> dict[str, float]:
    """With which power each quantity grows: the slope of its logarithm over that of ``of``.

    Args:
        found (Sequence[dict[str, Any]]): what ``time_rows`` or ``time_examples`` returned.
        of (str): ``tokens`` or ``examples``.

    Returns:
        dict[str, float]: for each of the other quantities.
    """
    x = np.log([each[of] for each in found])
    return {name: float(np.polyfit(x, np.log([each[name] for each in found]), 1)[0]) for name in found[0] if name != of}
