"""Prompts are cut before answers: against older TRL's rule written out on the tokens of prompt and answer."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.forms import FORMS
from prefix_sharing.datasets.tokenizing import PreferenceOptions, TokenizeRecord
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer
from records import write

TEXT = tokenizer()
WORDS = ["red", "boat", "bread", "we", "found", "butter"]


def line_of(record, **options):
    form = FORMS["messages" if isinstance(record["chosen"], list) else "text"]
    return TokenizeRecord(TEXT, form, PreferenceOptions(**options), is_json=False)(record, 0)


def by_older_trl(line, prompt, max_prompt_length, max_seq_len):
    """Token ids of each response: a prompt beyond the limit keeps its end, then answers keep their beginning."""
    answers = [tokens[prompt:] for tokens in line["tokens"]]
    kept = line["tokens"][0][:prompt]
    if prompt + max(map(len, answers)) > max_seq_len:
        kept = kept[-max_prompt_length:]
    return [(kept + answer)[:max_seq_len] for answer in answers]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_tokens_are_those_of_older_trl(data):
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).map(" ".join)
    record = {"prompt": data.draw(words), "chosen": data.draw(words), "rejected": data.draw(words)}
    whole = line_of(record)
    if whole["dropped"]:
        return
    prompt = whole["scored"][0].index(True)
    max_prompt_length = data.draw(st.integers(1, 40))
    max_seq_len = max_prompt_length + data.draw(st.integers(1, 60))
    line = line_of(record, max_prompt_length=max_prompt_length, max_seq_len=max_seq_len)
    expected = by_older_trl(whole, prompt, max_prompt_length, max_seq_len)
    is_cut = whole["longest"] > max_seq_len and prompt > max_prompt_length
    if line["dropped"]:
        assert line["dropped"] in ("identical up to max_seq_len", "nothing scored up to max_seq_len")
        return
    assert line["tokens"] == expected
    assert line["prompt_cut"] == is_cut
    kept = min(prompt, max_prompt_length) if is_cut else prompt
    assert [flags.index(True) for flags in line["scored"]] == [kept, kept]
    beyond = sum(kept + len(tokens) - prompt > max_seq_len for tokens in whole["tokens"])
    assert line["num_cut"] == beyond


def test_nothing_of_an_answer_is_cut_where_another_prompt_is_longer():
    def turns(*contents):
        roles = ["user", "assistant"] * 2
        return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]

    record = {"chosen": turns("boat", "bread " * 30), "rejected": turns("boat", "we", "found " * 20, "butter")}
    whole = line_of(record, masking_strategy="train_on_last")
    shorter = min(flags.index(True) for flags in whole["scored"])
    line = line_of(record, max_prompt_length=1, max_seq_len=40, masking_strategy="train_on_last")
    assert line["tokens"] == [tokens[shorter:][:40] for tokens in whole["tokens"]]


def test_earlier_turns_belong_to_the_prompt():
    def turns(*contents):
        roles = ["user", "assistant"] * 2
        return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]

    record = {
        "chosen": turns("red boat", "bread", "we", "butter"),
        "rejected": turns("red boat", "bread", "we", "boat"),
    }
    whole, last = line_of(record), line_of(record, masking_strategy="train_on_last")
    prompt = last["scored"][0].index(True)
    line = line_of(record, max_prompt_length=4, max_seq_len=whole["longest"] - 1)
    assert line["tokens"] == [tokens[prompt - 4 :] for tokens in whole["tokens"]]
    assert line["scored"] == [flags[prompt - 4 :] for flags in whole["scored"]]


def test_what_is_cut_is_counted_and_what_is_still_too_long_may_be_dropped(tmp_path):
    pairs = [
        {"prompt": "red boat " * n, "chosen": "bread " * m, "rejected": "we"} for n, m in ((9, 1), (1, 1), (9, 30))
    ]
    file = write(tmp_path / "a.jsonl", pairs)
    keys = {"max_prompt_length": 8, "max_seq_len": 24}
    cut = prefix_preference_dataset(TEXT, data_files=file, **keys)
    assert (len(cut), cut.num_prompts_cut, cut.num_cut, cut.longest) == (3, 2, 1, 24)
    assert "2 prompts lost their beginning to max_prompt_length" in repr(cut)
    dropped = prefix_preference_dataset(TEXT, data_files=file, **keys, truncation="drop")
    assert dropped.dropped == {"longer than max_seq_len": 1}
    assert dropped.num_prompts_cut == 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_prompt_length": 8}, "max_prompt_length': not used without max_seq_len"),
        ({"max_prompt_length": 8, "max_seq_len": 8}, "max_prompt_length': must be less than max_seq_len, 8"),
        ({"max_prompt_length": 0, "max_seq_len": 8}, "max_prompt_length': must be at least 1"),
        ({"max_prompt_length": 4, "max_seq_len": 8, "truncation": "keep_end"}, "max_prompt_length': not used with"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(tmp_path, keys, message):
    file = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "B"}])
    with pytest.raises(UserError, match=message):
        prefix_preference_dataset(TEXT, data_files=file, **keys)
