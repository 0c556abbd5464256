"""Learning rate schedules that warm up over a share of a run, whatever its number of steps."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from prefix_sharing.errors import ConfigError


def cosine_schedule(optimizer: Optimizer, num_training_steps: int, warmup_ratio: float = 0.1) -> LambdaLR:
    """Rises linearly, then falls to 0 along half a cosine, for a config's ``lr_scheduler``.

    Args:
        optimizer (Optimizer): whose learning rate it is.
        num_training_steps (int): of the run, which the recipe knows.
        warmup_ratio (float): share of the steps in which it rises, rounded up. Default: 0.1.

    Returns:
        LambdaLR: the schedule.

    Raises:
        ConfigError: if ``warmup_ratio`` is no share.

    Example:
        .. code-block:: yaml

            lr_scheduler:
              _component_: prefix_sharing.run.schedules.cosine_schedule
              warmup_ratio: 0.1
    """
    return _schedule(optimizer, num_training_steps, warmup_ratio, lambda done: 0.5 * (1 + math.cos(math.pi * done)))


def linear_schedule(optimizer: Optimizer, num_training_steps: int, warmup_ratio: float = 0.1) -> LambdaLR:
    """Rises linearly, then falls to 0 linearly; otherwise as ``cosine_schedule``."""
    return _schedule(optimizer, num_training_steps, warmup_ratio, lambda done: 1 - done)


def _schedule(optimizer: Optimizer, num_steps: int, ratio: float, falling: Callable[[float], float]) -> LambdaLR:
    if not 0 <= ratio <= 1:
        raise ConfigError("warmup_ratio", f"must be a share from 0 to 1, but is {ratio}")
    rising = math.ceil(round(ratio * num_steps, 6))  # 0.07 * 100 is a little above 7

    def factor(step: int) -> float:
        return step / rising if step < rising else falling((step - rising) / max(1, num_steps - rising))

    return LambdaLR(optimizer, factor)
