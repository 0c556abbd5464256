"""Records drawn from a grammar of the forms, with noise: used as transformers renders them, dropped, or refused.

Nothing else: no traceback, and nothing lost.
"""

import copy
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.forms import FORMS, recognize_form
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer as small_tokenizer
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR

LOOKING_LIKE_SOMETHING_ELSE = (
    "42",
    "true",
    "null",
    '"Ja"',
    '{"a": 1}',
    "[]",
    "2024-05-17",
    " \n",
    "naïve 🦊",
    "a\u2028b",
)
texts = st.one_of(st.sampled_from(LOOKING_LIKE_SOMETHING_ELSE), st.text(max_size=12))
words = st.text(alphabet="abc 1.\n", min_size=1, max_size=12).filter(str.strip)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def sharegpt(turns):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@st.composite
def prompts(draw, *, rounds=2, content=texts):
    """A system turn, earlier rounds and a question."""
    turns = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, rounds))):
        turns += [user(draw(content)), assistant(draw(content))]
    return [*turns, user(draw(content))]


def expected(prompt, *answers):
    return [[*prompt, assistant(answer)] for answer in answers]


@st.composite
def messages_records(draw):
    prompt, chosen, rejected = draw(prompts()), draw(texts), draw(texts)
    record = {}
    style = draw(st.sampled_from(["whole", "prompt", "last", "conversations", "string"]))
    answers = [[assistant(chosen)], [assistant(rejected)]]
    if style == "whole":
        answers = [[*prompt, *answer] for answer in answers]
    elif style == "prompt":
        record["prompt"] = prompt
    elif style == "last":  # each answer repeats the question
        record["prompt"] = prompt
        answers = [[prompt[-1], *answer] for answer in answers]
    elif style == "conversations":
        record["conversations"] = sharegpt(prompt)
        answers = [sharegpt(answer)[0] for answer in answers]
    else:
        prompt = prompt[-1:]
        record["prompt"] = prompt[0]["content"]
    record |= {"chosen": answers[0], "rejected": answers[1]}
    return record, expected(prompt, chosen, rejected)


@st.composite
def text_records(draw):
    prompt, chosen, rejected = draw(prompts(rounds=0)), draw(texts), draw(texts)
    question, system = prompt[-1]["content"], prompt[0]["content"] if len(prompt) > 1 else None
    name = draw(st.sampled_from(["prompt", "question", "instruction", "query"]))
    record = {name: question, "chosen": chosen, "rejected": rejected}
    if system:
        record[draw(st.sampled_from(["system", "system_prompt"]))] = system
    if not system:
        prompt = prompt[-1:]
    if name == "instruction" and question and draw(st.booleans()):
        record["input"] = draw(words)
        prompt[-1] = user(f"{question}\n{record['input']}")
    return record, expected(prompt, chosen, rejected)


@st.composite
def hh_records(draw):
    question, chosen, rejected = draw(words), draw(texts), draw(texts)
    record = {
        "chosen": f"\n\nHuman: {question}\n\nAssistant: {chosen}",
        "rejected": f"\n\nHuman: {question}\n\nAssistant: {rejected}",
    }
    return record, expected([user(question.strip())], chosen.strip(), rejected.strip())


@st.composite
def shared_beginning_records(draw):
    prompt, chosen, rejected = draw(words), " x" + draw(words), " y" + draw(words)
    prompt = prompt.rstrip(" ")
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}, expected([user(prompt)], chosen, rejected)


@st.composite
def ranked_records(draw):
    prompt = draw(prompts())
    answers = draw(st.lists(texts, min_size=1, max_size=4))
    record = {"prompt": prompt, "responses": answers}
    order = list(range(len(answers)))
    if draw(st.booleans()):
        record["scores"] = draw(st.permutations(range(len(answers))))
        order.sort(key=lambda i: -record["scores"][i])
    return record, expected(prompt, *(answers[i] for i in order))


@st.composite
def rejected_response_records(draw):
    prompt, chosen, rejected = draw(prompts()), draw(texts), draw(texts)
    record = {"messages": [*prompt, assistant(chosen)]}
    if draw(st.booleans()):
        record["rejected_response"] = rejected
    else:
        record["rejected_messages"] = [*prompt, assistant(rejected)]
    return record, expected(prompt, chosen, rejected)


