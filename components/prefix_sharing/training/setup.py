"""What both recipes build before training: device, model, data, loss, optimizer, schedule."""

import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training, utils

from prefix_sharing.attention import choose_attention_backend
from prefix_sharing.config import component_name, explained, instantiate
from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.errors import UserError
from prefix_sharing.model import TreeTransformerDecoder, to_tree_model
from prefix_sharing.training.adapters import freeze_base, has_adapter, trainable_parameters
from prefix_sharing.training.distributed import is_quantized, is_rank_zero, rank_zero_first
from prefix_sharing.training.evaluation import Evaluation
from prefix_sharing.training.memory import checkpoint_activations

log = logging.getLogger(__name__)


def set_up_logging() -> None:
    """Shows this package's log on rank 0, warnings on every rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package_log = logging.getLogger("prefix_sharing")
    package_log.handlers = [handler]
    package_log.propagate = False
    package_log.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)


def set_up_device(cfg: DictConfig) -> torch.device:
    """Chooses the device and checks what the config asks of it, and that ``output_dir`` can be written.

    Args:
        cfg (DictConfig): the run's config.

    Returns:
        torch.device: the device.

    Raises:
        UserError: if a key asks for what is not there.
    """
    with explained(f"Config: device: {cfg.device}"):
        device = utils.get_device(cfg.device)
    if cfg.device is not None and device.type != torch.device(cfg.device).type:
        raise UserError(f"Config: device: {cfg.device}, but there is none here; set device=cpu, or leave the key out.")
    with explained(f"Config: dtype: {cfg.dtype}"):
        training.get_dtype(cfg.dtype, device)
    if cfg.enable_activation_offloading and device.type != "cuda":
        raise UserError(f"Config: enable_activation_offloading needs a CUDA device, but the device is {device.type}.")
    backend = choose_attention_backend(cfg.attention_backend, device, compute_dtype(cfg))
    if cfg.flex_kernel_options is not None and backend != "flex":
        raise UserError(f"Config: flex_kernel_options: the attention backend is {backend}, which takes none.")
    try:
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.output_dir).close()
    except OSError as error:
        raise UserError(f"Config: output_dir: {cfg.output_dir} cannot be written: {error.strerror}.") from error
    return device


def compute_dtype(cfg: DictConfig) -> torch.dtype:
    """What the config has the model compute in; weights are fp32 always."""
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32


def build_model(cfg: DictConfig, device: torch.device) -> TreeTransformerDecoder:
    """Builds the model in fp32 with tree attention, compiled and checkpointed as the config says, without weights.

    Args:
        cfg (DictConfig): the run's config.
        device (torch.device): where the model runs; it is built on the meta device.

    Returns:
        TreeTransformerDecoder: on the meta device.

    Raises:
        UserError: if it cannot be built, or prefix sharing does not cover it.
    """
    with torch.device("meta"):
        model = instantiate("model", cfg.model)
    backend = choose_attention_backend(cfg.attention_backend, device, compute_dtype(cfg))
    model = to_tree_model(model, backend, cfg.flex_kernel_options)
    if dist.is_initialized() and not cfg.save_adapter_weights_only and any(map(is_quantized, model.parameters())):
        raise UserError(
            "Config: QLoRA on several devices cannot save a merged model; set save_adapter_weights_only=True."
        )
    freeze_base(model, torch.float32 if dist.is_initialized() else compute_dtype(cfg))
    if cfg.compile:
        training.compile_model(model, verbose=is_rank_zero())
    if cfg.enable_activation_checkpointing:
        checkpoint_activations(model, cfg.ac_mode)
    return model


def build_dataset(key: str, cfg: DictConfig, tokenizer: Any, model: TreeTransformerDecoder, loss: Any) -> Any:
    """Builds a data set, tokenized on one process of each machine, and checks that model and loss can take it.

    Args:
        key (str): ``dataset`` or ``dataset_val``.
        cfg (DictConfig): the run's config.
        tokenizer (Any): the tokenizer.
        model (TreeTransformerDecoder): the model.
        loss (Any): the loss.

    Returns:
        Any: a ``PrefixPreferenceDataset``, or None where the config has none.

    Raises:
        UserError: if it cannot be built or does not fit.
    """
    if cfg[key] is None:
        return None
    with rank_zero_first():
        try:
            dataset = instantiate(key, cfg[key], tokenizer)
        except UserError as error:  # the builder does not know for which key it works
            raise UserError(re.sub(r"^dataset(?=[:.])", key, str(error))) from error
    if not isinstance(dataset, PrefixPreferenceDataset):
        raise UserError(
            f"Config: {key}: {cfg[key]._component_} makes a {type(dataset).__name__}; use "
            "prefix_sharing.datasets.prefix_preference_dataset."
        )
    vocab_size = model.tok_embeddings.num_embeddings
    if dataset.largest_id >= vocab_size:
        raise UserError(
            f"{key}: the tokenizer makes token ids up to {dataset.largest_id}, but the model's vocabulary has "
            f"{vocab_size}; tokenizer and model do not belong together."
        )
    if dataset.longest > model.max_seq_len:
        raise UserError(
            f"{key}: the longest response sequence has {dataset.longest} tokens, but the model takes "
            f"{model.max_seq_len}; set {key}.max_seq_len."
        )
    for name, off in (("ld_alpha", 1.0), ("nll_over_prompt", False)):
        if getattr(loss, name, off) != off and dataset.num_responses > 2:
            raise UserError(
                f"{key}: loss.{name} is for pairs, but there are examples of {dataset.num_responses} responses."
            )
    if loss.mean_over == "tokens" and dataset.num_pairs.max() > 0:
        raise UserError(
            f"{key}: {type(loss).__name__} is for examples of one response; {key}.column_map: {{messages: chosen}} "
            "trains on the chosen ones."
        )
    if loss.mean_over != "tokens" and dataset.num_pairs.min() == 0:
        raise UserError(
            f"{key}: {type(loss).__name__} compares pairs, but {int((dataset.num_pairs == 0).sum()):,} of "
            f"{len(dataset):,} examples have one response only; leave them out with filter_fn."
        )
    return dataset


def build_lr_scheduler(cfg: DictConfig, optimizer: Optimizer, num_training_steps: int) -> LRScheduler | None:
    """The learning rate schedule, or None for a constant rate.

    Args:
        cfg (DictConfig): the run's config.
        optimizer (Optimizer): the optimizer.
        num_training_steps (int): optimizer steps in the whole run.

    Returns:
        LRScheduler | None: the schedule.
    """
    if cfg.lr_scheduler is None:
        return None
    return instantiate("lr_scheduler", cfg.lr_scheduler, optimizer, num_training_steps=num_training_steps)


def build_profiler(cfg: DictConfig) -> Any:
    """Torchtune's profiler, or one that does nothing."""
    if cfg.profiler is None:
        return training.DummyProfiler()
    profiler, _ = instantiate("profiler", cfg.profiler)
    return profiler


