"""The data set builder: labels as torchtune's, truncation, drops counted by reason, errors that name the record."""

import gzip
import importlib
import json
import linecache
import os
import shutil
import sys

import datasets
import numpy as np
import pytest
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import preference_dataset
from torchtune.models.llama2 import llama2_tokenizer
from torchtune.models.llama3 import llama3_tokenizer

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.errors import UserError
from prefix_sharing.quickstart import tokenizer as small_tokenizer
from prefix_sharing.quickstart.checkpointer import TOKENIZER_DIR
from prefix_sharing.tokenizers import hf_chat_tokenizer


@pytest.fixture
def write(tmp_path):
    def write_records(records, name="pairs.jsonl"):
        file = tmp_path / name
        text = "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
        if name.endswith(".gz"):
            file.write_bytes(gzip.compress(text.encode()))
        else:
            file.write_text(text)
        return str(file)

    return write_records


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def build(data_files, **kwargs):
    return prefix_preference_dataset(
        kwargs.pop("tokenizer", small_tokenizer()), source="json", data_files=data_files, **kwargs
    )


def turns(*contents):
    return [
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * len(contents), contents, strict=False)
    ]


def chat_tokenizer(tmp_path, template):
    directory = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER_DIR, directory)
    (directory / "chat_template.jinja").write_text(template)
    return hf_chat_tokenizer(str(directory))


def scored_text(response, tokenizer):
    return tokenizer.decode(response.tokens[response.scored].tolist(), skip_special_tokens=False)


