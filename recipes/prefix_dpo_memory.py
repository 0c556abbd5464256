"""How much memory a training config will take on each device: no GPU, weights or data are needed.

    tune run prefix_dpo_memory --config llama3_1/8B_prefix_dpo_distributed world_size=8 device_memory=80GiB

Takes any training config of this package that does not offload. Takes steps of its model without computing anything,
with Rows as configured and with longer ones, and prints the peak of each device, the longest Rows that fit, and which
keys would help.
"""

import logging
import re
from dataclasses import dataclass, field

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from prefix_sharing.config import DistributedConfig, at_least, check_config, readable_errors
from prefix_sharing.config.checks import leave_to_the_command_line
from prefix_sharing.config.parsing import read_config
from prefix_sharing.errors import ConfigError
from prefix_sharing.memory.estimate import MOST_TOKENS, PeakMemory, full_row, longest_row, peak_memory_estimate
from prefix_sharing.run import build_model, set_up_logging
from prefix_sharing.wording import counted

log = logging.getLogger("prefix_sharing.recipe")

UNITS = {"GiB": 1024**3, "GB": 10**9, "MiB": 1024**2, "MB": 10**6}

RESERVE = 0.1
"""The share of a device's memory that is left to the allocator's gaps, kernels and NCCL."""

SHORTEST_ROW = 128
"""Tokens of a Row that takes little more than what does not depend on its length."""

BYTES_OF_ADAM = 8
"""Optimizer state per parameter of Adam and its relatives in fp32; 8-bit ones have about a quarter."""


@dataclass
class MemoryConfig(DistributedConfig):
    """Every key of ``prefix_dpo_memory``: those of a training config, and a few more."""

    world_size: int = at_least(1, default=1)
    """Devices; 1 is for ``prefix_dpo_single_device``."""
    device_memory: str = "80GiB"
    """Memory of each device."""
    example: list[int] = field(default_factory=lambda: [1024, 512, 512])
    """Tokens of prefix, chosen and rejected of the examples that Rows are filled with."""