def clip_grad_norm(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scales the gradient down to a norm, over all ranks.

    Args:
        model (nn.Module): the model, sharded or not.
        max_norm (float | None): the largest norm; None only measures.

    Returns:
        torch.Tensor: the norm before, a scalar.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf") if max_norm is None else max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def summarize_run(
    cfg: DictConfig,
    model: nn.Module,
    dataset: PrefixPreferenceDataset,
    num_steps: int,
    before: Evaluation | None,
    after: Evaluation | None,
) -> str:
    """The last line of a run: what was trained, where it lies, and what became of the held-out accuracy.

    Args:
        cfg (DictConfig): the run's config.
        model (nn.Module): the model.
        dataset (PrefixPreferenceDataset): the training data set.
        num_steps (int): optimizer steps done.
        before (Evaluation | None): the evaluation before training; None if there is no held-out data.
        after (Evaluation | None): the evaluation after it.

    Returns:
        str: one line.
    """
    millions = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
    if has_adapter(model):
        millions += f", {sum(p.numel() for p in trainable_parameters(model)) / 1e6:,.2f} M of them trained"
    model_name, loss_name = (component_name(cfg[key]) for key in ("model", "loss"))
    where = Path(cfg.checkpointer.output_dir) / f"epoch_{cfg.epochs - 1}"
    line = (
        f"Trained {model_name} ({millions}) with {loss_name} for {num_steps:,} steps on "
        f"{dataset.name} ({len(dataset):,} examples); it lies in {where}"
    )
    if after is None:
        return f"{line}."
    accuracy = "eval/rewards/accuracies"
    name, what = (accuracy, "accuracy") if accuracy in after.metrics else ("eval/loss", "loss")
    return f"{line}; held-out {what} {before.metrics[name]:.3f} -> {after.metrics[name]:.3f}."
