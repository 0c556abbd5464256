"""Each form that records come in, and what is said to a record in none of them."""

import pytest

from prefix_sharing.datasets.forms import RecordError, check_format, recognize_format, to_conversations
from prefix_sharing.errors import UserError


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    made = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return made if system is None else [{"role": "system", "content": system}, *made]


def sharegpt(messages):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


EXPECTED = [turns("q", "good"), turns("q", "bad")]
EXPECTED_MULTI_TURN = [turns("q", "a", "q2", "good", system="s"), turns("q", "a", "q2", "bad", system="s")]

RECORDS = [
    ("text", {"prompt": "q", "chosen": "good", "rejected": "bad"}, EXPECTED),
    ("messages", {"chosen": turns("q", "good"), "rejected": turns("q", "bad")}, EXPECTED),
    ("messages", {"chosen": sharegpt(turns("q", "good")), "rejected": sharegpt(turns("q", "bad"))}, EXPECTED),
    # the prompt in a column of its own, as messages or as text
    ("messages", {"prompt": turns("q"), "chosen": turns("q", "good")[1:], "rejected": turns("q", "bad")[1:]}, EXPECTED),
    ("messages", {"prompt": "q", "chosen": turns("q", "good")[1:], "rejected": turns("q", "bad")[1:]}, EXPECTED),
    # the prompt in its own column and in the conversations too
    ("messages", {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad")}, EXPECTED),
    ("messages", {"prompt": turns("q"), "chosen": turns("q", "good"), "rejected": turns("q", "bad")}, EXPECTED),
    ("messages", {"prompt": None, "chosen": turns("q", "good"), "rejected": turns("q", "bad")}, EXPECTED),
    (
        "messages",
        {
            "prompt": turns("q", "a", "q2", system="s"),
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        EXPECTED_MULTI_TURN,
    ),
    # a prompt that ends with an answer goes on; a system turn in the prompt alone is kept
    (
        "messages",
        {
            "prompt": turns("q", "a", system="s"),
            "chosen": turns("q2", "good"),
            "rejected": turns("q2", "bad"),
        },
        EXPECTED_MULTI_TURN,
    ),
    (
        "messages",
        {"prompt": turns("q", system="s"), "chosen": turns("q", "good"), "rejected": turns("q", "bad")},
        [turns("q", "good", system="s"), turns("q", "bad", system="s")],
    ),
    (
        "hh",
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        EXPECTED,
    ),
    (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nAssistant: b\n\nHuman: Human: ?\n\nAssistant: two\n\nlines",
            "rejected": "\n\nHuman: q\n\nAssistant:",
        },
        [turns("q", "a\n\nb", "Human: ?", "two\n\nlines"), turns("q", "")],
    ),
    ("ranked", {"prompt": "q", "responses": ["good", "bad"]}, EXPECTED),
    ("ranked", {"prompt": "q", "responses": ["bad", "good"], "scores": [0.1, 2]}, EXPECTED),
    ("ranked", {"prompt": turns("q"), "responses": [turns("q", "a")[1:]]}, [turns("q", "a")]),
    (
        "ranked",
        {"prompt": "q", "responses": ["b", "c", "a"], "scores": [2, 1, 2]},
        [turns("q", "b"), turns("q", "a"), turns("q", "c")],
    ),
    ("chat", {"messages": turns("q", "a", "q2", "good", system="s")}, EXPECTED_MULTI_TURN[:1]),
    ("chat", {"messages": "\n\nHuman: q\n\nAssistant: good"}, EXPECTED[:1]),
]


@pytest.mark.parametrize(("format", "record", "expected"), RECORDS)
def test_record_is_recognized_and_read(format, record, expected):
    assert recognize_format({}, list(record), [record]) == format
    assert to_conversations(record, format, {}) == expected


def test_openai_parts_and_tools_are_read():
    chosen = [
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "call", "name": None},
        {"role": "tool", "content": "result"},
        {"role": "assistant", "content": "good"},
    ]
    (first, _) = to_conversations({"chosen": chosen, "rejected": turns("q", "bad")}, "messages", {})
    assert [t["role"] for t in first] == ["user", "assistant", "ipython", "assistant"]
    assert first[0]["content"] == "q?"


def test_columns_are_renamed_by_column_map():
    row = {"question": "q", "win": "good", "lose": "bad"}
    columns = {"prompt": "question", "chosen": "win", "rejected": "lose"}
    assert recognize_format(columns, list(row), [row]) == "text"
    assert to_conversations(row, "text", columns) == EXPECTED


def test_messages_may_be_the_chosen_ones_of_preference_data():
    row = {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "messages": turns("q", "x")}
    columns = {"messages": "chosen"}
    assert recognize_format(columns, list(row), [row]) == "chat"
    assert to_conversations(row, "chat", columns) == EXPECTED[:1]
    # without being told, a data set that has pairs is read as pairs
    assert recognize_format({}, list(row), [row]) == "messages"


def test_leading_empty_records_do_not_decide_the_format():
    rows = [{"chosen": None, "rejected": None}, {"chosen": turns("q", "a"), "rejected": turns("q", "b")}]
    assert recognize_format({}, ["chosen", "rejected"], rows) == "messages"


def test_unknown_forms_are_refused_with_the_columns_there_are():
    with pytest.raises(UserError, match="The columns question, answer match no known format"):
        recognize_format({}, ["question", "answer"], [])
    with pytest.raises(UserError, match="unknown format 'sft'; choose from messages, text, hh, ranked, chat"):
        check_format("sft", {}, ["chosen"])
    with pytest.raises(UserError, match="text needs a column 'prompt', but the columns are chosen, rejected"):
        check_format("text", {}, ["chosen", "rejected"])


GOOD = turns("q", "good")
MALFORMED = [
    ("text", {"prompt": "q", "chosen": None, "rejected": "b"}, "chosen", "must be a string, but is missing"),
    ("text", {"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen", "must be a string, but is a number"),
    (
        "text",
        {"prompt": None, "chosen": "a", "rejected": "b"},
        "prompt",
        "string or a list of messages, but is missing",
    ),
    ("text", {"prompt": "q", "chosen": GOOD, "rejected": "b"}, "chosen", "must be a string, but is a list"),
    ("messages", {"chosen": GOOD, "rejected": "bad"}, "rejected", "must be a list of messages, but is a string"),
    ("messages", {"chosen": GOOD, "rejected": []}, "rejected", "is an empty list"),
    ("messages", {"chosen": GOOD, "rejected": ["bad"]}, "rejected[0]", "must be a message, but is a string"),
    ("messages", {"chosen": GOOD, "rejected": [{"content": "x"}]}, "rejected[0]", "has no 'role'"),
    ("messages", {"chosen": GOOD, "rejected": [{"role": "bot", "content": "x"}]}, "rejected[0].role", "is 'bot'"),
    ("messages", {"chosen": GOOD, "rejected": [{"role": "user", "content": 3}]}, "rejected[0].content", "is a number"),
    ("messages", {"chosen": GOOD, "rejected": [{"from": "human"}]}, "rejected[0].value", "is missing"),
    ("messages", {"chosen": GOOD, "rejected": turns("q")}, "rejected", "roles out of order (user)"),
    ("messages", {"chosen": GOOD, "rejected": GOOD[1:]}, "rejected", "roles out of order (assistant)"),
    (
        "messages",
        {"chosen": [*GOOD, *turns(system="late"), *GOOD], "rejected": GOOD},
        "chosen",
        "roles out of order (user, assistant, system, user, assistant)",
    ),
    ("messages", {"chosen": [*turns("q"), *GOOD], "rejected": GOOD}, "chosen", "out of order (user, user, assistant)"),
    ("messages", {"chosen": [*GOOD, GOOD[1]], "rejected": GOOD}, "chosen", "(user, assistant, assistant)"),
    ("hh", {"chosen": "hello", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "chosen", "must begin with"),
    ("hh", {"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "chosen", "roles out of order"),
    ("hh", {"chosen": None, "rejected": "\n\nHuman: q\n\nAssistant: b"}, "chosen", "must be a string, but is missing"),
    ("chat", {"messages": turns("q")}, "messages", "roles out of order (user)"),
    ("chat", {"messages": None}, "messages", "must be a list of messages, but is missing"),
    ("ranked", {"prompt": "q", "responses": []}, "responses", "at least one response"),
    ("ranked", {"prompt": "q", "responses": "a"}, "responses", "at least one response"),
    ("ranked", {"prompt": "q", "responses": ["a", 1]}, "responses[1]", "but is a number"),
    ("ranked", {"prompt": "q", "responses": ["a", "b"], "scores": [1.0]}, "scores", "list of 2 numbers"),
    ("ranked", {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, "x"]}, "scores[1]", "but is a string"),
]


@pytest.mark.parametrize(("format", "record", "key", "problem"), MALFORMED)
def test_malformed_record_names_key_and_problem(format, record, key, problem):
    with pytest.raises(RecordError) as caught:
        to_conversations(record, format, {})
    assert caught.value.key == key
    assert problem in caught.value.problem
