"""``prefix_dpo_online`` on several devices: each samples its share of the prompts, and all train, sharded with FSDP2.

    tune run --nproc_per_node 2 prefix_dpo_online_distributed --config quickstart/online

Each rank holds the whole model while it samples; where that does not fit, a server samples:
``prefix_sharing.sampling.served_sampler``. Rank 0 judges.
"""

from dataclasses import dataclass

from omegaconf import DictConfig

from prefix_dpo_distributed import PrefixDPORecipeDistributed
from prefix_dpo_online import OnlineConfig, PrefixDPOOnline, RoundOfTraining
from prefix_sharing.config import DistributedConfig, parse
from prefix_sharing.distributed import process_group
from prefix_sharing.run import set_up_device, set_up_logging
from prefix_sharing.run.directory import full_disk_explained, locked_output_dir


@dataclass
class OnlineDistributedConfig(OnlineConfig, DistributedConfig):
    """Every key of ``prefix_dpo_online_distributed``: those of ``prefix_dpo_online`` and of distributed training."""


class DistributedRound(RoundOfTraining, PrefixDPORecipeDistributed):
    """A round's training on several devices."""


@parse(OnlineDistributedConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Runs the recipe with a config and ``key=value`` overrides."""
    device = set_up_device(cfg)
    with process_group(device):
        set_up_logging()
        with locked_output_dir(cfg), full_disk_explained(cfg):
            PrefixDPOOnline(cfg, device, DistributedRound, DistributedConfig).run()


if __name__ == "__main__":
    recipe_main()
