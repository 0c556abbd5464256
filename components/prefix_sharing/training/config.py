"""The keys a recipe takes, with their types, defaults and ranges, and everything that is checked before work begins.

A recipe of your own adds a key by adding a field::

    @dataclass
    class MyConfig(TrainingConfig):
        my_key: int = 3


    @parse(MyConfig)
    def recipe_main(cfg): ...
"""

import contextlib
import functools
import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pkgutil import resolve_name
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune import config

from prefix_sharing.config import find_config, nearest, one_line
from prefix_sharing.errors import UserError
from prefix_sharing.reference.cache import default_cache_dir

COMPONENTS = (
    "model",
    "tokenizer",
    "checkpointer",
    "ref_checkpointer",
    "dataset",
    "dataset_val",
    "loss",
    "optimizer",
    "lr_scheduler",
    "metric_logger",
    "profiler",
)
"""The keys that name a component with ``_component_``."""


@dataclass
class ReferenceConfig:
    """The keys under ``reference``.

    Attributes:
        cache_dir (str | None): where reference log-probs are kept for later runs. Default: beside the cache of
            ``datasets``; null turns it off.
        precompute (bool): False keeps a frozen second model in memory instead, for data that is used once.
    """

    cache_dir: str | None = field(default_factory=default_cache_dir)
    precompute: bool = True


@dataclass
class TrainingConfig:
    """Every key of ``prefix_dpo_single_device``; a field without a value has to be given.

    Attributes:
        output_dir (str): where checkpoints and logs go.
        model (Any): builds the model: one of torchtune's builders.
        tokenizer (Any): builds the tokenizer: torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        checkpointer (Any): reads the initial policy and writes checkpoints: one of torchtune's.
        dataset (Any): builds the training data set; gets the tokenizer as its first argument.
        loss (Any): one of ``prefix_sharing.losses``.
        optimizer (Any): torch's or torchao's; gets the parameters as its first argument.
        metric_logger (Any): one of torchtune's.
        ref_checkpointer (Any): reads the reference. Default: None, the initial policy is the reference.
        dataset_val (Any): builds the held-out data set, evaluated before the first step and after the last.
        run_val_every_n_steps (int | None): evaluates in between, too.
        lr_scheduler (Any): gets the optimizer and the number of steps. Default: None, a constant learning rate.
        profiler (Any): ``torchtune.training.setup_torch_profiler``.
        device (str | None): ``cuda`` or ``cpu``. Default: None, cuda where there is one.
        dtype (str): ``fp32`` or ``bf16``, the precision of the computation; weights are trained in fp32 always.
        seed (int | None): decides data order and everything random. Default: None, drawn and logged.
        epochs (int): passes over the data.
        max_steps_per_epoch (int | None): most optimizer steps an epoch.
        batch_size (int): examples a row, that is, a forward pass, where rows are not packed.
        gradient_accumulation_steps (int): rows an optimizer step, on each rank, unless ``global_batch_size`` is given.
        shuffle (bool): whether to shuffle each epoch.
        global_batch_size (int | None): examples an optimizer step takes over all ranks; needed with
            ``dataset.packed: True``. Default: None, ``batch_size`` times ``gradient_accumulation_steps`` times ranks.
        pack_len (Any): most tokens in a packed row, or ``auto``: the longest example rounded up.
        packing (str): ``step`` packs the examples of a step, which stay those of the unpacked run; ``dataset`` packs
            the whole data set first and takes ``pack_rows_per_step`` rows a step, whatever their number of examples.
        pack_rows_per_step (int | None): rows an optimizer step takes over all ranks, with ``packing: dataset``.
        drop_last (bool): whether to leave out the last step of an epoch if it is incomplete.
        num_workers (int): processes that build rows ahead, on each rank; 0 builds them in the loop.
        share_prefix (bool): False computes every response on its own, for comparison.
        attention_backend (str | None): ``flex``, ``chains`` or ``varlen``. Default: None, chosen by device.
        flex_kernel_options (dict[str, Any] | None): FlexAttention's ``kernel_options``, such as ``{BLOCK_M: 64}``.
        clip_grad_norm (float | None): largest norm of the gradient.
        compile (bool): whether to compile the layers.
        enable_activation_checkpointing (bool): trades time for memory.
        ac_mode (str): with it, ``full`` computes everything again, ``selective`` keeps what attention gave.
        enable_activation_offloading (bool): keeps activations in CPU memory; needs CUDA and checkpointing.
        log_every_n_steps (int): steps between log entries.
        log_peak_memory_stats (bool): whether to log peak memory, and that of parameters, gradients and optimizer state.
        adapter_checkpoint (str | None): for a model with an adapter, an ``adapter_model.pt`` to begin with, then part
            of the reference, too. Default: None, a fresh adapter, and the base is the reference.
        save_adapter_weights_only (bool): False also saves the model that base and adapter make together.
        resume_from_checkpoint (bool): goes on from the last epoch saved in ``output_dir``.
        reference (ReferenceConfig): where reference log-probs come from.
    """

    output_dir: str = MISSING
    model: Any = MISSING
    tokenizer: Any = MISSING
    checkpointer: Any = MISSING
    dataset: Any = MISSING
    loss: Any = MISSING
    optimizer: Any = MISSING
    metric_logger: Any = MISSING
    ref_checkpointer: Any = None
    dataset_val: Any = None
    run_val_every_n_steps: int | None = None
    lr_scheduler: Any = None
    profiler: Any = None
    device: str | None = None
    dtype: str = "bf16"
    seed: int | None = None
    epochs: int = 1
    max_steps_per_epoch: int | None = None
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    global_batch_size: int | None = None
    pack_len: Any = "auto"
    packing: str = "step"
    pack_rows_per_step: int | None = None
    drop_last: bool = False
    num_workers: int = 1
    shuffle: bool = True
    share_prefix: bool = True
    attention_backend: str | None = None
    flex_kernel_options: dict[str, Any] | None = None
    clip_grad_norm: float | None = None
    compile: bool = False
    enable_activation_checkpointing: bool = False
    ac_mode: str = "full"
    enable_activation_offloading: bool = False
    log_every_n_steps: int = 1
    log_peak_memory_stats: bool = False
    adapter_checkpoint: str | None = None
    save_adapter_weights_only: bool = True
    resume_from_checkpoint: bool = False
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)


