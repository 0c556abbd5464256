"""A reference that follows the policy: the moving average of TR-DPO."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from prefix_sharing.checkpoint import complete_directory
from prefix_sharing.distributed import is_rank_zero
from prefix_sharing.errors import UserError

WEIGHTS = "model.safetensors"


def write_average(
    reference: Mapping[str, torch.Tensor], policy: Mapping[str, torch.Tensor], share: float, directory: Path
) -> None:
    """Writes the average of a reference and a policy; a collective.

    The "soft update" of Gorbatovski et al. 2024 (https://arxiv.org/abs/2404.09656):
    ``share * policy + (1 - share) * reference``.

    Args:
        reference (Mapping[str, torch.Tensor]): the reference's weights, on rank 0.
        policy (Mapping[str, torch.Tensor]): the policy's, likewise.
        share (float): the policy's, alpha there.
        directory (Path): gets ``model.safetensors``, in fp32; appears whole or not at all.

    Raises:
        UserError: if the policy has weights that the reference lacks.
    """
    with complete_directory(directory) as unfinished:
        if is_rank_zero():
            # The first reference's files may hold tied weights twice.
            if lacking := set(policy) - set(reference):
                raise UserError(f"{directory}: the policy has {min(lacking)}, and the reference has not.")
            average = {
                name: torch.lerp(reference[name].float(), policy[name].float(), share).contiguous()
                for name in tqdm(policy, desc="Averaging the reference", unit="tensor", leave=False)
            }
            save_file(average, unfinished / WEIGHTS, metadata={"format": "pt"})
