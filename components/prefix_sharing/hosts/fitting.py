"""Whether a checkpoint's tensors are those of a model, whatever library it is of."""

from collections.abc import Mapping

import torch

from prefix_sharing.errors import ConfigError


def check_tensors_fit(expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], look_at: str) -> None:
    """Refuses a checkpoint that does not fit the model, by its first tensor that does not.

    Args:
        expected (Mapping[str, torch.Tensor]): the model's, by name.
        given (Mapping[str, torch.Tensor]): the checkpoint's.
        look_at (str): the keys that decide both, for the message.

    Raises:
        ConfigError: if a tensor is missing, left over, or of another shape.
    """
    for name in [*expected, *given]:
        in_model, in_checkpoint = (None if name not in some else some[name].shape for some in (expected, given))
        if in_model != in_checkpoint:
            problem = (
                f"the checkpoint does not fit the model: {name} is {_shown(in_checkpoint)} in the checkpoint, but "
                f"{_shown(in_model)} in the model; check {look_at}"
            )
            raise ConfigError("checkpointer", problem)


def _shown(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
