import torch
from hypothesis import given
from hypothesis import strategies as st

from plain import plain_num_scored, rows_of_examples
from prefix_sharing.trees import PrefixTree, Row, RowOptions, bucket_length


@given(rows_of_examples(), st.integers(0, 5))
def test_trees_stand_one_after_the_other_then_padding(row_examples, padding):
    trees = [PrefixTree.from_responses(example) for example in row_examples]
    num_tokens = sum(len(tree) for tree in trees)
    row = Row.from_examples(row_examples, options=RowOptions(round_length=lambda n: n + padding))
    assert row.num_tokens == num_tokens
    offset = 0
    for tree in trees:
        rows = slice(offset, offset + len(tree))
        assert row.tokens[0, rows].tolist() == tree.tokens.tolist()
        assert row.input_pos[0, rows].tolist() == tree.input_pos.tolist()
        assert (row.subtree_end[rows] - offset).tolist() == tree.subtree_end.tolist()
        offset += len(tree)
    assert row.subtree_end[offset:].tolist() == list(range(offset + 1, offset + padding + 1))


@given(rows_of_examples())
def test_counts_are_those_of_the_plain_labels(row_examples):
    row = Row.from_examples(row_examples)
    for e, example in enumerate(row_examples):
        expected = plain_num_scored(example)
        assert row.num_scored[e, : len(example)].tolist() == expected
        assert row.num_scored[e, len(example) :].sum() == 0
    counted = torch.zeros(row.num_scored.numel(), dtype=torch.long)
    counted.index_add_(0, row.scored_response, torch.ones_like(row.scored_response))
    assert counted.view_as(row.num_scored).equal(row.num_scored)


@given(rows_of_examples())
def test_offsets_delimit_the_scored_tokens_of_each_predictor(row_examples):
    row = Row.from_examples(row_examples)
    assert len(row.predictor_offsets) == len(row.predictor_index) + 1
    for i in range(len(row.predictor_index)):
        mine = row.scored_predictor[row.predictor_offsets[i] : row.predictor_offsets[i + 1]]
        assert len(mine) > 0
        assert (mine == i).all()
    assert row.predictor_offsets[-1] == len(row.scored_target)


def test_a_row_of_no_examples_is_padding():
    row = Row.from_examples([], options=RowOptions(round_length=lambda n: 4))
    assert row.num_tokens == 0
    assert row.tokens.shape == (1, 4)
    assert row.num_scored.shape == (0, 0)
    assert row.subtree_end.tolist() == [1, 2, 3, 4]


@given(st.integers(0, 200_000))
def test_bucket_lengths_are_few_and_pad_little(num_tokens):
    length = bucket_length(num_tokens)
    assert length % 128 == 0
    assert length >= max(num_tokens, 1)
    assert length - num_tokens < max(129, num_tokens / 16 + 1)


def test_number_of_buckets_is_bounded():
    assert len({bucket_length(n) for n in range(1, 65_537)}) == 32 + 4 * 16