def two_answers(name, question, names, verdict, *, is_text=True):
    """A form of two answers to a question, with an annotator's verdict."""

    @st.composite
    def records(draw):
        asked, first, second = draw(texts), draw(texts), draw(texts)
        field, value, second_is_better = verdict(draw(st.booleans()))
        record = {question: asked if is_text else [user(asked)], names[0]: first, names[1]: second, field: value}
        answers = (second, first) if second_is_better else (first, second)
        return record, expected([user(asked)], *answers)

    return name, records


@st.composite
def tldr_records(draw):
    title, post, first, second, choice = draw(texts), draw(texts), draw(texts), draw(texts), draw(st.integers(0, 1))
    info = {"title": title, "post": post, "subreddit": "s", "article": None}
    record = {"info": info, "summaries": [{"text": first}, {"text": second}], "choice": choice}
    prompt = [user(f"SUBREDDIT: r/s\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:")]
    return record, expected(prompt, *((first, second) if choice == 0 else (second, first)))


@st.composite
def nectar_records(draw):
    question, answers = draw(words), draw(st.lists(texts, min_size=2, max_size=4))
    ranks = draw(st.permutations(range(1, len(answers) + 1)))
    record = {
        "prompt": f"\n\nHuman: {question}\n\nAssistant: ",
        "answers": [{"answer": answer, "rank": float(rank)} for answer, rank in zip(answers, ranks, strict=True)],
    }
    order = sorted(range(len(answers)), key=lambda i: ranks[i])
    return record, expected([user(question.strip())], *(answers[i] for i in order))


@st.composite
def steps_records(draw):
    question, steps, chosen, rejected = draw(texts), draw(words), draw(texts), draw(texts)
    record = {"prompt": question, "initial_reason_steps": steps, "chosen": chosen, "rejected": rejected}
    return record, expected([user(question)], steps + chosen, steps + rejected)


@st.composite
def output_pair_records(draw):
    question, chosen, rejected = draw(texts), draw(texts), draw(texts)
    return {"instruction": question, "input": "", "output": [chosen, rejected]}, expected(
        [user(question)], chosen, rejected
    )


@st.composite
def chat_records(draw):
    prompt, answer = draw(prompts()), draw(texts)
    turns = [*prompt, assistant(answer)]
    return draw(st.sampled_from([{"messages": turns}, {"conversations": sharegpt(turns)}])), [turns]


@st.composite
def completion_records(draw):
    prompt, answer = draw(prompts()), draw(texts)
    name = draw(st.sampled_from(["completion", "response", "output"]))
    return {"prompt": prompt, name: answer}, [[*prompt, assistant(answer)]]


@st.composite
def unpaired_records(draw):
    prompt, answer, label = draw(prompts()), draw(texts), draw(st.booleans())
    turns = [*prompt, assistant(answer)]
    record = draw(st.sampled_from([{"messages": turns}, {"prompt": prompt, "completion": answer}]))
    return {**record, "label": label}, [turns]


GRAMMAR = dict(
    [
        ("messages", messages_records),
        ("text", text_records),
        ("hh", hh_records),
        ("shared_beginning", shared_beginning_records),
        ("ranked", ranked_records),
        ("rejected_response", rejected_response_records),
        ("tldr_comparison", tldr_records),
        ("nectar", nectar_records),
        ("steps", steps_records),
        ("output_pair", output_pair_records),
        ("chat", chat_records),
        ("completion", completion_records),
        ("unpaired", unpaired_records),
        two_answers("shp", "history", ("human_ref_A", "human_ref_B"), lambda b: ("labels", 0 if b else 1, b)),
        two_answers("safe_rlhf", "prompt", ("response_0", "response_1"), lambda b: ("better_response_id", int(b), b)),
        two_answers(
            "helpsteer2_preference",
            "prompt",
            ("response_1", "response_2"),
            lambda b: ("preference_strength", 2 if b else -1, b),
        ),
        two_answers(
            "helpsteer3",
            "context",
            ("response1", "response2"),
            lambda b: ("overall_preference", 1 if b else -3, b),
            is_text=False,
        ),
        two_answers(
            "alpaca_eval", "instruction", ("output_1", "output_2"), lambda b: ("preference", 1.8 if b else 1, b)
        ),
    ]
)

