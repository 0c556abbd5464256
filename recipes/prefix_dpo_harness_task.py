"""Writes the held-out pairs of a config as a task of lm-eval, which scores any model by them.

    tune run prefix_dpo_harness_task --config quickstart/single_device

Takes any training config of this package. Trains nothing and reads no weights; the task is written to ``harness`` under
``output_dir``.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from prefix_sharing.config import DistributedConfig, instantiate, parse
from prefix_sharing.errors import ConfigError
from prefix_sharing.reports.harness_task import write_harness_task
from prefix_sharing.run import build_loss, build_model, set_up_logging
from prefix_sharing.run.data import build_dataset


@dataclass
class HarnessTaskConfig(DistributedConfig):
    """Every key of ``prefix_dpo_harness_task``: those of a training config, and one more."""

    task: str = "held_out_pairs"
    """Name of the task, for ``--tasks`` of lm-eval."""


def write_task(cfg: DictConfig) -> None:
    """Writes the task of a config.

    Args:
        cfg (DictConfig): the keys of ``HarnessTaskConfig``.

    Raises:
        ConfigError: if there is no held-out data, or the task's name would be no name.
    """
    if cfg.dataset_val is None:
        raise ConfigError("dataset_val", "required: its pairs are the task's questions")
    if not cfg.task.replace("_", "").isalnum():
        raise ConfigError("task", f"'{cfg.task}' has to be of letters, digits and _")
    tokenizer, model = instantiate("tokenizer", cfg.tokenizer), build_model(cfg, torch.device("cpu"))
    dataset = build_dataset("dataset_val", cfg, tokenizer, model, build_loss(cfg))
    write_harness_task(dataset, tokenizer, cfg.task, Path(cfg.output_dir) / "harness")


@parse(HarnessTaskConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Writes the task of a config, with ``key=value`` overrides."""
    set_up_logging()
    write_task(cfg)


if __name__ == "__main__":
    recipe_main()
