"""Deduplication: against every pair compared, and which of two duplicates is kept."""

import logging
import re

import numpy as np
import pytest

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.choosing import RecordReader
from prefix_sharing.datasets.choosing.duplicates import Exact, MinHash
from prefix_sharing.datasets.forms import FORMS
from prefix_sharing.datasets.source import Source
from prefix_sharing.datasets.tokenizing import PreferenceOptions
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.quickstart import tokenizer
from records import prompts_of, read_prompts, write


def random_prompts(rng, number, vocabulary=300):
    """Prompts of random words, of which some repeat another exactly, some nearly, some half."""
    words = np.array([f"w{i}" for i in range(vocabulary)])
    prompts, kinds = [], []
    for i in range(number):
        kind = rng.choice(["new", "exact", "near", "half"], p=[0.7, 0.1, 0.1, 0.1]) if i > 20 else "new"
        prompt = list(rng.choice(words, size=rng.integers(20, 40)))
        if kind != "new":
            earlier = list(prompts[rng.integers(len(prompts))])
            changed = {"exact": 0, "near": 1, "half": 4}[kind]
            for place in rng.choice(len(earlier), size=changed, replace=False):
                earlier[place] = str(rng.choice(words))
            prompt = earlier
        prompts.append(prompt)
        kinds.append(kind)
    return [" ".join(prompt) for prompt in prompts], np.array(kinds)


def jaccard(texts, n):
    """Similarities of all texts, shape [texts, texts], by counting the n-grams that each two share."""
    having, sizes = {}, np.zeros(len(texts))
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        grams = {tuple(words[j : j + n]) for j in range(len(words) - n + 1)}
        sizes[i] = len(grams)
        for gram in grams:
            having.setdefault(gram, []).append(i)
    shared = np.zeros((len(texts), len(texts)))
    for those in having.values():
        shared[np.ix_(those, those)] += 1
    return shared / (sizes[:, None] + sizes[None] - shared)


@pytest.fixture(scope="module")
def two_thousand():
    texts, kinds = random_prompts(np.random.default_rng(0), 2000)
    return texts, kinds, np.tril(jaccard(texts, 3), -1)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_duplicates_are_those_of_all_pairs(two_thousand, threshold):
    texts, kinds, similarity = two_thousand
    found = MinHash(threshold=threshold).find(read_prompts(texts))
    # Each record is to be found that is similar enough to an earlier one that is kept.
    is_dropped = found != np.arange(2000)
    expected = (similarity[:, ~is_dropped] >= threshold).any(axis=1)
    missed, wrong = int((expected & ~is_dropped).sum()), int((is_dropped & ~expected).sum())
    recall, precision = 1 - missed / expected.sum(), 1 - wrong / is_dropped.sum()
    print(f"threshold {threshold}: {is_dropped.sum()} found, recall {recall:.4f}, precision {precision:.4f}")
    assert precision == 1
    assert recall >= 0.99  # that is what is expected at the threshold, and most are above it
    assert is_dropped[kinds == "exact"].all()
    assert (similarity[np.flatnonzero(is_dropped), found[is_dropped]] >= threshold).all()


def test_exact_duplicates_are_those_of_a_dictionary(two_thousand):
    texts, kinds, _ = two_thousand
    first = {}
    expected = [first.setdefault(text, i) for i, text in enumerate(texts)]
    found = Exact().find(read_prompts(texts))
    assert found.tolist() == expected
    assert (found != np.arange(2000))[kinds == "exact"].all()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_perm", [16, 128, 256])
def test_bands_miss_few_pairs_at_the_threshold(threshold, num_perm):
    if (1 - threshold) ** num_perm > 0.01:
        with pytest.raises(ConfigError, match="'num_perm': is too low for a threshold of"):
            MinHash(threshold=threshold, num_perm=num_perm)
        return
    bands, rows = MinHash(threshold=threshold, num_perm=num_perm).bands()
    assert bands * rows <= num_perm
    assert (1 - threshold**rows) ** bands <= 0.01


def test_calls_of_tools_and_tools_that_are_offered_tell_records_apart(tmp_path):
    def record(name, tools=()):
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}
        user = {"role": "user", "content": "weather?"}
        return {
            "chosen": [user, call],
            "rejected": [user, {"role": "assistant", "content": "No."}],
            "tools": list(tools),
        }

    records = [record("a"), record("b"), record("a"), record("a", [{"type": "function", "function": {"name": "a"}}])]
    source = Source("json", "train", {"data_files": write(tmp_path / "calls.jsonl", records)})
    read = RecordReader(source.load(), FORMS["messages"], PreferenceOptions()).read({})
    assert Exact("prompt_and_answers").find(read).tolist() == [0, 1, 0, 3]
    assert Exact("prompt").find(read).tolist() == [0, 0, 0, 3]


