"""Each form that records come in, and what is said to a record in none of them."""

import pytest

from prefix_sharing.datasets.forms import FORMS, Record, RecordError, check_column_map, choose_form, recognize_form
from prefix_sharing.errors import ConfigError, UserError


def read(record, columns=None, format=None):
    """How a record alone is read: its format, and its conversations."""
    form = recognize_form([record], columns or {}, "here")[0] if format is None else FORMS[format]
    return form.name, form.read(Record(record, columns))


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


def chatml(*contents, **kwargs):
    return sharegpt(turns(*contents, **kwargs))


ANSWER, OTHER = [turns("q", text)[1:] for text in ("good", "bad")]
INFO = {"title": "t", "post": "p", "subreddit": "s", "article": None}
TLDR = "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"

RECORDS += [
    # LLaMA-Factory: conversations or messages, and each answer as one message
    ("messages", {"conversations": chatml("q"), "chosen": chatml("q", "good")[1], "rejected": chatml("q", "bad")[1]}),
    ("messages", {"messages": turns("q"), "chosen": ANSWER[0], "rejected": OTHER[0]}),
    ("messages", {"conversations": turns("q"), "chosen": ANSWER, "rejected": OTHER}),
    ("text", {"messages": turns("q"), "chosen": "good", "rejected": "bad"}),
    (
        "messages",
        {"system": "s", "conversations": chatml("q", "a", "q2"), "chosen": ANSWER[0], "rejected": OTHER[0]},
        EXPECTED_MULTI_TURN,
    ),
    ("output_pair", {"instruction": "q", "input": "", "output": ["good", "bad"]}),
    # Alpaca
    ("text", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    (
        "text",
        {"instruction": "q", "input": "about x", "chosen": "good", "rejected": "bad"},
        [turns("q\nabout x", "good"), turns("q\nabout x", "bad")],
    ),
    (
        "text",
        {"instruction": "q2", "system": "s", "history": [["q", "a"]], "chosen": "good", "rejected": "bad"},
        EXPECTED_MULTI_TURN,
    ),
    # UltraFeedback, binarized: the prompt as a string, whole conversations, and the chosen one once more
    (
        "messages",
        {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "messages": turns("q", "good")},
    ),
    ("messages", {"chosen": turns("q", "good"), "rejected": turns("q", "bad"), "messages": turns("q", "good")}),
    # Orca
    (
        "text",
        {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"},
        [turns("q", "good", system="s"), turns("q", "bad", system="s")],
    ),
    ("text", {"system": "", "input": "q", "chosen": "good", "rejected": "bad"}),
    # OpenRLHF and others: the prompt as a transcript
    ("text", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "good", "rejected": "bad"}),
    # TRL without a prompt: what both begin with, up to the space before the first difference
    (
        "shared_beginning",
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        [turns("The sky is", " blue."), turns("The sky is", " green.")],
    ),
    ("shp", {"history": "q", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 9}),
    ("shp", {"history": "q", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0}),
    ("safe_rlhf", {"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1}),
    (
        "tldr_comparison",
        {"info": INFO, "summaries": [{"text": "bad"}, {"text": "good"}], "choice": 1},
        [turns(TLDR, "good"), turns(TLDR, "bad")],
    ),
    (
        "tldr_comparison",
        {
            "info": {"title": "t", "article": "a", "post": None},
            "summaries": [{"text": "good"}, {"text": "bad"}],
            "choice": 0,
        },
        [turns("TITLE: t\n\na\n\nTL;DR:", "good"), turns("TITLE: t\n\na\n\nTL;DR:", "bad")],
    ),
    (
        "nectar",
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [{"answer": "bad", "rank": 7.0}, {"answer": "good", "rank": 1.0}],
        },
    ),
    ("helpsteer2", {"prompt": "q", "response": "good", "helpfulness": 4, "verbosity": 1}, EXPECTED[:1]),
    (
        "helpsteer2_preference",
        {"prompt": "q", "response_1": "bad", "response_2": "good", "preference_strength": 2},
    ),
    (
        "helpsteer3",
        {"context": turns("q"), "response1": "good", "response2": "bad", "overall_preference": -1},
    ),
    ("alpaca_eval", {"instruction": "q", "output_1": "bad", "output_2": "good", "preference": 2.0}),
    ("alpaca_eval", {"instruction": "q", "output_1": "good", "output_2": "bad", "preference": 1.12}),
    # ms-swift
    ("rejected_response", {"messages": turns("q", "good"), "rejected_response": "bad"}),
    ("rejected_response", {"messages": turns("q", "good"), "rejected_messages": turns("q", "bad")}),
    ("rejected_response", {"query": "q", "response": "good", "rejected_response": "bad"}),
    (
        "rejected_response",
        {"messages": turns("q", "a", "q2", "good", system="s"), "rejected_response": "bad"},
        EXPECTED_MULTI_TURN,
    ),
    # step-level: the steps so far are the beginning of both answers
    (
        "steps",
        {"prompt": "q", "initial_reason_steps": "One. ", "chosen": "Two.", "rejected": "Three."},
        [turns("q", "One. Two."), turns("q", "One. Three.")],
    ),
    (
        "text",
        {"prompt": turns("q", "One. "), "chosen": "Two.", "rejected": "Three."},
        [turns("q", "One. Two."), turns("q", "One. Three.")],
    ),
    ("unpaired", {"prompt": "q", "completion": "good", "label": True}, EXPECTED[:1]),
    ("unpaired", {"prompt": turns("q"), "completion": ANSWER, "label": False}, EXPECTED[:1]),
    ("unpaired", {"messages": turns("q", "good"), "label": 1}, EXPECTED[:1]),
    ("unpaired", {"instruction": "q", "input": "", "output": "good", "kto_tag": False}, EXPECTED[:1]),
    ("chat", {"conversations": chatml("q", "a", "q2", "good"), "system": "s"}, EXPECTED_MULTI_TURN[:1]),
    ("completion", {"prompt": "q", "completion": "good"}, EXPECTED[:1]),
    ("completion", {"prompt": turns("q"), "completion": ANSWER}, EXPECTED[:1]),
    ("completion", {"instruction": "q", "input": "", "output": "good"}, EXPECTED[:1]),
    (
        "completion",
        {"query": "q2", "history": [["q", "a"]], "system": "s", "response": "good"},
        EXPECTED_MULTI_TURN[:1],
    ),
]


@pytest.mark.parametrize("example", RECORDS)
def test_record_is_recognized_and_read(example):
    format, record, expected = example if len(example) == 3 else (*example, EXPECTED)
    name, comparison = read(record)
    assert name == format
    assert comparison.conversations == expected


def test_every_form_is_tested():
    assert {example[0] for example in RECORDS} == set(FORMS)


def test_verdicts_without_a_preference_are_ties():
    for record in (
        {"prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 0},
        {"context": turns("q"), "response1": "a", "response2": "b", "overall_preference": 0},
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 1.5},
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 0},
    ):
        scores = read(record)[1].scores
        assert scores[0] == scores[1]


def test_labels_of_unpaired_answers():
    for label, expected in ((True, True), (0, False), ("true", True), ("0", False), ("TRUE", True), ("0.0", False)):
        assert read({"prompt": "q", "completion": "a", "label": label})[1].label is expected


def test_steps_before_an_answer_are_given_however_they_are_written():
    for record in (
        {"prompt": "q", "initial_reason_steps": "One. ", "chosen": "Two.", "rejected": "No."},
        {"prompt": turns("q", "One. "), "chosen": "Two.", "rejected": "No."},
        {"prompt": turns("q", "One. "), "chosen": turns("q", "Two.")[1:], "rejected": turns("q", "No.")[1:]},
        {"prompt": turns("q", "One. "), "chosen": turns("q", "One. Two."), "rejected": turns("q", "One. No.")},
    ):
        comparison = read(record)[1]
        assert comparison.conversations == [turns("q", "One. Two."), turns("q", "One. No.")]
        assert comparison.given == ["One. ", "One. "]
    # text that happens to begin as the steps do is still what follows them
    record = {"prompt": "q", "initial_reason_steps": "1", "chosen": "1", "rejected": "2"}
    assert read(record)[1].conversations == [turns("q", "11"), turns("q", "12")]


HISTORY = turns("u1", "a1", "u2", system="S")
JOINED = [[*HISTORY, *answer] for answer in (ANSWER, OTHER)]


@pytest.mark.parametrize("overlap", range(len(HISTORY) + 1))
def test_an_answer_may_repeat_any_end_of_its_prompt(overlap):
    begun = HISTORY[len(HISTORY) - overlap :]
    record = {"prompt": HISTORY, "chosen": [*begun, *ANSWER], "rejected": [*begun, *OTHER]}
    assert read(record)[1].conversations == JOINED


def test_a_prompt_may_be_a_part_of_what_the_answers_begin_with():
    record = {"prompt": "u2", "chosen": JOINED[0], "rejected": JOINED[1]}
    assert read(record)[1].conversations == JOINED


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("something else", turns("q", "good")),
        (turns("u1", "a1", "u2"), turns("q", "good")),
        (turns("q"), turns("q2", "a")),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(prompt, answer):
    with pytest.raises(RecordError, match="the two do not fit"):
        read({"prompt": prompt, "chosen": answer, "rejected": turns("q", "bad")})
    columns = {"prompt": None}
    assert read({"prompt": prompt, "chosen": answer, "rejected": answer}, columns)[1].conversations[0] == answer


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]}


