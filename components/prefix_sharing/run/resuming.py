"""What a run that is continued must have in common with what was saved, and what it remembers."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from prefix_sharing.checkpoint import Checkpoint, TrainingCheckpoint, TrainingCheckpoints, complete_file
from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.distributed import broadcast_object, is_rank_zero, wait_for_all_ranks
from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.hosts import TreeModel
from prefix_sharing.losses import Loss
from prefix_sharing.planning import Plan, WholeDataset
from prefix_sharing.run.directory import CHECKPOINTS, own_logs, run_id
from prefix_sharing.run.evaluation import Evaluation
from prefix_sharing.run.finite import FiniteCheck
from prefix_sharing.run.metrics import StepMetrics

log = logging.getLogger(__name__)

_DECISIVE = (
    "model",
    "loss",
    "optimizer",
    "lr_scheduler",
    "packing",
    "shuffle",
    "drop_last",
    "share_prefix",
    "dtype",
    "clip_grad_norm",
)
"""Keys that decide a run's numbers; data, lengths and examples per step are compared by what they come to."""

_PATHS = ("path",)
"""Arguments of components that may differ: a model may have moved, and what is there is compared."""


def frozen_weights(
    model: TreeModel, loss: Loss, checkpoint: Checkpoint, reference: Checkpoint | None
) -> dict[str, str]:
    """The weights that decide a run's numbers and are in no training checkpoint, by their content; a collective.

    Args:
        model (TreeModel): the model that is trained.
        loss (Loss): the run's loss.
        checkpoint (Checkpoint): what the run began with.
        reference (Checkpoint | None): the reference, if it is not what the run began with.

    Returns:
        dict[str, str]: fingerprints, by what they are of.
    """
    frozen = {}
    if is_rank_zero():  # which may have the weights alone
        if checkpoint.config_file is not None:
            frozen["content of the model's config.json"] = fingerprint(checkpoint.config_file.read_bytes())
        if model.has_adapter:
            frozen["content of the base model's weights"] = checkpoint.fingerprint
        if loss.needs.reference:
            frozen["content of the reference's weights"] = (reference or checkpoint).fingerprint
    wait_for_all_ranks()  # reading all weights may take as long as set-up
    return broadcast_object(frozen)


def training_checkpoints(
    cfg: DictConfig,
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    seed: int,
    frozen: Mapping[str, str],
    resumed: TrainingCheckpoint | None,
) -> TrainingCheckpoints:
    """Where a run's training checkpoints go, after comparing it with the one it continues from.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset): the training data set.
        plan (Plan): of the run's steps.
        seed (int): the run's seed.
        frozen (Mapping[str, str]): what ``frozen_weights`` returns.
        resumed (TrainingCheckpoint | None): what it continues from.

    Returns:
        TrainingCheckpoints: for ``save``.

    Raises:
        UserError: if the run would not continue what was begun; it names every key that differs.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    decides: dict[str, Any] = {key: _without_paths(plain[key]) for key in _DECISIVE}
    decides |= {"seed": seed, **frozen}
    decides["examples (data and lengths)"] = _examples_of(dataset)
    decides["examples per step"] = plan.examples_per_step
    if isinstance(plan.packing, WholeDataset):
        decides |= {"pack_len": plan.packing.pack_len, "pack_rows_per_step": plan.packing.rows_per_step}
    if resumed is not None:
        _compare(decides, resumed, plan.steps_per_epoch, cfg.epochs)
        log.info("Resuming after step %d from %s", resumed.step, resumed.directory)
        if resumed.step >= cfg.epochs * plan.steps_per_epoch:
            log.info("The run is finished, so nothing is left to train; to continue it, raise epochs.")
    run = {"id": run_id(cfg, resumed, len(dataset)), "steps_per_epoch": plan.steps_per_epoch, "decides": decides}
    return TrainingCheckpoints(Path(cfg.output_dir) / CHECKPOINTS, run, cfg.keep_last_n)


def _examples_of(dataset: PrefixPreferenceDataset) -> str:
    """A short name for a data set's examples, in their order."""
    return fingerprint(dataset.ids.to_pylist())


def _without_paths(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: part for key, part in value.items() if key not in _PATHS}


