"""Reading and writing weights with torchtune's checkpointers, into and out of models that may be sharded."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn
from torchtune import training, utils

from prefix_sharing.checkpoint import Checkpoint, complete_directory, full_weights, set_full_weights
from prefix_sharing.config import explained, instantiate
from prefix_sharing.distributed import is_rank_zero, wait_for_all_ranks
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts.fitting import check_not_all_zero, check_tensors_fit, check_values
from prefix_sharing.hosts.tokenizer_files import replace_tokenizer
from prefix_sharing.hosts.torchtune.adapters import (
    adapter_to_save,
    correct_peft_file,
    has_adapter,
    initial_adapter,
    is_adapter_key,
    merged,
)
from prefix_sharing.hosts.torchtune.exports import complete_export, remove_unknown_copies
from prefix_sharing.hosts.torchtune.geometry import check_geometry, config_file_of
from prefix_sharing.hosts.torchtune.quantization import dequantized, load_quantized

log = logging.getLogger(__name__)

_PEFT_FILE = "adapter_model.safetensors"

_GEMMA2_EXCHANGED = {"mlp_norm.scale": "mlp_scale.scale", "mlp_scale.scale": "mlp_norm.scale"}
"""Gemma 2's norms before and after the MLP, which torchtune 0.6.1 takes for one another."""


def load_checkpoint(key: str, node: DictConfig, *, adapter: str | None = None) -> tuple[Any, Checkpoint]:
    """Builds a checkpointer and reads its checkpoint, both on rank 0 only.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        adapter (str | None): path of a trained adapter in torchtune's format, to begin with. Default: None.

    Returns:
        tuple[Any, Checkpoint]: the checkpointer and what it read; on other ranks None and a checkpoint without tensors.

    Raises:
        UserError: if there is no such checkpoint, or its files are outside of its directory.
    """
    _check_files_are_inside(key, node)
    return _load(key, node, adapter)


def _check_files_are_inside(key: str, node: DictConfig) -> None:
    directory, files = node.get("checkpoint_dir"), node.get("checkpoint_files")
    if not isinstance(directory, str):
        return
    if OmegaConf.is_dict(files):
        files = [files.get("filename_format")]
    for file in files or []:
        # Links are not followed: in the hub's cache, every file is one.
        if os.path.relpath(os.path.join(directory, str(file)), directory).startswith(".."):
            raise ConfigError(f"{key}.checkpoint_files", f"{file} is not in checkpoint_dir; set that to its directory")


def _load(key: str, node: DictConfig, adapter: str | None = None) -> tuple[Any, Checkpoint]:
    checkpointer: Any = None
    checkpoint = Checkpoint()
    if is_rank_zero():
        checkpointer = instantiate(key, node)
        with explained(key, node._component_):
            read = checkpointer.load_checkpoint()
        if adapter is not None:
            with explained("adapter_checkpoint"):
                read[training.ADAPTER_KEY] = torch.load(adapter, map_location="cpu", weights_only=True)
        checkpoint = Checkpoint(
            _gemma2_norms_in_place(checkpointer, read[training.MODEL_KEY]),
            read.get(training.ADAPTER_KEY, {}),
            config_file_of(checkpointer),
        )
    wait_for_all_ranks()
    return checkpointer, checkpoint


def load_trained_checkpoint(key: str, node: DictConfig, epoch_dir: Path) -> Checkpoint:
    """Reads what a run wrote after an epoch.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        epoch_dir (Path): the epoch's directory.

    Returns:
        Checkpoint: as for ``load_checkpoint``.

    Raises:
        UserError: if it has no weights.
    """
    adapter = epoch_dir / "adapter_model.pt"
    if adapter.exists():
        return load_checkpoint(key, node, adapter=str(adapter))[1]
    node = node.copy()
    node.checkpoint_files = [str(file.resolve()) for file in _weight_files(epoch_dir)]
    return _load(key, node)[1]


def read_weight_file(file: Path) -> Checkpoint:
    """Reads weights by the model's own names, on rank 0 only.

    Args:
        file (Path): a safetensors file.

    Returns:
        Checkpoint: on other ranks without tensors.
    """
    return Checkpoint(load_file(file) if is_rank_zero() else {})


