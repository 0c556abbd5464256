"""What is done to data of single answers for supervised fine-tuning: masks, empty system turns, splits at turns."""

import json
import logging
import shutil

import numpy as np
import pytest

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.tokenizers import hf_chat_tokenizer

TOKENIZER = tokenizer()


def build(directory, records, name="chats.jsonl", **kwargs):
    file = directory / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return prefix_preference_dataset(kwargs.pop("tokenizer", TOKENIZER), data_files=str(file), **kwargs)


def chat(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return ([] if system is None else [{"role": "system", "content": system}]) + turns


def text_of(dataset, i):
    return TOKENIZER.decode(dataset[i][0].tokens.tolist(), skip_special_tokens=False)


def scored_text(dataset, i):
    response = dataset[i][0]
    return TOKENIZER.decode(response.tokens[response.scored].tolist())


def test_the_best_answer_alone_is_a_conversation_whatever_the_form(tmp_path):
    records = {
        "text": [{"prompt": "Q", "chosen": "good", "rejected": "bad"}],
        "ranked": [{"prompt": "Q", "responses": ["bad", "good", "worse"], "scores": [2, 3, 1]}],
        "tied": [{"prompt": "Q", "responses": ["good", "bad"], "scores": [1, 1]}],
        "by_prompt": [
            {"prompt": "Q", "response": text, "helpfulness": score} for text, score in (("bad", 1), ("good", 4))
        ],
    }
    expected = build(tmp_path, [{"messages": chat("Q", "good")}])[0][0]
    for name, of_form in records.items():
        dataset = build(tmp_path, of_form, f"{name}.jsonl", pairs="best_only")
        assert (len(dataset), dataset.num_responses, dataset.num_pairs.tolist()) == (1, 1, [0])
        assert dataset[0][0].tokens.tolist() == expected.tokens.tolist()
        assert dataset[0][0].scored.tolist() == expected.scored.tolist()


def test_examples_that_are_mostly_masked_are_dropped_and_counted(tmp_path):
    rng = np.random.default_rng(0)
    records = [{"messages": chat("word " * rng.integers(1, 80), "answer " * rng.integers(1, 6))} for _ in range(40)]
    whole = build(tmp_path, records)
    masked = np.array([1 - whole[i][0].scored.mean() for i in range(40)])
    assert 5 < (masked > 0.9).sum() < 35
    dataset = build(tmp_path, records, max_masked=0.9)
    assert dataset.record_index.tolist() == np.flatnonzero(masked <= 0.9).tolist()
    assert dataset.dropped == {"more masked than max_masked": int((masked > 0.9).sum())}
    with pytest.raises(UserError, match=r"'max_masked': must be a share above 0, at most 1, not 90"):
        build(tmp_path, records, max_masked=90)


def test_empty_system_turns_are_drawn_by_the_prompt(tmp_path):
    records = [{"messages": chat(f"Question {i}", "A", system="S" if i % 10 == 0 else None)} for i in range(300)]
    plain, drawn = build(tmp_path, records), build(tmp_path, records, empty_system_prob=0.1)
    every = build(tmp_path, records, empty_system_prob=1.0)
    with_turn = [plain.ids[i] != drawn.ids[i] for i in range(300)]
    assert not any(with_turn[::10])  # they have one of their own
    assert abs(sum(with_turn) - 27) < 4 * np.sqrt(270 * 0.1 * 0.9)
    assert all(drawn.ids[i] == every.ids[i] for i in range(300) if with_turn[i])
    first = with_turn.index(True)
    by_hand = build(tmp_path, [{"messages": chat(f"Question {first}", "A", system="")}], "by_hand.jsonl")
    assert drawn.ids[first] == by_hand.ids[0]
    # neither its place, nor the answer, nor the data set changes it; and both answers of a pair have the same prompt
    some = [i for i in range(300) if i % 10]
    pairs = [{"prompt": f"Question {i}", "chosen": "B", "rejected": "C"} for i in reversed(some)]
    dataset = build(tmp_path, pairs, "pairs.jsonl", empty_system_prob=0.1)
    beginnings = [[r.tokens.tolist()[: len(dataset[k][0].tokens) - 4] for r in dataset[k]] for k in (0, 269)]
    assert all(chosen == rejected for chosen, rejected in beginnings)
    plain_pairs = build(tmp_path, pairs, "pairs.jsonl")
    assert [plain_pairs.ids[k] != dataset.ids[k] for k in range(270)] == [with_turn[i] for i in reversed(some)]


def test_an_empty_system_turn_is_not_for_conversations_that_get_another(tmp_path):
    with pytest.raises(UserError, match="'empty_system_prob': not used with new_system_prompt"):
        build(tmp_path, [{"messages": chat("Q", "A")}], empty_system_prob=0.1, new_system_prompt="S")


def test_long_conversations_are_split_at_turns(tmp_path, caplog):
    rounds = [(f"Question {i} " + "word " * (i % 5), f"Answer {i}") for i in range(12)]
    long = chat(*(text for both in rounds for text in both), system="Be brief.")
    records = [{"messages": chat("Q", "A"), "id": 7}, {"messages": long, "id": 8}, {"messages": chat("R", "B")}]
    with caplog.at_level(logging.INFO, "prefix_sharing"):
        dataset = build(tmp_path, records, truncation="split_turns", max_seq_len=80)
    assert "1 of 3 conversations, longer than max_seq_len, are split at turns into" in caplog.text
    assert "not used: column id" in caplog.text
    parts = range(1, len(dataset) - 1)
    assert len(parts) > 2
    assert dataset.longest <= 80
    assert dataset.num_cut == 0
    # all of it is there once, in order, each part by itself what the conversation of its turns is
    assert "".join(scored_text(dataset, i) for i in parts) == "".join(answer for _, answer in rounds)
    first = 0
    for i in parts:
        number = text_of(dataset, i).count("Answer")
        turns = chat(*(text for both in rounds[first : first + number] for text in both), system="Be brief.")
        by_hand = build(tmp_path, [{"messages": turns}], f"{i}.jsonl")
        assert dataset.ids[i] == by_hand.ids[0]
        if first + number < len(rounds):  # one more round would have been too long
            more = chat(*(text for both in rounds[first : first + number + 1] for text in both), system="Be brief.")
            assert build(tmp_path, [{"messages": more}], f"{i}_more.jsonl").longest > 80
        first += number


def test_splitting_loses_nothing(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 25, 2 * rng.integers(1, 8)) for _ in range(60)]
    records = [
        {"messages": chat(*("why " * n if t % 2 == 0 else "so " * n for t, n in enumerate(of)))} for of in lengths
    ]
    whole = build(tmp_path, records)
    limit = int(np.median([len(whole[i][0].tokens) for i in range(60)]))
    split = build(tmp_path, records, truncation="split_turns", max_seq_len=limit, empty_system_prob=0.5)
    assert split.longest <= limit
    assert split.num_cut == 0
    assert len(split) > 80
    assert split.num_scored.sum() == whole.num_scored.sum()
    assert "".join(scored_text(split, i) for i in range(len(split))) == "".join(
        scored_text(whole, i) for i in range(60)
    )


