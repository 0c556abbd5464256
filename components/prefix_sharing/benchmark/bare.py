"""The matrix products of a step by themselves: no autograd, nothing element-wise. A step cannot be faster."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
# How many products each attention kernel makes of a matrix of scores: S, then S V; again S, then the gradients of
# V, S, Q and K.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: 5,
}


class _Record(TorchDispatchMode):
    """Writes down the operands of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PRODUCTS:
            a, b = args
            self.products[(tuple(a.shape), a.stride()), (tuple(b.shape), b.stride())] += 1
        elif func in _ATTENTION:
            q, k = args[:2] if _ATTENTION[func] == 2 else args[1:3]
            _, heads, num_queries, head_dim = q.shape
            # Of the keys before them and the triangle of their own, queries see half a triangle less than all.
            num_keys = k.shape[2] - num_queries // 2
            a, b = (heads, num_queries, head_dim), (heads, head_dim, num_keys)
            contiguous = [(num_queries * head_dim, head_dim, 1), (head_dim * num_keys, num_keys, 1)]
            self.products[(a, contiguous[0]), (b, contiguous[1])] += _ATTENTION[func]
        return func(*args, **(kwargs or {}))


def seconds_of_matrix_products(step: Callable[[], Any], rounds: int) -> float:
    """Repeats the matrix products of a step on tensors of the same shapes and strides.

    Attention is counted as the products of the scores that a token may see. Products within compiled code are not seen;
    on CUDA, where attention is compiled, that is attention.

    Args:
        step (Callable[[], Any]): a training step.
        rounds (int): times each product is repeated; the median counts.

    Returns:
        float: their sum.
    """
    with _Record() as record:
        step()
    total = 0.0
    for operands, count in record.products.items():
        a, b = (torch.empty_strided(shape, stride).normal_() for shape, stride in operands)
        product = torch.mm if a.dim() == 2 else torch.bmm
        output = product(a, b)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            product(a, b, out=output)
            seconds.append(time.perf_counter() - start)
        total += count * statistics.median(seconds)
    return total
