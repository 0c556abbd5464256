"""Weights and training state, on one device or sharded, by torchtune's checkpointers."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training

from prefix_sharing.config import explained, instantiate
from prefix_sharing.errors import UserError
from prefix_sharing.training.adapters import (
    adapter_to_save,
    correct_peft_file,
    has_adapter,
    initial_adapter,
    is_adapter_key,
    merged,
)
from prefix_sharing.training.distributed import (
    broadcast_from_rank_zero,
    broadcast_object,
    is_quantized,
    is_rank_zero,
    quantize_like,
)

log = logging.getLogger(__name__)

LR_SCHEDULER_KEY = "lr_scheduler"

_PEFT_FILE = "adapter_model.safetensors"


def load_checkpoint(
    key: str, node: DictConfig, *, resume: bool = False, adapter: str | None = None
) -> tuple[Any, dict[str, Any]]:
    """Builds a checkpointer and reads its checkpoint, both on rank 0 only.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        resume (bool): whether to read the last epoch saved in its ``output_dir``, with the training state.
            Default: False.
        adapter (str | None): path of a trained adapter in torchtune's format, to begin with unless the run resumes.
            Default: None.

    Returns:
        tuple[Any, dict[str, Any]]: the checkpointer and what it read; on other ranks None and what is no tensor.

    Raises:
        UserError: if there is no such checkpoint.
    """
    checkpointer, checkpoint = None, {}
    if is_rank_zero():
        overrides = _weights_of_last_epoch(Path(node.output_dir)) if resume else {}
        checkpointer = instantiate(key, node, should_load_recipe_state=resume, **overrides)
        with explained(f"{key}: {node._component_}"):
            checkpoint = checkpointer.load_checkpoint()
        if adapter is not None and not resume:
            with explained("Config: adapter_checkpoint"):
                checkpoint[training.ADAPTER_KEY] = torch.load(adapter, map_location="cpu", weights_only=True)
    of_rank_zero = (training.MODEL_KEY, training.ADAPTER_KEY, training.OPT_KEY)
    small = broadcast_object({k: v for k, v in checkpoint.items() if k not in of_rank_zero})
    return checkpointer, {**{name: {} for name in of_rank_zero}, **small, **checkpoint}


def load_trained_checkpoint(key: str, node: DictConfig, epoch: int) -> dict[str, Any]:
    """Reads what a run left in its ``output_dir``.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        epoch (int): after which epoch, from 0.

    Returns:
        dict[str, Any]: as for ``load_checkpoint``.

    Raises:
        UserError: if there is nothing.
    """
    epoch_dir = Path(node.output_dir) / f"epoch_{epoch}"
    if not epoch_dir.is_dir():
        raise UserError(f"{key}: there is no {epoch_dir}; train with this config first.")
    adapter = epoch_dir / "adapter_model.pt"
    if adapter.exists():
        return load_checkpoint(key, node, adapter=str(adapter))[1]
    node = node.copy()
    node.checkpoint_files = [str(file.resolve()) for file in _weight_files(epoch_dir)]
    return load_checkpoint(key, node)[1]


def load_weights(model: nn.Module, checkpoint: dict[str, Any], seed: int) -> None:
    """Copies a checkpoint's weights into a model, sharded or not, after checking that they fit.

    Args:
        model (nn.Module): the model.
        checkpoint (dict[str, Any]): as ``load_checkpoint`` returned it; full tensors of any precision.
        seed (int): decides the adapter, if the model has one and the checkpoint none.

    Raises:
        UserError: if a tensor is missing, left over, or of another shape.
    """
    adapter = checkpoint.get(training.ADAPTER_KEY, {})
    state_dict = checkpoint[training.MODEL_KEY] | adapter
    if is_rank_zero():
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if not adapter:
            shapes = {name: shape for name, shape in expected.items() if is_adapter_key(name)}
            state_dict |= initial_adapter(shapes, state_dict, seed)
        given = {name: tensor.shape for name, tensor in state_dict.items()}
        for name in [*expected, *given]:
            if expected.get(name) != given.get(name):
                raise UserError(
                    f"checkpointer: the checkpoint does not fit the model: {name} is {_shape(given.get(name))} there, "
                    f"but {_shape(expected.get(name))} in the model; check model and checkpointer."
                )
    state_dict = dict(state_dict)
    options = _options()
    if dist.is_initialized():  # set_model_state_dict cannot shard what is quantized
        options.strict = not _load_quantized(model, state_dict)
    set_model_state_dict(model, state_dict, options=options)


def _load_quantized(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> bool:
    """Takes the weights that are NF4 in a sharded model out of rank 0's state dict; whether there are any."""
    names = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    quantized = {name: parameter for name, parameter in names.items() if is_quantized(parameter)}
    for name, parameter in quantized.items():
        values = torch.empty(parameter.shape, device=parameter.device)
        if is_rank_zero():
            values.copy_(state_dict.pop(name))
        parameter.to_local().copy_(quantize_like(parameter, broadcast_from_rank_zero(values)))
    return bool(quantized)