MULTI_TURN = {
    "chosen": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What did we find?"},
        {"role": "assistant", "content": "bread"},
        {"role": "user", "content": "What else?"},
        {"role": "assistant", "content": "butter"},
    ],
    "rejected": [
        {"role": "user", "content": "What did we find?"},
        {"role": "assistant", "content": "a boat"},
    ],
}


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    import sentencepiece

    directory = tmp_path_factory.mktemp("sentencepiece")
    corpus = directory / "corpus.txt"
    corpus.write_text(
        "What did we find? bread butter a boat What else? Be brief. [INST] [/INST] <<SYS>> <</SYS>>\n" * 50
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(directory / "m"),
        vocab_size=64,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        character_coverage=1.0,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(directory / "m.model")


@pytest.fixture(scope="module")
def tiktoken_file(tmp_path_factory):
    import base64

    file = tmp_path_factory.mktemp("tiktoken") / "bytes.tiktoken"
    file.write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    return str(file)


@pytest.mark.parametrize("train_on_input", [False, True])
@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_tokens_and_labels_are_torchtunes(write, sentencepiece_file, tiktoken_file, family, train_on_input):
    tokenizer = llama2_tokenizer(sentencepiece_file) if family == "llama2" else llama3_tokenizer(tiktoken_file)
    file = write([MULTI_TURN])
    theirs = preference_dataset(tokenizer, source="json", data_files=file, train_on_input=train_on_input)[0]
    for response, name in zip(
        build(file, tokenizer=tokenizer, train_on_input=train_on_input)[0], ("chosen", "rejected"), strict=True
    ):
        assert response.tokens.tolist() == theirs[f"{name}_input_ids"]
        labels = np.where(response.scored, response.tokens, CROSS_ENTROPY_IGNORE_IDX)
        assert labels.tolist() == theirs[f"{name}_labels"]


def test_masking_strategies(write):
    file, tokenizer = write([MULTI_TURN]), small_tokenizer()
    scored = {
        strategy: scored_text(build(file, masking_strategy=strategy)[0][0], tokenizer)
        for strategy in ("train_on_assistant", "train_on_last", "train_on_all")
    }
    assert scored == {
        "train_on_assistant": "bread<|end|>butter<|end|>",
        "train_on_last": "butter<|end|>",
        "train_on_all": "Be brief.<|end|>What did we find?<|end|>bread<|end|>What else?<|end|>butter<|end|>",
    }
    assert scored_text(build(file)[0][0], tokenizer) == scored["train_on_assistant"]
    assert scored_text(build(file, train_on_input=True)[0][0], tokenizer) == scored["train_on_all"]


def test_new_system_prompt_replaces_the_records_own_and_is_not_scored(write):
    tokenizer = small_tokenizer()
    for response in build(write([MULTI_TURN]), new_system_prompt="Say yes.", train_on_input=True)[0]:
        text = tokenizer.decode(response.tokens.tolist(), skip_special_tokens=False)
        assert text.startswith("<|start|>system\nSay yes.<|end|><|start|>user\n")
        assert "brief" not in text
        assert "Say yes" not in scored_text(response, tokenizer)


def test_ranked_records_keep_all_responses_best_first(write):
    records = [{"prompt": "q", "responses": ["bad", "good", "fair"], "scores": [0.0, 2.0, 1.0]}]
    dataset = build(write(records))
    tokenizer = small_tokenizer()
    assert [scored_text(r, tokenizer) for r in dataset[0]] == ["good<|end|>", "fair<|end|>", "bad<|end|>"]
    assert dataset.num_responses == 3
    assert dataset.num_responses_of.tolist() == [3]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_files_of_every_kind(write, tmp_path, name):
    records = [pair("q", "good", "bad"), pair("p", "yes", "no")]
    if name.endswith("parquet"):
        file = str(tmp_path / name)
        datasets.Dataset.from_list(records).to_parquet(file)
        dataset = prefix_preference_dataset(small_tokenizer(), source="parquet", data_files=file)
    else:
        dataset = build(write([json.dumps(records)] if name.endswith("json") else records, name))
    assert len(dataset) == 2


def test_keep_start_cuts_each_response_and_writes_nothing_over_the_cut(write):
    file = write([pair("What did we find?", "bread butter oven salt", "boat anchor sail rope wave gull")])
    whole = build(file)[0]
    cut = build(file, max_seq_len=14)[0]
    for a, b in zip(whole, cut, strict=True):
        assert b.tokens.tolist() == a.tokens[:14].tolist()
        assert b.scored.tolist() == a.scored[:14].tolist()


def test_the_tokenizers_max_seq_len_is_the_limit_unless_the_data_set_has_its_own(write):
    file = write([pair("What did we find?", "bread butter oven salt", "boat anchor sail rope wave gull")])
    assert [len(r.tokens) for r in build(file, tokenizer=small_tokenizer(max_seq_len=14))[0]] == [14, 14]
    assert [len(r.tokens) for r in build(file, tokenizer=small_tokenizer(max_seq_len=14), max_seq_len=15)[0]] == [
        15,
        15,
    ]


def test_keep_end_cuts_the_same_tokens_from_every_response(write):
    file = write([pair("What did we find there?", "bread butter oven salt", "boat anchor")])
    whole = build(file)[0]
    limit = len(whole[0].tokens) - 4
    cut = build(file, max_seq_len=limit, truncation="keep_end")[0]
    for a, b in zip(whole, cut, strict=True):
        assert b.tokens.tolist() == a.tokens[4:].tolist()
        assert b.scored.tolist() == a.scored[4:].tolist()


def test_every_drop_is_counted_by_reason(write):
    records = [
        pair("q", "good", "bad"),
        pair("q", "same", "same"),
        pair("q", "", "bad"),
        pair("q", "good", " \n"),
        pair("a long prompt " * 20, "good", "bad"),
        pair("q", "bread " * 20 + "good", "bread " * 20 + "bad"),
    ]
    dataset = build(write(records), max_seq_len=20)
    assert dataset.dropped == {
        "empty response": 2,
        "identical responses": 1,
        "identical up to max_seq_len": 1,
        "nothing scored up to max_seq_len": 1,
    }
    assert dataset.num_records == 6 == len(dataset) + sum(dataset.dropped.values())
    assert repr(dataset).endswith(
        "6 records = 1 used + 5 dropped (empty response: 2, identical responses: 1, identical up to max_seq_len: 1, "
        "nothing scored up to max_seq_len: 1)"
    )
    dropping = build(write(records), max_seq_len=20, truncation="drop")
    assert dropping.dropped == {"empty response": 2, "identical responses": 1, "longer than max_seq_len": 2}


def test_identical_answers_are_told_apart_by_where_they_became_so(write, tmp_path):
    cut = pair("q", "bread " * 20 + "good", "bread " * 20 + "bad")
    records = [
        pair("q", "same", "same"),
        {"prompt": "q", "chosen": turns("q", "same")[1:], "rejected": "same"},
        {"prompt": "q", "chosen": turns("q", "same"), "rejected": "same"},
        pair("q", "<think>hm</think>same", "<think>ah</think>same"),
        cut,
        pair("q", "a", "b"),
    ]
    template = """{% for m in messages %}<|start|>{{ m.role }}
{{ m.content.split("</think>")[-1] }}<|end|>{% endfor %}"""
    dataset = build(write(records), tokenizer=chat_tokenizer(tmp_path, template), max_seq_len=20)
    assert dataset.dropped == {
        "identical after reading": 1,
        "identical after the chat template": 1,
        "identical responses": 2,
        "identical up to max_seq_len": 1,
    }


def test_answers_that_lost_their_end_are_counted(write):
    records = [pair("q", "good", "bad"), pair("q", "bread " * 20, "bad"), pair("q", "bread " * 20, "oven " * 20)]
    dataset = build(write(records), max_seq_len=20)
    assert dataset.num_cut == 3
    assert repr(dataset).endswith("3 used + 0 dropped; 3 of 6 responses lost their end to max_seq_len")
    assert build(write(records)).num_cut == 0
    assert build(write(records), max_seq_len=20, truncation="keep_end").num_cut == 0


@pytest.mark.parametrize("has_end", [True, False])
def test_a_template_without_an_end_of_answers_is_warned_of_once(write, tmp_path, caplog, has_end):
    end = "{% if messages|length < 99 %}<|end|>{% endif %}" if has_end else ""
    template = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}" + end + "{% endfor %}"
    records = [pair("q", "good", "bad"), pair("q", "bread", "oven")]
    dataset = build(write(records), tokenizer=chat_tokenizer(tmp_path, template))
    warnings = [r.getMessage() for r in caplog.records if "does not learn to stop" in r.getMessage()]
    assert dataset.num_without_end == (0 if has_end else 4)
    assert len(warnings) == (0 if has_end else 1)
    assert has_end or "4 of 4 responses have no token behind the answer that ends it" in warnings[0]