def _compare(decides: Mapping[str, Any], resumed: TrainingCheckpoint, steps: int, epochs: int) -> None:
    saved = resumed.content["run"]
    before, steps_before = saved["decides"], saved["steps_per_epoch"]
    differing = [
        f"{key} was {_shown(before.get(key))} and is {_shown(decides.get(key))}"
        for key in {**decides, **before}
        if before.get(key) != decides.get(key)
    ]
    # The weights of an epoch are written after its last step, which has to be still to come.
    if resumed.step > steps_before < steps or resumed.step >= steps < steps_before:
        differing.append(f"steps per epoch were {steps_before} and are {steps}")
    elif resumed.step > epochs * steps:
        differing.append(f"epochs is {epochs}, which ended before step {resumed.step}")
    if differing:
        raise UserError(
            f"{resumed.directory} cannot be continued with this config: {'; '.join(differing)}. Set back what differs, "
            "or start another run in another output_dir."
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def forget_later_entries(cfg: DictConfig, resumed: TrainingCheckpoint | None, num_steps: int) -> None:
    """Takes from a run's logs on disk what will come again: what is after the step that it continues from.

    Logs of other runs in the same place stay as they are.

    Args:
        cfg (DictConfig): the run's config.
        resumed (TrainingCheckpoint | None): what the run continues from.
        num_steps (int): the run's; after the last one it evaluates the model once more.
    """
    if cfg.resume is None or not is_rank_zero():
        return
    last = -1 if resumed is None else resumed.step
    for file in own_logs(cfg):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= last and line.endswith("\n")]
        kept = [line for line in kept if not (_step_of(line) == num_steps and "| eval/" in line)]
        if kept != lines:
            complete_file(file, "".join(kept))


def _step_of(line: str) -> int:
    match = re.match(r"Step (\d+) \|", line)
    return int(match[1]) if match else -1


def stop_run(checkpoints: TrainingCheckpoints, step: int, exit_code: int) -> NoReturn:
    """Ends a run that was asked to, once its state is saved.

    Args:
        checkpoints (TrainingCheckpoints): the run's.
        step (int): optimizer steps done.
        exit_code (int): the process's.

    Raises:
        SystemExit: always.
    """
    checkpoints.wait()
    log.warning("Stopped after step %d; resume=auto continues from there.", step)
    raise SystemExit(exit_code)


def remembered(
    seed: int,
    metrics: StepMetrics,
    finite: FiniteCheck,
    evaluation_before: Evaluation | None,
    dataset_val: PrefixPreferenceDataset | None,
) -> dict[str, Any]:
    """What a training checkpoint holds besides tensors of model and optimizer, as JSON can say it: a collective.

    Args:
        seed (int): the run's seed.
        metrics (StepMetrics): of the steps since the last log entry.
        finite (FiniteCheck): what has been left out.
        evaluation_before (Evaluation | None): that before training.
        dataset_val (PrefixPreferenceDataset | None): what it is of.

    Returns:
        dict[str, Any]: for ``recall``, and the seed for ``choose_seed``.
    """
    before = None
    if evaluation_before is not None and dataset_val is not None:
        tensors = {name: getattr(evaluation_before, name).tolist() for name in ("log_probs", "num_scored")}
        before = {"metrics": evaluation_before.metrics, "of": _examples_of(dataset_val), **tensors}
    return {"seed": seed, "metrics": metrics.state_dict(), "finite": finite.state_dict(), "before": before}


def recall(
    values: Mapping[str, Any],
    metrics: StepMetrics,
    finite: FiniteCheck,
    dataset_val: PrefixPreferenceDataset | None,
) -> Evaluation | None:
    """Goes on from what ``remembered`` returned.

    Args:
        values (Mapping[str, Any]): ``TrainingCheckpoint.values``.
        metrics (StepMetrics): of the next steps.
        finite (FiniteCheck): the check of the next steps.
        dataset_val (PrefixPreferenceDataset | None): the held-out data set, which may be another one by now.

    Returns:
        Evaluation | None: that before training; None if it was of other data.
    """
    metrics.load_state_dict(values["metrics"])
    finite.load_state_dict(values["finite"])
    before = values["before"]
    if before is None or dataset_val is None:
        return None
    if before["of"] != _examples_of(dataset_val):
        log.warning("%s is not what was evaluated before training, so the two are not compared.", dataset_val.name)
        return None
    log_probs = torch.tensor(before["log_probs"], dtype=torch.float64)
    return Evaluation(before["metrics"], log_probs, torch.tensor(before["num_scored"]))