def test_messages_keep_what_a_template_may_use():
    chosen = [
        {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}], "name": "Ann"},
        {**CALL, "content": None, "reasoning_content": "hm"},
        {"role": "tool", "content": "result", "tool_call_id": "1"},
        {"role": "assistant", "content": "good", "name": None},
    ]
    record = {
        "chosen": chosen,
        "rejected": turns("q", "bad"),
        "tools": '[{"name": "f"}]',
        "chat_template_kwargs": {"k": 1},
    }
    comparison = read(record)[1]
    assert comparison.conversations[0] == [
        {"role": "user", "content": "q?", "name": "Ann"},
        {**CALL, "reasoning_content": "hm"},
        chosen[2],
        {"role": "assistant", "content": "good"},
    ]
    assert comparison.tools == [{"name": "f"}]
    assert comparison.template_kwargs == {"k": 1}


def test_calls_in_other_words_are_calls():
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": None}}}
    for call in (
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": None}}},
    ):
        answer = [call, {"from": "observation", "value": "r"}, {"from": "gpt", "value": "good"}]
        conversation = read({"conversations": chatml("q"), "chosen": answer, "rejected": OTHER})[1].conversations[0]
        assert conversation == [
            *turns("q"),
            {"role": "assistant", "tool_calls": [called]},
            {"role": "tool", "content": "r"},
            *ANSWER,
        ]