def test_text_that_the_template_leaves_out_is_warned_of_with_its_records(write, tmp_path, caplog):
    template = """{% for m in messages %}<|start|>{{ m.role }}
{{ m.content.split("</think>")[-1] | trim }}<|end|>{% endfor %}"""
    tokenizer = chat_tokenizer(tmp_path, template)
    build(write([pair("q", " good\n", "bad"), pair("q", "<think>ah</think>good", "bad")]), tokenizer=tokenizer)
    (warning,) = [r.getMessage() for r in caplog.records if "leaves out text" in r.getMessage()]
    assert "of the answers of 1 records, such as" in warning
    assert "record 1 (line 2)" in warning


def test_columns_and_message_keys_without_a_use_are_named_in_one_line(write, caplog):
    caplog.set_level("INFO")
    answers = [{"role": "assistant", "content": text, "weight": 1, "name": None} for text in ("a", "b")]
    records = [
        {"prompt": "q", "chosen": answers[:1], "rejected": answers[1:], "id": 7, "tags": []},
        {"prompt": "q", "chosen": "a", "rejected": "b", "id": 8},
    ]
    build(write(records))
    (line,) = [r.getMessage() for r in caplog.records if "not used" in r.getMessage()]
    assert line.endswith("not used: column id (2 records), message key weight (1 records)")


def test_answers_to_different_prompts_are_said(write, caplog):
    caplog.set_level("INFO")
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (("q", "a"), ("q", "b"), ("another", "b"))
    ]
    build(write([{"chosen": chats[0], "rejected": chats[1]}, {"chosen": chats[0], "rejected": chats[2]}]))
    (line,) = [r.getMessage() for r in caplog.records if "different prompts" in r.getMessage()]
    assert "in 1 records the answers are to different prompts, such as" in line
    assert "record 1 (line 2); only" in line


