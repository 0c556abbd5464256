"""What both recipes build before training: logging, device, loss, model, schedule; and what they say at the end."""

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchtune import training, utils
from torchtune.training.metric_logging import DiskLogger

from prefix_sharing import losses
from prefix_sharing.attention import choose_attention_backend
from prefix_sharing.config import component_name, explained, instantiate
from prefix_sharing.config.secrets import without_secrets
from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.distributed import broadcast_object, check_processes_joined, is_rank_zero
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.hosts import TreeModel, check_arithmetic, checkpoint_activations, compile_layers, to_tree_model
from prefix_sharing.losses import Loss
from prefix_sharing.planning import Plan
from prefix_sharing.run.directory import remember_log
from prefix_sharing.run.evaluation import Evaluation
from prefix_sharing.wording import counted

log = logging.getLogger(__name__)


def set_up_logging() -> None:
    """Shows this package's log on rank 0, warnings on every rank.

    Raises:
        UserError: if this is one of several processes that are not in a process group: which rank it is, nobody knows.
    """
    check_processes_joined()  # here, since every recipe comes by before it does anything
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package_log = logging.getLogger("prefix_sharing")
    package_log.handlers = [handler]
    package_log.propagate = False
    package_log.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)


def set_up_device(cfg: DictConfig) -> torch.device:
    """Chooses the device and checks what the config asks of it, and that ``output_dir`` can be written.

    Args:
        cfg (DictConfig): the run's config; keys that it leaves to the device are set.

    Returns:
        torch.device: the device.

    Raises:
        ConfigError: if a key asks for something that is not available.
    """
    with explained("device"):
        device = utils.get_device(cfg.device)
    if cfg.device is not None and device.type != torch.device(cfg.device).type:
        raise ConfigError("device", f"{cfg.device} is not available; set device=cpu or remove the key")
    if cfg.dtype is None:
        cfg.dtype = default_dtype(device)
    if cfg.compile is None:
        cfg.compile = device.type == "cuda"
    with explained("dtype"):
        training.get_dtype(cfg.dtype, device)
    if cfg.enable_activation_offloading and device.type != "cuda":
        raise ConfigError("enable_activation_offloading", f"needs a CUDA device, but the device is {device.type}")
    backend = choose_attention_backend(cfg.attention_backend, device, compute_dtype(cfg))
    if cfg.flex_kernel_options is not None and backend != "flex":
        raise ConfigError("flex_kernel_options", f"not used by the attention backend {backend}; remove it")
    try:
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cfg.output_dir).close()
    except OSError as error:
        raise ConfigError("output_dir", f"{cfg.output_dir} cannot be written: {error.strerror}") from error
    return device


def default_dtype(device: torch.device) -> str:
    """What ``dtype`` is on a device if it is not set."""
    return "bf16" if device.type == "cuda" else "fp32"


def compute_dtype(cfg: DictConfig) -> torch.dtype:
    """What the config has the model compute in; weights are fp32 always."""
    return torch.bfloat16 if cfg.dtype == "bf16" else torch.float32


def build_loss(cfg: DictConfig) -> Loss:
    """Builds the loss.

    Args:
        cfg (DictConfig): the run's config.

    Returns:
        Loss: the loss.

    Raises:
        ConfigError: if it cannot be built, is none of this package's kind, or keys are set that it makes no use of.
    """
    loss = instantiate("loss", cfg.loss)
    if not isinstance(loss, Loss):
        name = component_name(cfg.loss)
        remedy = f"use prefix_sharing.losses.{name}" if hasattr(losses, name) else "choose from prefix_sharing.losses"
        problem = f"{cfg.loss._component_} is not a prefix_sharing.losses.Loss"
        raise ConfigError("loss", f"{problem}; {remedy} or subclass Loss")
    if not loss.needs.reference and cfg.ref_checkpointer is not None:
        raise ConfigError("ref_checkpointer", f"not used: {type(loss).__name__} needs no reference; remove it")
    if loss.needs.whole_sequence and not cfg.share_prefix:
        problem = f"{type(loss).__name__} as configured reads prompts off the shared prefix; set it to True"
        raise ConfigError("share_prefix", problem)
    return loss


def self_check(cfg: DictConfig) -> None:
    """Tries on rank 0, if configured, that the model computes over a tree what it computes over separate sequences.

    Args:
        cfg (DictConfig): the run's config.

    Raises:
        UserError: on every rank, if it does not.
    """
    if not cfg.self_check:
        return
    refusal: UserError | None = None
    if is_rank_zero():
        try:
            check_arithmetic(cfg.model, gradients=cfg.self_check == "gradients")
        except UserError as error:
            refusal = error
    refusal = broadcast_object(refusal)
    if refusal is not None:
        raise refusal