def save_checkpoint(
    checkpointer: Any,
    model: nn.Module,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler | None,
    *,
    epoch: int,
    cfg: DictConfig,
) -> None:
    """Writes the weights in the checkpointer's format and, unless training is done, what it takes to go on.

    Of a model with an adapter, the adapter alone, in torchtune's format and in PEFT's, and with
    ``save_adapter_weights_only: False`` also the model it makes of the base; PEFT's files are in ``adapter`` then.

    Args:
        checkpointer (Any): one of torchtune's.
        model (nn.Module): the model, sharded or not.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
        epoch (int): the epoch that is finished, from 0.
        cfg (DictConfig): the run's config, with the seed that was used.
    """
    is_last = epoch + 1 == cfg.epochs
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    adapter_only = has_adapter(model) and cfg.save_adapter_weights_only
    # The frozen base need not be gathered where the adapter alone is saved.
    weights = get_model_state_dict(model, options=dataclasses.replace(options, ignore_frozen_params=adapter_only))
    checkpoint = {}
    if has_adapter(model) and is_rank_zero():
        adapter, adapter_config = adapter_to_save(model, weights)
        checkpoint |= {training.ADAPTER_KEY: adapter, training.ADAPTER_CONFIG: adapter_config}
        if not adapter_only:
            weights = merged(model, weights)
    if not adapter_only:
        checkpoint[training.MODEL_KEY] = weights
    if not is_last:
        checkpoint |= {
            training.OPT_KEY: get_optimizer_state_dict(model, optimizer, options=options),
            LR_SCHEDULER_KEY: None if lr_scheduler is None else lr_scheduler.state_dict(),
            training.EPOCHS_KEY: epoch + 1,
            training.SEED_KEY: cfg.seed,
        }
    if is_rank_zero():
        checkpointer.save_checkpoint(
            checkpoint, epoch=epoch, intermediate_checkpoint=not is_last, adapter_only=adapter_only
        )
        epoch_dir = Path(cfg.checkpointer.output_dir) / f"epoch_{epoch}"
        if has_adapter(model) and (epoch_dir / _PEFT_FILE).exists():
            correct_peft_file(epoch_dir / _PEFT_FILE, adapter, model)
        if has_adapter(model) and not adapter_only:
            _put_adapter_apart(epoch_dir)
    if dist.is_initialized():
        dist.barrier()


def load_training_state(
    checkpoint: dict[str, Any], model: nn.Module, optimizer: Optimizer, lr_scheduler: LRScheduler | None
) -> None:
    """Puts optimizer and schedule back to where ``save_checkpoint`` left them.

    Args:
        checkpoint (dict[str, Any]): as ``load_checkpoint`` with ``resume`` read it.
        model (nn.Module): the model.
        optimizer (Optimizer): its optimizer.
        lr_scheduler (LRScheduler | None): its schedule.
    """
    set_optimizer_state_dict(model, optimizer, checkpoint[training.OPT_KEY], options=_options())
    if lr_scheduler is not None and checkpoint[LR_SCHEDULER_KEY] is not None:
        lr_scheduler.load_state_dict(checkpoint[LR_SCHEDULER_KEY])


def _put_adapter_apart(epoch_dir: Path) -> None:
    """Moves PEFT's files: from where they lie beside a whole model, transformers would apply the adapter once more."""
    (epoch_dir / "adapter").mkdir(exist_ok=True)
    for file in epoch_dir.glob("adapter_*"):
        if file.suffix != ".pt":
            file.replace(epoch_dir / "adapter" / file.name)


def _options() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def _weights_of_last_epoch(output_dir: Path) -> dict[str, Any]:
    """Which weights belong to the training state in ``output_dir``, for a checkpointer, relative to the directory."""
    state_file = output_dir / "recipe_state" / "recipe_state.pt"
    if not state_file.is_file():
        raise UserError(
            f"Config: resume_from_checkpoint is true, but there is no {state_file}; training state is saved after "
            "every epoch but the last."
        )
    epochs_done = torch.load(state_file, map_location="cpu", weights_only=True, mmap=True)[training.EPOCHS_KEY]
    epoch_dir = output_dir / f"epoch_{epochs_done - 1}"
    adapter = epoch_dir / "adapter_model.pt"
    if adapter.exists():  # over the base model that the config names
        log.info("Resuming after %d epochs from %s", epochs_done, adapter)
        return {"adapter_checkpoint": str(adapter.relative_to(output_dir))}
    files = _weight_files(epoch_dir)
    log.info("Resuming after %d epochs from %s", epochs_done, epoch_dir)
    return {"checkpoint_files": [str(file.relative_to(output_dir)) for file in files]}


def _weight_files(epoch_dir: Path) -> list[Path]:
    files = [file for file in sorted(epoch_dir.glob("*model*")) if file.suffix in (".safetensors", ".bin")]
    if not files:
        raise UserError(f"checkpointer: there are no weights in {epoch_dir}.")
    return files


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
