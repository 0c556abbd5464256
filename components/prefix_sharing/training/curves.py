"""Training curves of a run, drawn from the log that torchtune's ``DiskLogger`` writes."""

import re
from pathlib import Path

from omegaconf import DictConfig

from prefix_sharing.config import component_name
from prefix_sharing.training.distributed import is_rank_zero

Log = list[tuple[int, dict[str, float]]]

_PANELS = {
    "loss": ("loss",),
    "reward accuracy": ("rewards/accuracies",),
    "reward margin": ("rewards/margins",),
    "log-probs of responses": ("log_probs/chosen", "log_probs/rejected"),
}


def read_log(log_dir: str | Path) -> Log:
    """Every entry of a directory's logs.

    Args:
        log_dir (str | Path): the ``DiskLogger``'s; a run that was resumed has several files there.

    Returns:
        Log: steps and their metrics, in the order of the files.
    """
    entries = []
    for file in sorted(Path(log_dir).glob("log_*.txt")):
        for line in file.read_text().splitlines():
            match = re.fullmatch(r"Step (\d+) \| (.*)", line.strip())
            if match:
                values = (value.rsplit(":", 1) for value in match[2].split())
                entries.append((int(match[1]), {name: float(value) for name, value in values}))
    return entries


def plot_curves(entries: Log, title: str, file: Path) -> None:
    """Loss, accuracy, margin and log-probs over steps: lines in training, dots on held-out examples.

    Args:
        entries (Log): as ``read_log`` returns them.
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


def draw_curves(cfg: DictConfig) -> None:
    """Draws ``curves.png`` in ``output_dir`` at the end of a run, on rank 0, where the log is on disk.

    Args:
        cfg (DictConfig): the run's config.
    """
    log_dir = cfg.metric_logger.get("log_dir")
    if log_dir is None or not is_rank_zero():
        return
    entries = read_log(log_dir)
    if entries:
        loss, dataset = (component_name(cfg[key]) for key in ("loss", "dataset"))
        plot_curves(entries, f"{loss}, {dataset}, {cfg.output_dir}", Path(cfg.output_dir) / "curves.png")