def test_a_record_knows_what_of_it_was_not_used():
    values = {"prompt": "q", "chosen": "a", "rejected": "b", "system_prompt": "s", "id": 7, "note": None, "tags": []}
    record = Record(values)
    FORMS["text"].read(record)
    assert list(record.unused()) == ["id"]


def test_columns_are_renamed_by_column_map():
    row = {"ask": "q", "win": "good", "lose": "bad"}
    columns = {"prompt": "ask", "chosen": "win", "rejected": "lose"}
    name, comparison = read(row, columns)
    assert (name, comparison.conversations) == ("text", EXPECTED)
    check_column_map(columns, [row])
    with pytest.raises(
        ConfigError, match=r"'column_map.promt': no form has a column of this name. Did you mean 'prompt'"
    ):
        check_column_map({"promt": "ask"}, [row])
    with pytest.raises(ConfigError, match=r"'column_map.chosen': there is no column 'wins'.* Did you mean 'win'"):
        check_column_map({"chosen": "wins"}, [row])


def test_messages_may_be_the_chosen_ones_of_preference_data():
    row = {"prompt": "q", "chosen": turns("q", "good"), "rejected": turns("q", "bad"), "messages": turns("q", "x")}
    name, comparison = read(row, {"messages": "chosen"})
    assert (name, comparison.conversations) == ("chat", EXPECTED[:1])
    # without being told, a data set that has pairs is read as pairs
    assert read(row)[0] == "messages"


def test_leading_empty_records_do_not_decide_the_format():
    rows = [{"chosen": None, "rejected": None}, {"chosen": turns("q", "a"), "rejected": turns("q", "b")}]
    form, reason = recognize_form(rows, {}, "here")
    assert form.name == "messages"
    assert reason == "columns chosen (a list), rejected (a list)"


