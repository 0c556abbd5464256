"""Activation checkpointing and compilation: what is computed or compiled again, and what is not."""

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plain import FAMILIES, response
from prefix_sharing.attention import flex
from prefix_sharing.hosts import checkpoint_activations, compile_layers, to_tree_model
from prefix_sharing.trees import Row

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = {ATTENTION: 0, torch.ops.aten.mm.default: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.calls:
            self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def calls_and_gradients(ac_mode):
    torch.manual_seed(0)
    model = to_tree_model(FAMILIES["llama3"](), "chains")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    if ac_mode is not None:
        checkpoint_activations(model, ac_mode)
    row = Row.from_examples([[response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 2, 5, 4], [0, 0, 1, 1])]])
    with Count() as count:
        model(row).log_probs.sum().backward()
    return count.calls[ATTENTION], count.calls[torch.ops.aten.mm.default], [p.grad for p in model.parameters()]


def test_selective_checkpointing_computes_no_attention_again_and_nothing_of_the_last_layer():
    attention, products, expected = calls_and_gradients(None)
    for ac_mode, more_attention, layers_again in (("full", attention, 2), ("selective", 0, 1)):
        calls, products_again, gradients = calls_and_gradients(ac_mode)
        assert calls == attention + more_attention
        # q, k, v, output, and three of the MLP, of which the last is nobody's input
        assert layers_again * 6 <= products_again - products <= layers_again * 7
        for gradient, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, e)


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)  # or they would be run uncompiled from then on
def test_layers_are_not_compiled_anew_for_every_row(monkeypatch):
    # As dynamo sees them; code is not generated.
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, graphs = to_tree_model(FAMILIES["llama3"](), "chains"), []
    compile_layers(model)
    for answers in ([4], [4, 5], [4, 5, 6], [4, 5, 6, 7, 8]):
        row = Row.from_examples([[response([1, 2, answer, 3, 9], [0, 0, 1, 1, 1]) for answer in answers]])
        with torch.no_grad():
            model(row)
        model(row).log_probs.sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[-1]


class CountCompiled(TorchDispatchMode):
    """How often code is run that was compiled to be seen."""

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.calls = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True  # or nothing would be compiled within

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch._higher_order_ops.inductor_compiled_code
        return func(*args, **(kwargs or {}))


def attention_without_kernels(q, k, v, *, enable_gqa, **_):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def test_selective_checkpointing_keeps_what_compiled_attention_gave(monkeypatch):
    # FlexAttention's own kernels have no backward on a CPU; what is compiled in their place is compiled alike.
    monkeypatch.setattr(flex, "flex_attention", attention_without_kernels)
    flex._compiled_flex_attention.cache_clear()
    row = Row.from_examples([[response([1, 2, 3, 4], [0, 0, 1, 1]), response([1, 2, 5, 4], [0, 0, 1, 1])]])
    calls = {}
    for ac_mode in (None, "full", "selective"):
        model = to_tree_model(FAMILIES["llama3"](), "flex")
        if ac_mode is not None:
            checkpoint_activations(model, ac_mode)
        with CountCompiled() as count:
            model(row).log_probs.sum().backward()
        calls[ac_mode] = count.calls
    flex._compiled_flex_attention.cache_clear()
    layers = len(model.layers)
    assert calls[None] == 2 * layers  # forward and backward
    assert calls["full"] == 3 * layers
    assert calls["selective"] == 2 * layers
