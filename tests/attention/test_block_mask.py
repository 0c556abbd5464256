import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from plain import rows_of_examples
from prefix_sharing.attention import tree_block_mask
from prefix_sharing.trees import Row, RowOptions


def blocks(block_mask, which):
    """The key blocks each query block meets, as sets."""
    counts, indices = (
        (block_mask.kv_num_blocks, block_mask.kv_indices)
        if which == "partial"
        else (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    )
    return [set(indices[0, 0, q, :n].tolist()) for q, n in enumerate(counts[0, 0].tolist())]


def assert_equal_to_create_block_mask(subtree_end, block_size):
    length = len(subtree_end)
    ours = tree_block_mask(subtree_end, block_size)
    theirs = create_block_mask(
        lambda b, h, q, kv: (kv <= q) & (q < subtree_end[kv]), 1, 1, length, length, device="cpu", BLOCK_SIZE=block_size
    )
    assert blocks(ours, "full") == blocks(theirs, "full")
    assert blocks(ours, "partial") == blocks(theirs, "partial")
    assert ours.seq_lengths == theirs.seq_lengths
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE


@settings(max_examples=60)
@given(rows_of_examples(), st.integers(0, 40), st.sampled_from([4, 8]))
def test_small_blocks_of_random_trees(row_examples, padding, block_size):
    row = Row.from_examples(row_examples, options=RowOptions(round_length=lambda n: n + padding + 1))
    assert_equal_to_create_block_mask(row.subtree_end, block_size)


@st.composite
def random_subtree_ends(draw):
    """Trees of realistic size, as [prefix, branch, branch, ...] with random lengths."""
    ends = []
    for _ in range(draw(st.integers(1, 4))):
        start = len(ends)
        prefix = draw(st.integers(0, 400))
        branches = draw(st.lists(st.integers(1, 300), min_size=1, max_size=3))
        end = start + prefix + sum(branches)
        ends += [end] * prefix
        for branch in branches:
            ends += [len(ends) + branch] * branch
    padding = draw(st.integers(0, 200))
    ends += range(len(ends) + 1, len(ends) + padding + 1)
    return torch.tensor(ends)


@settings(max_examples=25)
@given(random_subtree_ends())
def test_blocks_of_128(subtree_end):
    assert_equal_to_create_block_mask(subtree_end, 128)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_all_padding(length):
    assert_equal_to_create_block_mask(torch.arange(1, length + 1), 128)


@settings(max_examples=60)
@given(rows_of_examples(), st.integers(0, 40), st.sampled_from([2, 4]), st.booleans(), st.none() | st.integers(1, 12))
def test_queries_at_some_rows_and_within_a_window_meet_every_block_they_see(
    row_examples, padding, block_size, at_predictors, window
):
    row = Row.from_examples(row_examples, options=RowOptions(round_length=lambda n: n + padding + 1))
    end, length, position = row.subtree_end, len(row.subtree_end), row.input_pos[0]
    at = row.predictor_index if at_predictors else torch.arange(length)
    ours = tree_block_mask(
        end, block_size, query_index=at if at_predictors else None, positions=position, window=window
    )
    assert ours.seq_lengths == (len(at), length)
    keys = torch.arange(-(-length // block_size) * block_size)
    visible = (keys <= at[:, None]) & (at[:, None] < torch.cat([end, keys[length:] * 0]))
    if window is not None:
        visible[:, :length] &= position[at][:, None] - position < window
    for q, (full, partial) in enumerate(zip(blocks(ours, "full"), blocks(ours, "partial"), strict=True)):
        of_block = visible[q * block_size : (q + 1) * block_size].unflatten(1, (-1, block_size))
        # What is taken as seen whole is seen whole; what is looked at token by token may be more than need be.
        assert full <= set(of_block.all(0).all(-1).nonzero()[:, 0].tolist())
        assert set(of_block.any(0).any(-1).nonzero()[:, 0].tolist()) <= full | partial
