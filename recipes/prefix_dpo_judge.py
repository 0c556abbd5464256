"""Judges the answers of a round, and no more; or compares files of answers to the same prompts.

    tune run prefix_dpo_judge --config quickstart/online round=0
    tune run prefix_dpo_judge --config quickstart/online 'answers=[base.json,sft.json,dpo.json]'

Takes the config of ``prefix_dpo_online``, which goes on from a judged round. Of files, each is compared with the first;
the table that is printed goes to ``comparison.json`` in ``output_dir``, too.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from prefix_dpo_online import PrefixDPOOnline, RoundConfig
from prefix_sharing.config import instantiate, parse
from prefix_sharing.errors import ConfigError
from prefix_sharing.online import judged_answers
from prefix_sharing.online.comparison import compare_answers, describe_comparisons, read_model_answers
from prefix_sharing.run import set_up_device, set_up_logging
from prefix_sharing.run.directory import locked_output_dir

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class JudgeConfig(RoundConfig):
    """Every key of ``prefix_dpo_judge``: those of a round, and one more."""

    answers: list[str] | None = None
    """Files of answers to the same prompts that are compared, in place of a round: each with the first one."""


def compare_files(cfg: DictConfig) -> None:
    """Compares the files of ``answers``.

    Args:
        cfg (DictConfig): the keys of ``JudgeConfig``.

    Raises:
        ConfigError: if there are fewer than two.
    """
    if len(cfg.answers) < 2:
        raise ConfigError("answers", f"has {len(cfg.answers)} file; give those of two models or more")
    judge = instantiate("judge", cfg.judge)
    first, *others = [read_model_answers(Path(file)) for file in cfg.answers]
    comparisons = [compare_answers(judge, other, first) for other in others]
    print(describe_comparisons(comparisons))
    file = Path(cfg.output_dir) / "comparison.json"
    file.write_text(json.dumps(comparisons, indent=2) + "\n")
    log.info("Comparison saved to %s", file)


@parse(JudgeConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Judges with a config and ``key=value`` overrides."""
    set_up_logging()
    with locked_output_dir(cfg):
        if cfg.answers is not None:
            compare_files(cfg)
            return
        run = PrefixDPOOnline(cfg, set_up_device(cfg))
        judged_answers(cfg.judge, run.judge, run.directory(cfg.round))


if __name__ == "__main__":
    recipe_main()
