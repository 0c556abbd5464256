"""What the losses share: how pairs are read from values of responses, and checks of arguments."""

import torch
import torch.nn.functional as F


def take_pairs(pairs: torch.Tensor | None, *values: torch.Tensor) -> list[torch.Tensor]:
    """Reads pairs off values of responses, so that each response is computed once whatever the number of its pairs.

    Args:
        pairs (torch.Tensor | None): ``example * K + response`` of chosen and rejected, shape ``[P, 2]``; None if the
            values are of pairs already.
        *values (torch.Tensor): values of each response, shape ``[E, K]``.

    Returns:
        list[torch.Tensor]: for each its values of the pairs, shape ``[P, 2]``.
    """
    return [value if pairs is None else value.flatten()[pairs] for value in values]


def chosen_and_rejected(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits ``[P, 2]`` into chosen and rejected, each ``[P]``.

    Raises:
        ValueError: if these are not pairs.
    """
    if values.shape[1] != 2:
        raise ValueError(f"A pairwise loss needs 2 responses per example, but there are {values.shape[1]}; give pairs.")
    return values[:, 0], values[:, 1]


def average_log_probs(log_probs: torch.Tensor, num_scored: torch.Tensor) -> torch.Tensor:
    """Log-probs per scored token, of the same shape; 0 for a response with none."""
    return log_probs / num_scored.clamp(min=1)


def smoothed_log_sigmoid_loss(h: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """``-log sigmoid(h)``, where a preference is the wrong way round with probability ``label_smoothing``."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def require(value: torch.Tensor | None, what: str, loss: object) -> torch.Tensor:
    """Refuses to continue without something that a loss needs.

    Args:
        value (torch.Tensor | None): the value.
        what (str): what it is.
        loss (object): the loss, for the message.

    Returns:
        torch.Tensor: the value.

    Raises:
        ValueError: if it is None.
    """
    if value is None:
        raise ValueError(f"{type(loss).__name__} needs {what}.")
    return value


def check_beta_and_label_smoothing(beta: float, label_smoothing: float = 0.0) -> None:
    """Refuses what is out of range.

    Raises:
        ValueError: if ``beta`` is not positive or ``label_smoothing`` not in [0, 0.5).
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, not {label_smoothing}.")
