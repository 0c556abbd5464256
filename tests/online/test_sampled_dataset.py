"""Judged answers become trees of the tokens that were sampled."""

import json

import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.online import RoundTable, sampled_preference_dataset
from prefix_sharing.quickstart import tokenizer


def write(path, *judged):
    """A row of each ``(answers, scores)``; an answer is its tokens, and complete if they end with 2."""
    table = RoundTable(path, {})
    made = [
        {
            "key": f"{i:032x}",
            "turns": json.dumps([{"role": "user", "content": "q"}]),
            "prompt_tokens": [10, 11, 12 + i],
            "answers": answers,
            "texts": [" ".join(map(str, answer)) for answer in answers],
            "log_probs": [-1.0] * len(answers),
            "complete": [answer[-1:] == [2] for answer in answers],
            "scores": scores,
        }
        for i, (answers, scores) in enumerate(judged)
    ]
    table.add(made)
    table.finish([row["key"] for row in made])
    return str(path)


ANSWERS = [[5, 2], [6, 7], [8, 2], [9, 2]]


def test_best_and_worst_are_compared_and_the_others_left_out(tmp_path):
    file = write(tmp_path / "scores.parquet", (ANSWERS, [0.5, 0.1, 0.9, 0.3]))
    dataset = sampled_preference_dataset(tokenizer(), data_files=file)
    best, worst = dataset[0]
    assert best.tokens.tolist() == [10, 11, 12, 8, 2]
    assert best.scored.tolist() == [False] * 3 + [True] * 2
    assert worst.tokens.tolist() == [10, 11, 12, 6, 7]  # cut: nothing is scored that was not sampled
    assert dataset.pairs(0).tolist() == [[0, 1]]
    assert dataset.num_without_end == 1


def test_all_pairs_share_one_tree(tmp_path):
    file = write(tmp_path / "scores.parquet", (ANSWERS, [0.5, 0.1, 0.9, 0.5]))
    dataset = sampled_preference_dataset(tokenizer(), data_files=file, pairs="all")
    assert [response.tokens[3] for response in dataset[0]] == [8, 5, 9, 6]
    assert dataset.pairs(0).tolist() == [[0, 1], [0, 2], [0, 3], [1, 3], [2, 3]]  # not the tied ones


def test_what_says_nothing_is_dropped_and_counted(tmp_path):
    nan = float("nan")
    file = write(
        tmp_path / "scores.parquet",
        (ANSWERS[:2], [1.0, 0.0]),
        (ANSWERS[:2], [1.0, 1.0]),
        ([[5, 2], [5, 2]], [1.0, 0.0]),
        ([[5, 2], [6, 2]], [1.0, nan]),
        ([[5, 2], []], [1.0, 0.0]),
    )
    dataset = sampled_preference_dataset(tokenizer(), data_files=file)
    assert len(dataset) == 1
    assert dataset.dropped == {
        "fewer than two answers with text and a score": 2,
        "identical responses": 1,
        "tied scores": 1,
    }


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"scores.parquet not found; prefix_dpo_online"):
        sampled_preference_dataset(tokenizer(), data_files=str(tmp_path / "scores.parquet"))


def test_answers_with_nan_scores_only_leave_no_example(tmp_path):
    file = write(tmp_path / "scores.parquet", (ANSWERS[:2], [float("nan")] * 2))
    with pytest.raises(UserError, match="has no usable example"):
        sampled_preference_dataset(tokenizer(), data_files=file)
