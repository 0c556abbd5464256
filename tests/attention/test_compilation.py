"""How often FlexAttention is compiled, with a stand-in for the code generator."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from prefix_sharing.attention import flex, rounding_of
from prefix_sharing.attention.flex import FlexMask
from prefix_sharing.benchmark.workloads import draw_lengths, make_pairs
from prefix_sharing.trees import Row, RowOptions

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled, from now on."""
    found = []

    def count(graph, inputs):
        found.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, options: compile_(function, dynamic=dynamic, backend=count)
    )
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *args: None)
    flex._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()
    yield found
    flex._compiled_flex_attention.cache_clear()
    torch._dynamo.reset()


def attend(row, at_predictors, **kwargs):
    mask = FlexMask(row, at_predictors=at_predictors)
    mask._on_cuda = True  # which decides how it is compiled
    num_queries, num_keys = mask.block_mask.seq_lengths
    for needs_grad in (False, True):
        q, k, v = (
            torch.empty(1, heads, length, HEAD_DIM, device="meta", requires_grad=needs_grad)
            for heads, length in ((HEADS, num_queries), (KV_HEADS, num_keys), (KV_HEADS, num_keys))
        )
        mask.attend(q, k, v, **kwargs)


def test_a_handful_of_graphs_serve_rows_of_all_lengths(graphs):
    num_steps, batch_size = 200, 2
    pairs = make_pairs(draw_lengths("capybara", num_steps * batch_size), vocab_size=100)
    shapes = set()
    for first in range(0, len(pairs), batch_size):
        options = RowOptions(round_length=rounding_of("flex"))
        row = Row.from_examples(pairs[first : first + batch_size], options=options).map_tensors(lambda t: t.to("meta"))
        shapes.add((row.tokens.shape[1], len(row.predictor_index)))
        for at_predictors in (False, True):
            attend(row, at_predictors)
    assert len(shapes) > 100
    assert len(graphs) <= 8


def test_capped_scores_are_compiled_whole(graphs):
    pairs = make_pairs(draw_lengths("capybara", 6), vocab_size=100)
    torch._dynamo.utils.counters.clear()
    for pair in pairs:
        row = Row.from_examples([pair], options=RowOptions(round_length=rounding_of("flex")))
        attend(row.map_tensors(lambda t: t.to("meta")), False, softcap=50.0)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < len(graphs) <= 4
