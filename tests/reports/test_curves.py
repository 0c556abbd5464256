import matplotlib.figure
import pytest
from torchtune.training.metric_logging import DiskLogger

from prefix_sharing.reports.curves import plot_curves, read_log, read_log_of_last_run


def test_a_log_of_torchtunes_is_read_back(tmp_path):
    logger = DiskLogger(str(tmp_path))
    logger.log_dict({"loss": 0.5, "rewards/accuracies": 1.0}, step=1)
    logger.log_dict({"eval/loss": 1e-7}, step=2)
    logger.close()
    assert read_log(logger.path_to_log_file()) == [
        (1, {"loss": 0.5, "rewards/accuracies": 1.0}),
        (2, {"eval/loss": pytest.approx(1e-7)}),
    ]


def test_training_is_a_line_and_held_out_examples_are_dots(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    plot_curves([(1, {"loss": 0.7}), (2, {"loss": 0.6}), (2, {"eval/loss": 0.65})], "a run", tmp_path / "curves.png")
    line, dots = drawn[0].axes[0].lines
    assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([1, 2], [0.7, 0.6])
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist(), dots.get_marker()) == ([2], [0.65], "o")


def write_log(file, *steps):
    file.write_text("".join(f"Step {step} | loss:{loss} \n" for step, loss in steps))
    return file


def test_a_run_that_was_resumed_is_one_curve_and_another_run_none_of_it(tmp_path):
    first = write_log(tmp_path / "log_1.txt", (1, 9.0), (2, 9.0), (3, 9.0))
    begun = write_log(tmp_path / "log_2.txt", (0, 0.7), (1, 0.6), (2, 0.5), (3, 0.4))
    resumed = write_log(tmp_path / "log_3.txt", (2, 0.55), (3, 0.45))
    steps = lambda *files: [(step, metrics["loss"]) for step, metrics in read_log_of_last_run(files)]  # noqa: E731
    assert steps(begun) == [(0, 0.7), (1, 0.6), (2, 0.5), (3, 0.4)]
    assert steps(first, begun) == steps(begun)
    assert steps(first, begun, resumed) == [(0, 0.7), (1, 0.6), (2, 0.55), (3, 0.45)]
    # two runs that began in the same second share a file
    both = write_log(tmp_path / "log_4.txt", (1, 9.0), (2, 9.0), (1, 0.3), (2, 0.2))
    assert steps(both) == [(1, 0.3), (2, 0.2)]