def test_what_is_given_of_an_answer_is_not_scored(write):
    records = [{"prompt": "q", "initial_reason_steps": "bread butter", "chosen": " oven", "rejected": " salt"}]
    tokenizer = small_tokenizer()
    dataset = build(write(records))
    assert [scored_text(response, tokenizer) for response in dataset[0]] == [" oven<|end|>", " salt<|end|>"]
    assert "bread butter oven" in tokenizer.decode(dataset[0][0].tokens.tolist())


def test_answers_of_one_prompt_in_several_records_are_compared(write):
    def rated(prompt, response, helpfulness):
        return {"prompt": prompt, "response": response, "helpfulness": helpfulness}

    records = [rated("q", "bad", 1), rated("q", "good", 4), rated("p", "x", 2), rated("r", "a", 3), rated("r", "b", 3)]
    dataset = build(write(records))
    assert [scored_text(r, small_tokenizer()) for r in dataset[0]] == ["good<|end|>", "bad<|end|>"]
    assert dataset.pairs(0).tolist() == [[0, 1]]
    assert dataset.dropped == {"one response to its prompt": 1, "tied scores": 2}
    assert len(dataset) + dataset.num_merged + sum(dataset.dropped.values()) == 5


def test_malformed_records_are_dropped_and_counted_up_to_a_share(write, caplog):
    records = [pair("q", "good", "bad")] * 8 + ["{", pair("q", 5, "bad")]
    with pytest.raises(UserError, match=r"record 8 \(line 9\): it is not JSON: Expecting property name"):
        build(write(records))
    dataset = build(write(records), on_malformed="drop", max_malformed=0.2)
    assert dataset.dropped == {"malformed": 2}
    assert len(dataset) == 8
    (warning,) = [r.getMessage() for r in caplog.records if "malformed" in r.getMessage()]
    assert "2 of 10 records of" in warning
    assert "record 9 (line 10): chosen must be a string" in warning
    with pytest.raises(UserError, match=r"2 of 10 .* are malformed, more than max_malformed: 0.1 allows; the first is"):
        build(write(records), on_malformed="drop")
    with pytest.raises(UserError, match="'max_malformed': must be a share from 0 to 1"):
        build(write(records), max_malformed=10)


def to_pair(record):
    return pair(record["ask"].upper(), *record["best_first"])


def test_record_fn_makes_records_of_a_known_form(write):
    file = write([{"ask": "q", "best_first": ["good", "bad"]}, {"ask": "p", "best_first": ["yes", "no"]}])
    for record_fn in (to_pair, f"{__name__}.to_pair"):
        dataset = build(file, record_fn=record_fn)
        assert scored_text(dataset[1][0], small_tokenizer()) == "yes<|end|>"
    with pytest.raises(UserError, match="'record_fn': 'nowhere.at_all' not found"):
        build(file, record_fn="nowhere.at_all")
    with pytest.raises(UserError, match=r"record 0 \(line 1\): record_fn fails with KeyError: 'ask'"):
        build(write([pair("q", "a", "b")]), record_fn=to_pair)
    with pytest.raises(UserError, match="record_fn returns a list, but must return a dict"):
        build(file, record_fn=list)


def starts_with_q(record):
    return record["prompt"].startswith("q")


def test_records_filtered_out_are_counted_too(write):
    file = write([pair("q1", "a", "b"), pair("p", "a", "b"), pair("q2", "a", "b")])
    for filter_fn in (starts_with_q, f"{__name__}.starts_with_q"):
        dataset = build(file, filter_fn=filter_fn)
        assert len(dataset) == 2
        assert dataset.dropped == {"filtered out": 1}
    with pytest.raises(UserError, match="'filter_fn': 'nowhere.at_all' not found"):
        build(file, filter_fn="nowhere.at_all")


