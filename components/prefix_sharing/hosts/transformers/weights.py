"""Reading and writing directories of models as transformers has them, into and out of models that may be sharded."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.distributed.tensor import DTensor, distribute_tensor

from prefix_sharing.checkpoint import Checkpoint, complete_directory, full_weights
from prefix_sharing.config import instantiate
from prefix_sharing.distributed import is_rank_zero
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts.companions import is_companion
from prefix_sharing.hosts.fitting import check_tensors_fit
from prefix_sharing.hosts.tokenizer_files import replace_tokenizer
from prefix_sharing.hosts.transformers.adapters import (
    ADAPTER_FILE,
    adapter_of,
    base_name,
    has_adapter,
    initial_adapter,
    is_adapter_key,
    merged_weight,
    peft_names,
    read_adapter,
    save_adapter,
    scaling_of,
)
from prefix_sharing.hosts.transformers.files import WeightFiles, local_directory, read_config, read_into, write_from

log = logging.getLogger(__name__)

_DTYPES = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class DirectoryCheckpointer:
    """See ``checkpointer``.

    Attributes:
        path (str): directory of the base, or its name on the hub.
        output_dir (Path): where each epoch's directory goes.
        dtype (torch.dtype): of the weights that are written.
    """

    path: str
    output_dir: Path
    dtype: torch.dtype


def checkpointer(path: str, output_dir: str, save_dtype: str | None = None) -> DirectoryCheckpointer:
    """Reads and writes directories of models as transformers has them, for a config.

    Args:
        path (str): directory of the model to start from, or its name on the hub.
        output_dir (str): each epoch's model goes to ``epoch_<n>`` below it.
        save_dtype (str | None): dtype of the weights that are written, ``fp32``, ``bf16`` or ``fp16``. Default: None,
            fp32, in which they are trained. Adapters are fp32 always.

    Returns:
        DirectoryCheckpointer: what the recipes read from and write to.

    Raises:
        ConfigError: if there is no such dtype.

    Example:
        .. code-block:: yaml

            checkpointer:
              _component_: prefix_sharing.hosts.transformers.checkpointer
              path: /tmp/Qwen3-0.6B
              output_dir: /tmp/prefix_dpo_qwen3
    """
    if save_dtype not in _DTYPES:
        raise ConfigError("save_dtype", f"must be one of {', '.join(filter(None, _DTYPES))}, not {save_dtype}")
    return DirectoryCheckpointer(path, Path(output_dir), _DTYPES[save_dtype])


def load_checkpoint(key: str, node: DictConfig, *, adapter: str | None = None) -> tuple[Any, Checkpoint]:
    """Finds a checkpoint's files, whose tensors each rank reads when it has a model to put them into.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        adapter (str | None): directory of a trained adapter as PEFT saves it, to begin with. Default: None.

    Returns:
        tuple[Any, Checkpoint]: the checkpointer and the checkpoint.

    Raises:
        UserError: if there is no such checkpoint.
    """
    checkpointer: DirectoryCheckpointer = instantiate(key, node)
    source = local_directory(checkpointer.path)
    tensors = {} if adapter is None else read_adapter(Path(adapter))
    files = WeightFiles(source)
    if files.num_left_out:
        log.info(
            "%s: the decoder of text is trained and saved; %d tensors for images are not", source, files.num_left_out
        )
    return checkpointer, Checkpoint(files, tensors, source / "config.json")


def load_trained_checkpoint(key: str, node: DictConfig, epoch_dir: Path) -> Checkpoint:
    """Finds what a run wrote after an epoch.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        epoch_dir (Path): the epoch's directory.

    Returns:
        Checkpoint: as for ``load_checkpoint``.

    Raises:
        UserError: if it has no weights.
    """
    if (epoch_dir / ADAPTER_FILE).exists():
        return load_checkpoint(key, node, adapter=str(epoch_dir))[1]
    return Checkpoint(WeightFiles(epoch_dir), config_file=epoch_dir / "config.json")


def read_weight_file(file: Path) -> Checkpoint:
    """Finds weights by the names that transformers' files have.

    Args:
        file (Path): ``model.safetensors``.

    Returns:
        Checkpoint: whose tensors each rank reads when it has a model to put them into.
    """
    return Checkpoint(WeightFiles(file.parent))


def merged_weights(model: Any, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """What a checkpoint's base and adapter make together.

    Args:
        model (Any): as ``causal_lm`` and ``lora_causal_lm`` return it, with or without memory.
        checkpoint (Checkpoint): the checkpoint.

    Returns:
        Mapping[str, torch.Tensor]: the weights of a model without an adapter.
    """
    if not checkpoint.adapter:
        return checkpoint.weights
    adapter = {ours: checkpoint.adapter[name] for ours, name in peft_names(model).items()}
    weights = dict(checkpoint.weights)
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if parts := adapter_of(layer, adapter):
            weights[name] = merged_weight(weight, parts, scaling_of(model, layer))
    return weights


def load_weights(model: Any, checkpoint: Checkpoint, seed: int) -> None:
    """See ``TreeModel.load_weights``; into transformers' own model as well.

    Args:
        model (Any): the model, sharded or not.
        checkpoint (Checkpoint): the checkpoint.
        seed (int): decides the adapter, if the model has one and the checkpoint none.

    Raises:
        ConfigError: if a tensor is missing, left over, or of another shape.
    """
    if not isinstance(checkpoint.weights, WeightFiles):
        problem = "models of transformers need prefix_sharing.hosts.transformers.checkpointer"
        raise ConfigError("checkpointer", problem)
    read_into(_base_of(model), checkpoint.weights, model.config)
    if not has_adapter(model):
        if checkpoint.adapter:
            raise ConfigError("adapter_checkpoint", "the model has no adapter; choose lora_causal_lm")
        return
    adapter = initial_adapter(model, seed)
    if checkpoint.adapter:
        names = peft_names(model)
        check_tensors_fit(
            {name: adapter[ours] for ours, name in names.items()}, checkpoint.adapter, "adapter_checkpoint"
        )
        adapter = {ours: checkpoint.adapter[name] for ours, name in names.items()}
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if is_adapter_key(name):
                parameter.copy_(_laid_out_like(parameter, adapter[name]))


def _base_of(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a model without its adapter, by their names there, tied ones once."""
    tied = model.all_tied_weights_keys
    named = {base_name(name): tensor for name, tensor in model.state_dict().items() if not is_adapter_key(name)}
    return {name: tensor for name, tensor in named.items() if name not in tied}


