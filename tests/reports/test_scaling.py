"""Runs on data sets of several sizes in one picture."""

import json
import sys

import matplotlib.figure
import numpy as np
import pytest

from documents import PAGES, commands
from prefix_sharing.errors import UserError
from prefix_sharing.reports import scaling
from prefix_sharing.reports.scaling import describe_scaling, plot_scaling, read_scaling
from runs import run_in_process

ACCURACY = "eval/rewards/accuracies"


def make_run(directory, num_examples, points):
    """What a run leaves behind, as far as it is read."""
    (directory / "logs").mkdir(parents=True)
    (directory / "run.json").write_text(json.dumps({"id": "0", "started": "", "examples": num_examples}))
    lines = [f"Step {step} | loss:0.5 \nStep {step} | eval/loss:0.6 {ACCURACY}:{value!r} \n" for step, value in points]
    (directory / "logs" / "log_1.txt").write_text("".join(lines))
    return directory


def quadratic(a, b, c):
    return [(step, a + b * step + c * step**2) for step in range(0, 101, 10)]


@pytest.fixture
def runs(tmp_path):
    """100 and 1,000 examples; the latter in two runs, whose noise is opposite."""
    small = make_run(tmp_path / "small", 100, quadratic(0.5, 4e-3, -5e-5))  # turns at 40
    large = [(step, value) for step, value in quadratic(0.5, 5e-3, -2e-5)]  # would turn at 125
    noise = np.random.default_rng(0).normal(0, 0.01, len(large))
    for k, sign in enumerate((1, -1)):
        points = [(step, float(value + sign * e)) for (step, value), e in zip(large, noise, strict=True)]
        make_run(tmp_path / f"large_{k}", 1000, points)
    return [tmp_path / "large_0", small, tmp_path / "large_1"]


def test_planted_curves_are_found(runs):
    small, large = read_scaling(runs, ACCURACY)
    assert (small.num_examples, large.num_examples) == (100, 1000)
    assert small.steps.tolist() == list(range(10, 101, 10))  # without what was before training
    assert len(large.steps) == 20
    steps = np.arange(10, 101)
    assert small.fit(steps) == pytest.approx(0.5 + 4e-3 * steps - 5e-5 * steps**2, abs=1e-12)
    assert large.fit(steps) == pytest.approx(0.5 + 5e-3 * steps - 2e-5 * steps**2, abs=1e-12)
    assert small.turns_at == pytest.approx(40)
    assert large.turns_at is None
    title, _, first, second = describe_scaling([small, large], ACCURACY).splitlines()
    assert title == ACCURACY
    assert first.split() == ["100", "100", "0.4000", "0.0000", "40"]
    assert second.split()[:3] + second.split()[4:] == ["1,000", "100", "0.8000", "-"]


def test_two_steps_have_no_fit_and_a_line_does_not_turn(tmp_path):
    (curve,) = read_scaling([make_run(tmp_path / "two", 10, [(1, 0.5), (2, 0.6)])], ACCURACY)
    assert curve.fit is None
    assert curve.turns_at is None
    assert describe_scaling([curve], ACCURACY).split()[-2:] == ["-", "-"]
    (line,) = read_scaling([make_run(tmp_path / "line", 10, [(1, 0.5), (2, 0.5), (3, 0.5)])], ACCURACY)
    assert line.turns_at is None


def test_dots_are_measured_and_lines_fitted(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    curves = read_scaling(runs, ACCURACY)
    plot_scaling(curves, ACCURACY, tmp_path / "scaling.png")
    dots, line, *_ = drawn[0].axes[0].lines
    assert (dots.get_marker(), len(drawn[0].axes[0].lines)) == ("o", 4)
    assert dots.get_ydata().tolist() == curves[0].values.tolist()
    assert line.get_ydata()[-1] == pytest.approx(curves[0].fit(100))


def test_the_documented_command_reads_a_real_run(tmp_path, monkeypatch, capsys, pictures):
    command = next(line for line in commands(PAGES["recipes.md"]) if "reports.scaling" in line).split()
    monkeypatch.chdir(tmp_path)
    directories = [argument for argument in command[3:] if "/" in argument and not argument.startswith("eval/")]
    for k, directory in enumerate(directories):
        keys = {"run_val_every_n_steps": 1, "max_steps_per_epoch": 3, "dataset.num_pairs": 32 + 32 * k}
        run_in_process(tmp_path / directory, **keys)
    monkeypatch.setattr(sys, "argv", command[2:])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["32", "3"], ["64", "3"]]
    assert (tmp_path / command[-1]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", [*command[2:4], "--metric", "eval/scores"])
    with pytest.raises(SystemExit):
        scaling.main()
    assert "have no eval/scores after step 0; it has eval/" in capsys.readouterr().err


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"run.json not found; give the output_dir of a training run"):
        read_scaling([tmp_path], ACCURACY)
    (tmp_path / "run.json").write_text('{"id": "0"}')
    with pytest.raises(UserError, match="does not say how many examples the run had"):
        read_scaling([tmp_path], ACCURACY)
    with pytest.raises(UserError, match="set dataset_val and run_val_every_n_steps"):
        read_scaling([make_run(tmp_path / "run", 10, [])], ACCURACY)