def test_examples_stay_memory_mapped_and_the_second_start_finds_them(write):
    def cached(dataset):
        return {f["filename"]: os.stat(f["filename"]).st_mtime_ns for f in dataset._examples.cache_files}

    file = write([pair(f"What did we find, {i}?", "bread butter oven", "boat anchor sail") for i in range(3000)])
    first = cached(build(file))
    assert first
    assert cached(build(file)) == first


def test_another_template_or_mask_is_tokenized_anew(write, tmp_path):
    file = write([MULTI_TURN])
    other = tmp_path / "other"
    shutil.copytree(TOKENIZER_DIR, other)
    (other / "chat_template.jinja").write_text((other / "chat_template.jinja").read_text().replace("\\n", ": "))
    first = build(file)[0][0].tokens.tolist()
    assert build(file, tokenizer=hf_chat_tokenizer(str(other)))[0][0].tokens.tolist() != first
    assert build(file, masking_strategy="train_on_last")[0][0].scored.sum() < build(file)[0][0].scored.sum()


def test_statistics(write):
    records = [
        pair("q", "good", "bad"),
        pair("What did we find?", "bread butter oven salt", "a boat"),
        pair("q", "x", "x"),
    ]
    dataset = build(write(records))
    assert dataset.longest == max(len(r.tokens) for i in range(2) for r in dataset[i])
    assert dataset.largest_id == max(r.tokens.max() for i in range(2) for r in dataset[i])
    assert dataset.num_responses == 2


def test_malformed_record_names_file_row_and_key(write):
    records = [pair("q", "good", "bad")] * 3 + [{"prompt": "q", "rejected": "bad"}]
    with pytest.raises(
        UserError,
        match=r"pairs.jsonl, record 3 \(line 4\): chosen must be a string, .* but is missing\.$",
    ):
        build(write(records))


def test_malformed_record_is_found_behind_a_slice(write):
    records = [pair("q", "good", "bad")] * 3 + [pair("q", 7, "bad")]
    with pytest.raises(
        UserError, match=r"pairs.jsonl, record 3 \(line 4\): chosen must be a string, .* but is a number"
    ):
        build(write(records), split="train[2:]")


def test_malformed_record_is_found_in_its_file(write):
    first = write([pair("q", "good", "bad")] * 3, "first.jsonl")
    second = write([pair("q", "good", "bad"), pair("q", "good", None)], "second.jsonl")
    with pytest.raises(UserError, match=r"second.jsonl, record 1 \(line 2\): rejected"):
        build([first, second])


def test_malformed_record_is_found_by_worker_processes(write):
    records = [pair("q", "good", "bad")] * 2500 + [{"prompt": "q", "chosen": "good"}]
    with pytest.raises(UserError, match=r"record 2500 \(line 2501\): rejected must be a string"):
        build(write(records))


def test_a_conversation_the_template_refuses_is_an_error_of_its_record(write, tmp_path):
    directory = tmp_path / "refusing"
    shutil.copytree(TOKENIZER_DIR, directory)
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(
        UserError, match=r"record 0 \(line 1\): the chat template of .* refuses turns of user, assistant: no"
    ):
        build(write([pair("q", "a", "b")]), tokenizer=hf_chat_tokenizer(str(directory)))


@pytest.mark.parametrize(
    ("content", "kwargs", "message"),
    [
        (None, {}, "nowhere.jsonl cannot be loaded: Unable to find"),
        ([], {}, "pairs.jsonl is empty"),
        (['{"prompt": "q", '], {}, "pairs.jsonl cannot be read"),
        ([pair("q", "a", "b")], {"split": "test"}, "Config key 'split': 'test' of .*: Unknown split"),
        ([pair("q", "a", "b")], {"splitt": "train"}, "'splitt': unknown argument .* Did you mean 'split'"),
        ([pair("q", "a", "b")], {"max_seqlen": 5}, "Did you mean 'max_seq_len'"),
        ([pair("q", "a", "a")], {}, r"no usable example \(dropped by reason: identical responses: 1\)"),
        ([pair("q", "a", "b")], {"truncation": "middle"}, "'truncation': must be one of keep_start, keep_end, drop"),
        ([pair("q", "a", "b")], {"masking_strategy": "all"}, "'masking_strategy': must be one of train_on_assistant"),
        (
            [pair("q", "a", "b")],
            {"masking_strategy": "train_on_last", "train_on_input": True},
            "is train_on_last, but train_on_input is true",
        ),
        ([pair("q", "a", "b")], {"format": "hh"}, "chosen must begin with"),
        ([{"a": 1}], {}, r"pairs.jsonl: its columns a match no known form"),
    ],
)
def test_bad_input_is_one_sentence(write, tmp_path, content, kwargs, message):
    file = str(tmp_path / "nowhere.jsonl") if content is None else write(content)
    with pytest.raises(UserError, match=message) as caught:
        build(file, **kwargs)
    assert "\n" not in str(caught.value)


