"""Every backend that can run computes dense attention under the tree's mask, gradients included."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from plain import response, rows_of_examples
from prefix_sharing.attention import (
    ChainsMask,
    FlexMask,
    VarlenMask,
    choose_attention_backend,
    flex,
    mask_builder,
)
from prefix_sharing.attention.varlen import has_grouped_queries
from prefix_sharing.errors import UserError
from prefix_sharing.trees import Row, RowOptions

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def visible_in(row):
    """The mask, token by token."""
    token = torch.arange(row.tokens.shape[1], device=row.tokens.device)
    i, j = token[:, None], token[None, :]
    return (j <= i) & (i < row.subtree_end[None, :])


def dense_attention(row, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible_in(row), enable_gqa=True)


def random_qkv(length, dtype, value_dim=HEAD_DIM):
    return [
        torch.randn(1, heads, length, size, dtype=dtype, requires_grad=True)
        for heads, size in ((HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, value_dim))
    ]


def assert_same(output, expected, inputs, tolerance):
    """The outputs, and the gradients of a random weighting of them."""
    weight = torch.randn_like(expected)
    grads, expected_grads = (torch.autograd.grad((o * weight).sum(), inputs) for o in (output, expected))
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance * 10)


MASKS = pytest.mark.parametrize("mask_class", [ChainsMask, FlexMask, VarlenMask])
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


@MASKS
@PRECISIONS
def test_outputs_and_gradients_are_those_of_dense_attention(on_cpu, mask_class, dtype, tolerance):
    @settings(max_examples=25)
    @given(rows_of_examples(), st.integers(0, 3))
    def check(row_examples, padding):
        row = Row.from_examples(row_examples, options=RowOptions(round_length=lambda n: n + padding))
        inputs = random_qkv(row.tokens.shape[1], dtype)
        real = slice(0, row.num_tokens)
        expected = dense_attention(row, *inputs)[:, :, real]
        assert_same(mask_class(row).attend(*inputs)[:, :, real], expected, inputs, tolerance)

    check()


@MASKS
def test_values_may_be_smaller_than_keys(on_cpu, mask_class):
    prompt = list(range(9))
    row = Row.from_examples([[response([*prompt, *a], [0] * 9 + [1] * 4) for a in ([10] * 4, [11] * 4)]])
    inputs = random_qkv(row.num_tokens, torch.float64, 5)
    assert_same(mask_class(row).attend(*inputs), dense_attention(row, *inputs), inputs, 1e-12)


class Sizes(TorchDispatchMode):
    """Numbers of elements of everything that operators give."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.seen |= {x.numel() for x in torch.utils._pytree.tree_leaves(output) if torch.is_tensor(x)}
        return output


@pytest.mark.parametrize(("value_dim", "softcap"), [(HEAD_DIM, None), (HEAD_DIM, 1.5), (5, None)])
def test_chains_neither_expand_keys_nor_make_scores_that_no_cap_needs(value_dim, softcap):
    prompt = list(range(9))
    row = Row.from_examples(
        [[response([*prompt, *a], [0] * 9 + [1] * len(a)) for a in ([10] * 5, [11] * 7)]],
        options=RowOptions(round_length=lambda n: n + 2),
    )
    (first, second), num_keys = (chain.span for chain in row.chains), 15
    assert (first, second) == ((0, 13), (13, 19))  # the last token of each answer is a target only
    inputs = random_qkv(21, torch.float32, value_dim)
    with Sizes() as sizes:
        output = ChainsMask(row).attend(*inputs, softcap=softcap)
        output.sum().backward()
    assert KV_HEADS * num_keys * HEAD_DIM in sizes.seen
    assert HEADS * num_keys * HEAD_DIM not in sizes.seen
    assert HEADS * num_keys * value_dim not in sizes.seen
    assert (HEADS * 6 * num_keys in sizes.seen) == (softcap is not None)


@pytest.mark.parametrize("length", [384, 300])
def test_compiled_flex_forward_uses_the_block_mask(length):
    prompt = torch.randint(0, 20, (150,)).tolist()
    answers = [[1] + [3] * 60, [2] + [4] * 40]
    example = [response(prompt + a, [0] * 150 + [1] * len(a)) for a in answers]
    row = Row.from_examples([example], options=RowOptions(round_length=lambda n: length))
    q, k, v = (x.detach() for x in random_qkv(length, torch.float32))
    with torch.no_grad():
        output = FlexMask(row).attend(q, k, v)
        expected = dense_attention(row, q, k, v)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@MASKS
