"""A look at a config's data set before training: lengths, drops, what sharing saves, how Rows fill up, one example.

    tune run prefix_dpo_stats --config quickstart/single_device

Takes any training config of this package. Trains nothing and reads no weights; prints what it finds, and writes
``stats.json`` and ``lengths.png`` to ``stats`` under ``output_dir``.
"""

import json
import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from prefix_sharing.attention import rounding_of
from prefix_sharing.config import DistributedConfig, at_least, instantiate, parse
from prefix_sharing.distributed import Ranks
from prefix_sharing.errors import ConfigError
from prefix_sharing.planning import ByLength, report_plan
from prefix_sharing.reports.lengths import PERCENTILES, mark_example, measure_lengths, percentiles, plot_lengths
from prefix_sharing.reports.lengths import prefix_ratio as ratio_of
from prefix_sharing.run import build_loss, build_model, build_plan, set_up_logging
from prefix_sharing.run.data import build_dataset, describe_step
from prefix_sharing.run.optimization import choose_seed
from prefix_sharing.run.setup import default_dtype
from prefix_sharing.trees import bucket_length
from prefix_sharing.wording import counted

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class StatsConfig(DistributedConfig):
    """Every key of ``prefix_dpo_stats``: those of a training config, and a few more."""

    show_example: int = at_least(0, default=0)
    """Index of the example that is shown."""
    world_size: int = at_least(1, default=1)
    """Processes that the run will have."""


class PrefixDPOStats:
    """Describes the training data set of a config.

    Args:
        cfg (DictConfig): the keys of ``StatsConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        on_cuda = torch.cuda.is_available() if cfg.device is None else cfg.device.startswith("cuda")
        device = torch.device("cuda" if on_cuda else "cpu")
        cfg.dtype = cfg.dtype or default_dtype(device)
        self.model = build_model(cfg, device)  # on the meta device, whatever the device
        self.round_length = rounding_of(self.model.attention_backend)
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        loss = build_loss(cfg)
        self.dataset = build_dataset("dataset", cfg, self.tokenizer, self.model, loss)
        ranks, seed = Ranks(world_size=cfg.world_size), choose_seed(cfg.seed)
        self.plan = build_plan(cfg, self.dataset, self.model, loss, seed=seed, ranks=ranks)
        if cfg.show_example >= len(self.dataset):
            raise ConfigError("show_example", f"is {cfg.show_example}, but there are {len(self.dataset):,} examples")

    @property
    def pack_len(self) -> int | None:
        """Maximum number of tokens in a Row as configured; None where Rows are not packed."""
        return self.plan.packing.pack_len if isinstance(self.plan.packing, ByLength) else None

    def packings(self) -> list[dict[str, Any]]:
        """How full Rows are at the config's ``pack_len`` and at others: their tokens over ``pack_len`` for each."""
        longest = bucket_length(int(self.plan.sizes.num_tokens.max()))
        found = []
        for pack_len in sorted({longest * factor for factor in (1, 2, 4, 8)} | {self.pack_len or longest}):
            packing = self.plan.packing
            packing = replace(packing, pack_len=pack_len) if isinstance(packing, ByLength) else ByLength(pack_len)
            report = report_plan(replace(self.plan, packing=packing), self.round_length)
            found.append({"pack_len": pack_len, "rows": report.num_rows, "fill": report.fill})
        return found

    def run(self) -> None:
        """Prints the figures, and writes them down."""
        dataset, plan = self.dataset, self.plan
        lengths = measure_lengths(dataset)
        flops = {share: float(self.model.forward_flops(dataset.sizes(share)).sum()) for share in (True, False)}
        stats = {
            "name": dataset.name,
            "records": dataset.num_records,
            "examples": len(dataset),
            "pairs": int(dataset.num_pairs.sum()),
            "dropped": dataset.dropped,
            "percentiles": {name: percentiles(values) for name, values in lengths.named().items()},
            "median_prefix_ratio": float(np.median(ratio_of(lengths))),
            "repeated_over_shared_tokens": float(lengths.repeated.sum() / lengths.example.sum()),
            "expected_speed_up": flops[False] / flops[True],
            "world_size": self.cfg.world_size,
            "steps_per_epoch": plan.steps_per_epoch,
            "packings": self.packings(),
        }
        print(f"{'tokens':12} " + " ".join(f"{f'{p} %':>8}" for p in PERCENTILES))
        for name, values in stats["percentiles"].items():
            print(f"{name:12} " + " ".join(f"{value:8,}" for value in values.values()))
        print(f"\nA prefix is {stats['median_prefix_ratio']:.2f} times as long as a response of its example (median).")
        print(
            f"Without sharing there are {stats['repeated_over_shared_tokens']:.2f} times the tokens; by the "
            "floating-point operations of this model, a step is expected to be "
            f"{stats['expected_speed_up']:.2f} times as fast."
        )
        processes = "1 process" if self.cfg.world_size == 1 else f"{self.cfg.world_size:,} processes"
        steps = counted(plan.steps_per_epoch, "step")
        print(f"{steps} per epoch, {describe_step(plan)} per step, on {processes} (world_size).\n")
        print(f"{'pack_len':>8} {'Rows':>8} {'full':>7}")
        for packing in stats["packings"]:
            configured = "  as configured" if packing["pack_len"] == self.pack_len else ""
            print(f"{packing['pack_len']:8,} {packing['rows']:8,} {packing['fill']:7.1%}{configured}")
        colors = sys.stdout.isatty()
        print(f"\nExample {self.cfg.show_example}, scored tokens {'underlined' if colors else 'in brackets'}:")
        print(mark_example(self.tokenizer, dataset[self.cfg.show_example], colors=colors))

        output_dir = Path(self.cfg.output_dir) / "stats"
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        plot_lengths(lengths, f"{dataset.name}: {len(dataset):,} examples", output_dir / "lengths.png")
        log.info("Statistics saved to %s", output_dir)


@parse(StatsConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Describes the data set of a config, with ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOStats(cfg).run()


if __name__ == "__main__":
    recipe_main()
