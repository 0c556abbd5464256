"""Every private name of torch that this package uses, in one place to look at when a new torch comes out.

============================= =========================================================================================
name                          what for
============================= =========================================================================================
``checkpoint_wrapper``        layers that compute their activations again: torchtune and torchtitan use the same wrapper
``attention_operators``       what ``ac_mode: selective`` keeps: there is no public list of attention kernels
``raise_recompile_limits``    how many shapes of compiled attention dynamo keeps, and ``num_graphs_compiled``
``CHECKPOINT_PREFIX``         what that wrapper puts into the names of parameters
``FakeTensorMode``            tensors without values, on which the memory estimate takes a step, and
                              ``unset_fake_temporarily`` where a real one is needed
``MemTracker``                what holds memory while it does, and ``FSDPMemTracker`` with FSDP2
``FakeStore``                 a process group of ranks that do not exist
``TorchDispatchMode``         sees every operator: the benchmark counts matrix products, and knows ``CPU_ATTENTION``
                              and ``GROUPED_PRODUCT``; ``ShapesOfGroupedProducts``
``local_dtensor``             a sharded tensor around a local one that ``DTensor.from_local`` cannot take
``PLACES_IN_TENSORS``         under which key ``HuggingFaceStorageReader`` finds where a rank's part of a tensor lies
============================= =========================================================================================
"""

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY as PLACES_IN_TENSORS
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = [
    "CHECKPOINT_PREFIX",
    "CPU_ATTENTION",
    "CPU_ATTENTION_BACKWARD",
    "GROUPED_PRODUCT",
    "PLACES_IN_TENSORS",
    "FSDPMemTracker",
    "FakeStore",
    "FakeTensorMode",
    "MemTracker",
    "ShapesOfGroupedProducts",
    "TorchDispatchMode",
    "apply_activation_checkpointing",
    "attention_operators",
    "checkpoint_wrapper",
    "local_dtensor",
    "num_graphs_compiled",
    "raise_recompile_limits",
    "unset_fake_temporarily",
]

CHECKPOINT_PREFIX = "_checkpoint_wrapped_module."
"""What ``checkpoint_wrapper`` puts into the names of parameters, though not of state dicts."""

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
"""Of experts."""


def attention_operators() -> list[Any]:
    """The operators of attention on any device."""
    return [
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        CPU_ATTENTION,
        torch.ops.torch_attn._varlen_attn.default,
        torch._higher_order_ops.flex_attention,
        torch._higher_order_ops.inductor_compiled_code,  # FlexAttention, compiled
    ]


class ShapesOfGroupedProducts(TorchDispatchMode):
    """Has products of groups, those of experts, on tensors without values: torch itself does for bf16 only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not GROUPED_PRODUCT:
            return func(*args, **kwargs)
        a, b = args[:2]
        shape = [a.shape[-2], b.shape[-1]]
        if a.dim() == b.dim():
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            shape.insert(0, len(a) if a.dim() == 3 else len(offsets))
        return a.new_empty(shape)


def raise_recompile_limits(limit: int, accumulated: int) -> None:
    """Lets dynamo keep at least so many graphs of a function before it falls back to running it uncompiled.

    Args:
        limit (int): graphs of one code object.
        accumulated (int): graphs of all of them.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, accumulated)


def num_graphs_compiled() -> int:
    """How many graphs dynamo has had compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")  # which is not imported before something is compiled
    return 0 if utils is None else utils.counters["stats"]["unique_graphs"]


def local_dtensor(local: torch.Tensor, like: DTensor) -> DTensor:
    """A sharded tensor of which this rank holds ``local``, spread over the ranks as ``like`` is.

    Args:
        local (torch.Tensor): this rank's part; a subclass that has no views, such as NF4, will do.
        like (DTensor): a tensor of the same shape.

    Returns:
        DTensor: without a gradient.
    """
    return DTensor(local, like._spec, requires_grad=False)


def __getattr__(name: str) -> Any:
    """Imports what takes half a second only where it is used."""
    if name == "MemTracker":
        from torch.distributed._tools.mem_tracker import MemTracker

        return MemTracker
    if name == "FSDPMemTracker":
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

        return FSDPMemTracker
    if name == "FakeStore":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        return FakeStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
