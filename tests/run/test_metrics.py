import pytest
import torch

from plain import response
from prefix_sharing.losses import LossOutput
from prefix_sharing.run import StepMetrics
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row

CPU = torch.device("cpu")


def row_of(num_examples):
    pair = [response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 2, 5, 4], [0, 0, 1, 1])]
    return Row.from_examples([pair] * num_examples, num_responses=2)


def add(metrics, losses, chosen, rejected, log_probs):
    row = row_of(len(losses))
    output = ResponseLogProbs(torch.tensor(log_probs).view(-1, 2), row.num_scored)
    metrics.add(row, output, LossOutput(*(torch.tensor(x) for x in (losses, chosen, rejected))))


def test_means_are_over_pairs_not_over_rows():
    metrics = StepMetrics(CPU)
    add(metrics, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0])
    add(metrics, [10.0], [4.0], [0.0], [-7.0, -8.0])
    values = metrics.compute()
    assert values["loss"] == 4.0
    assert values["rewards/chosen"] == 7 / 4
    assert values["rewards/rejected"] == 3 / 4
    assert values["rewards/margins"] == 1.0
    assert values["log_probs/chosen"] == -4.0
    assert values["log_probs/rejected"] == -5.0
    # right, wrong, tie, right
    assert values["rewards/accuracies"] == 2.5 / 4


def test_tokens_saved_is_the_share_of_the_paired_formats_tokens():
    metrics = StepMetrics(CPU)
    add(metrics, [0.0], [0.0], [0.0], [0.0, 0.0])
    # [1, 2, 3] and [1, 2, 5] are read: 4 tokens with sharing, 6 without
    assert metrics.compute()["tokens_saved"] == pytest.approx(1 - 4 / 6)


def test_a_rank_without_examples_adds_nothing():
    metrics = StepMetrics(CPU)
    add(metrics, [3.0], [0.0], [0.0], [0.0, 0.0])
    metrics.add(
        Row.from_examples([], num_responses=2),
        ResponseLogProbs(torch.zeros(0, 2), torch.zeros(0, 2)),
        LossOutput(*(torch.zeros(0) for _ in range(3))),
    )
    values = metrics.compute()
    assert values["loss"] == 3.0
    assert values["tokens_saved"] == pytest.approx(1 - 4 / 6)


def test_the_progress_bar_shows_no_accuracy_where_there_are_no_pairs():
    assert StepMetrics.shown({"loss": 0.5, "rewards/accuracies": 0.75, "lr": 1.0}) == {
        "loss": "0.5000",
        "accuracy": "0.7500",
    }
    assert StepMetrics.shown({"loss": 0.5}) == {"loss": "0.5000"}
