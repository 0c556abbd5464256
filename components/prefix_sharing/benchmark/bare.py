"""The matrix products of a step by themselves: no autograd, nothing element-wise. A step cannot be faster."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from prefix_sharing.torch_private import CPU_ATTENTION, CPU_ATTENTION_BACKWARD, GROUPED_PRODUCT, TorchDispatchMode

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_PLUS_A_BIAS = torch.ops.aten.addmm.default
# How many products each attention kernel makes of a matrix of scores: S, then S V; again S, then the gradients of
# V, S, Q and K.
_ATTENTION = {
    CPU_ATTENTION: 2,
    CPU_ATTENTION_BACKWARD: 5,
}


class RecordProducts(TorchDispatchMode):
    """Writes down every matrix product.

    Attributes:
        operands (Counter[tuple]): how often each pair of shapes and strides was multiplied.
        attention_flops (float): operations of the products within attention, of the scores that a token may see.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operands: Counter[tuple] = Counter()
        self.attention_flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PRODUCTS:
            self._add(*args)
        elif func is _PLUS_A_BIAS:
            self._add(*args[1:3])
        elif func is GROUPED_PRODUCT:
            # As many operations as one product has with a single expert that gets every token.
            a, b = (operand[0] if operand.dim() == 3 else operand for operand in args[:2])
            self._add(a, b)
        elif func in _ATTENTION:
            q, k = args[:2] if _ATTENTION[func] == 2 else args[1:3]
            _, heads, num_queries, head_dim = q.shape
            # Of the keys before them and the triangle of their own, queries see half a triangle less than all.
            num_keys = k.shape[2] - num_queries / 2
            self.attention_flops += _ATTENTION[func] * 2.0 * heads * num_queries * head_dim * num_keys
        return func(*args, **(kwargs or {}))

    def _add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.operands[(tuple(a.shape), a.stride()), (tuple(b.shape), b.stride())] += 1


def seconds_of_matrix_products(step: Callable[[], Any], rounds: int) -> float:
    """Repeats the matrix products of a step on tensors of the same shapes and strides.

    Those within attention are counted at the same operations per second. Products within compiled code are not seen; on
    CUDA, where attention is compiled, that is attention.

    Args:
        step (Callable[[], Any]): a training step.
        rounds (int): times each product is repeated; the median counts.

    Returns:
        float: their sum.
    """
    with RecordProducts() as record:
        step()
    total, flops = 0.0, 0.0
    for operands, count in record.operands.items():
        a, b = (torch.empty_strided(shape, stride).normal_() for shape, stride in operands)
        product = torch.mm if a.dim() == 2 else torch.bmm
        output = product(a, b)
        seconds = []
        for _ in range(rounds):
            start = time.perf_counter()
            product(a, b, out=output)
            seconds.append(time.perf_counter() - start)
        total += count * statistics.median(seconds)
        flops += count * 2.0 * math.prod(a.shape) * b.shape[-1]
    return total * (1 + record.attention_flops / flops)
