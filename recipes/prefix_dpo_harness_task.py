"""Writes the held-out pairs of a config as a task of lm-eval, which scores any model by them.

    tune run prefix_dpo_harness_task --config quickstart/single_device

Takes any training config of this package whose held-out data has pairs, whatever its loss and device. Builds no model;
the task is written to ``harness`` under ``output_dir``.
"""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from prefix_sharing.config import DistributedConfig, instantiate, parse
from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.errors import ConfigError
from prefix_sharing.reports.harness_task import write_harness_task
from prefix_sharing.run import set_up_logging


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
        ConfigError: if there is no held-out data of this package's, or the task's name would be no name.
    """
    if cfg.dataset_val is None:
        raise ConfigError("dataset_val", "required: its pairs are the task's questions")
    if not cfg.task.replace("_", "").isalnum():
        raise ConfigError("task", f"'{cfg.task}' has to be of letters, digits and _")
    tokenizer = instantiate("tokenizer", cfg.tokenizer)
    # Not as for training, where a loss may take pairs apart or have use for none.
    dataset = instantiate("dataset_val", cfg.dataset_val, tokenizer)
    if not isinstance(dataset, PrefixPreferenceDataset):
        problem = f"builds a {type(dataset).__name__}, which has no pairs to ask about; use "
        raise ConfigError("dataset_val", f"{problem}prefix_sharing.datasets.prefix_preference_dataset")
    write_harness_task(dataset, tokenizer, cfg.task, Path(cfg.output_dir) / "harness")


@parse(HarnessTaskConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Writes the task of a config, with ``key=value`` overrides."""
    set_up_logging()
    write_task(cfg)


if __name__ == "__main__":
    recipe_main()