def test_a_changed_filter_is_not_mistaken_for_the_old_one(write, tmp_path, monkeypatch):
    file = write([pair("q", "good", "bad"), pair("p", "fine", "poor")])
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_filters.py"
    lengths = []
    for question in ("q", "x"):
        module.write_text(
            f"def keep(record):\n    return record['prompt'] == '{question}' or record['prompt'] == 'p'\n"
        )
        monkeypatch.delitem(sys.modules, "my_filters", raising=False)
        linecache.clearcache()
        importlib.invalidate_caches()
        lengths.append(len(build(file, filter_fn="my_filters.keep")))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert lengths == [2, 1]


def test_code_that_makes_other_tokens_does_not_find_the_old_ones(write, monkeypatch):
    file = write([pair("q", "good", "bad")])
    first = build(file)._examples.cache_files
    assert build(file)._examples.cache_files == first
    monkeypatch.setattr("prefix_sharing.datasets.tokenizing.code_fingerprint", lambda *parts: "another")
    assert build(file)._examples.cache_files != first


@pytest.mark.parametrize("kind", ["function", "partial", "instance"])
def test_a_changed_record_fn_is_not_mistaken_for_the_old_one(write, tmp_path, monkeypatch, kind):
    file = write([{"ask": "q"}])
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_records.py"
    found = []
    for word in ("one", "two"):
        module.write_text(
            "import functools\n"
            f"WORD = '{word}'\n"
            "def pair(record, more=''):\n"
            "    return {'prompt': record['ask'], 'chosen': WORD + more, 'rejected': 'b'}\n"
            "class Pair:\n"
            "    def __call__(self, record):\n"
            "        return pair(record)\n"
            "function, partial, instance = pair, functools.partial(pair, more=''), Pair()\n"
        )
        monkeypatch.delitem(sys.modules, "my_records", raising=False)
        linecache.clearcache()
        importlib.invalidate_caches()
        found.append(scored_text(build(file, record_fn=f"my_records.{kind}")[0][0], small_tokenizer()))
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert found == ["one<|end|>", "two<|end|>"]


def test_column_map_may_name_what_only_later_records_have(write):
    records = [pair("q", "good", "bad")] * 70 + [pair("q", "good", "bad") | {"persona": "S"}]
    dataset = build(write(records), column_map={"system": "persona"})
    assert "system\nS" in small_tokenizer().decode(dataset[70][0].tokens.tolist())
    with pytest.raises(UserError, match="there is no column 'personal'.* Did you mean 'persona'"):
        build(write(records[-1:]), column_map={"system": "personal"})


def test_the_same_answer_with_a_label_counts_each_time(write):
    records = [{"prompt": "q", "completion": "a", "label": label} for label in (True, True, False)]
    assert build(write(records), group_by_prompt=True).num_labels.tolist() == [3]


def test_a_class_label_is_not_taken_for_true_or_false(tmp_path):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "completion")}
        | {"label": datasets.ClassLabel(names=["good", "bad"])}
    )
    data = {"prompt": ["q"], "completion": ["a"], "label": ["good"]}
    file = str(tmp_path / "answers.parquet")
    datasets.Dataset.from_dict(data, features=features).to_parquet(file)
    with pytest.raises(UserError, match=r"column label is a class \(good, bad\), not true or false"):
        prefix_preference_dataset(small_tokenizer(), data_files=file)
