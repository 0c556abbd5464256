"""Learning rate schedules that warm up over a share of a run, whatever its number of steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from prefix_sharing.errors import ConfigError


def cosine_schedule(optimizer: Optimizer, num_training_steps: int, warmup_ratio: float = 0.1) -> LambdaLR:
    """Rises linearly, then falls to 0 along half a cosine, for a config's ``lr_scheduler``.

    Args:
        optimizer (Optimizer): whose learning rate it is.
        num_training_steps (int): of the run, which the recipe knows.
        warmup_ratio (float): share of the steps in which it rises, rounded up. Default: 0.1.

    Returns:
        LambdaLR: the schedule.

    Example:
        .. code-block:: yaml

            lr_scheduler:
              _component_: prefix_sharing.run.schedules.cosine_schedule
              warmup_ratio: 0.1
    """
    num_warmup_steps = _warmup_steps(warmup_ratio, num_training_steps)
    return get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps
    )


def linear_schedule(optimizer: Optimizer, num_training_steps: int, warmup_ratio: float = 0.1) -> LambdaLR:
    """Rises linearly, then falls to 0 linearly, for a config's ``lr_scheduler``.

    Args:
        optimizer (Optimizer): whose learning rate it is.
        num_training_steps (int): of the run, which the recipe knows.
        warmup_ratio (float): share of the steps in which it rises, rounded up. Default: 0.1.

    Returns:
        LambdaLR: the schedule.
    """
    rising = _warmup_steps(warmup_ratio, num_training_steps)

    def factor(step: int) -> float:
        if step < rising:
            return step / rising
        return (num_training_steps - step) / max(1, num_training_steps - rising)

    return LambdaLR(optimizer, factor)


def _warmup_steps(ratio: float, num_training_steps: int) -> int:
    if not 0 <= ratio <= 1:
        raise ConfigError("warmup_ratio", f"must be a share from 0 to 1, but is {ratio}")
    return math.ceil(round(ratio * num_training_steps, 6))
