"""Rules as judges."""

import numpy as np
import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.judging import function_judge, length_judge

PROMPTS = [[{"role": "user", "content": "How many?"}], [{"role": "user", "content": "Why?"}]]
ANSWERS = [["two", "three of them"], ["because", ""]]


def repeats(turns, answer, times=1):
    return times * answer.count(turns[-1]["content"][0])


def fails(turns, answer):
    raise KeyError("x")


def test_a_function_scores_each_answer_with_its_prompt():
    judge = function_judge(f"{__name__}:repeats", times=3)
    found = judge([PROMPTS[0], PROMPTS[1]], [["H", "HHx"], ["", "Why? Why?"]])
    assert [scores.tolist() for scores in found] == [[3.0, 6.0], [0.0, 6.0]]


def test_length_is_a_baseline():
    assert [scores.tolist() for scores in length_judge()(PROMPTS, ANSWERS)] == [[3, 13], [7, 0]]
    assert length_judge()(PROMPTS, ANSWERS)[0].dtype == np.float64


def test_what_is_no_function_and_one_that_fails_are_named():
    with pytest.raises(UserError, match="'function': 'nowhere.rule' cannot be imported"):
        function_judge("nowhere.rule")
    with pytest.raises(UserError, match="is no function"):
        function_judge(f"{__name__}:PROMPTS")
    with pytest.raises(UserError, match=r"judge .*fails fails with KeyError: 'x' \(answer: 'two'\)"):
        function_judge(f"{__name__}:fails")(PROMPTS, ANSWERS)
