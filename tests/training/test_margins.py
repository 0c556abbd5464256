"""The table and the picture of what training did to each held-out pair."""

import matplotlib.image
import numpy as np
import pytest
import torch

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.training.evaluation import Evaluation
from prefix_sharing.training.margins import margins_table, plot_margins


@pytest.fixture
def dataset(tmp_path):
    """A dropped row, a pair, and a ranking of three compared in all ways."""
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


def test_a_row_for_each_pair(table):
    assert table["source_row"].to_pylist() == [1, 2, 2, 2]
    assert table["chosen"].to_pylist() == [0, 0, 0, 1]
    assert table["rejected"].to_pylist() == [1, 1, 2, 2]
    assert table["chosen_tokens"].to_pylist() == [2, 3, 3, 4]
    assert table["rejected_log_prob_before"].to_pylist() == [-5.0, -2.0, -4.0, -4.0]
    assert table["margin_before"].to_pylist() == [1.0, 1.0, 3.0, 2.0]
    assert table["margin_after"].to_pylist() == [4.0, 0.0, 0.0, 0.0]


def test_the_picture_is_drawn(table, tmp_path):
    file = tmp_path / "margins.png"
    plot_margins(table, "a run", file)
    assert np.ptp(matplotlib.image.imread(file)) > 0