def build_model(cfg: DictConfig, device: torch.device, *, sharded: bool = False) -> TreeModel:
    """Builds the model with tree attention and without weights; compiles and checkpoints its layers if configured.

    Args:
        cfg (DictConfig): the run's config.
        device (torch.device): where the model runs; it is built on the meta device.
        sharded (bool): whether it is about to be sharded. Default: False.

    Returns:
        TreeModel: on the meta device.

    Raises:
        ConfigError: if it cannot be built, or prefix sharing does not cover it.
    """
    with torch.device("meta"):
        built = instantiate("model", cfg.model)
    backend = choose_attention_backend(cfg.attention_backend, device, compute_dtype(cfg))
    model = to_tree_model(built, backend, cfg.flex_kernel_options)
    if sharded and model.is_quantized:
        for key, is_set in (
            ("save_adapter_weights_only", not cfg.save_adapter_weights_only),
            ("fsdp_cpu_offload", cfg.get("fsdp_cpu_offload", False)),
            ("data_parallel_replicate_dim", cfg.get("data_parallel_replicate_dim", 1) > 1),
        ):
            if is_set:
                raise ConfigError(key, f"is {cfg[key]}, which QLoRA on several devices does not support; remove it")
    # FSDP2 casts to the compute dtype itself.
    model.freeze_base(torch.float32 if sharded else compute_dtype(cfg))
    if cfg.compile:
        compile_layers(model)
    if cfg.enable_activation_checkpointing:
        checkpoint_activations(model, cfg.ac_mode)
    return model


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
    num_warmup_steps = cfg.lr_scheduler.get("num_warmup_steps") or 0
    if num_warmup_steps >= num_training_steps and is_rank_zero():
        log.warning(
            "lr_scheduler.num_warmup_steps is %s, but the run has %s steps: the rate never reaches optimizer.lr.",
            f"{num_warmup_steps:,}",
            f"{num_training_steps:,}",
        )
    return instantiate("lr_scheduler", cfg.lr_scheduler, optimizer, num_training_steps=num_training_steps)


def log_config(metric_logger: Any, cfg: DictConfig, seed: int) -> None:
    """Logs and saves a run's config with its secrets masked, and remembers where its log is.

    Args:
        metric_logger (Any): one of torchtune's, which save ``torchtune_config.yaml``.
        cfg (DictConfig): the run's config.
        seed (int): the seed that was chosen.
    """
    chosen: Any = OmegaConf.merge(cfg, {"seed": seed})
    metric_logger.log_config(without_secrets(chosen))
    # Loggers resolve references, a file need not.
    OmegaConf.save(without_secrets(chosen, keep_references=True), Path(cfg.output_dir) / "torchtune_config.yaml")
    if isinstance(metric_logger, DiskLogger):
        remember_log(cfg, metric_logger.path_to_log_file())


def build_profiler(cfg: DictConfig) -> Any:
    """Torchtune's profiler, or one that does nothing."""
    if cfg.profiler is None:
        return training.DummyProfiler()
    profiler, _ = instantiate("profiler", cfg.profiler)
    return profiler


def summarize_run(
    cfg: DictConfig,
    model: TreeModel,
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    before: Evaluation | None,
    after: Evaluation | None,
) -> str:
    """The last line of a run: what was trained, where it was saved, and how the held-out accuracy changed.

    Args:
        cfg (DictConfig): the run's config.
        model (TreeModel): the model.
        dataset (PrefixPreferenceDataset): the training data set.
        plan (Plan): of the steps that were done.
        before (Evaluation | None): the evaluation before training; None if there is no held-out data.
        after (Evaluation | None): the evaluation after it.

    Returns:
        str: one line.
    """
    millions = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M parameters"
    if model.has_adapter:
        millions += f", {sum(p.numel() for p in model.trainable_parameters()) / 1e6:,.2f} M of them trained"
    model_name, loss_name = (component_name(cfg[key]) for key in ("model", "loss"))
    where = Path(cfg.checkpointer.output_dir) / f"epoch_{cfg.epochs - 1}"
    num_visited, examples = len(plan.examples_visited(0, cfg.epochs)), counted(len(dataset), "example")
    if num_visited < len(dataset):
        examples = f"{num_visited:,} of {examples}"
    line = (
        f"Trained {model_name} ({millions}) with {loss_name} for {counted(cfg.epochs * plan.steps_per_epoch, 'step')} "
        f"on {dataset.name} ({examples}); checkpoint saved to {where}"
    )
    if before is None or after is None:
        return f"{line}."
    accuracy = "eval/rewards/accuracies"
    name, what = (accuracy, "accuracy") if accuracy in after.metrics else ("eval/loss", "loss")
    return f"{line}; held-out {what} {before.metrics[name]:.3f} -> {after.metrics[name]:.3f}."
