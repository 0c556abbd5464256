"""What a run holds in memory, as measured."""

import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer
from torchtune import training

from prefix_sharing.distributed import local_part


def memory_by_part(model: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    """What parameters, their gradients and the optimizer's state take on this rank; the rest of a peak is activations.

    Gradients are as large as the parameters that have one; those that wait unsharded for a step's last Row take more.

    Args:
        model (nn.Module): sharded or not.
        optimizer (Optimizer): after its first step.

    Returns:
        dict[str, float]: in GiB.
    """

    def size(tensors: Iterable[torch.Tensor]) -> float:
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
        (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
