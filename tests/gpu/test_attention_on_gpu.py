"""Attention's compiled kernels against dense attention in fp64, on the GPU.

pytest -n 0 tests/gpu/test_attention_on_gpu.py
"""

import pytest
import torch

from plain import response
from prefix_sharing.attention import mask_builder, rounding_of
from prefix_sharing.attention.varlen import has_grouped_queries
from prefix_sharing.trees import Row, RowOptions

CUDA = torch.device("cuda")
PROMPT = [7] * 300
ANSWERS = [[1] + [3] * 100, [2] + [4] * 90, [2, 5] + [6] * 60]

# head_dim, heads of queries, heads of keys: those of Llama 3.2 1B, Llama 3.1 8B, SmolLM2, Phi 3, Gemma 2, and no groups
SHAPES = [(64, 32, 8), (128, 32, 8), (64, 9, 3), (96, 32, 32), (256, 8, 4), (16, 4, 4)]


def make_row(backend):
    example = [response(PROMPT + a, [0] * 300 + [1] * len(a)) for a in ANSWERS]
    return Row.from_examples([example, example], options=RowOptions(round_length=rounding_of(backend))).to(CUDA)


def dense_attention(row, q, k, v, window, softcap):
    token, position = torch.arange(row.tokens.shape[1], device=CUDA), row.input_pos[0]
    i, j = token[:, None], token[None, :]
    visible = (j <= i) & (i < row.subtree_end[None, :])
    if window is not None:
        visible &= position[:, None] - position[None, :] < window
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v


def check(backend, shape, dtype, tolerance, at_predictors=False, window=None, softcap=None):
    head_dim, heads, kv_heads = shape
    row = make_row(backend)
    q, k, v = (
        torch.randn(1, n, row.tokens.shape[1], head_dim, device=CUDA, dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    rows = row.predictor_index if at_predictors else torch.arange(row.num_tokens, device=CUDA)
    expected = dense_attention(row, *exact, window, softcap).index_select(2, rows)
    queries = q.index_select(2, rows) if at_predictors else q
    mask = mask_builder(backend)(row, at_predictors=at_predictors, window=window)
    output = mask.attend(queries, k, v, softcap=softcap)[:, :, : len(rows)]
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((output.double() * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), exact)
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance * 10)


pytestmark = pytest.mark.gpu
AT_PREDICTORS = pytest.mark.parametrize("at_predictors", [False, True])


@AT_PREDICTORS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_is_dense_attention(shape, at_predictors):
    check("flex", shape, torch.float32, 1e-4, at_predictors)
    check("flex", shape, torch.bfloat16, 5e-2, at_predictors)


def test_flex_goes_by_positions_and_caps_scores():
    check("flex", (256, 8, 4), torch.float32, 1e-4, window=128, softcap=50.0)


@AT_PREDICTORS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.skipif(not has_grouped_queries(), reason="varlen_attn takes grouped heads from torch 2.12 on")
def test_varlen_is_dense_attention(shape, at_predictors):
    check("varlen", shape, torch.bfloat16, 5e-2, at_predictors, window=None)
    check("varlen", shape, torch.bfloat16, 5e-2, at_predictors, window=128)
