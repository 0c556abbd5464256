"""Weights as full tensors, gathered from a model that may be sharded and put back into one, and where they go."""

import contextlib
import functools
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from prefix_sharing.distributed import is_rank_zero, wait_for_all_ranks
from prefix_sharing.errors import UserError

log = logging.getLogger(__name__)

UNFINISHED = ".writing"
"""What the name of a directory or file ends with until all of it is written."""

_BEFORE = ".before"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run starts from: full tensors of any precision, by name.

    Attributes:
        weights (Mapping[str, torch.Tensor]): the model's: on rank 0's CPU and none on other ranks, or in files that
            every rank reads.
        adapter (dict[str, torch.Tensor]): those of a trained adapter; empty where there is none.
        config_file (Path | None): the ``config.json`` that says what model the weights are of, if there is one.
    """

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    config_file: Path | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short name for the content of weights, adapter and ``config.json``, wherever they are.

        32 hexadecimal digits; on rank 0, which may have the weights alone. Reads one tensor after the other.
        """
        digest = xxhash.xxh3_128()
        if self.config_file is not None:  # no tensor has the base of rotary embeddings, or a norm's epsilon
            digest.update(self.config_file.read_bytes())
        for tensors in (self.weights, self.adapter):
            for name in sorted(tensors):
                tensor = tensors[name].detach().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def full_weights(model: nn.Module, *, trainable_only: bool = False) -> dict[str, Any]:
    """A model's weights on rank 0's CPU; a collective.

    Args:
        model (nn.Module): sharded or not.
        trainable_only (bool): whether to leave out what is frozen, which then need not be gathered. Default: False.

    Returns:
        dict[str, Any]: by name; empty on other ranks.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(model, options=options)


def set_full_weights(model: nn.Module, weights: dict[str, Any], *, strict: bool = True) -> None:
    """Copies rank 0's weights into a model; a collective.

    Args:
        model (nn.Module): sharded or not.
        weights (dict[str, Any]): by name; not looked at on other ranks.
        strict (bool): whether every name must be there. Default: True.
    """
    options = _from_rank_zero()
    options.strict = strict
    set_model_state_dict(model, weights, options=options)


@contextlib.contextmanager
def complete_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to, which gets its name when the body has ended, on every rank; a collective.

    Whoever looks finds all of it or, as long as it is not complete, what was there before.

    Args:
        directory (Path): its name; what is there is replaced.

    Yields:
        Path: an empty directory beside it.

    Raises:
        UserError: if it cannot be written.
    """
    unfinished, before = (directory.with_name(f"{directory.name}{end}") for end in (UNFINISHED, _BEFORE))
    try:
        if is_rank_zero():
            for left_over in (unfinished, before):
                shutil.rmtree(left_over, ignore_errors=True)
            unfinished.mkdir(parents=True)
        wait_for_all_ranks()
        yield unfinished
        wait_for_all_ranks()
        if is_rank_zero():
            if directory.exists():
                directory.rename(before)
            unfinished.rename(directory)
            shutil.rmtree(before, ignore_errors=True)
            log.info("Checkpoint saved to %s", directory)
        wait_for_all_ranks()
    except (OSError, SafetensorError) as error:
        if is_rank_zero():
            shutil.rmtree(unfinished, ignore_errors=True)
        free = readable_size(shutil.disk_usage(directory.parent).free)
        raise UserError(f"{directory} could not be written ({error}); {free} are free there.") from error


def readable_size(size: int) -> str:
    """A number of bytes as people say it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def complete_file(file: Path, content: str | bytes) -> None:
    """Writes a file, which gets its name when all of it is written.

    Args:
        file (Path): its name; what is there is replaced.
        content (str | bytes): what is to be in it.
    """
    unfinished = file.with_name(f".{file.name}{UNFINISHED}")
    unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
    unfinished.replace(file)


def remove_unfinished(parent: Path) -> None:
    """Removes what a process that was killed left of ``complete_directory``, ``complete_file`` and of checkpoints.

    Args:
        parent (Path): where they are; nobody else may be writing there.
    """
    for unfinished in parent.glob(f"*{UNFINISHED}"):
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
    for before in parent.glob(f"*{_BEFORE}"):
        if before.with_suffix("").exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(before.with_suffix(""))


def _from_rank_zero() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