def test_unknown_forms_are_refused_with_the_columns_there_are():
    for columns, missing in {
        ("question", "answer"): "",
        ("prompt", "chosen"): r" \(rejected is missing\)",
        ("chosen",): r" \(rejected is missing\)",
        ("prompt", "response_1", "response_2"): r" \(preference_strength is missing\)",
    }.items():
        expected = f"qa.jsonl: its columns {', '.join(columns)} match no known form{missing}: chosen and"
        with pytest.raises(UserError, match=expected):
            recognize_form([dict.fromkeys(columns, "text")], {}, "qa.jsonl")
    with pytest.raises(UserError, match="unknown format 'sft'; choose from ranked, .*, chat"):
        choose_form("sft", [{"chosen": "a"}], {})
    with pytest.raises(UserError, match="ranked needs a column 'responses', but the columns are prompt"):
        choose_form("ranked", [{"prompt": "q"}], {})


GOOD = turns("q", "good")
MALFORMED = [
    ("text", {"prompt": "q", "chosen": None, "rejected": "b"}, "chosen", "must be a string, a message or a list"),
    ("text", {"prompt": "q", "chosen": 5, "rejected": "b"}, "chosen", "a list of messages, but is a number"),
    ("text", {"prompt": 5, "chosen": "a", "rejected": "b"}, "prompt", "string or a list of messages, but is a number"),
    ("text", {"prompt": "q", "chosen": "\ud83d", "rejected": "b"}, "chosen", "half of a surrogate pair ('\\ud83d')"),
    ("text", {"prompt": None, "chosen": "a", "rejected": "b"}, "chosen", "roles out of order (assistant)"),
    ("text", {"prompt": "q", "history": "x", "chosen": "a", "rejected": "b"}, "history", "must be a list of pairs"),
    ("text", {"prompt": "q", "history": [["x"]], "chosen": "a", "rejected": "b"}, "history[0]", "must be a pair"),
    ("text", {"prompt": "q", "tools": "{", "chosen": "a", "rejected": "b"}, "tools", "must be JSON"),
    ("text", {"prompt": "q", "tools": 5, "chosen": "a", "rejected": "b"}, "tools", "must be a list of tools"),
    (
        "text",
        {"prompt": "q", "chat_template_kwargs": 5, "chosen": "a", "rejected": "b"},
        "chat_template_kwargs",
        "object",
    ),
    (
        "text",
        {"prompt": turns("q", system="s"), "system": "other", "chosen": "a", "rejected": "b"},
        "system",
        "is not the system prompt that the messages begin with",
    ),
    ("messages", {"chosen": GOOD, "rejected": []}, "rejected", "is an empty list"),
    ("messages", {"chosen": GOOD, "rejected": ["bad"]}, "rejected[0]", "must be a message, but is a string"),
    ("messages", {"chosen": GOOD, "rejected": [{"content": "x"}]}, "rejected[0]", "has no 'role'"),
    ("messages", {"chosen": GOOD, "rejected": [{"role": "bot", "content": "x"}]}, "rejected[0].role", "is 'bot'"),
    ("messages", {"chosen": GOOD, "rejected": [{"role": [], "content": "x"}]}, "rejected[0].role", "is a list"),
    ("messages", {"chosen": GOOD, "rejected": [{"role": "user", "content": 3}]}, "rejected[0].content", "is a number"),
    ("messages", {"chosen": GOOD, "rejected": [{"from": "human"}]}, "rejected[0].value", "is missing"),
    (
        "messages",
        {"chosen": GOOD, "rejected": [{"role": "user", "content": [{"type": "image"}]}]},
        "rejected[0].content[0]",
        "must be a part of type text, but is image",
    ),
    ("messages", {"chosen": GOOD, "rejected": [{**CALL, "role": "user"}]}, "rejected[0].tool_calls", "assistant's"),
    ("messages", {"chosen": GOOD, "rejected": [{**CALL, "tool_calls": "f"}]}, "rejected[0].tool_calls", "is a string"),
    (
        "messages",
        {"chosen": GOOD, "rejected": [{"from": "function_call", "value": "f(x)"}]},
        "rejected[0].value",
        "JSON",
    ),
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
    ("shared_beginning", {"chosen": "a", "rejected": "b"}, "chosen", "no beginning in common"),
    ("chat", {"messages": turns("q")}, "messages", "roles out of order (user)"),
    ("chat", {"messages": "hello"}, "messages", "must begin with"),
    ("ranked", {"prompt": "q", "responses": []}, "responses", "at least one response"),
    ("ranked", {"prompt": "q", "responses": "a"}, "responses", "at least one response"),
    ("ranked", {"prompt": "q", "responses": ["a", 1]}, "responses[1]", "but is a number"),
    ("ranked", {"prompt": "q", "responses": ["a", "b"], "scores": [1.0]}, "scores", "list of 2 numbers"),
    ("ranked", {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, "x"]}, "scores[1]", "is a string (x)"),
    (
        "ranked",
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, float("nan")]},
        "scores[1]",
        "must be a number",
    ),
    ("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}, "labels", "must be 1 or 0, but is"),
    ("nectar", {"prompt": "q", "answers": ["a"]}, "answers[0]", "must be an object with 'answer' and 'rank'"),
    ("nectar", {"prompt": "q", "answers": [{"answer": "a"}]}, "answers[0].rank", "must be a number, but is missing"),
    ("tldr_comparison", {"info": INFO, "summaries": [], "choice": 0}, "summaries", "list of two summaries"),
    ("tldr_comparison", {"info": None, "summaries": [{}, {}], "choice": 0}, "info", "must be an object"),
    (
        "alpaca_eval",
        {"instruction": "q", "output_1": "a", "output_2": "b", "preference": 3},
        "preference",
        "must be from 1 to 2, or 0 for a tie, but is 3",
    ),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 0.5}, "label", "must be True or False, but is a number"),
    (
        "rejected_response",
        {"messages": turns("q"), "rejected_response": "b"},
        "messages",
        "must end with the assistant",
    ),
    ("output_pair", {"instruction": "q", "output": ["a"]}, "output", "must be a list of two answers"),
]


