"""The keys of a training config: each with its type, default, range and meaning, said once, here.

``docs/settings.md`` is generated from this file. A recipe of your own adds a key by subclassing a config and adding a
field with a docstring under it, as ``StatsConfig`` in ``prefix_dpo_stats.py`` does.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from omegaconf import MISSING

from prefix_sharing.config.defaults import default_cache_dir

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
    "prompts",
    "prompts_val",
    "sampler",
    "judge",
)
"""The keys that name a component with ``_component_``."""


def at_least(least: float, *, default: Any) -> Any:
    """A field whose value, unless None, must not be below a number.

    Args:
        least (float): the smallest value allowed.
        default (Any): the default.

    Returns:
        Any: the field.
    """
    return field(default=default, metadata={"at_least": least})


def above(bound: float, *, default: Any) -> Any:
    """A field whose value, unless None, must be above a number.

    Args:
        bound (float): what it must exceed.
        default (Any): the default.

    Returns:
        Any: the field.
    """
    return field(default=default, metadata={"above": bound})


@dataclass
class ReferenceConfig:
    """The keys under ``reference``."""

    cache_dir: str | None = field(default_factory=default_cache_dir)
    """Directory that keeps reference log-probs for later runs, by default next to the cache of ``datasets``; null turns
    the cache off."""
    precompute: bool = True
    """False keeps a frozen second model in memory instead of a pass over the data, for data that is used once; for a
    fresh adapter, the base model that is there already."""


@dataclass
class TrainingConfig:
    """Every key of ``prefix_dpo_single_device``."""

    output_dir: str = MISSING
    """Directory of the run; ``checkpointer.output_dir`` and ``metric_logger.log_dir`` usually point to it."""

    path: str | None = None
    """Directory of a model of transformers, for other keys to refer to as ``${path}``."""

    # Components
    model: Any = MISSING
    """Builds the model: one of torchtune's builders, or ``prefix_sharing.hosts.transformers.causal_lm``."""
    tokenizer: Any = MISSING
    """Builds the tokenizer: one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``."""
    checkpointer: Any = MISSING
    """Reads the initial policy and writes checkpoints: one of torchtune's checkpointers, or
    ``prefix_sharing.hosts.transformers.checkpointer``."""
    dataset: Any = MISSING
    """Builds the training data set; gets the tokenizer as its first argument. ``dataset.packed: True`` is accepted for
    ``packing: step``."""
    loss: Any = MISSING
    """One of ``prefix_sharing.losses``, or a subclass of ``prefix_sharing.losses.Loss``."""
    optimizer: Any = MISSING
    """An optimizer of torch or torchao; gets the parameters as its first argument."""
    metric_logger: Any = MISSING
    """One of torchtune's metric loggers."""
    ref_checkpointer: Any = None
    """Reads the reference model. Without it the initial policy is the reference."""
    dataset_val: Any = None
    """Builds the held-out data set, which is evaluated before the first step and after the last."""
    lr_scheduler: Any = None
    """Builds the learning rate schedule; gets the optimizer and the number of steps. Without it the rate is
    constant."""
    profiler: Any = None
    """``torchtune.training.setup_torch_profiler``; without it nothing is profiled."""

    # Data and steps
    epochs: int = at_least(1, default=1)
    """Passes over the data."""
    max_steps_per_epoch: int | None = at_least(1, default=None)
    """Maximum number of optimizer steps per epoch."""
    packing: Literal["none", "step", "dataset"] = "none"
    """Which examples share a Row. ``none``: ``batch_size`` examples each. ``step``: as many of a step's examples as fit
    into ``pack_len`` tokens; the steps stay those of the unpacked run. ``dataset``: the whole data set is packed first,
    and a step takes ``pack_rows_per_step`` Rows, however many examples they hold."""
    batch_size: int | None = at_least(1, default=None)
    """Examples per Row, that is, per forward pass, with ``packing: none``; 1 if not set."""
    gradient_accumulation_steps: int | None = at_least(1, default=None)
    """Rows per optimizer step on each rank, with ``packing: none`` and no ``global_batch_size``; 1 if not set."""
    global_batch_size: int | None = at_least(1, default=None)
    """Examples per optimizer step over all ranks; required with ``packing: step``. Otherwise ``batch_size`` times
    ``gradient_accumulation_steps`` times the number of ranks."""
    pack_len: int | str | None = None
    """Maximum number of tokens in a packed Row; ``auto``, as if not set, is the longest example rounded up."""
    pack_rows_per_step: int | None = at_least(1, default=None)
    """Rows per optimizer step over all ranks; required with ``packing: dataset``."""
    shuffle: bool = True
    """Whether to shuffle every epoch."""
    drop_last: bool = False
    """Whether to leave out the last step of an epoch if it is incomplete."""
    seed: int | None = at_least(0, default=None)
    """Decides the data order and every random number; drawn and logged if not set."""
    num_workers: int = at_least(0, default=1)
    """Processes on each rank that build Rows ahead of the training loop; 0 builds them in the loop."""
    run_val_every_n_steps: int | None = at_least(1, default=None)
    """Steps between evaluations during training."""

    # Computation
    device: str | None = None
    """``cuda`` or ``cpu``; cuda where there is one if not set."""
    dtype: Literal["fp32", "bf16"] | None = None
    """What the layers compute in; bf16 on CUDA and fp32 elsewhere if not set. Trained weights are always fp32; the
    frozen base of an adapter is kept in it on one device."""
    self_check: Literal[True, False, "gradients"] = True
    """Before any work, whether to try on a small random model like this one that a tree gives the log-probs that
    separate sequences give; ``gradients`` compares those, too."""
    share_prefix: bool = True
    """False computes every response on its own, for comparison."""
    attention_backend: Literal["flex", "chains", "varlen"] | None = None
    """``flex`` (default on CUDA), ``chains`` (default elsewhere), or ``varlen`` (FlashAttention; CUDA, bf16, torch
    2.12)."""
    flex_kernel_options: dict[str, Any] | None = None
    """FlexAttention's ``kernel_options``, such as ``{BLOCK_M: 64, BLOCK_N: 64}``."""
    compile: bool | None = None
    """Whether to compile the layers; on CUDA if not set."""
    clip_grad_norm: float | None = above(0, default=None)
    """Maximum norm of the gradient, to which larger ones are scaled down."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens at a step whose loss or gradient is not finite. ``stop`` ends the run, ``skip`` leaves the step's
    update and numbers out and goes on; both name the examples."""
    max_nonfinite_in_a_row: int = at_least(1, default=5)
    """Steps in a row that ``on_nonfinite: skip`` leaves out before the run ends."""
    enable_activation_checkpointing: bool = False
    """Computes activations again in the backward pass: less memory, more time."""
    ac_mode: Literal["full", "selective"] = "full"
    """With activation checkpointing, ``full`` computes everything again, ``selective`` keeps the output of
    attention."""
    enable_activation_offloading: bool = False
    """Keeps activations in CPU memory; needs CUDA and activation checkpointing."""

    # Logs and checkpoints
    log_every_n_steps: int = at_least(1, default=1)
    """Steps between log entries; each entry covers all steps since the last one."""
    log_peak_memory_stats: bool = False
    """Whether to log peak memory, and that of parameters, gradients and optimizer state."""
    adapter_checkpoint: str | None = None
    """What a model with an adapter begins with: an ``adapter_model.pt`` of torchtune's or, for a model of transformers,
    a directory of PEFT's; the reference then includes it. Without it the adapter is fresh, and the base model is the
    reference."""
    save_adapter_weights_only: bool = True
    """False also saves the model that base and adapter make together."""
    save_every_n_steps: int | None = at_least(1, default=100)
    """Steps between training checkpoints, which are saved to ``output_dir/checkpoints`` while training goes on; there
    is one after every epoch in any case, and only there if this is null."""
    keep_last_n: int = at_least(1, default=2)
    """Training checkpoints that stay; each has the trained weights and the state of the optimizer."""
    resume: str | None = None
    """``auto`` continues from the newest training checkpoint in ``output_dir`` that is whole, or starts from the
    beginning if there is none; a directory continues from that one."""
    overwrite_output_dir: bool = False
    """Whether a run that starts from the beginning may replace another one's training checkpoints."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """Where reference log-probs come from: the keys below."""


@dataclass
class DistributedConfig(TrainingConfig):
    """Every key of ``prefix_dpo_distributed``."""

    fsdp_cpu_offload: bool = False
    """Keeps parameters, gradients and optimizer state in CPU memory; needs CUDA."""
    fsdp_reshard_after_forward: bool = True
    """Frees each layer's gathered parameters after its forward pass."""
    fsdp_sync_every_row: bool = False
    """Adds up gradients over ranks after each Row instead of once per step: more communication, but no rank ever holds
    a gradient of the whole model."""
    data_parallel_replicate_dim: int = at_least(1, default=1)
    """Copies of the model, each sharded over its share of the ranks (HSDP); 1 shards over all."""


def field_docs(config_class: type) -> dict[str, str]:
    """What the docstring under each field of a config says.

    Args:
        config_class (type): a dataclass; fields that it inherits are included.

    Returns:
        dict[str, str]: text on one line by field, in the order of the fields.
    """
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(tree, ast.ClassDef)
        for declared, following in zip(tree.body, tree.body[1:], strict=False):
            match declared, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return {f.name: docs.get(f.name, "") for f in fields(config_class)}
