"""The operations by which work is shared out and speed-up foretold, against those of a forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", minversion="5.24")

from decoders import build, make_examples
from prefix_sharing.attention import ChainsMask
from prefix_sharing.hosts.transformers import to_tree_model
from prefix_sharing.trees import PrefixTree, Row, TreeSizes


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi", "gpt_neox", "qwen3_moe", "deepseek_v3"])
def test_operations_are_those_of_a_forward_pass(name, monkeypatch):
    model = to_tree_model(build(name, experts_implementation="eager").float(), "chains")
    trees = [PrefixTree.from_responses(example) for example in make_examples()]
    sizes = TreeSizes.of([tree.size for tree in trees])
    num_visible, in_attention, attend = sizes.num_visible.sum(), [], ChainsMask.attend

    def counted(self, q, k, v, **kwargs):
        # Of a query and a key that it sees: a product of the one's size, and one of the value's.
        in_attention.append(2 * q.shape[1] * (q.shape[3] + v.shape[3]) * num_visible)
        return attend(self, q, k, v, **kwargs)

    monkeypatch.setattr(ChainsMask, "attend", counted)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(Row.from_examples(make_examples()))
    of_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert of_attention.overloadpacket not in counter.get_flop_counts()["Global"]
    # Those of rotary embeddings, which look like a small product, are not in the formula.
    expected = counter.get_total_flops() + sum(in_attention)
    assert model.forward_flops(sizes).sum() == pytest.approx(expected, rel=0.01)
