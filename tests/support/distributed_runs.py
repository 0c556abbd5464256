"""Runs the distributed recipe with one config after the other in the same processes: to start them takes longest.

torchrun --nproc_per_node 4 distributed_runs.py CONFIG.yaml CONFIG.yaml
"""

import sys

import torch
from omegaconf import OmegaConf

from prefix_dpo_distributed import PrefixDPORecipeDistributed
from prefix_sharing.config import DistributedConfig, check_config
from prefix_sharing.distributed import process_group
from prefix_sharing.run import set_up_device
from prefix_sharing.run.signals import StopRequest


def main(files):
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")):
        for file in files:
            cfg = check_config(OmegaConf.load(file), DistributedConfig)
            recipe = PrefixDPORecipeDistributed(cfg, set_up_device(cfg))
            recipe.setup()
            recipe.train(StopRequest())
            recipe.cleanup()


if __name__ == "__main__":
    main(sys.argv[1:])
