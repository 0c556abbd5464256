"""What is compiled, computed again or kept elsewhere gives the same log-probs and gradients."""

import copy
import functools

import pytest
import torch

pytest.importorskip("transformers", minversion="5.24")

from decoders import build, make_examples
from prefix_sharing.hosts import checkpoint_activations, compile_layers
from prefix_sharing.hosts.transformers import to_tree_model
from prefix_sharing.trees import Row

# Of each kind of layer: plain, with two masks and capped scores, with values smaller than keys, with experts.
FAMILIES = ("llama", "gemma2", "deepseek_v3", "qwen3_moe")


def new_model(name):
    return to_tree_model(build(name).float(), "chains")


def log_probs_and_gradients(model, rows):
    """Of several Rows, whose backward passes come after all forward passes."""
    found = [model(row).log_probs for row in rows]
    sum(log_probs.sum() for log_probs in found).backward()
    return found, [parameter.grad for parameter in model.parameters()]


def assert_same(found, expected):
    for ours, theirs in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def two_rows():
    examples = make_examples()
    return [Row.from_examples(examples), Row.from_examples(examples[::-1])]


@pytest.mark.parametrize("ac_mode", ["full", "selective"])
@pytest.mark.parametrize("name", FAMILIES)
def test_activations_that_are_computed_again_are_those_of_their_row(name, ac_mode):
    rows, model = two_rows(), new_model(name)
    expected = log_probs_and_gradients(copy.deepcopy(model), rows)
    checkpoint_activations(model, ac_mode)
    assert_same(log_probs_and_gradients(model, rows), expected)


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3"])
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # or it would be run uncompiled from then on
def test_compiled_layers_compute_the_same_and_are_not_compiled_anew_for_every_row(name, monkeypatch):
    # As dynamo and autograd see the layers; code is not generated, which takes a minute.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, examples = new_model(name), make_examples()
    plain = copy.deepcopy(model)
    compile_layers(model)
    graphs = []
    for some in (examples, examples[:2], examples[1:], examples[:1]):
        row = Row.from_examples(some)
        with torch.no_grad():
            model(row)
        assert_same(log_probs_and_gradients(model, [row]), log_probs_and_gradients(plain, [row]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


def test_activations_that_are_offloaded_are_the_layers_inputs_and_give_the_same(monkeypatch):
    rows, model = two_rows(), new_model("llama")
    expected = log_probs_and_gradients(copy.deepcopy(model), rows)
    checkpoint_activations(model, "full")
    moved, cpu = [], torch.Tensor.cpu
    with model.offload_activations(True), monkeypatch.context() as context:
        context.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tuple(tensor.shape)) or cpu(tensor))
        found = [model(row).log_probs for row in rows]
    sum(log_probs.sum() for log_probs in found).backward()
    assert_same((found, [parameter.grad for parameter in model.parameters()]), expected)
    for row in rows:
        assert moved.count((1, row.tokens.shape[1], 48)) >= 3
    # The output projection, its weight and its log-probs stay where they are: they are needed at once.
    assert not [shape for shape in moved if 97 in shape]
    with model.offload_activations(False):
        assert model(rows[0]).log_probs.equal(found[0])