@dataclass
class DistributedConfig(TrainingConfig):
    """Every key of ``prefix_dpo_distributed``.

    Attributes:
        fsdp_cpu_offload (bool): keeps parameters, gradients and optimizer state in CPU memory; needs CUDA.
        fsdp_reshard_after_forward (bool): frees each layer's gathered parameters after its forward pass.
        fsdp_sync_every_row (bool): adds up gradients over ranks after each row instead of once a step: more
            communication, but no rank ever holds a gradient of the whole model.
        data_parallel_replicate_dim (int): groups of ranks with a full copy of the model each (HSDP); 1 shards over all.
    """

    fsdp_cpu_offload: bool = False
    fsdp_reshard_after_forward: bool = True
    fsdp_sync_every_row: bool = False
    data_parallel_replicate_dim: int = 1


def parse(config_class: type) -> Callable[[Callable], Callable[[], None]]:
    """Makes a recipe's main function read ``--config NAME_OR_PATH key=value ...`` as ``tune run`` hands them on.

    Config names of this package resolve as torchtune's own do. Whatever the user can put right is printed as one
    sentence, with exit status 1 and no traceback.

    Args:
        config_class (type): a dataclass of the keys the recipe takes, ``TrainingConfig`` or one of your own.

    Returns:
        Callable[[Callable], Callable[[], None]]: the decorator.
    """

    def decorate(recipe_main: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(recipe_main)
        def main() -> None:
            with _readable_errors():
                recipe_main(check_config(_read_config(), config_class))

        return main

    return decorate


def check_config(cfg: DictConfig, config_class: type) -> DictConfig:
    """Checks a config and fills in defaults.

    Args:
        cfg (DictConfig): as read.
        config_class (type): a dataclass of the keys there are.

    Returns:
        DictConfig: the config with every key of ``config_class``.

    Raises:
        UserError: if a key is unknown, missing, of the wrong type or out of range, or a component does not exist or
            does not take an argument given to it.
    """
    known = [field.name for field in fields(config_class)]
    _check_known("", cfg, known)
    if OmegaConf.is_dict(cfg.get("reference")):
        _check_known("reference.", cfg.reference, [field.name for field in fields(ReferenceConfig)])
    for key in COMPONENTS:
        # What torchtune's parser makes of ``key=null`` on the command line.
        if OmegaConf.is_dict(cfg.get(key)) and cfg[key].get("_component_", key) is None:
            cfg[key] = None
    try:
        cfg = OmegaConf.merge(OmegaConf.structured(config_class), cfg)
        missing = [key for key in known if OmegaConf.is_missing(cfg, key)] or sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"Config: these keys are missing: {', '.join(missing)}.")
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"Config: {getattr(error, 'full_key', None) or 'a key'}: {one_line(error)}.") from error

    if issubclass(config_class, TrainingConfig):
        _check_values(cfg)
    for key in COMPONENTS:
        if cfg.get(key) is not None:
            _check_component(key, cfg[key])
    return cfg