def test_a_window_goes_over_positions(on_cpu, mask_class):
    @settings(max_examples=25)
    @given(rows_of_examples(), st.sampled_from([1, 3, 8]), st.booleans())
    def check(row_examples, window, at_predictors):
        row = Row.from_examples(row_examples)
        q, k, v = random_qkv(row.tokens.shape[1], torch.float64)
        position = row.input_pos[0]
        visible = visible_in(row) & (position[:, None] - position[None, :] < window)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3, enable_gqa=True)
        queries = q
        if at_predictors:
            expected, queries = (x.index_select(2, row.predictor_index) for x in (expected, q))
        mask = mask_class(row, at_predictors=at_predictors, window=window)
        assert_same(mask.attend(queries, k, v, scale=0.3), expected, (q, k, v), 1e-12)

    check()


@pytest.mark.parametrize("mask_class", [ChainsMask, FlexMask])
def test_scores_are_capped(on_cpu, mask_class):
    prompt = list(range(9))
    row = Row.from_examples([[response([*prompt, *a], [0] * 9 + [1] * 4) for a in ([10] * 4, [11] * 4)]])
    q, k, v = random_qkv(row.num_tokens, torch.float64)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = 1.5 * torch.tanh(q @ keys.transpose(-1, -2) * 2.0 / 1.5)
    expected = scores.masked_fill(~visible_in(row), float("-inf")).softmax(-1) @ values
    assert_same(mask_class(row).attend(q, k, v, scale=2.0, softcap=1.5), expected, (q, k, v), 1e-12)


def test_chains_leave_padding_at_zero():
    row = Row.from_examples([[response([1, 2, 3], [0, 1, 1])]], options=RowOptions(round_length=lambda n: 5))
    output = ChainsMask(row).attend(*random_qkv(5, torch.float32))
    assert (output[:, :, 2:] == 0).all()


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_backend_is_chosen_by_device():
    assert choose_attention_backend(None, CUDA, torch.bfloat16) == "flex"
    assert choose_attention_backend(None, CPU, torch.bfloat16) == "chains"
    assert choose_attention_backend("chains", CUDA, torch.float32) == "chains"


@pytest.mark.skipif(not has_grouped_queries(), reason="varlen_attn takes grouped heads from torch 2.12 on")
def test_varlen_is_chosen_by_name():
    assert choose_attention_backend("varlen", CUDA, torch.bfloat16) == "varlen"


def test_a_backend_that_cannot_run_is_refused_with_the_way_out(monkeypatch):
    with pytest.raises(UserError, match="flex cannot train on cpu.*use chains"):
        choose_attention_backend("flex", CPU, torch.float32)
    with pytest.raises(UserError, match="varlen needs CUDA and dtype: bf16, but this is cuda and float32; use chains"):
        choose_attention_backend("varlen", CUDA, torch.float32)
    with pytest.raises(UserError, match="varlen needs CUDA and dtype: bf16, but this is cpu and bfloat16"):
        choose_attention_backend("varlen", CPU, torch.bfloat16)
    with pytest.raises(UserError, match="unknown backend 'flash'; choose from flex, chains, varlen"):
        choose_attention_backend("flash", CPU, torch.float32)


def test_kernel_options_reach_flex_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(flex, "_compiled_flex_attention", lambda dynamic: lambda *args, **kwargs: seen.append(kwargs))
    row = Row.from_examples([[response([1, 2, 3], [0, 1, 1])]])
    for options in (None, {"BLOCK_M": 64}):
        mask_builder("flex", options)(row, at_predictors=True).attend(None, None, None)
        assert seen.pop()["kernel_options"] == options


@MASKS
@PRECISIONS
def test_at_predictors_queries_see_what_they_see_among_all(on_cpu, mask_class, dtype, tolerance):
    @settings(max_examples=25)
    @given(rows_of_examples(), st.integers(0, 3))
    def check(row_examples, padding):
        row = Row.from_examples(row_examples, options=RowOptions(round_length=lambda n: n + padding))
        q, k, v = random_qkv(row.tokens.shape[1], dtype)
        expected = dense_attention(row, q, k, v).index_select(2, row.predictor_index)
        output = mask_class(row, at_predictors=True).attend(q.index_select(2, row.predictor_index), k, v)
        assert_same(output, expected, (q, k, v), tolerance)

    check()
