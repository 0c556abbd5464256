"""What rounds of sampling, judging and training have come to: a table, a picture and answers to read."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_COLUMNS = {
    "score": "score",
    "score_gain": "gain",
    "length_controlled_gain": "at equal length",
    "win_rate_over_last": "wins over last",
    "win_rate_over_first": "wins over first",
    "answer_length": "tokens",
    "entropy": "entropy",
    "kl": "KL to first",
    "share_tied": "tied",
    "tokens_saved": "tokens saved",
}


def describe_rounds(rounds: Sequence[Mapping[str, float]]) -> str:
    """The rounds as a table.

    Args:
        rounds (Sequence[Mapping[str, float]]): metrics of each, the first policy's first.

    Returns:
        str: a line for each.
    """
    names = [name for name in _COLUMNS if any(name in metrics for metrics in rounds)]
    lines = ["".join(f"{title:>17}" for title in ("after round", *(_COLUMNS[name] for name in names)))]
    for number, metrics in enumerate(rounds):
        values = (f"{metrics[name]:.3f}" if name in metrics else "" for name in names)
        lines.append("".join(f"{value:>17}" for value in ("-" if number == 0 else str(number - 1), *values)))
    return "\n".join(lines)


def plot_rounds(rounds: Sequence[Mapping[str, float]], title: str, file: Path) -> None:
    """Score, win rates, length and entropy over the rounds.

    Args:
        rounds (Sequence[Mapping[str, float]]): as for ``describe_rounds``.
        title (str): what was trained.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    panels = {
        "judged mean on held-out prompts": ("score",),
        "win rate": ("win_rate_over_last", "win_rate_over_first"),
        "tokens in an answer": ("answer_length",),
        "nats a token": ("entropy", "kl"),
    }
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in names:
            points = [(number, metrics[name]) for number, metrics in enumerate(rounds) if name in metrics]
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xlabel="rounds done", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(names) > 1:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(file)


def warn_of_length(metrics: Mapping[str, float]) -> None:
    """Says so where answers have become better mostly by becoming longer.

    Args:
        metrics (Mapping[str, float]): of a round.
    """
    gain, at_equal_length = metrics["score_gain"], metrics["length_controlled_gain"]
    if gain > 0 and at_equal_length < gain / 2:
        log.warning(
            "Answers score %.3f more than the first policy's, but %.3f of it is by their length "
            "(%.0f tokens on average).",
            gain,
            gain - at_equal_length,
            metrics["answer_length"],
        )


def write_answers(
    file: Path, title: str, policies: Mapping[str, Sequence[Mapping[str, Any]]], num_prompts: int
) -> None:
    """Answers of several policies to the same prompts, with their scores, to be read.

    Args:
        file (Path): the Markdown file.
        title (str): its title.
        policies (Mapping[str, Sequence[Mapping[str, Any]]]): rows of the same prompts, by policy.
        num_prompts (int): how many prompts to show.
    """
    lines = [f"# {title}"]
    for rows in list(zip(*policies.values(), strict=True))[:num_prompts]:
        turns = json.loads(rows[0]["turns"])
        lines.append(f"## {' '.join(str(turns[-1].get('content', '')).split())[:80]}")
        lines += [f"**{turn['role']}**\n\n````text\n{turn.get('content', '')}\n````" for turn in turns]
        for name, row in zip(policies, rows, strict=True):
            for text, score in zip(row["texts"], row["scores"], strict=True):
                lines.append(f"**{name}**, score {score:.3f}\n\n````text\n{text.strip()}\n````")
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
