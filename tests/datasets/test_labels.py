"""Labels of responses, and answers to other prompts beside them."""

import json

import numpy as np
import pytest
import torch

from prefix_sharing.datasets import StepLoader, preference_mixture, prefix_preference_dataset
from prefix_sharing.datasets.labels import with_labels
from prefix_sharing.errors import UserError
from prefix_sharing.planning import ByLength, ExampleSizes, Plan
from prefix_sharing.quickstart import tokenizer


@pytest.fixture
def build(tmp_path):
    def make(records, **kwargs):
        file = tmp_path / "answers.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return prefix_preference_dataset(tokenizer(), source="json", data_files=str(file), **kwargs)

    return make


def answer(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def texts(dataset, index):
    """Prompt and scored text of each response."""
    decode = lambda tokens: tokenizer().decode(tokens.tolist(), skip_special_tokens=False)  # noqa: E731
    found = []
    for response in dataset[index]:
        start = np.flatnonzero(response.scored)[0]
        prompt = decode(response.tokens[:start]).split("<|end|>")[-2].split("\n")[-1]
        found.append((prompt, decode(response.tokens[response.scored])))
    return found


RECORDS = [answer("q", "good", True), answer("p", "bad", False), answer("p", "fine", True), answer("r", "poor", False)]


def test_each_answer_gets_one_to_another_prompt_beside_it(build):
    dataset = with_labels(build(RECORDS), mismatched=True)
    assert [texts(dataset, i) for i in range(4)] == [
        [("q", "good<|end|>"), ("q", "poor<|end|>")],
        [("p", "bad<|end|>"), ("p", "good<|end|>")],
        [("p", "fine<|end|>"), ("p", "good<|end|>")],
        [("r", "poor<|end|>"), ("r", "fine<|end|>")],
    ]
    assert [dataset.labels(i).tolist() for i in range(4)] == [[1, 0], [-1, 0], [1, 0], [-1, 0]]
    assert dataset.num_labels.tolist() == [1, 1, 1, 1]
    assert with_labels(build(RECORDS), mismatched=False).num_responses == 1


def test_answers_of_one_prompt_may_be_one_example(build):
    dataset = with_labels(build(RECORDS, group_by_prompt=True), mismatched=True)
    assert [texts(dataset, i) for i in range(3)] == [
        [("q", "good<|end|>"), ("q", "poor<|end|>")],
        [("p", "bad<|end|>"), ("p", "fine<|end|>"), ("p", "good<|end|>"), ("p", "good<|end|>")],
        [("r", "poor<|end|>"), ("r", "bad<|end|>")],
    ]
    assert dataset.labels(1).tolist() == [-1, 1, 0, 0]
    assert dataset.num_labels.sum() == 4


def test_chosen_is_desirable_and_rejected_is_not(build):
    records = [{"prompt": p, "chosen": "a", "rejected": "b"} for p in "qp"]
    dataset = with_labels(build(records), mismatched=True)
    assert [dataset.labels(i).tolist() for i in range(2)] == [[1, -1, 0, 0]] * 2
    assert texts(dataset, 0) == [(p, f"{a}<|end|>") for p, a in ("qa", "qb", "qa", "qb")]
    ranked = [{"prompt": p, "responses": ["a", "b", "c"]} for p in "qp"]
    assert with_labels(build(ranked), mismatched=False).labels(0).tolist() == [1, -1, -1]
    with pytest.raises(UserError, match="record 0 .* worse than another; set pairs: best_vs_worst for"):
        with_labels(build(ranked, pairs="adjacent"), mismatched=False)


def test_earlier_turns_belong_to_the_prompt(build):
    talk = [{"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "q2"))]
    records = [
        {"messages": [*talk, {"role": "assistant", "content": "good"}], "label": True},
        {"messages": [*talk[:1], {"role": "assistant", "content": "bad"}], "label": False},
    ]
    dataset = with_labels(build(records), mismatched=True)
    first, other = dataset[0]
    assert tokenizer().decode(other.tokens.tolist()).endswith("assistant\nbad")
    start = np.flatnonzero(other.scored)[0]
    assert other.tokens[:start].tolist() == first.tokens[:start].tolist()
    assert other.scored.sum() == dataset[1][0].scored.sum()


def test_an_answer_to_another_prompt_is_no_longer_than_the_longest_response(build):
    records = [
        answer("a longer question than that " * 3, "yes", True),
        answer("q", "bread butter oven salt " * 4, False),
    ]
    whole = build(records)
    dataset = with_labels(whole, mismatched=True)
    assert max(len(response.tokens) for i in range(2) for response in dataset[i]) == whole.longest
    assert all(response.scored[1:].any() for i in range(2) for response in dataset[i])


def test_one_prompt_is_not_enough(build):
    with pytest.raises(UserError, match="but there is one prompt only"):
        with_labels(build(RECORDS[1:3]), mismatched=True)


def test_a_prompt_that_is_scored_is_refused(build):
    dataset = build(RECORDS, masking_strategy="train_on_all")
    assert with_labels(dataset, mismatched=True).num_responses == 2  # only the content of turns is scored
    scored = dataset.with_table(dataset.tokenized.map(lambda e: {"scored": [[True] * len(t) for t in e["tokens"]]}))
    with pytest.raises(UserError, match="nothing comes before its answer"):
        with_labels(scored, mismatched=True)


def test_the_second_start_finds_labels_in_the_cache(build):
    dataset = build(RECORDS)
    first = with_labels(dataset, mismatched=True).tokenized.cache_files
    assert with_labels(dataset, mismatched=True).tokenized.cache_files == first
    assert with_labels(dataset, mismatched=False).tokenized.cache_files != first


def test_only_examples_of_the_mixture_are_partners(build, tmp_path):
    build(RECORDS)
    node = {"source": "json", "data_files": str(tmp_path / "answers.jsonl")}
    mixture = preference_mixture(tokenizer(), datasets=[{**node, "weight": 2}, {**node, "weight": 1}])
    dataset = with_labels(mixture, mismatched=True)
    assert len(dataset) == len(mixture)
    assert dataset.describe(len(dataset) - 1) == mixture.describe(len(dataset) - 1)
    answers = {texts(mixture, i)[0][1] for i in range(len(mixture))}
    assert {texts(dataset, i)[1][1] for i in range(len(dataset))} <= answers


def test_rows_of_a_step_hold_every_response_once(build):
    dataset = with_labels(build(RECORDS * 3, group_by_prompt=False), mismatched=True)
    sizes = dataset.sizes()
    terms = dataset.num_terms("responses")
    for pack_len, num_rows in ((4096, 1), (64, None)):
        plan = Plan(
            sizes=ExampleSizes(sizes.num_tokens, sizes.num_tokens.astype(float), terms),
            packing=ByLength(pack_len),
            examples_per_step=12,
        )
        (step,) = StepLoader(torch.device("cpu"))(dataset, plan.epoch(0), kl_apart=True)
        together, apart = step.rows, step.kl_rows
        assert step.num_terms == sum(row.num_labels for row in together) == 12
        if num_rows == 1:
            assert len(together) == 1
            assert apart == []
            assert (together[0].num_scored > 0).all()
        else:
            assert len(together) == len(apart) > 1
            for row in together:
                assert ((row.num_scored > 0) == (row.labels != 0)).all()
            for row in apart:
                assert ((row.num_scored > 0) == (row.labels == 0)).all()
