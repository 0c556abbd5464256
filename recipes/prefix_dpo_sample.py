"""Samples the answers of a round, and no more.

    tune run prefix_dpo_sample --config quickstart/online round=0

Takes the config of ``prefix_dpo_online``, which goes on from there.
"""

from omegaconf import DictConfig

from prefix_dpo_online import PrefixDPOOnline, RoundConfig
from prefix_sharing.config import parse
from prefix_sharing.run import set_up_device, set_up_logging
from prefix_sharing.run.directory import locked_output_dir


@parse(RoundConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Samples with a config and ``key=value`` overrides."""
    set_up_logging()
    device = set_up_device(cfg)
    with locked_output_dir(cfg):
        PrefixDPOOnline(cfg, device).sample(cfg.round)


if __name__ == "__main__":
    recipe_main()
