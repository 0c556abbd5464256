"""The table and the picture of what training did to each held-out pair."""

import json

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
import torch
from omegaconf import OmegaConf

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.reports.margins import margins_table, plot_margins, read_margins, report_margins
from prefix_sharing.run import Evaluation


@pytest.fixture
def dataset(tmp_path):
    """A dropped record, a pair, and a ranking of three compared in all ways."""
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"prompt": "q", "responses": ["a", "a"]}\n'
        '{"prompt": "q", "responses": ["good", "bad"]}\n'
        '{"prompt": "q", "responses": ["one", "two", "three"]}\n'
    )
    return prefix_preference_dataset(tokenizer(), source="json", data_files=str(file), pairs="all")


@pytest.fixture
def table(dataset):
    before = torch.tensor([[-4.0, -5.0, 0.0], [-1.0, -2.0, -4.0]], dtype=torch.float64)
    after = torch.tensor([[-3.0, -7.0, 0.0], [-1.0, -1.0, -1.0]], dtype=torch.float64)
    counts = torch.tensor([[2, 2, 0], [3, 4, 5]])
    return margins_table(dataset, *(Evaluation({}, values, counts) for values in (before, after)))


def test_a_line_for_each_pair(table):
    assert table["record"].to_pylist() == [1, 2, 2, 2]
    assert table["chosen"].to_pylist() == [0, 0, 0, 1]
    assert table["rejected"].to_pylist() == [1, 1, 2, 2]
    assert table["chosen_tokens"].to_pylist() == [2, 3, 3, 4]
    assert table["rejected_log_prob_before"].to_pylist() == [-5.0, -2.0, -4.0, -4.0]
    assert table["margin_before"].to_pylist() == [1.0, 1.0, 3.0, 2.0]
    assert table["margin_after"].to_pylist() == [4.0, 0.0, 0.0, 0.0]


def margins(before, after):
    return pa.table({"margin_before": np.asarray(before, float), "margin_after": np.asarray(after, float)})


def test_figures_are_those_of_planted_margins():
    before = np.random.default_rng(0).normal(0, 30, 500)
    after = 2.0 + 0.75 * before + 0.004 * before**2
    found = read_margins(margins(before, after))
    assert found["curvature"] == pytest.approx(0.004, rel=1e-9)
    assert found["mean_change"] == pytest.approx((after - before).mean())
    flipped = np.sign(before) != np.sign(after)
    assert found["share_flipped"] == flipped.mean() > 0
    assert found["share_flipped_to_chosen"] == (flipped & (after > 0)).mean()
    assert found["share_flipped_to_rejected"] == (flipped & (after < 0)).mean()
    # a change that falls with the margin before: exactly linear it correlates at -1
    linear = read_margins(margins(before, 5 + 0.5 * before))
    assert linear["correlation"] == pytest.approx(-1)
    assert linear["spread_of_change"] == pytest.approx(0.5)
    assert linear["curvature"] == pytest.approx(0, abs=1e-12)


def test_too_little_training_and_too_much_are_told_apart():
    rng = np.random.default_rng(0)
    before = rng.normal(-3, 30, 2000)
    too_little, too_much = (
        margins(before, before + rng.normal(shift, spread, 2000)) for shift, spread in ((0.3, 1), (20, 90))
    )
    little, much = read_margins(too_little), read_margins(too_much)
    assert little["share_flipped"] < 0.03 < 0.3 < much["share_flipped"]
    assert much["share_flipped_to_rejected"] > 0.1 > 0.03 > little["share_flipped_to_rejected"]
    assert little["spread_of_change"] == pytest.approx(1 / 30, rel=0.1)
    assert much["spread_of_change"] == pytest.approx(3, rel=0.1)
    # of 2,000 independent pairs it is 0 with a standard error of 0.022
    assert abs(little["correlation"]) < 0.1


def test_margins_that_do_not_differ_have_no_shape():
    found = read_margins(margins([0.1, 0.1, 0.1], [0.1, 2.0, 0.0]))
    assert np.isnan([found[name] for name in ("spread_of_change", "correlation", "curvature")]).all()
    assert found["share_flipped_to_rejected"] == found["share_flipped"] == pytest.approx(1 / 3)
    assert np.isnan(read_margins(margins([1.0, 2.0], [3.0, 4.0]))["curvature"])


def test_figures_are_written_and_logged(dataset, tmp_path, caplog):
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "loss": {"_component_": "prefix_sharing.losses.DPOLoss"}})
    counts = torch.ones(2, 3, dtype=torch.long)
    before = torch.tensor([[-5.0, -5.0, 0.0], [-5.0, -5.0, -5.0]])
    after = torch.tensor([[-3.0, -7.0, 0.0], [-1.0, -1.0, -1.0]])
    with caplog.at_level("INFO", logger="prefix_sharing"):
        report_margins(cfg, dataset, *(Evaluation({}, values, counts) for values in (before, after)))
    changed = "25.0 % of pairs changed sign (25.0 % now prefer chosen, 0.0 % rejected)"
    assert caplog.messages[1:] == [f"Held-out margins: {changed}; more in {tmp_path / 'margins.json'}"]
    found = json.loads((tmp_path / "margins.json").read_text())
    assert (found["num_pairs"], found["mean_change"], found["correlation"]) == (4, 1.0, None)


def test_a_run_that_diverged_is_reported_without_a_picture(dataset, tmp_path, caplog):
    cfg = OmegaConf.create({"output_dir": str(tmp_path), "loss": {"_component_": "prefix_sharing.losses.DPOLoss"}})
    counts = torch.ones(2, 3, dtype=torch.long)
    before, after = (Evaluation({}, torch.full((2, 3), value), counts) for value in (-1.0, torch.nan))
    with caplog.at_level("WARNING", logger="prefix_sharing"):
        report_margins(cfg, dataset, before, after)
    assert "the run has diverged" in caplog.text
    assert (tmp_path / "margins.parquet").exists()
    assert not (tmp_path / "margins.png").exists()


def test_the_picture_is_drawn(table, tmp_path, pictures):
    file = tmp_path / "margins.png"
    plot_margins(table, "a run", file)
    assert np.ptp(matplotlib.image.imread(file)) > 0
