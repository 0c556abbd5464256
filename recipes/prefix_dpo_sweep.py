"""Several runs that differ in a key or more, one after the other, and a table of what came of them.

    tune run prefix_dpo_sweep --config quickstart/single_device 'loss.beta=[0.01,0.05,0.1,0.5]' examples=1000

Takes the config of ``prefix_dpo_single_device``. Every list on the command line is an axis, several are a grid. Each
run is that recipe's, with its ``output_dir`` below the sweep's, as in ``beta=0.05``. The reference log-probs are
computed by the first run that needs them and read by the others. What is finished is not done again, so that a sweep
that was stopped at any moment goes on when it is started again, and may be given more values, seeds and measures.
"""

import gc
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune.training.metric_logging import DiskLogger

from prefix_dpo_online import OnlineConfig, PrefixDPOOnline
from prefix_dpo_single_device import PrefixDPORecipeSingleDevice
from prefix_sharing.config import TrainingConfig, at_least, check_config, component_name, readable_errors
from prefix_sharing.config.files import did_you_mean
from prefix_sharing.config.parsing import read_config
from prefix_sharing.config.secrets import without_secrets
from prefix_sharing.config.sweeping import Axis, Point, check_axes, config_at, grid, run_name, short_names, take_axes
from prefix_sharing.errors import ConfigError, UserError
from prefix_sharing.online.held_out import HeldOut
from prefix_sharing.reports.curves import read_log_of_last_run
from prefix_sharing.reports.sweep import CAUTION, Measured, plot_sweep, table_of, what_it_shows
from prefix_sharing.run import set_up_device, set_up_logging
from prefix_sharing.run.directory import full_disk_explained, locked_output_dir, own_logs
from prefix_sharing.run.results import measured, read_result, write_result
from prefix_sharing.run.signals import run_to_end

log = logging.getLogger("prefix_sharing.recipe")

_OF_THE_JUDGE = ("judge", "sampler", "prompts_val", "num_answers_val", "max_new_tokens", "temperature")


@dataclass
class SweepConfig(TrainingConfig):
    """Every key of ``prefix_dpo_sweep``: those of training, each of which may be swept, and a few more."""

    examples: int | None = at_least(1, default=None)
    """How many training examples each run takes: the same ones, drawn at random; all if not set or if there are not so
    many."""
    seeds: int = at_least(1, default=1)
    """Runs of each point of the grid, with ``seed``, ``seed`` + 1 and so on; what differs between them is noise."""
    measures: list[str] | None = None
    """What the table shows, the first to choose by: names of logged metrics, as last logged; ``score`` and
    ``answer_length`` with a ``judge``; ``FILE.json:path/to/number`` for a number that something else has left in the
    run's directory. Accuracy and margin on ``dataset_val``, or its loss, if not set, after the ``score``."""
    judge: Any = None
    """Scores each trained model's answers to ``prompts_val``: one of ``prefix_sharing.judging``."""
    sampler: Any = None
    """With ``judge``: samples the answers, as in ``prefix_dpo_online``."""
    prompts_val: Any = None
    """With ``judge``: builds the prompts, ``prefix_sharing.online.prompt_dataset``."""
    num_answers_val: int = at_least(1, default=1)
    """With ``judge``: answers to each prompt."""
    max_new_tokens: int = at_least(1, default=256)
    """With ``judge``: maximum number of tokens in an answer."""
    temperature: float = at_least(0, default=1.0)
    """With ``judge``: of sampling; 0 takes the most likely token each time."""


TRAINING_KEYS = [field.name for field in fields(TrainingConfig)]

NEVER_SWEPT = {field.name for field in fields(SweepConfig)} - {*TRAINING_KEYS, "examples"}
"""What is the sweep's, not a run's."""


class RunOfSweep(PrefixDPORecipeSingleDevice):
    """A run, which remembers what was logged last."""

    def setup(self) -> None:
        """As for any training."""
        super().setup()
        self.last_logged: dict[str, float] = {}
        if self.resumed is not None and isinstance(self.metric_logger, DiskLogger):  # what it logged before
            for _, metrics in read_log_of_last_run(own_logs(self.cfg)):
                self.last_logged |= metrics
        log_dict = self.metric_logger.log_dict

        def log_and_remember(payload: dict[str, Any], step: int) -> None:
            self.last_logged |= {name: float(value) for name, value in payload.items()}
            log_dict(payload, step=step)

        self.metric_logger.log_dict = log_and_remember


class JudgedPolicy(PrefixDPOOnline):
    """A trained policy, for its judged answers to held-out prompts."""

    def directory(self, number: int) -> Path:
        """The run's; there is one policy only."""
        return self.output_dir


