"""Which host a model, or a checkpointer, belongs to."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.training import set_default_dtype

from prefix_sharing.attention import AttentionBackend
from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.config import component_name, instantiate
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts import torchtune
from prefix_sharing.hosts.answer_model import AnswerModel
from prefix_sharing.hosts.tree_model import TreeModel

log = logging.getLogger(__name__)


def build_answer_model(node: DictConfig, device: torch.device, dtype: torch.dtype) -> AnswerModel:
    """Builds the model of a config for generation, without weights.

    Args:
        node (DictConfig): the config's ``model``.
        device (torch.device): where it runs.
        dtype (torch.dtype): what it computes in.

    Returns:
        AnswerModel: the host's.
    """
    with torch.device("meta"), set_default_dtype(dtype):
        model = instantiate("model", node)
    return _host_of(model).AnswerModel(model, device, dtype)


def check_arithmetic(node: DictConfig, *, gradients: bool) -> None:
    """Tries on a small random model like a config's that a tree gives what separate sequences give.

    Args:
        node (DictConfig): the config's ``model``.
        gradients (bool): whether gradients are compared, too.

    Raises:
        ConfigError: if the model cannot be built, or computes something else over a tree.
    """
    with torch.device("meta"):
        model = instantiate("model", node)
    host = _host_of(model)
    if host is torchtune:
        name = component_name(node)
        differences = torchtune.check_arithmetic(name, model, gradients=gradients)
    else:
        name = model.config.model_type
        differences = host.check_arithmetic(model, gradients=gradients)
    log.info("Self-check of %s passed: over a tree and over separate sequences %s", name, differences)


def paired_model(model: nn.Module, beta: float) -> torchtune.PairedModel:
    """A model as its library builds it, with the paired computation of DPO that the benchmark compares with.

    Args:
        model (nn.Module): as for ``to_tree_model``.
        beta (float): of the DPO loss.

    Returns:
        torchtune.PairedModel: or that of another host.
    """
    return _host_of(model).PairedModel(model, beta)


def to_tree_model(
    model: nn.Module, attention_backend: AttentionBackend, kernel_options: Mapping[str, Any] | None = None
) -> TreeModel:
    """Turns a built model of a host's library, in place, into one that takes a Row and returns its log-probs.

    Call it before compilation, activation checkpointing and sharding.

    Args:
        model (nn.Module): as torchtune's builders or ``prefix_sharing.hosts.transformers.causal_lm`` return it.
        attention_backend (AttentionBackend): see ``prefix_sharing.attention.choose_attention_backend``.
        kernel_options (Mapping[str, Any] | None): handed to FlexAttention. Default: None.

    Returns:
        TreeModel: the same object.

    Raises:
        ConfigError: if the model has parts whose arithmetic tree attention does not cover.
    """
    return _host_of(model).to_tree_model(model, attention_backend, kernel_options)


def load_checkpoint(key: str, node: DictConfig, *, adapter: str | None = None) -> tuple[Any, Checkpoint]:
    """Finds or reads what a run starts from, by a host's checkpointer.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        adapter (str | None): path of a trained adapter to begin with, a file of torchtune's or a directory of PEFT's.
            Default: None.

    Returns:
        tuple[Any, Checkpoint]: the checkpointer, which may be None on ranks other than 0, and the checkpoint.

    Raises:
        UserError: if there is no such checkpoint.
    """
    return _host_of_checkpointer(node).load_checkpoint(key, node, adapter=adapter)


def load_trained_checkpoint(key: str, node: DictConfig, epoch: int) -> Checkpoint:
    """Finds or reads what a run wrote to its ``output_dir``.

    Args:
        key (str): the config's key, for messages.
        node (DictConfig): its value.
        epoch (int): after which epoch, from 0.

    Returns:
        Checkpoint: as for ``load_checkpoint``.

    Raises:
        UserError: if there is nothing.
    """
    epoch_dir = Path(node.output_dir) / f"epoch_{epoch}"
    if not epoch_dir.is_dir():
        raise ConfigError(f"{key}.output_dir", f"{epoch_dir} not found; train with this config first")
    return _host_of_checkpointer(node).load_trained_checkpoint(key, node, epoch_dir)


def merged_weights(node: DictConfig, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
    """What a checkpoint's base and adapter make together.

    Args:
        node (DictConfig): the config's ``model``.
        checkpoint (Checkpoint): the checkpoint.

    Returns:
        Mapping[str, torch.Tensor]: the weights of a model without an adapter; those of the checkpoint if it has none.
    """
    with torch.device("meta"):
        model = instantiate("model", node)
    return _host_of(model).merged_weights(model, checkpoint)


def read_weight_file(node: DictConfig, file: Path) -> Checkpoint:
    """Finds or reads weights by the names that checkpoints have.

    Args:
        node (DictConfig): the config's ``checkpointer``.
        file (Path): a ``model.safetensors`` with nothing else.

    Returns:
        Checkpoint: as for ``load_checkpoint``.
    """
    return _host_of_checkpointer(node).read_weight_file(file)


def save_checkpoint(checkpointer: Any, model: TreeModel, *, epoch: int, cfg: DictConfig) -> None:
    """Writes a model as its library does; a collective.

    Args:
        checkpointer (Any): what ``load_checkpoint`` returned.
        model (TreeModel): the model, sharded or not.
        epoch (int): the epoch that is finished, from 0.
        cfg (DictConfig): the run's config.
    """
    _host_of_checkpointer(cfg.checkpointer).save_checkpoint(checkpointer, model, epoch=epoch, cfg=cfg)


def _host_of(model: nn.Module) -> Any:
    return _host(type(model).__module__.partition(".")[0] == "transformers")


def _host_of_checkpointer(node: DictConfig) -> Any:
    return _host(str(node._component_).startswith("prefix_sharing.hosts.transformers."))


def _host(is_of_transformers: bool) -> Any:
    """The room of a host."""
    if is_of_transformers:
        from prefix_sharing.hosts import transformers  # the library takes seconds to import

        return transformers
    return torchtune
