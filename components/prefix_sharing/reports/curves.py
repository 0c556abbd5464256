"""Training curves of a run, drawn from the log that torchtune's ``DiskLogger`` writes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torchtune.training.metric_logging import DiskLogger

from prefix_sharing.config import component_name
from prefix_sharing.run.directory import own_logs

Log = list[tuple[int, dict[str, float]]]

_PANELS = {
    "loss": ("loss",),
    "reward accuracy": ("rewards/accuracies",),
    "reward margin": ("rewards/margins",),
    "log-probs of responses": ("log_probs/chosen", "log_probs/rejected"),
}


def read_log(file: Path) -> Log:
    """Every entry of a log, of several runs if they share it.

    Args:
        file (Path): the ``DiskLogger``'s.

    Returns:
        Log: steps and their metrics.
    """
    entries = []
    for line in file.read_text().splitlines(keepends=True):
        match = re.fullmatch(r"Step (\d+) \| (.*)\n", line)  # without its end, it is of a run that was killed
        if match:
            values = (value.rsplit(":", 1) for value in match[2].split())
            entries.append((int(match[1]), {name: float(value) for name, value in values}))
    return entries


def read_log_of_last_run(files: Sequence[Path]) -> Log:
    """The entries of the last run in some files; of a run that was resumed, those of all its parts.

    Where steps begin at the first one again, another run begins. Where they begin at a later one, the run before is
    continued from that step on.

    Args:
        files (Sequence[Path]): logs in the order in which they were written.

    Returns:
        Log: steps and their metrics.
    """
    entries: Log = []
    for file in files:
        previous = None
        for step, metrics in read_log(file):
            if previous is None or step < previous:  # a run begins, or a part of one
                entries = [entry for entry in entries if entry[0] < step] if step > 1 else []
            entries.append((step, metrics))
            previous = step
    return entries


def plot_curves(entries: Log, title: str, file: Path) -> None:
    """Loss, accuracy, margin and log-probs over steps: lines in training, dots on held-out examples.

    Args:
        entries (Log): as ``read_log_of_last_run`` returns them.
        title (str): what was trained.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (label, names) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for i, name in enumerate(names):
            of_responses = f", {name.split('/')[1]}" if len(names) > 1 else ""
            for prefix, style, where in (("", "-", "training"), ("eval/", "o", "held out")):
                points = [(step, values[prefix + name]) for step, values in entries if prefix + name in values]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=where + of_responses)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(label)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=120)


def draw_curves(cfg: DictConfig, metric_logger: Any) -> None:
    """Draws ``curves.png`` in ``output_dir`` at the end of a run, if its log is on disk.

    Args:
        cfg (DictConfig): the run's config.
        metric_logger (Any): the run's logger; None on ranks other than 0.
    """
    if not isinstance(metric_logger, DiskLogger):
        return
    files = own_logs(cfg) if cfg.resume is not None else [metric_logger.path_to_log_file()]
    entries = read_log_of_last_run(files)
    if entries:
        loss, dataset = (component_name(cfg[key]) for key in ("loss", "dataset"))
        plot_curves(entries, f"{loss}, {dataset}, {cfg.output_dir}", Path(cfg.output_dir) / "curves.png")
