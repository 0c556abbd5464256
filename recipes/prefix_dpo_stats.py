"""A look at a config's data set before training: lengths, drops, what sharing saves, how rows fill up, one example.

    tune run prefix_dpo_stats --config quickstart/single_device

Takes any training config of this package. Trains nothing and reads no weights; prints what it finds, and writes
``stats.json`` and ``lengths.png`` to ``stats`` under ``output_dir``.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from prefix_sharing.attention import rounding_of
from prefix_sharing.config import instantiate
from prefix_sharing.datasets.stats import PERCENTILES, mark_example, measure_lengths, percentiles, plot_lengths
from prefix_sharing.datasets.stats import prefix_ratio as ratio_of
from prefix_sharing.model import forward_flops
from prefix_sharing.rows import Plan, bucket_length, report_plan
from prefix_sharing.training import (
    DistributedConfig,
    build_dataset,
    build_model,
    build_plan,
    parse,
    set_up_logging,
)

log = logging.getLogger("prefix_sharing.recipe")


@dataclass
class StatsConfig(DistributedConfig):
    """Every key of ``prefix_dpo_stats``: those of a training config, and one more.

    Attributes:
        show_example (int): which example is shown.
    """

    show_example: int = 0


class PrefixDPOStats:
    """Describes the training data set of a config.

    Args:
        cfg (DictConfig): the keys of ``StatsConfig``.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        on_cuda = torch.cuda.is_available() if cfg.device is None else cfg.device.startswith("cuda")
        device = torch.device("cuda" if on_cuda else "cpu")
        self.model = build_model(cfg, device)  # on the meta device, whatever the device
        self.round_length = rounding_of(self.model.attention_backend)
        self.tokenizer = instantiate("tokenizer", cfg.tokenizer)
        loss = instantiate("loss", cfg.loss)
        self.dataset = build_dataset("dataset", cfg, self.tokenizer, self.model, loss)
        self.plan = build_plan(cfg, self.dataset, self.model, loss)

    def packings(self) -> list[dict[str, Any]]:
        """How full rows are at the config's ``pack_len`` and at others."""
        longest = bucket_length(int(self.plan.sizes.num_tokens.max()))
        found = []
        for pack_len in sorted({longest * factor for factor in (1, 2, 4, 8)} | {self.plan.pack_len or longest}):
            plan: Plan = replace(self.plan, pack_len=pack_len, batch_size=None)
            report = report_plan(plan, self.round_length)
            found.append({"pack_len": pack_len, "rows": report.num_rows, "fill": report.fill})
        return found

    def run(self) -> None:
        """Prints what there is to say, and writes it down."""
        dataset, plan = self.dataset, self.plan
        lengths = measure_lengths(dataset)
        flops = {share: float(forward_flops(self.model, dataset.sizes(share)).sum()) for share in (True, False)}
        stats = {
            "name": dataset.name,
            "rows": dataset.num_rows,
            "examples": len(dataset),
            "pairs": int(dataset.num_pairs.sum()),
            "dropped": dataset.dropped,
            "percentiles": {name: percentiles(values) for name, values in lengths.named().items()},
            "median_prefix_ratio": float(sorted(ratio_of(lengths))[len(dataset) // 2]),
            "repeated_over_shared_tokens": float(lengths.repeated.sum() / lengths.example.sum()),
            "expected_speed_up": flops[False] / flops[True],
            "steps_per_epoch": plan.steps_per_epoch,
            "packings": self.packings(),
        }
        print(repr(dataset))
        print(f"\n{'tokens':12} " + " ".join(f"{f'{p} %':>8}" for p in PERCENTILES))
        for name, values in stats["percentiles"].items():
            print(f"{name:12} " + " ".join(f"{value:8,}" for value in values.values()))
        print(f"\nA prefix is {stats['median_prefix_ratio']:.2f} times as long as a response of its example (median).")
        print(
            f"Without sharing, {stats['repeated_over_shared_tokens']:.2f} times the tokens; from the floating-point "
            f"operations of this model, a step is expected to be {stats['expected_speed_up']:.2f} times as fast."
        )
        per_step = f"{plan.examples_per_step:,} examples" if plan.examples_per_step else f"{plan.rows_per_step:,} rows"
        print(f"{plan.steps_per_epoch:,} steps an epoch, {per_step} a step.\n")
        print(f"{'pack_len':>8} {'rows':>8} {'fill':>7}")
        for packing in stats["packings"]:
            configured = "  as configured" if packing["pack_len"] == plan.pack_len else ""
            print(f"{packing['pack_len']:8,} {packing['rows']:8,} {packing['fill']:7.3f}{configured}")
        print(f"\nExample {self.cfg.show_example}, scored tokens underlined:")
        print(mark_example(self.tokenizer, dataset[self.cfg.show_example]))

        output_dir = Path(self.cfg.output_dir) / "stats"
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        plot_lengths(lengths, f"{dataset.name}: {len(dataset):,} examples", output_dir / "lengths.png")
        log.info("Written to %s", output_dir)


@parse(StatsConfig)
def recipe_main(cfg: DictConfig) -> None:
    """Describes the data set of a config, with ``key=value`` overrides."""
    set_up_logging()
    PrefixDPOStats(cfg).run()


if __name__ == "__main__":
    recipe_main()
