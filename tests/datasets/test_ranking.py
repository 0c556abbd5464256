"""More than pairs: pairs of a ranking, and the pairs of one prompt merged into one tree."""

import json

import pytest
import torch
from torchtune.models.llama3 import llama3

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.datasets.ranking import pairs_of_ranking, pairs_with_a_preference
from prefix_sharing.hosts import to_tree_model
from prefix_sharing.losses import DPOLoss, ORPOLoss, SimPOLoss
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.trees import Row, RowOptions

PROMPT = "We went to the market and looked at all there was. What did we find?"
ANSWERS = ["bread and butter", "bread and cheese", "a boat", "bread", "an old boat and a sail", "a sail", "nails"]


def build(tmp_path, rows, **kwargs):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return prefix_preference_dataset(tokenizer(), source="json", data_files=str(file), **kwargs)


def as_row(dataset):
    examples = range(len(dataset))
    return Row.from_examples([dataset[i] for i in examples], pairs=[dataset.pairs(i) for i in examples])


@pytest.fixture
def model():
    dims = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 32, "intermediate_dim": 64}
    return to_tree_model(llama3(vocab_size=2048, max_seq_len=512, **dims), "chains")


def losses_and_gradient(model, dataset, loss, reference_of):
    """Mean loss of all pairs and its gradient, with the reference log-probs that ``reference_of`` gives a row."""
    model.zero_grad()
    row = as_row(dataset)
    output = model(row)
    losses = loss(output, reference_of(output.log_probs), row.pairs).losses
    losses.mean().backward()
    return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters()]), row


@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [
        ("best_vs_rest", [(0, 1), (0, 2), (0, 3)]),
        ("adjacent", [(0, 1), (1, 2), (2, 3)]),
        ("all", [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]),
        ("best_vs_worst", [(0, 3)]),
    ],
)
def test_pairs_of_a_ranking(strategy, pairs):
    assert pairs_of_ranking(4, strategy) == pairs
    assert pairs_of_ranking(2, strategy) == [(0, 1)]
    assert pairs_of_ranking(1, strategy) == []


def test_ties_and_repeated_responses_are_no_pairs():
    assert pairs_with_a_preference("abc", [2.0, 2.0, 1.0], "all") == [(0, 2), (1, 2)]
    assert pairs_with_a_preference("aba", None, "all") == [(0, 1), (1, 2)]


def test_a_response_in_no_pair_is_not_computed(tmp_path):
    dataset = build(tmp_path, [{"prompt": "q", "responses": list("abcd")}], pairs="best_vs_worst")
    assert dataset.num_responses_of.tolist() == [2]
    assert dataset.pairs(0).tolist() == [[0, 1]]
    texts = [tokenizer().decode(response.tokens.tolist()) for response in dataset[0]]
    assert texts[0].endswith("a")
    assert texts[1].endswith("d")


def test_a_record_without_a_preference_is_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 1.0]},
        {"prompt": "q", "responses": ["a", "a"], "scores": [2.0, 1.0]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.0]},
    ]
    dataset = build(tmp_path, rows)
    assert dataset.dropped == {"identical responses": 1, "tied scores": 1}
    assert len(dataset) == 1


@pytest.mark.parametrize("loss", [DPOLoss(), SimPOLoss(), ORPOLoss()])
def test_seven_responses_are_the_twenty_one_pairs(tmp_path, model, loss):
    ranked = build(tmp_path, [{"prompt": PROMPT, "responses": ANSWERS, "scores": list(range(7, 0, -1))}], pairs="all")
    pairs = [{"prompt": PROMPT, "chosen": ANSWERS[i], "rejected": ANSWERS[j]} for i, j in pairs_of_ranking(7, "all")]
    apart = build(tmp_path, pairs)

    def reference(log_probs):
        return log_probs.detach() * 1.01 + 0.1

    expected, expected_gradient, apart_row = losses_and_gradient(model, apart, loss, reference)
    losses, gradient, row = losses_and_gradient(model, ranked, loss, reference)
    assert losses.shape == (21,)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    # every response is read once, not six times
    assert row.num_tokens < apart_row.num_tokens / 3


def test_pairs_of_one_prompt_are_merged_and_count_as_apart(tmp_path, model):
    pairs = [(0, 1), (0, 2), (1, 3), (0, 1)]
    rows = [{"prompt": PROMPT, "chosen": ANSWERS[i], "rejected": ANSWERS[j]} for i, j in pairs]
    rows.insert(2, {"prompt": "Another one?", "chosen": "a", "rejected": "b"})
    rows.append({"prompt": "q", "chosen": "a", "rejected": "a"})
    apart, merged = build(tmp_path, rows), build(tmp_path, rows, group_by_prompt=True)
    assert len(apart) == 5
    assert len(merged) == 2
    assert merged.num_pairs.tolist() == [4, 1]
    assert merged.num_responses_of.tolist() == [4, 2]
    assert repr(merged).endswith("6 records = 5 used (merged into 2 examples) + 1 dropped (identical responses: 1)")

    expected, expected_gradient, apart_row = losses_and_gradient(model, apart, DPOLoss(), lambda x: x.detach() - 1.0)
    losses, gradient, row = losses_and_gradient(model, merged, DPOLoss(), lambda x: x.detach() - 1.0)
    torch.testing.assert_close(losses.sort().values, expected.sort().values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    assert row.num_tokens < 0.6 * apart_row.num_tokens


def test_prompts_that_differ_are_not_merged(tmp_path):
    def turns(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [
        {"chosen": turns("q", "a"), "rejected": turns("q", "b")},
        {"chosen": turns("q", "a"), "rejected": turns("p", "b")},
        {"chosen": turns("q", "a"), "rejected": turns("q", "c")},
    ]
    dataset = build(tmp_path, rows, group_by_prompt=True)
    assert dataset.num_pairs.tolist() == [2, 1]
    assert dataset.num_merged == 1


def test_sizes_are_those_of_the_trees(tmp_path):
    rows = [{"prompt": PROMPT, "responses": ANSWERS}, {"prompt": "q", "responses": ["a", "b"]}]
    dataset = build(tmp_path, rows)
    for share_prefix in (True, False):
        for i in range(2):
            row = Row.from_examples([dataset[i]], options=RowOptions(share_prefix=share_prefix))
            sizes = dataset.sizes(share_prefix)
            assert sizes.num_tokens[i] == row.num_tokens
            assert sizes.num_predictors[i] == len(row.predictor_index)
            places = torch.arange(row.num_tokens)
            assert sizes.num_visible[i] == (row.subtree_end - places).sum()