@dataclass(frozen=True)
class Run:
    """One of a sweep's runs.

    Attributes:
        name (str): of its directory.
        point (Point): a value of each axis.
        cfg (DictConfig): the keys of ``TrainingConfig``.
    """

    name: str
    point: Point
    cfg: DictConfig


class PrefixDPOSweep:
    """Trains at every point of a grid.

    Args:
        cfg (DictConfig): the keys of ``SweepConfig`` as read, without the axes.
        axes (Sequence[Axis]): the keys that are swept.

    Raises:
        UserError: if there is nothing to sweep, or a run's config is wrong.
    """

    def __init__(self, cfg: DictConfig, axes: Sequence[Axis]) -> None:
        if not axes:
            raise UserError("There is nothing to sweep: give a key a list of values, such as 'loss.beta=[0.01,0.1]'.")
        check_axes(cfg, axes)
        self.axes, self.names = axes, short_names(axes)
        self.cfg = check_config(config_at(cfg, axes, grid(axes)[0]), SweepConfig)
        self.output_dir = Path(self.cfg.output_dir)
        missing = [key for key in ("judge", "sampler", "prompts_val") if self.cfg[key] is None]
        if missing and len(missing) < 3:
            raise ConfigError(missing[0], "required: judge, sampler and prompts_val belong together")
        if self.cfg.dataset_val is None and self.cfg.measures is None and missing:
            raise ConfigError(
                "dataset_val", "required: the runs are compared on it, unless measures name something else"
            )
        if self.cfg.measures is not None and not self.cfg.measures:
            raise ConfigError("measures", "is empty; name what to compare by, or leave it out")
        if self.cfg.seeds > 1 and any(axis.key == "seed" for axis in axes):
            raise ConfigError("seeds", "not used while seed is swept; remove one of the two")
        self.runs = [self.run_at(cfg, point, k) for point in grid(axes) for k in range(self.cfg.seeds)]
        plain: list[Any] = [OmegaConf.to_container(run.cfg, resolve=True) for run in self.runs]
        if any(keys["dataset_val"] != plain[0]["dataset_val"] for keys in plain):
            log.warning("dataset_val is not the same in all runs, so what is measured on it does not compare; set it.")

    def run_at(self, cfg: DictConfig, point: Point, k: int) -> Run:
        """The run at a point of the grid, with its k-th seed."""
        cfg, name = config_at(cfg, self.axes, point), run_name(self.axes, point)
        cfg.seed = (cfg.get("seed") or 0) + k
        if k > 0:
            name = f"{name},seed={cfg.seed}"
        cfg.output_dir = str(self.output_dir / name)
        cfg.resume, cfg.overwrite_output_dir = "auto", False
        checked = check_config(cfg, SweepConfig)
        cfg = OmegaConf.masked_copy(checked, TRAINING_KEYS)
        cfg.checkpointer.output_dir = cfg.output_dir
        if "log_dir" in cfg.metric_logger:
            cfg.metric_logger.log_dir = f"{cfg.output_dir}/logs"
        if cfg.reference.cache_dir is None:
            cfg.reference.cache_dir = str(self.output_dir / "reference_log_probs")
        if checked.examples is not None:
            # What refers to the data set's arguments finds them a level below.
            moved: Any = OmegaConf.create(OmegaConf.to_yaml(cfg).replace("${dataset.", "${dataset.dataset."))
            subset = "prefix_sharing.datasets.random_subset"
            moved.dataset = {"_component_": subset, "examples": checked.examples, "dataset": moved.dataset}
            cfg = moved
        return Run(name, point, cfg)

    def run(self) -> None:
        """Every run that is not finished yet, and the report."""
        for run in self.runs:
            read_result(run.cfg)  # which refuses another sweep's, before any work
        failed: dict[str, str] = {}
        for i, run in enumerate(self.runs, start=1):
            number = f"Run {i} of {len(self.runs)}, {run.name}"
            try:
                if read_result(run.cfg) is not None:
                    log.info("%s: finished before", number)
                else:
                    log.info("%s: in %s", number, run.cfg.output_dir)
                    train(run)
                if self.cfg.judge is not None:
                    self.judge(run)
            except UserError as error:  # such as a learning rate at which it diverges: the others go on
                log.error("%s failed: %s", number, error)
                failed[run.name] = str(error)
            gc.collect()  # the next run needs the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.report(failed, is_last=i == len(self.runs))
        if len(failed) < len(self.runs):
            log.info("The table is in %s, its picture in %s", self.output_dir / "sweep.md", self.picture)
        if failed:
            name, why = next(iter(failed.items()))
            count = f"{len(failed)} of {len(self.runs)} runs failed"
            raise UserError(f"{count}, {name} because of: {why} The same command tries them again.")

    def judge(self, run: Run) -> None:
        """Adds to a run's result what the judge has to say of its answers, unless that is there."""
        whole: Any = OmegaConf.to_container(self.cfg, resolve=True)
        judging = OmegaConf.create({key: whole[key] for key in _OF_THE_JUDGE})
        by = OmegaConf.to_container(without_secrets(judging))
        result = read_result(run.cfg)
        assert result is not None
        if result.get("judged_by") == by:
            return
        cfg = OmegaConf.structured(OnlineConfig)
        for keys in (run.cfg, judging):
            cfg.merge_with(OmegaConf.create(OmegaConf.to_container(keys, resolve=True)))
        cfg.dataset = cfg.dataset_val = None
        cfg.prompts = cfg.prompts_val
        with locked_output_dir(run.cfg):
            held_out = HeldOut.of_rows(JudgedPolicy(cfg, set_up_device(cfg)).answer_held_out(0))
        judged = {"score": float(np.nanmean(held_out.scores)), "answer_length": float(held_out.lengths.mean())}
        write_result(run.cfg, result["metrics"] | judged, judged_by=by)

    def report(self, failed: dict[str, str], *, is_last: bool) -> None:
        """Writes the table and the picture of the runs that are finished so far; the last ones are printed."""
        results = [(run, read_result(run.cfg)) for run in self.runs]
        done = [(run, result["metrics"]) for run, result in results if result is not None]
        if not done:
            return
        measures = self.measures({name: value for _, metrics in done for name, value in metrics.items()})
        found = []
        for point in grid(self.axes):
            of_point = [(run, metrics) for run, metrics in done if run.point == point]
            values = {name: [measured(run.cfg, metrics, name) for run, metrics in of_point] for name in measures}
            found.append(Measured(point, {name: [v for v in of if v is not None] for name, of in values.items()}))
        lines = [table_of(self.names, found, measures), ""]
        for measure in measures:
            text, shows_nothing = what_it_shows(self.names, found, measure)
            lines.append(f"- {'Warning: ' if shows_nothing else ''}{text}")
        lines += [f"- {name} failed: {why}" for name, why in failed.items()]
        lines += ["", CAUTION]
        title = f"{component_name(self.cfg.model)}, {len(self.runs)} runs, seeds: {self.cfg.seeds}"
        if self.cfg.examples is not None and "examples" not in self.names:
            title += f", {self.cfg.examples:,} examples each"
        report = "\n".join(lines)
        text = f"# Sweep of {', '.join(axis.key for axis in self.axes)}\n\n{title}.\n\n{report}\n"
        (self.output_dir / "sweep.md").write_text(text, encoding="utf-8")
        plot_sweep(self.names, found, measures, title, self.picture)
        if is_last:
            print(report)

    @property
    def picture(self) -> Path:
        """Where the picture goes."""
        return self.output_dir / "sweep.png"

    def measures(self, metrics: dict[str, float]) -> list[str]:
        """What the table shows: what was asked for, if some run has it, or what there is."""
        if self.cfg.measures is None:
            held_out = ["eval/rewards/accuracies", "eval/rewards/margins"]
            if held_out[0] not in metrics:
                held_out = ["eval/loss"]
            return [name for name in ["score", *held_out] if name in metrics]
        for name in self.cfg.measures:
            if ".json:" not in name and name not in metrics:
                problem = f"no run logs '{name}'; there are {', '.join(metrics)}.{did_you_mean(name, list(metrics))}"
                raise ConfigError("measures", problem)
        return list(self.cfg.measures)


def train(run: Run) -> None:
    """Trains, and leaves the result.

    Args:
        run (Run): the run.

    Raises:
        UserError: if it fails.
    """
    cfg = run.cfg.copy()  # which learns of the device
    recipe = RunOfSweep(cfg, set_up_device(cfg))
    with locked_output_dir(cfg), full_disk_explained(cfg):
        exit_code = run_to_end(recipe)
    write_result(run.cfg, recipe.last_logged)
    if exit_code:
        raise SystemExit(exit_code)


def recipe_main() -> None:
    """Sweeps with a config and ``key=value`` overrides, where a list is swept."""
    with readable_errors():
        set_up_logging()
        axes, sys.argv[1:] = take_axes(sys.argv[1:], NEVER_SWEPT)
        sweep = PrefixDPOSweep(read_config(), axes)
        with locked_output_dir(OmegaConf.create({"output_dir": str(sweep.output_dir)})):
            sweep.run()


recipe_main.config_class = SweepConfig  # type: ignore[attr-defined]


if __name__ == "__main__":
    recipe_main()
