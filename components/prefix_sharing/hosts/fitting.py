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


def check_values(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses weights that no model was trained to have, after reading each of them once.

    Args:
        weights (Mapping[str, torch.Tensor]): by name, or this rank's parts of them.

    Raises:
        ConfigError: if one is of whole numbers, as quantized ones are, or has a number that is not finite.
    """
    for name, tensor in weights.items():
        problem = None
        if not tensor.is_floating_point():
            problem = f"holds {str(tensor.dtype).removeprefix('torch.')} numbers; quantized weights cannot be trained"
        elif not tensor.sum(dtype=torch.float32).isfinite():  # which one number that is not makes of the sum, too
            problem = (
                "holds numbers that are not finite; the checkpoint is damaged, or was saved by a run that diverged"
            )
        if problem is not None:
            raise ConfigError("checkpointer", f"{name} of the checkpoint {problem}")


def check_not_all_zero(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses weights of which every matrix is zero: a file that was allocated, but never written.

    Args:
        weights (Mapping[str, torch.Tensor]): by name, or this rank's parts of them.

    Raises:
        ConfigError: if so.
    """
    matrices = [tensor for tensor in weights.values() if tensor.dim() > 1 and tensor.numel() > 0]
    if matrices and not any(matrix.any() for matrix in matrices):
        raise ConfigError("checkpointer", "every weight of the checkpoint is 0; its files were not written")


def _shown(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