def merged_weights(model: nn.Module, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """What a checkpoint's base and adapter make together.

    Args:
        model (nn.Module): of torchtune, with or without memory.
        checkpoint (Checkpoint): the checkpoint.

    Returns:
        Mapping[str, torch.Tensor]: the weights of a model without an adapter.
    """
    if not checkpoint.adapter:
        return checkpoint.weights
    return merged(model, {**checkpoint.weights, **checkpoint.adapter})


def load_weights(model: nn.Module, checkpoint: Checkpoint, seed: int) -> None:
    """See ``TreeModel.load_weights``; into torchtune's own model as well.

    Args:
        model (nn.Module): the model.
        checkpoint (Checkpoint): the checkpoint.
        seed (int): decides the adapter, if the model has one and the checkpoint none.

    Raises:
        ConfigError: if a tensor is missing, left over, or of another shape, or if the checkpoint's ``config.json``
            describes another model.
    """
    state_dict = {**checkpoint.weights, **checkpoint.adapter}
    if is_rank_zero():
        if checkpoint.config_file is not None:
            check_geometry(model, checkpoint.config_file)
        expected = model.state_dict()
        if not checkpoint.adapter:
            shapes = {name: tensor.shape for name, tensor in expected.items() if is_adapter_key(name)}
            state_dict |= initial_adapter(shapes, state_dict, seed)
        check_tensors_fit(expected, state_dict, "model and checkpointer")
        check_values(state_dict)
        check_not_all_zero(checkpoint.weights)
    # What is quantized cannot be sharded by torch.distributed.checkpoint.
    strict = not (dist.is_initialized() and load_quantized(model, state_dict))
    set_full_weights(model, state_dict, strict=strict)


def save_checkpoint(checkpointer: Any, model: nn.Module, *, epoch: int, cfg: DictConfig) -> None:
    """Writes the weights in the checkpointer's format, under their name when all of them are there.

    Of a model with an adapter, the adapter alone, in torchtune's format and in PEFT's, and with
    ``save_adapter_weights_only: False`` also the model it makes of the base; PEFT's files are in ``adapter`` then.

    Args:
        checkpointer (Any): one of torchtune's.
        model (nn.Module): the model, sharded or not.
        epoch (int): the epoch that is finished, from 0.
        cfg (DictConfig): the run's config.
    """
    adapter_only = has_adapter(model) and cfg.save_adapter_weights_only
    # The frozen base need not be gathered where the adapter alone is saved.
    weights = full_weights(model, trainable_only=adapter_only)
    adapter: dict[str, torch.Tensor] = {}
    content: dict[str, Any] = {}
    if has_adapter(model) and is_rank_zero():
        adapter, adapter_config = adapter_to_save(model, weights)
        content |= {training.ADAPTER_KEY: adapter, training.ADAPTER_CONFIG: adapter_config}
        if not adapter_only:
            weights = merged(model, weights | dequantized(model))
    if not adapter_only:
        content[training.MODEL_KEY] = _gemma2_norms_in_place(checkpointer, weights)
    with complete_directory(Path(cfg.checkpointer.output_dir) / f"epoch_{epoch}") as epoch_dir:
        if is_rank_zero():
            _write(checkpointer, content, epoch, epoch_dir, adapter_only)
            if has_adapter(model) and (epoch_dir / _PEFT_FILE).exists():
                correct_peft_file(epoch_dir / _PEFT_FILE, adapter, model)
            if hasattr(checkpointer, "_checkpoint_dir"):
                remove_unknown_copies(epoch_dir, Path(checkpointer._checkpoint_dir))
            complete_export(epoch_dir, config_file_of(checkpointer), adapter_only=adapter_only)
            replace_tokenizer(cfg, epoch_dir)


def _write(checkpointer: Any, content: dict[str, Any], epoch: int, directory: Path, adapter_only: bool) -> None:
    """Has a checkpointer write to a directory of another name than the one it would choose."""
    # Its log would name files of that directory, which is about to be renamed, and ask for a merge that is not needed.
    torchtune_log = utils.get_logger()
    level, output_dir = torchtune_log.level, checkpointer._output_dir
    torchtune_log.setLevel(logging.WARNING)
    checkpointer._output_dir = directory
    try:
        checkpointer.save_checkpoint(content, epoch=epoch, intermediate_checkpoint=False, adapter_only=adapter_only)
    finally:
        checkpointer._output_dir = output_dir
        torchtune_log.setLevel(level)
    for file in list((directory / f"epoch_{epoch}").iterdir()):
        file.replace(directory / file.name)
    (directory / f"epoch_{epoch}").rmdir()


def _gemma2_norms_in_place(checkpointer: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights between a checkpointer and a model, either way."""
    if getattr(checkpointer, "_model_type", None) is not training.ModelType.GEMMA2:
        return weights
    in_place = {}
    for name, tensor in weights.items():
        norm = name.split(".", 2)[-1]  # after layers.0.
        in_place[name.removesuffix(norm) + _GEMMA2_EXCHANGED.get(norm, norm)] = tensor
    return in_place


def _weight_files(epoch_dir: Path) -> list[Path]:
    files = [file for file in sorted(epoch_dir.glob("*model*")) if file.suffix in (".safetensors", ".bin")]
    if not files:
        raise UserError(f"No weights found in {epoch_dir}.")
    return files