def _check_known(prefix: str, cfg: DictConfig, known: list[str]) -> None:
    for key in cfg:
        if key not in known:
            raise UserError(f"Config: there is no key '{prefix}{key}'{nearest(key, known)}.")


def _read_config() -> DictConfig:
    """The config named on the command line, with its overrides, by torchtune's own parser."""
    if "--config" not in sys.argv[:-1]:
        raise UserError("Config: the recipe needs --config NAME_OR_PATH.")
    name_at = sys.argv.index("--config") + 1
    sys.argv[name_at] = find_config(sys.argv[name_at])
    read: list[DictConfig] = []
    try:
        config.parse(read.append)()
    except SystemExit:  # how torchtune's parser ends, having called the function
        if not read:
            raise
    except Exception as error:
        raise UserError(f"Config: {one_line(error)}.") from error
    return read[0]


def _check_values(cfg: DictConfig) -> None:
    for key in (
        "epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "global_batch_size",
        "pack_rows_per_step",
        "log_every_n_steps",
        "max_steps_per_epoch",
        "run_val_every_n_steps",
        "data_parallel_replicate_dim",
    ):
        value = cfg.get(key)
        if value is not None and value < 1:
            raise UserError(f"Config: {key} must be at least 1, but is {value}.")
    _check_packing(cfg)
    if cfg.num_workers < 0:
        raise UserError(f"Config: num_workers must not be negative, but is {cfg.num_workers}.")
    if cfg.dtype not in ("fp32", "bf16"):
        raise UserError(f"Config: dtype must be fp32 or bf16, but is {cfg.dtype}.")
    if cfg.seed is not None and cfg.seed < 0:
        raise UserError(f"Config: seed must not be negative, but is {cfg.seed}.")
    if cfg.clip_grad_norm is not None and not cfg.clip_grad_norm > 0:
        raise UserError(f"Config: clip_grad_norm must be positive, but is {cfg.clip_grad_norm}.")
    if cfg.run_val_every_n_steps is not None and cfg.dataset_val is None:
        raise UserError("Config: run_val_every_n_steps is set, but there is no dataset_val to evaluate.")
    if cfg.ac_mode not in ("full", "selective"):
        raise UserError(f"Config: ac_mode must be full or selective, but is {cfg.ac_mode}.")
    if cfg.ac_mode == "selective" and not cfg.enable_activation_checkpointing:
        raise UserError("Config: ac_mode: selective needs enable_activation_checkpointing: True.")
    if cfg.enable_activation_offloading and not cfg.enable_activation_checkpointing:
        raise UserError("Config: enable_activation_offloading needs enable_activation_checkpointing: True.")


def _check_packing(cfg: DictConfig) -> None:
    if cfg.packing not in ("step", "dataset"):
        raise UserError(f"Config: packing must be step or dataset, but is {cfg.packing}.")
    if cfg.pack_len != "auto" and not (type(cfg.pack_len) is int and cfg.pack_len >= 1):
        raise UserError(f"Config: pack_len must be auto or a number of tokens, but is {cfg.pack_len}.")


def _check_component(key: str, node: Any) -> None:
    if not OmegaConf.is_dict(node) or "_component_" not in node:
        raise UserError(f"Config: {key} must name its component with _component_.")
    path = node._component_
    if os.getcwd() not in sys.path:  # components in the user's own directory, as torchtune finds them
        sys.path.append(os.getcwd())
    try:
        component = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"Config: {key}: there is no component '{path}': {one_line(error)}.") from error
    if key == "loss" and not hasattr(component, "needs_reference"):
        raise UserError(
            f"Config: loss: {path} does not take log-probs of shape [E, K]; use one of prefix_sharing.losses, or give "
            "yours what they have: needs_reference and mean_over."
        )
    if key == "loss" and getattr(component, "mean_over", None) not in ("pairs", "examples", "tokens"):
        raise UserError(f"Config: loss: {path} needs an attribute mean_over, which is pairs, examples or tokens.")
    try:
        parameters = inspect.signature(component).parameters
    except (TypeError, ValueError):
        return
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    names = [name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    for argument in node:
        if argument != "_component_" and argument not in names:
            raise UserError(f"Config: {key}: {path} takes no '{argument}'{nearest(argument, names)}.")


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Prints what the user can put right as one line; a distributed run prints it once."""
    try:
        yield
    except Exception as error:
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            # If rank 0 fails alike, its exit ends this process before it says the same once more.
            time.sleep(5)
        what = str(error)
        if not isinstance(error, UserError):
            traceback.print_exception(error)
            what = f"{type(error).__name__}: {one_line(error)}"
        where = f"rank {rank}: " if "RANK" in os.environ else ""
        print(f"Error: {where}{what}", file=sys.stderr, flush=True)
        sys.exit(1)
