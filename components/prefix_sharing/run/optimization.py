"""Parts of an optimizer step that need care: random numbers, casts of weights and the gradient's norm."""

import contextlib
import logging

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from prefix_sharing.checkpoint import TrainingCheckpoint
from prefix_sharing.distributed import broadcast_object, this_rank

log = logging.getLogger(__name__)


def choose_seed(seed: int | None, resumed: TrainingCheckpoint | None = None) -> int:
    """The run's seed: the config's, or else that of the run which is continued, or one that is drawn and logged.

    Args:
        seed (int | None): the config's.
        resumed (TrainingCheckpoint | None): what the run continues from. Default: None.

    Returns:
        int: the same on every rank.
    """
    if seed is None and resumed is not None:
        seed = resumed.values["seed"]
    if seed is None:
        seed = broadcast_object(int(np.random.SeedSequence().generate_state(1)[0]))
        log.info("seed: %d", seed)
    return seed


def seed_step(seed: int, step: int) -> None:
    """Starts torch's random numbers anew, so that seed, step and rank decide them and nothing that happened before.

    Dropout is then the same whether or not reference log-probs came from the cache, and after a resume.

    Args:
        seed (int): the run's seed.
        step (int): optimizer steps done.
    """
    state = np.random.SeedSequence([seed, step, this_rank().rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def weights_cast_once(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Within it autocast casts each weight at most once, however many forward passes there are.

    Autocast forgets its casts when the outermost context ends, and one that casts nothing itself is an outermost
    context, too. Weights must not change meanwhile, and a pass without gradients does not belong here: a cast that it
    makes has none for later ones either.

    Args:
        device (torch.device): where the model runs.

    Returns:
        contextlib.AbstractContextManager[None]: the context.
    """
    return torch.autocast(device.type, enabled=False)


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Measures the gradient's norm over all ranks, and scales the gradient down where the norm is larger than allowed.

    Args:
        model (nn.Module): the model, sharded or not.
        max_norm (float | None): the maximum norm; None changes no gradient.

    Returns:
        torch.Tensor: the norm before, a scalar.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
