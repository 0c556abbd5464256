"""Running out of memory: which step it was, how long its Row is, and which keys make it need less."""

import contextlib
from collections.abc import Iterator

import torch
from omegaconf import DictConfig

from prefix_sharing.errors import UserError
from prefix_sharing.trees import Row

_OF_CPU = ("not enough memory", "can't allocate memory")
"""What torch's CPU allocator says in a ``RuntimeError``, which has no class of its own."""


@contextlib.contextmanager
def out_of_memory_explained(cfg: DictConfig, number: int, row: Row | None = None) -> Iterator[None]:
    """Turns an error of an allocator into one that says what to change.

    Args:
        cfg (DictConfig): the run's config.
        number (int): the step's number in the run, from 1.
        row (Row | None): the Row that the body computes; None for the optimizer. Default: None.

    Yields:
        None: to the body.

    Raises:
        UserError: if the body runs out of memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        is_cpus = any(text in str(error) for text in _OF_CPU)
        if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or is_cpus):
            raise
        problem = f"Out of memory at step {number:,}, in "
        if row is None:
            problem += "the optimizer"
        else:
            problem += f"a Row of {row.tokens.shape[1]:,} tokens with {len(row.example_index):,} examples"
        raise UserError(
            f"{problem}: {_remedies(cfg, row is not None)}; prefix_dpo_memory with this config says what takes it."
        ) from error


def _remedies(cfg: DictConfig, depends_on_rows: bool) -> str:
    ways = []
    if depends_on_rows:
        row_key = "batch_size" if cfg.packing == "none" else "pack_len"
        ways.append(f"lower {row_key} or tokenizer.max_seq_len")
        if not cfg.enable_activation_checkpointing:
            ways.append("set enable_activation_checkpointing: True")
        elif not cfg.enable_activation_offloading and torch.cuda.is_available():
            ways.append("set enable_activation_offloading: True")
    if not cfg.get("fsdp_cpu_offload", True) and torch.cuda.is_available():
        ways.append("set fsdp_cpu_offload: True")
    return ", ".join([*ways, "train an adapter (LoRA, QLoRA), or use more devices"])
