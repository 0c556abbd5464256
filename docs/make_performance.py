"""What a step on a GPU is made of, by counting: ``python docs/make_performance.py`` prints the tables of its page.

Forward, backward and update of one Row are taken on tensors without values, and each operator's operations and bytes
are added up. Nothing is measured. Attention is counted as FlexAttention's kernels would compute it: visible scores
only, and each tensor read or written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils._pytree import tree_leaves

from prefix_sharing.attention import TreeMask
from prefix_sharing.benchmark.layers import one_pair
from prefix_sharing.config import TrainingConfig, check_config, find_config
from prefix_sharing.run.optimization import weights_cast_once
from prefix_sharing.run.setup import build_model
from prefix_sharing.torch_private import FakeTensorMode, TorchDispatchMode
from prefix_sharing.trees import PrefixTree, Row, RowOptions

CONFIGS = ("llama3_1/8B_lora_prefix_dpo_single_device", "llama3_2/1B_prefix_dpo_single_device")
PAIRS = ((5, 2048, 512), (8, 1024, 512))
"""Pairs in a Row, and tokens of a prompt and of each response: as many as fit into 16,384 tokens."""

FLOPS, BANDWIDTH = 989e12, 3.35e12
"""An H100 SXM's bf16 products without sparsity and bytes of memory, a second, by its data sheet."""

_CPU = torch.device("cpu")
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
_NO_KERNEL = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view"}


@dataclass
class Cost:
    """What the operators of a kind come to: operations, bytes read and written, and their number."""

    flops: float = 0.0
    moved: float = 0.0
    calls: int = 0

    def seconds(self) -> float:
        """The least time it can take."""
        return max(self.flops / FLOPS, self.moved / BANDWIDTH)


class Count(TorchDispatchMode):
    """Adds up every operator, as products of matrices or as one of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.costs = {kind: Cost() for kind in ("matrix products", "attention", "everything else", "clip and AdamW")}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            is_product = func in _PRODUCTS
            tensors = [x for x in tree_leaves((args, output)) if isinstance(x, torch.Tensor)]
            flops = 2.0 * args[-2].numel() * args[-1].shape[-1] if is_product else 0.0
            self.add("matrix products" if is_product else "everything else", flops, tensors)
        return output

    def add(self, kind: str, flops: float, tensors: list[torch.Tensor]) -> None:
        """Adds an operator that computes so much and reads or writes these tensors."""
        cost = self.costs[kind]
        cost.flops += flops
        cost.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        cost.calls += 1


def attention_counted_by(count: Count, num_visible: float, of_predictors: float) -> Callable[..., Any]:
    """A mask that computes nothing.

    Args:
        count (Count): what it is counted by.
        num_visible (float): scores that are not masked, of all tokens.
        of_predictors (float): the same, of the queries of the last layer.
    """

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: float) -> torch.Tensor:
            ctx.save_for_backward(q, k, v)
            ctx.flops = 4.0 * q.shape[1] * q.shape[3] * scores
            output = torch.empty_like(q)
            count.add("attention", ctx.flops, [q, k, v, output])
            return output

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
            q, k, v = ctx.saved_tensors
            grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            # Scores once more, and four products: 2.5 times the forward.
            count.add("attention", 2.5 * ctx.flops, [q, k, v, q, grad, *grads])
            return *grads, None

    class Mask(TreeMask):
        def __init__(self, row: Row, *, at_predictors: bool = False, window: int | None = None) -> None:
            self.scores = of_predictors if at_predictors else num_visible

        def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
            return Attention.apply(q, k, v, self.scores)

    return Mask


def count_step(cfg: DictConfig, num_pairs: int, prefix: int, completion: int, *, share_prefix: bool) -> Count:
    """Counts forward, backward and update of one Row.

    Args:
        cfg (DictConfig): a training config.
        num_pairs (int): pairs in it.
        prefix (int): tokens of a prompt.
        completion (int): tokens of a response.
        share_prefix (bool): whether each prompt is there once or twice.
    """
    pair, count = one_pair(prefix, completion), Count()
    row = Row.from_examples([pair] * num_pairs, options=RowOptions(share_prefix))
    size = PrefixTree.from_responses(pair, share_prefix=share_prefix).size
    # A predictor sees the prompt, and half of its response on average.
    of_predictors = size.num_predictors * (prefix + completion / 2)
    model: Any = build_model(cfg, _CPU)
    model.mask_of = attention_counted_by(count, num_pairs * size.num_visible, num_pairs * of_predictors)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        model.materialize(_CPU)
        row = row.map_tensors(fake.from_tensor)
        with count, weights_cast_once(_CPU):
            with torch.autocast("cpu", torch.bfloat16):
                log_probs = model(row).log_probs
            log_probs.sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The norm reads gradients, scaling reads and writes them; AdamW reads four numbers a weight and writes three.
    count.add("clip and AdamW", 0.0, [parameter for parameter in trained for _ in range(3 + 7)])
    return count


def tables(name: str, num_pairs: int, prefix: int, completion: int) -> str:
    """A table of parts, as Markdown.

    Args:
        name (str): a shipped config.
        num_pairs (int): pairs in a Row.
        prefix (int): tokens of a prompt.
        completion (int): tokens of a response.
    """
    on_cpu = {"device": "cpu", "attention_backend": "chains", "compile": False}
    base: Any = OmegaConf.merge(OmegaConf.load(find_config(name)), on_cpu)
    cfg = check_config(base, TrainingConfig)
    count, paired = (count_step(cfg, num_pairs, prefix, completion, share_prefix=share) for share in (True, False))
    lines = [
        f"`{name}`, a Row of {num_pairs} pairs of ({prefix}, {completion}, {completion}):",
        "",
        "| part | TFLOP | GB | operators | ms at the data sheet's speed | at 60 % | at 40 % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    total = Cost()
    for kind, cost in count.costs.items():
        lines.append(describe(kind, cost, cost.seconds()))
        total = Cost(total.flops + cost.flops, total.moved + cost.moved, total.calls + cost.calls)
    seconds, without = (sum(cost.seconds() for cost in each.costs.values()) for each in (count, paired))
    lines += [describe("together", total, seconds), ""]
    fused = sum(cost.seconds() for kind, cost in count.costs.items() if kind != "everything else")
    share = total.flops / FLOPS / seconds
    lines += [
        f"At the data sheet's speed that is {share:.0%} of peak, and {total.flops / FLOPS / fused:.0%} if what lies "
        f"between products cost nothing. The same pairs without sharing take {without / seconds:.2f} times as long."
    ]
    return "\n".join(lines)


def describe(part: str, cost: Cost, seconds: float) -> str:
    """A line of a table."""
    times = " | ".join(f"{1e3 * seconds / share:,.0f}" for share in (1.0, 0.6, 0.4))
    return f"| {part} | {cost.flops / 1e12:,.0f} | {cost.moved / 1e9:,.0f} | {cost.calls:,} | {times} |"


if __name__ == "__main__":
    print("\n\n".join(tables(name, *pairs) for name in CONFIGS for pairs in PAIRS))