def _laid_out_like(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that every rank has, as one that may be sharded."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def save_checkpoint(checkpointer: DirectoryCheckpointer, model: Any, *, epoch: int, cfg: DictConfig) -> None:
    """Writes a complete directory, under its name when it is complete; a collective.

    Of a model with an adapter, the adapter alone, as PEFT does, and with ``save_adapter_weights_only: False`` the model
    it makes of the base; the adapter is in ``adapter`` then.

    Args:
        checkpointer (DirectoryCheckpointer): says where.
        model (Any): the model, sharded or not.
        epoch (int): the epoch that is finished, from 0.
        cfg (DictConfig): the run's config.
    """
    with complete_directory(checkpointer.output_dir / f"epoch_{epoch}") as epoch_dir:
        adapter_only = has_adapter(model) and cfg.save_adapter_weights_only
        if has_adapter(model):
            adapter = full_weights(model, trainable_only=True)
            if is_rank_zero():
                where = epoch_dir if adapter_only else epoch_dir / "adapter"
                save_adapter(where, model, adapter, checkpointer.path)
        if not adapter_only:
            save_model(model, checkpointer, epoch_dir)
        if is_rank_zero():
            _copy_companions(local_directory(checkpointer.path), epoch_dir)
            replace_tokenizer(cfg, epoch_dir)


def save_model(model: Any, checkpointer: DirectoryCheckpointer, epoch_dir: Path) -> None:
    """Writes weights and what describes them, without an adapter; a collective.

    Args:
        model (Any): the model, sharded or not.
        checkpointer (DirectoryCheckpointer): says where its base is, and the dtype.
        epoch_dir (Path): an existing directory.
    """
    config = read_config(checkpointer.path)
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict().items() if base_name(name) not in tied}

    def without_adapter(layer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = {}
        for name, tensor in layer.items():
            if name.endswith(".base_layer.weight"):
                module = name.removesuffix(".base_layer.weight")
                tensor = merged_weight(tensor, adapter_of(module, layer), scaling_of(model, module))
            if not is_adapter_key(name):
                whole[base_name(name)] = tensor
        return whole

    write_from(tensors, epoch_dir, config, dtype=checkpointer.dtype, complete=without_adapter)
    if is_rank_zero():
        config.dtype = checkpointer.dtype
        config.architectures = [model.host_class.__name__]
        config.save_pretrained(epoch_dir)
        model.generation_config.save_pretrained(epoch_dir)


def _copy_companions(base: Path, epoch_dir: Path) -> None:
    for file in base.iterdir():
        if file.is_file() and is_companion(file):
            shutil.copyfile(file, epoch_dir / file.name)
