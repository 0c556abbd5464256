"""The parts of a step: casts of weights under autocast."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plain import FAMILIES, response
from prefix_sharing.hosts import checkpoint_activations, to_tree_model
from prefix_sharing.run.optimization import weights_cast_once
from prefix_sharing.trees import Row

CPU = torch.device("cpu")


class CountCasts(TorchDispatchMode):
    def __init__(self, parameters):
        super().__init__()
        self.casts = {id(parameter): 0 for parameter in parameters}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and id(args[0]) in self.casts:
            self.casts[id(args[0])] += 1
        return func(*args, **(kwargs or {}))


def casts_and_gradients(once, ac_mode=None):
    torch.manual_seed(0)
    model = to_tree_model(FAMILIES["llama3"](), "chains")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if ac_mode:
        checkpoint_activations(model, ac_mode)
    rows = [
        Row.from_examples([[response([1, 2, 3, a], [0, 0, 1, 1]), response([1, 2, a, 4], [0, 0, 1, 1])]])
        for a in (5, 6, 7)
    ]
    context = weights_cast_once(CPU) if once else contextlib.nullcontext()
    with context, CountCasts(model.parameters()) as count:
        for row in rows:
            with torch.autocast("cpu", torch.bfloat16):
                log_probs = model(row).log_probs
            log_probs.sum().backward()
    return set(count.casts.values()) - {0}, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("ac_mode", [None, "full"])
def test_each_weight_is_cast_once_in_a_step_and_nothing_else_changes(ac_mode):
    often, expected = casts_and_gradients(once=False, ac_mode=ac_mode)
    assert min(often) == 3
    once, gradients = casts_and_gradients(once=True, ac_mode=ac_mode)
    assert once == {1}
    for gradient, e in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, e)


def test_casts_are_forgotten_when_a_step_ends():
    linear = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(2, 4)
    found = []
    for _ in range(2):
        with weights_cast_once(CPU), torch.autocast("cpu", torch.bfloat16):
            found.append(linear(x))
        with torch.no_grad():
            linear.weight.add_(1.0)
    assert not torch.equal(*found)
