"""What is said of a policy's answers to held-out prompts."""

import numpy as np
import pytest

from prefix_sharing.online.held_out import HeldOut, compare, score_per_token, win_rate


def held_out(scores, lengths, log_probs=None):
    scores, lengths = np.array(scores, float), np.array(lengths, float)
    return HeldOut(scores, lengths, -lengths if log_probs is None else np.array(log_probs, float), 1.0)


def test_ties_are_half_a_win_and_answers_without_a_verdict_none():
    assert win_rate(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [3.0], [2.0]])) == 0.5
    assert win_rate(np.array([[1.0, 0.0]]), np.array([[0.5]])) == 0.5
    assert win_rate(np.array([[1.0], [np.nan]]), np.array([[0.0], [0.0]])) == 1.0


def test_a_gain_that_is_by_length_alone_is_none_at_equal_length():
    first, new = held_out([[0.1], [0.2], [0.3]], [[1], [2], [3]]), held_out([[0.6], [0.7], [0.8]], [[6], [7], [8]])
    found = compare(new, first, first)
    assert found["score_gain"] == pytest.approx(0.5)
    assert found["length_controlled_gain"] == pytest.approx(0.0)
    assert found["answer_length"] == 7
    assert found["entropy"] == pytest.approx(1.0)


def test_a_gain_at_equal_length_is_all_there_is():
    first, new = held_out([[0.1], [0.3]], [[5], [5]]), held_out([[0.5], [0.7]], [[5], [5]])
    assert score_per_token([first, new]) == 0.0
    assert compare(new, first, first)["length_controlled_gain"] == pytest.approx(0.4)
    assert compare(new, first, first)["win_rate_over_last"] == 1.0


def test_prompts_with_longer_answers_are_not_a_merit_of_length():
    """Within each prompt a token more costs 0.1; the second prompt's answers are longer and better."""
    lengths = np.array([[10.0, 20.0], [100.0, 110.0]])
    scores = np.array([[1.0, 0.0], [9.0, 8.0]])
    policy = HeldOut(scores, lengths, -lengths, 1.0)
    assert score_per_token([policy]) == pytest.approx(-0.1)
    unknown = np.where(lengths > 50, np.nan, -2 * lengths)  # as a server gives them that does not tell
    assert compare(HeldOut(scores, lengths, unknown, 1.0), policy, policy)["entropy"] == pytest.approx(2.0)
    nothing = np.full_like(lengths, np.nan)
    assert np.isnan(compare(HeldOut(scores, lengths, nothing, 1.0), policy, policy)["entropy"])
