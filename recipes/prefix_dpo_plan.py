"""What a training config will take of each device's memory, before there are any: no GPU, weights or data are needed.

    tune run prefix_dpo_plan --config llama3_1/8B_prefix_dpo_distributed world_size=8 device_memory=80GiB

Takes any training config of this package. Takes steps of its model without computing anything, with rows as configured
and rows twice as long, and prints what a device holds at its peak, how long rows may be, and which keys would help.
"""

import logging
import re
from dataclasses import dataclass, field

from omegaconf import DictConfig

from prefix_sharing.errors import UserError
from prefix_sharing.training import DistributedConfig, parse, set_up_logging
from prefix_sharing.training.prediction import PeakMemory, full_row, predict_peak_memory

log = logging.getLogger("prefix_sharing.recipe")

GIB = 1024**3
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": 1024**2, "MB": 10**6}

RESERVE = 0.1
"""The share of a device's memory that is left to the allocator's gaps, kernels and NCCL."""


@dataclass
class PlanConfig(DistributedConfig):
    """Every key of ``prefix_dpo_plan``: those of a training config, and a few more.

    Attributes:
        world_size (int): devices; 1 is for ``prefix_dpo_single_device``.
        device_memory (str): of each, such as ``80GiB``.
        example (list[int]): tokens of prefix, chosen and rejected of the examples that rows are filled with.
    """

    world_size: int = 1
    device_memory: str = "80GiB"
    example: list[int] = field(default_factory=lambda: [1024, 512, 512])


class PrefixDPOPlan:
    """Predicts the peak memory of a training config.

    Args:
        cfg (DictConfig): the keys of ``PlanConfig``.

    Raises:
        UserError: if a key has a value that cannot be planned for.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        match = re.fullmatch(r"([\d.]+) ?(\w+)", cfg.device_memory)
        if match is None or match[2] not in UNITS:
            raise UserError(f"Config: device_memory must be such as 80GiB, but is {cfg.device_memory}.")
        self.usable = (1 - RESERVE) * float(match[1]) * UNITS[match[2]]
        if len(cfg.example) != 3 or min(cfg.example) < 1:
            raise UserError(f"Config: example must be tokens of prefix, chosen and rejected, but is {cfg.example}.")
        if cfg.world_size < 1:
            raise UserError(f"Config: world_size must be at least 1, but is {cfg.world_size}.")
        for key in ("fsdp_cpu_offload", "enable_activation_offloading"):
            if cfg[key]:
                raise UserError(f"Config: {key} is not planned for; what it moves to the CPU is not on the device.")
        if not cfg.reference.precompute:
            raise UserError("Config: reference.precompute: False is not planned for; it holds a second model.")
        cfg.attention_backend, cfg.flex_kernel_options, cfg.compile = "chains", None, False

    def run(self) -> None:
        """Prints what a device will hold."""
        cfg = self.cfg
        packed = (cfg.dataset.get("packed") or "packed" in cfg.dataset._component_) and cfg.pack_len != "auto"
        num_tokens = cfg.pack_len if packed else cfg.batch_size * sum(cfg.example)
        rows = [full_row(n, cfg.example) for n in (num_tokens, 2 * num_tokens)]
        log.info("Taking steps of %s on %d devices, without computing anything", cfg.model._component_, cfg.world_size)
        peak, of_longer = predict_peak_memory(cfg, cfg.world_size, rows)

        print(f"\nPeak memory of each of {cfg.world_size:,} devices, GiB, and what holds it:")
        print("tokens a row     peak  parameters  gradients  optimizer  activations")
        for row, of_row in zip(rows, (peak, of_longer), strict=True):
            kinds = (of_row.parameters, of_row.gradients, of_row.optimizer_state, of_row.activations)
            print(
                f"{row.num_tokens:12,} {of_row.total / GIB:8.2f} {kinds[0] / GIB:11.2f} {kinds[1] / GIB:10.2f} "
                f"{kinds[2] / GIB:10.2f} {kinds[3] / GIB:12.2f}"
            )
        per_token = (of_longer.total - peak.total) / (rows[1].num_tokens - rows[0].num_tokens)
        longest = int(rows[0].num_tokens + (self.usable - peak.total) / per_token)
        fits = "fits into" if peak.total <= self.usable else "DOES NOT FIT into"
        print(
            f"\nIt {fits} {self.usable / GIB:.1f} GiB, which is {cfg.device_memory} less {RESERVE:.0%} for what the "
            "allocator, kernels and NCCL need."
        )
        length = "pack_len" if packed else "tokens a row"
        if longest >= min(cfg.example):
            print(f"The longest {length} that fits, by the line through both: about {longest // 128 * 128:,}.")
        else:
            print(f"No {length} fits.")
        for change in self.changes(peak):
            print(f"To use less: {change}")

    def changes(self, peak: PeakMemory) -> list[str]:
        """Keys that lower the peak, the largest share first.

        Args:
            peak (PeakMemory): as configured.

        Returns:
            list[str]: a line each.
        """
        cfg = self.cfg
        sharded = cfg.world_size > 1
        found = []
        if not cfg.enable_activation_checkpointing:
            found.append((peak.activations, "enable_activation_checkpointing: True (activations)"))
        elif cfg.ac_mode == "selective":
            found.append((peak.activations, "ac_mode: full (activations)"))
        else:
            found.append((peak.activations, "a shorter pack_len, or smaller batch_size (activations)"))
        if sharded and not cfg.fsdp_sync_every_row:
            found.append((peak.gradients, "fsdp_sync_every_row: True (gradients wait for the last row unsharded)"))
        elif "lora" not in cfg.model._component_:
            found.append((peak.gradients, "LoRA, with torchtune's lora_ builder of the model (gradients)"))
        if "8bit" not in cfg.optimizer._component_:
            found.append(
                (
                    peak.optimizer_state,
                    "an optimizer that keeps less, such as torchao.optim.AdamW8bit (optimizer state)",
                )
            )
        found.append((peak.parameters, "more devices (parameters, and all that is sharded)"))
        return [f"{size / GIB:6.2f} GiB  {change}" for size, change in sorted(found, reverse=True)]


@parse(PlanConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Predicts the peak memory of a config, with ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOPlan(cfg).run()


if __name__ == "__main__":
    recipe_main()
