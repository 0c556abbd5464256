"""The table and the picture of what training did to each held-out pair."""

import matplotlib.image
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.reports.margins import margins_table, plot_margins, report_margins
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
