import matplotlib.figure
import pytest
from torchtune.training.metric_logging import DiskLogger

from prefix_sharing.training.curves import plot_curves, read_log


def test_a_log_of_torchtunes_is_read_back(tmp_path):
    logger = DiskLogger(str(tmp_path))
    logger.log_dict({"loss": 0.5, "rewards/accuracies": 1.0}, step=1)
    logger.log_dict({"eval/loss": 1e-7}, step=2)
    logger.close()
    assert read_log(tmp_path) == [
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
