"""Prompts of any data: once each, by the chat template, up to where an answer begins."""

import json

import pytest

from prefix_sharing.errors import UserError
from prefix_sharing.online import prompt_dataset
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.tokenizers import decode_all


def read(tmp_path, *records, **kwargs):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return prompt_dataset(tokenizer(), data_files=str(file), **kwargs)


def test_prompts_are_found_in_records_of_every_kind(tmp_path):
    question = {"role": "user", "content": "Why?"}
    records = [
        {"prompt": "Why?"},
        {"messages": [question]},
        {"prompt": [question], "chosen": "Because.", "rejected": "No."},
        {
            "chosen": [question, {"role": "assistant", "content": "A"}],
            "rejected": [question, {"role": "assistant", "content": "B"}],
        },
        {"chosen": "\n\nHuman: Why?\n\nAssistant: A", "rejected": "\n\nHuman: Why?\n\nAssistant: B"},
        {"messages": [question, {"role": "assistant", "content": "Because."}]},
    ]
    for record in records:
        (prompt,) = read(tmp_path, record)
        assert prompt.turns == (question,)
        text = decode_all(tokenizer(), prompt.tokens)
        assert "Why?" in text
        assert text.rstrip().endswith("<|im_start|>assistant") or "assistant" in text[-20:]


def test_each_is_there_once_and_none_is_too_long(tmp_path, caplog):
    with caplog.at_level("INFO", logger="prefix_sharing"):
        found = read(
            tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "long " * 50}, max_prompt_len=30
        )
    assert [prompt.turns[0]["content"] for prompt in found] == ["a", "b"]
    assert "2 prompts, 2 left out (there already: 1, too long: 1)" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": 3}, r"record 0 \(line 1\): 'prompt' must be a string"),
        ({"text": "x"}, r"record 0 \(line 1\): its columns text match no known form"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, record)


def test_no_prompt_left_is_an_error(tmp_path):
    with pytest.raises(UserError, match="has no usable prompt"):
        read(tmp_path, {"prompt": "long " * 50}, max_prompt_len=3)