@pytest.mark.parametrize(("format", "record", "key", "problem"), MALFORMED)
def test_malformed_record_names_key_and_problem(format, record, key, problem):
    with pytest.raises(RecordError) as caught:
        read(record, format=format)
    assert caught.value.key == key
    assert problem in caught.value.problem


def test_a_prompt_may_hold_the_answer_as_well():
    for prompt in ({"messages": turns("q", "good")}, {"conversations": sharegpt(turns("q", "good"))}):
        for chosen, rejected in (("good", "bad"), (ANSWER, OTHER), (ANSWER[0], OTHER[0])):
            assert read({**prompt, "chosen": chosen, "rejected": rejected})[1].conversations == EXPECTED


def test_a_rejected_response_takes_the_place_of_what_follows_the_last_result():
    begun = [*turns("q"), CALL, {"role": "tool", "content": "r"}]
    conversations = read({"messages": [*begun, *ANSWER], "rejected_response": "bad"})[1].conversations
    assert conversations == [[*begun, *ANSWER], [*begun, *OTHER]]


def test_what_only_later_records_have_is_not_passed_over():
    record = {"prompt": "q", "chosen": "It is Oslo.", "rejected": "It is Bergen."}
    comparison = read(record, format="shared_beginning")[1]
    assert comparison.conversations == [turns("q", "It is Oslo."), turns("q", "It is Bergen.")]
    for name, value in (("rejected_response", "bad"), ("label", False)):
        with pytest.raises(RecordError, match="is beside messages in this record but not in the first ones"):
            read({"messages": turns("q", "good"), name: value}, format="chat")
        columns = {name: None}
        assert read({"messages": turns("q", "good"), name: value}, columns, "chat")[1].conversations == EXPECTED[:1]
        with pytest.raises(RecordError, match="is beside completion in this record but not in the first ones"):
            read({"prompt": "q", "completion": "good", name: value}, format="completion")


def test_empty_columns_do_not_hide_full_ones():
    record = {"prompt": "", "question": "q", "system": "", "system_prompt": "s", "history": ""}
    comparison = read({**record, "chosen": "good", "rejected": "bad"})[1]
    assert comparison.conversations[0] == turns("q", "good", system="s")


@pytest.mark.parametrize("value", [["hm"], 5])
def test_thoughts_that_are_no_text_are_refused(value):
    answer = [{"role": "assistant", "content": "a", "reasoning_content": value}]
    with pytest.raises(RecordError) as caught:
        read({"prompt": "q", "chosen": answer, "rejected": "b"})
    assert caught.value.key == "chosen[0].reasoning_content"