DEEP = json.loads("[" * 60 + "]" * 60)
JUNK = st.sampled_from([None, "", " ", [], {}, 5, True, float("nan"), DEEP, {"role": "user"}, "\ud83d", ["x"]])

MORE_COLUMNS = ("id", "tools", "system", "history", "score", "chat_template_kwargs")


@st.composite
def noisy(draw, records):
    """A record with something wrong in it, or something more."""
    record = copy.deepcopy(draw(records)[0])
    key = draw(st.sampled_from(sorted(record)))
    what = draw(st.sampled_from(["replace", "delete", "extra", "inside", "text"]))
    if what == "replace":
        record[key] = draw(JUNK)
    elif what == "delete":
        del record[key]
    elif what == "extra":
        record[draw(st.sampled_from(["id", "tools", "system", "history", "score", "chat_template_kwargs"]))] = draw(
            JUNK
        )
    elif what == "inside" and isinstance(record[key], list) and record[key]:
        message = record[key][-1]
        if isinstance(message, dict):
            message[draw(st.sampled_from([*sorted(message), "tool_calls", "weight"]))] = draw(JUNK)
        else:
            record[key][-1] = draw(JUNK)
    elif what == "text":
        return draw(st.sampled_from(['{"prompt": ', "[]", "hello", '{"a": 1, "a": 2}', "5"]))
    return record


@st.composite
def data_sets(draw):
    name = draw(st.sampled_from(sorted(GRAMMAR)))
    clean = GRAMMAR[name]()
    lines = draw(st.lists(st.one_of(clean, clean, noisy(clean)), min_size=1, max_size=10))
    return name, lines


def their_tokens(theirs, conversation):
    return theirs.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"]


@pytest.fixture
def theirs():
    """The same tokenizer, by transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(TOKENIZER_DIR)


REASONS = {
    "empty response",
    "identical responses",
    "identical after reading",
    "identical after the chat template",
    "tied scores",
    "malformed",
}


def test_the_grammar_is_of_every_form_that_reads_a_record_by_itself():
    assert set(GRAMMAR) == {name for name, form in FORMS.items() if not form.by_prompt}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=data_sets())
def test_what_a_record_holds_is_used_dropped_or_refused(tmp_path, theirs, data):
    name, lines = data
    file = tmp_path / "records.jsonl"
    records = [line[0] if isinstance(line, tuple) else line for line in lines]
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))

    def build(**kwargs):
        return prefix_preference_dataset(small_tokenizer(), source="json", data_files=str(file), **kwargs)

    try:
        dataset = build(on_malformed="drop", max_malformed=1.0)
    except UserError as error:  # nothing that can be used
        said = str(error)
    else:
        said = ""
    if said:
        event("refused")
        assert "\n" not in said
        assert str(file) in said
        return
    dropped = np.asarray(dataset.tokenized["dropped"], dtype=object)
    assert len(dataset) + sum(dataset.dropped.values()) == len(records)
    assert set(dataset.dropped) <= REASONS
    for reason in dataset.dropped:
        event(reason)

    malformed = np.flatnonzero(dropped == "malformed")
    if len(malformed):
        with pytest.raises(
            UserError, match=rf"records.jsonl, record {malformed[0]} \(line {malformed[0] + 1}\): "
        ) as caught:
            build()
        assert "\n" not in str(caught.value)

    parsed = [r for r in records if isinstance(r, dict)]
    as_generated = recognize_form(parsed, {}, "here")[0].name == name
    example_of = {record: example for example, record in enumerate(dataset.record_index.tolist())}
    for index, line in enumerate(lines):
        if not isinstance(line, tuple) or not as_generated:
            continue
        conversations = line[1]
        tokens = [their_tokens(theirs, conversation) for conversation in conversations]
        if index in example_of:
            found = [response.tokens.tolist() for response in dataset[example_of[index]]]
            assert all(ids in tokens for ids in found)
            assert found[0] == tokens[0]
            assert len(found) == 1 if len(tokens) == 1 else len(found) > 1
            event("used as it was generated")
        elif dropped[index] == "empty response":
            assert any(not answer["content"].strip() for (*_, answer) in conversations) or name == "steps"
        else:
            assert dropped[index].startswith("identical")
            assert all(ids == tokens[0] for ids in tokens)