def test_a_template_without_a_place_for_a_system_turn_is_named(tmp_path):
    shutil.copytree(TOKENIZER_DIR, tmp_path / "tokenizer")
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = refusing + "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="System role not supported; the system turn comes from empty_system_prob"):
        build(
            tmp_path,
            [{"messages": chat("Q", "A")}],
            tokenizer=hf_chat_tokenizer(str(tmp_path / "tokenizer")),
            empty_system_prob=1.0,
        )


@pytest.mark.parametrize(
    ("records", "keys", "match"),
    [
        ([{"prompt": "Q", "chosen": "A", "rejected": "B"}], {}, "'truncation': split_turns is for conversations"),
        ([{"messages": chat("Q", "A")}], {"masking_strategy": "train_on_last"}, "'masking_strategy': train_on_last"),
        ([{"messages": chat("Q", "A")}], {"record_fn": "copy.copy"}, "'record_fn': not used with truncation"),
        ([{"messages": chat("Q", "A")}], {"filter_fn": "copy.copy"}, "'filter_fn': not used with truncation"),
    ],
)
def test_what_does_not_go_with_splitting_is_refused(tmp_path, records, keys, match):
    with pytest.raises(UserError, match=match):
        build(tmp_path, records, truncation="split_turns", max_seq_len=80, **keys)


def test_a_malformed_conversation_is_named_by_its_place_before_the_split(tmp_path):
    long = chat(*["word " * 20] * 12)
    with pytest.raises(UserError, match=r"chats.jsonl, record 1 \(line 2\): messages\[0\] has no 'role'"):
        build(
            tmp_path, [{"messages": long}, {"messages": [{"content": "Q"}]}], truncation="split_turns", max_seq_len=80
        )
