"""What a run holds in memory, and what it computes again instead of holding it."""

import functools
import re
import resource
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.optim import Optimizer
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torchtune import training

from prefix_sharing.model import TreeTransformerDecoder
from prefix_sharing.training.distributed import local_part

_ATTENTION = [
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.torch_attn._varlen_attn.default,
    torch._higher_order_ops.flex_attention,
    torch._higher_order_ops.inductor_compiled_code,  # FlexAttention, compiled
]


def checkpoint_activations(model: TreeTransformerDecoder, ac_mode: str) -> None:
    """Has layers compute their activations again in the backward pass.

    Args:
        model (TreeTransformerDecoder): before sharding.
        ac_mode (str): ``full`` keeps nothing but each layer's input. ``selective`` also keeps what attention gave, the
            costliest to compute again for its size, and all of the last layer, which is computed for few tokens.
    """
    wrap, layers = checkpoint_wrapper, set(model.layers)
    if ac_mode == "selective":
        keep_attention = functools.partial(create_selective_checkpoint_contexts, _ATTENTION)
        wrap = functools.partial(checkpoint_wrapper, context_fn=keep_attention)
        layers.remove(model.layers[-1])
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrap, check_fn=layers.__contains__)


def memory_by_part(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """What parameters, their gradients and the optimizer's state take on this rank; the rest of a peak is activations.

    Args:
        model (nn.Module): sharded or not.
        optimizer (Optimizer): after its first step.

    Returns:
        dict[str, float]: in GiB.
    """

    def size(tensors: list[torch.Tensor]) -> float:
        return sum(tensor.numel() * tensor.element_size() for tensor in map(local_part, tensors)) / 1024**3

    parameters = list(model.parameters())
    state = [value for of_one in optimizer.state.values() for value in of_one.values() if torch.is_tensor(value)]
    return {
        "memory_parameters": size(parameters),
        "memory_gradients": size([parameter for parameter in parameters if parameter.requires_grad]),
        "memory_optimizer_state": size(state),
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB, under torchtune's names on CUDA, of the process elsewhere.

    Args:
        device (torch.device): where the model runs.

    Returns:
        dict[str, float]: the metrics.
    """
    if device.type == "cuda":
        return training.get_memory_stats(device)
    return {"peak_memory_process": _peak_rss() / 1024**3}


def _peak_rss() -> int:
    """Most bytes of memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage would count what the parent held when it started this process.
        kilobytes = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(kilobytes[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
