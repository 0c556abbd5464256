"""A judge behind a server: what it is asked, and what is made of what it says."""

import re

import numpy as np
import pytest

from prefix_sharing import served
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.judging import served_judge
from servers import says, serve

PROMPTS = [
    [{"role": "user", "content": "How many?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why {answer}?"}],
]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch):
    monkeypatch.setattr(served, "_pause", lambda stop, seconds: None)


def part(text, tag):
    return re.search(rf"<{tag}>\n(.*)\n</{tag}>", text, re.DOTALL)[1]


def by_length(path, body, number):
    """As many points as the answer has characters; says nothing of answers with a ``?``."""
    answer = part(body["messages"][0]["content"], "answer")
    return says("I cannot tell." if "?" in answer else f"Not [[99]]. It has [[ {len(answer)} ]]")


def longer(path, body, number):
    """The longer is better, and a tie is A's: it has a bias. Says nothing if the first has a ``?``."""
    text = body["messages"][0]["content"]
    a, b = part(text, "answer_a"), part(text, "answer_b")
    if "?" in a:
        return says("[[A or B]]")
    return says(f"Is it [[B]]? [[{'A' if len(a) >= len(b) else 'B'}]]")


def test_scores_are_what_the_judge_says(caplog):
    with serve(by_length) as stub:
        judge = served_judge(stub.base_url, "big")
        found = judge(PROMPTS, [["two", "three {prompt}", "what?", "two"], [""]])
        np.testing.assert_equal(found, [[3, 14, np.nan, 3], [0]])
        assert found[0].dtype == np.float64
        assert len(stub.bodies) == 4  # equal answers are judged once
        assert {path for path, _, _ in stub.requests} == {"/v1/chat/completions"}
        body = stub.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0, 1024)
        assert f"big at {stub.base_url}: 1 of 4 verdicts cannot be read" in caplog.text
        conversations = {part(body["messages"][0]["content"], "conversation") for body in stub.bodies}
        assert conversations == {"How many?", "System: Be brief.\n\nUser: Why {answer}?"}
        assert judge([], []) == []
        assert [len(scores) for scores in judge(PROMPTS, [[], []])] == [0, 0]


def test_pairs_are_compared_in_both_orders():
    with serve(longer) as stub:
        judge = served_judge(stub.base_url, "big", mode="pairwise")
        # aa and bb tie as each wins when it is first; cc with aa is the same
        found, alone = judge(PROMPTS, [["aa", "bb", "longest", "aa"], ["x"]])
        np.testing.assert_allclose(found, np.array([1.0, 1.0, 3.0, 1.0]) / 3)
        np.testing.assert_equal(alone, [np.nan])
        assert len(stub.bodies) == 6  # of the distinct ones aa, bb, longest


def test_a_pair_counts_if_both_orders_have_a_verdict(caplog):
    with serve(longer) as stub:
        (found,) = served_judge(stub.base_url, "big", mode="pairwise")(PROMPTS[:1], [["a", "bbb", "why?"]])
        np.testing.assert_equal(found, [0.0, 1.0, np.nan])
        assert "2 of 6 verdicts cannot be read" in caplog.text


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("[[7]]", 7.0),
        ("[[7.5]] and [[ -2 ]]", -2.0),
        ("[7]", None),
        ("[[7/10]]", None),
        ("[[nan]]", None),
        ("", None),
        (None, None),
    ],
)
def test_what_is_read_as_a_score(said, score):
    with serve(lambda path, body, number: says(said)) as stub:
        ((found,),) = served_judge(stub.base_url, "big")(PROMPTS[:1], [["x"]])
    np.testing.assert_equal(found, np.nan if score is None else score)


@pytest.mark.parametrize("response", [{}, {"choices": []}, {"choices": [{"message": None}]}, {"choices": 3}])
def test_a_response_without_a_message_is_no_verdict(response):
    with serve(lambda path, body, number: response) as stub:
        ((found,),) = served_judge(stub.base_url, "big")(PROMPTS[:1], [["x"]])
    assert np.isnan(found)


def test_a_busy_judge_is_asked_again_and_one_that_is_gone_is_named():
    with serve(lambda path, body, number: (503, "busy", {}) if number == 0 else by_length(path, body, number)) as stub:
        judge = served_judge(stub.base_url, "big", retries=1)
        np.testing.assert_equal(judge(PROMPTS[:1], [["two", "four"]]), [[3, 4]])
        assert len(stub.requests) == 3
    with pytest.raises(UserError, match=f"{stub.base_url}/chat/completions cannot be reached"):
        judge(PROMPTS[:1], [["two"]])


def test_templates_and_fields_of_ones_own(tmp_path):
    file = tmp_path / "judge.txt"
    file.write_text('Q: {prompt}\n<answer>\n{answer}\n</answer>\n{"json": {}}')
    with serve(by_length) as stub:
        fields = {"temperature": None, "max_tokens": 5, "chat_template_kwargs": {"enable_thinking": False}}
        judge = served_judge(stub.base_url, "big", template=str(file), request=fields)
        np.testing.assert_equal(judge(PROMPTS[:1], [[r"\1 {prompt}"]]), [[11]])
        assert stub.bodies[0]["messages"][0]["content"] == (
            'Q: How many?\n<answer>\n\\1 {prompt}\n</answer>\n{"json": {}}'
        )
        assert "temperature" not in stub.bodies[0]
        assert stub.bodies[0]["max_tokens"] == 5
        assert stub.bodies[0]["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"'template': .*judge.txt lacks \{answer_a\}"):
        served_judge(stub.base_url, "big", mode="pairwise", template=str(file))
    with pytest.raises(ConfigError, match="'template': nowhere.txt cannot be read as a text file"):
        served_judge(stub.base_url, "big", template="nowhere.txt")
    with pytest.raises(ConfigError, match="'mode': must be score or pairwise, not rank"):
        served_judge(stub.base_url, "big", mode="rank")
    with pytest.raises(ConfigError, match="'base_url': 'here' is no URL"):
        served_judge("here", "big")