def test_the_first_is_kept_in_the_order_of_records(tmp_path, caplog):
    prompts = ["Sum 2 and 3!", "What is red?", "sum 2 and 3", "What is red?", "Sum 2 and 3!"]
    file = write(
        tmp_path / "a.jsonl", [{"prompt": p, "chosen": f"yes {i}", "rejected": "no"} for i, p in enumerate(prompts)]
    )
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        exact = prefix_preference_dataset(tokenizer(), data_files=file, deduplicate="exact")
        near = prefix_preference_dataset(tokenizer(), data_files=file, deduplicate={"method": "minhash"})
        both = prefix_preference_dataset(
            tokenizer(), data_files=file, deduplicate={"method": "exact", "over": "prompt_and_answers"}
        )
    assert exact.record_index.tolist() == [0, 1, 2]
    assert near.record_index.tolist() == [0, 1]
    assert len(both) == 5
    assert near.dropped == {"duplicate": 3}
    assert f"{file}: 3 of 5 records are duplicates (minhash, prompt); the first of each is kept" in caplog.text
    assert "5 records = 3 used + 2 dropped (duplicate: 2)" in caplog.text


def test_records_that_are_dropped_anyway_hide_no_others(tmp_path):
    records = [{"prompt": "Q", "chosen": "same", "rejected": "same"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}]
    dataset = prefix_preference_dataset(
        tokenizer(), data_files=write(tmp_path / "a.jsonl", records), deduplicate="exact"
    )
    assert dataset.record_index.tolist() == [1]


def test_duplicates_are_not_merged_by_prompt(tmp_path):
    records = [{"prompt": "Q", "chosen": c, "rejected": "no"} for c in ("a", "b", "a")]
    dataset = prefix_preference_dataset(
        tokenizer(),
        data_files=write(tmp_path / "a.jsonl", records),
        deduplicate={"over": "prompt_and_answers"},
        group_by_prompt=True,
    )
    assert (len(dataset), dataset.num_responses, dataset.num_pairs.tolist()) == (1, 3, [2])
    assert dataset.dropped == {"duplicate": 1}


def test_turns_and_roles_count_and_texts_without_words_are_compared_as_they_are():
    texts = ["???", "!!!", "???", "你好吗", "你好嗎", "你 好 吗"]
    found = MinHash(ngram_size=1, threshold=1.0).find(read_prompts(texts))
    assert found.tolist() == [0, 1, 0, 3, 4, 3]


def test_nothing_is_like_another_and_nothing_is_there(tmp_path):
    assert MinHash().find(read_prompts(["red boat", "we found bread"])).tolist() == [0, 1]
    file = write(tmp_path / "a.jsonl", [{"prompt": "Q", "chosen": "A", "rejected": "A"}])
    with pytest.raises(UserError, match="no usable example"):
        prefix_preference_dataset(tokenizer(), data_files=file, deduplicate="minhash")


def test_the_result_is_kept(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl", [{"prompt": f"Q{i % 5}", "chosen": "A", "rejected": "B"} for i in range(9)])
    first = prefix_preference_dataset(tokenizer(), data_files=file, deduplicate="exact")

    def find(self, read):
        raise AssertionError

    monkeypatch.setattr(Exact, "find", find)
    again = prefix_preference_dataset(tokenizer(), data_files=file, deduplicate="exact")
    assert again.record_index.tolist() == first.record_index.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fuzzy", "deduplicate.method': must be one of exact, minhash, but is fuzzy"),
        ({"method": "exact", "threshold": 0.5}, "deduplicate.threshold': no key of deduplicate by exact"),
        ({"method": "minhash", "treshold": 0.5}, "deduplicate.treshold': no key of .* Did you mean 'threshold'"),
        ({"method": "minhash", "threshold": 0}, "deduplicate.threshold': must be above 0"),
        ({"method": "minhash", "num_perm": 1.5}, "deduplicate.num_perm': must be a whole number"),
        ({"over": "answers"}, "deduplicate.over': must be one of prompt, prompt_and_answers"),
    ],
)
def test_what_is_no_deduplication_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        prefix_preference_dataset(tokenizer(), data_files="none.jsonl", deduplicate=value)


def test_a_mixture_drops_what_earlier_data_sets_have(tmp_path, caplog):
    from prefix_sharing.datasets import preference_mixture

    files = {}
    for name, prompts in {"a": ["p", "q", "p"], "b": ["q", "r"], "c": ["r", "s", "p"]}.items():
        files[name] = write(
            tmp_path / f"{name}.jsonl", [{"prompt": p, "chosen": "A", "rejected": "B"} for p in prompts]
        )
    with caplog.at_level(logging.INFO, logger="prefix_sharing"):
        mixture = preference_mixture(
            tokenizer(), datasets=[{"data_files": file} for file in files.values()], deduplicate="exact"
        )
    assert prompts_of(mixture) == ["p", "q", "r", "s"]
    assert mixture.dropped == {"duplicate": 4}
    assert mixture.describe(3) == f"record 1 of the split of {files['c']}"
    for name, count, others in (("a", "1 of 3", 0), ("b", "1 of 2", 1), ("c", "2 of 3", 2)):
        line = f"{files[name]}: {count} records are duplicates (exact, prompt), {others} of them of records of earlier"
        assert line in caplog.text
    repeated = [{"data_files": files["a"]}, {"data_files": files["a"]}]
    with pytest.raises(UserError, match=r"datasets\[1\]': all of .* repeats earlier data sets; leave it out"):
        preference_mixture(tokenizer(), datasets=repeated, deduplicate="exact")