class PrefixDPOMemory:
    """Estimates the peak memory of a training config.

    Args:
        cfg (DictConfig): the keys of ``MemoryConfig``.

    Raises:
        ConfigError: if a key has a value for which there is no estimate.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        match = re.fullmatch(r"([\d.]+) ?(\w+)", cfg.device_memory)
        if match is None or match[2] not in UNITS:
            raise ConfigError("device_memory", f"must be a size such as 80GiB, but is {cfg.device_memory}")
        self.usable = (1 - RESERVE) * float(match[1]) * UNITS[match[2]]
        if len(cfg.example) != 3 or min(cfg.example) < 1:
            raise ConfigError("example", f"must be tokens of prefix, chosen and rejected, but is {cfg.example}")
        for key in ("fsdp_cpu_offload", "enable_activation_offloading"):
            if cfg[key]:
                raise ConfigError(key, "cannot be estimated; set it to False for an upper bound")
        if not cfg.reference.precompute:
            raise ConfigError(
                "reference.precompute",
                "False cannot be estimated; set it to True, and add the memory of a second model",
            )
        cfg.dtype = cfg.dtype or "bf16"
        # Attention by chains keeps as much for the backward pass as by flex.
        cfg.attention_backend, cfg.flex_kernel_options, cfg.compile = "chains", None, False

    def run(self) -> None:
        """Prints what a device will hold."""
        cfg = self.cfg
        fixed_length = cfg.packing != "none" and cfg.pack_len not in (None, "auto")
        num_tokens = cfg.pack_len if fixed_length else (cfg.batch_size or 1) * sum(cfg.example)
        log.info("Simulating training steps of %s on %s", cfg.model._component_, counted(cfg.world_size, "device"))
        peaks: dict[int, PeakMemory] = {}
        with peak_memory_estimate(cfg, cfg.world_size) as peak_of, tqdm(desc="Rows tried", unit="Row") as progress:

            def total_of(length: int) -> int:
                row = full_row(length, cfg.example)
                if row.num_tokens not in peaks:
                    peaks[row.num_tokens] = peak_of(row)
                    progress.update()
                return peaks[row.num_tokens].total

            total_of(num_tokens)
            configured = next(iter(peaks))
            longest = longest_row(total_of, num_tokens, self.usable)
            total_of(min(num_tokens, SHORTEST_ROW))
        peak = peaks[configured]
        each = "the device" if cfg.world_size == 1 else f"each of {cfg.world_size:,} devices"
        print(f"\nPeak memory of {each}, by what takes it:")
        print("tokens per Row        peak  parameters   gradients   optimizer  activations and temporaries")
        for length, of_row in sorted(peaks.items()):
            kinds = (of_row.total, of_row.parameters, of_row.gradients, of_row.optimizer_state)
            mark = "  as configured" if length == configured else ""
            columns = " ".join(f"{describe_bytes(size):>11}" for size in kinds)
            print(f"{length:14,} {columns} {describe_bytes(of_row.activations):>28}{mark}")
        fits = "fits into" if peak.total <= self.usable else "DOES NOT FIT into"
        print(
            f"\nIt {fits} {describe_bytes(self.usable)}, which is {cfg.device_memory} less {RESERVE:.0%} for what the "
            "allocator, kernels and NCCL need."
        )
        print(self.describe_longest(longest, "pack_len" if fixed_length else "Row"))
        for change in self.changes(peak, peaks[min(peaks)], configured):
            print(f"To use less: {change}")

    def describe_longest(self, longest: int | None, what: str) -> str:
        """A sentence about the longest Row that fits."""
        shortest = sum(self.cfg.example)
        if longest is None or longest < shortest:
            return f"No {what} fits that holds an example of {shortest:,} tokens."
        if longest >= MOST_TOKENS:
            return f"The longest {what} tried fits: {longest:,} tokens."
        return f"The longest {what} that fits: about {longest:,} tokens."

    def changes(self, peak: PeakMemory, shortest: PeakMemory, num_tokens: int) -> list[str]:
        """Keys that lower the peak, the largest share first.

        Args:
            peak (PeakMemory): as configured.
            shortest (PeakMemory): with the shortest Row that was tried; no change saves the activations that it has.
            num_tokens (int): in a Row as configured.

        Returns:
            list[str]: a line each.
        """
        cfg = self.cfg
        model = build_model(cfg, torch.device("cpu"))
        trained = sum(parameter.numel() for parameter in model.trainable_parameters()) / cfg.world_size
        varying = peak.activations - shortest.activations
        found = []
        if not cfg.enable_activation_checkpointing:
            found.append((varying, "enable_activation_checkpointing: True (activations)"))
        elif cfg.ac_mode == "selective":
            found.append((varying, "ac_mode: full (activations)"))
        elif num_tokens > sum(cfg.example):
            key = "batch_size" if cfg.packing == "none" else "pack_len"
            found.append((varying, f"a smaller {key} (activations)"))
        if cfg.world_size > 1 and not cfg.fsdp_sync_every_row:
            found.append((peak.gradients, "fsdp_sync_every_row: True (gradients wait for the last Row unsharded)"))
        elif not model.has_adapter:
            found.append((peak.gradients, "LoRA, with the lora_ builder of the model (gradients)"))
        if peak.optimizer_state >= BYTES_OF_ADAM * trained:
            found.append(
                (peak.optimizer_state, "an 8-bit optimizer, such as torchao.optim.AdamW8bit (optimizer state)")
            )
        found.append((peak.parameters, "more devices (parameters, and all that is sharded)"))
        return [f"{describe_bytes(size):>10}  {change}" for size, change in sorted(found, reverse=True) if size > 0]


def describe_bytes(size: float) -> str:
    """A size in the largest unit of which it is at least one."""
    for unit in ("GiB", "MiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:.2f} {unit}"
    return f"{size / 1024:.2f} KiB"


def recipe_main() -> None:
    """Estimates the peak memory of a config, with ``key=value`` overrides."""
    with readable_errors():
        cfg = read_config()
        leave_to_the_command_line(cfg, ("dataset", "dataset_val"))  # no data are read
        set_up_logging()
        PrefixDPOMemory(check_config(cfg, MemoryConfig)).run()


recipe_main.config_class = MemoryConfig  # type: ignore[attr-defined]


if __name__ == "__main__":
    recipe_main()
