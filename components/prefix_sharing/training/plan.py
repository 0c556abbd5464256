"""The plan of a run from its config: steps, rows, ranks, and what is said of them before the first step."""

import logging
from typing import Any

import torch
from omegaconf import DictConfig

from prefix_sharing.attention import rounding_of
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.errors import UserError
from prefix_sharing.model import TreeTransformerDecoder, forward_flops
from prefix_sharing.rows import ExampleSizes, Plan, bucket_length, report_plan
from prefix_sharing.training.distributed import is_rank_zero, rank_and_world_size

log = logging.getLogger(__name__)


def build_loader(cfg: DictConfig, model: TreeTransformerDecoder, loss: Any, device: torch.device) -> StepLoader:
    """What builds the rows of the run, in few lengths where attention is compiled for each.

    Args:
        cfg (DictConfig): the run's config.
        model (TreeTransformerDecoder): the model.
        loss (Any): the loss, which may discount what makes a response longer than the other, or score prompts.
        device (torch.device): where it runs.

    Returns:
        StepLoader: for any data set and plan.

    Raises:
        UserError: if the loss scores prompts and nothing is shared.
    """
    score_whole = getattr(loss, "nll_over_prompt", False)
    if score_whole and not cfg.share_prefix:
        raise UserError(
            "Config: loss.nll_over_prompt reads prompts off the shared prefix; it needs share_prefix: True."
        )
    return StepLoader(
        device,
        share_prefix=cfg.share_prefix,
        ld_alpha=getattr(loss, "ld_alpha", 1.0),
        score_whole=score_whole,
        round_length=rounding_of(model.attention_backend),
        num_workers=cfg.num_workers,
    )


def build_plan(cfg: DictConfig, dataset: PrefixPreferenceDataset, model: TreeTransformerDecoder, loss: Any) -> Plan:
    """The plan of the run: which examples each step takes, and which of them share a row.

    Args:
        cfg (DictConfig): the run's config, its seed drawn.
        dataset (PrefixPreferenceDataset): the training data set.
        model (TreeTransformerDecoder): the model, for what its examples cost.
        loss (Any): the loss, for what it is the mean over.

    Returns:
        Plan: for this rank.

    Raises:
        UserError: if an example does not fit into a row.
    """
    rank, world_size = rank_and_world_size()
    by_rows = cfg.packing == "dataset"
    needed = "pack_rows_per_step" if by_rows else "global_batch_size"
    if dataset.packed and cfg[needed] is None:
        raise UserError(f"Config: dataset.packed: True with packing: {cfg.packing} needs {needed}.")
    if by_rows and not dataset.packed:
        raise UserError("Config: packing: dataset needs dataset.packed: True.")
    plan = Plan(
        sizes=_example_sizes(cfg, dataset, model, loss.mean_over),
        examples_per_step=None if by_rows else _examples_per_step(cfg, world_size),
        batch_size=None if dataset.packed else cfg.batch_size,
        pack_len=_pack_len(cfg, dataset, "dataset") if dataset.packed else None,
        rows_per_step=cfg.pack_rows_per_step if by_rows else None,
        seed=cfg.seed,
        shuffle=cfg.shuffle,
        drop_last=cfg.drop_last,
        max_steps=cfg.max_steps_per_epoch,
        rank=rank,
        world_size=world_size,
    )
    if plan.steps_per_epoch == 0:
        raise UserError(f"dataset: {len(dataset):,} examples are not one step; drop_last: False takes what there is.")
    per_step = f"{plan.rows_per_step:,} rows" if by_rows else f"{plan.examples_per_step:,} examples"
    log.info("%s steps an epoch, %s a step", f"{plan.steps_per_epoch:,}", per_step)
    return plan


def build_val_plan(
    cfg: DictConfig, dataset: PrefixPreferenceDataset | None, model: TreeTransformerDecoder, *, packed: bool
) -> Plan | None:
    """The plan of an evaluation.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset | None): the held-out data set.
        model (TreeTransformerDecoder): the model, for what its examples cost.
        packed (bool): whether rows are packed, as those of the training data set are.

    Returns:
        Plan | None: for this rank; None where there is no data set.

    Raises:
        UserError: if an example does not fit into a row.
    """
    if dataset is None:
        return None
    rank, world_size = rank_and_world_size()
    return Plan(
        sizes=_example_sizes(cfg, dataset, model),
        batch_size=None if packed else cfg.batch_size,
        pack_len=_pack_len(cfg, dataset, "dataset_val") if packed else None,
        rank=rank,
        world_size=world_size,
    ).of_pass()


def log_plan(plan: Plan, dataset: PrefixPreferenceDataset, load: StepLoader) -> None:
    """Says how full rows are, how even ranks, how many shapes attention sees, and what sharing saves.

    Args:
        plan (Plan): the plan of the run.
        dataset (PrefixPreferenceDataset): its data set.
        load (StepLoader): what builds its rows.
    """
    if is_rank_zero():
        saved = 1 - plan.sizes.num_tokens.sum() / dataset.sizes(share_prefix=False).num_tokens.sum()
        log.info("%s, %.1f %% of tokens saved by sharing", report_plan(plan, load.round_length), 100 * saved)


def _example_sizes(
    cfg: DictConfig, dataset: PrefixPreferenceDataset, model: TreeTransformerDecoder, mean_over: str = "pairs"
) -> ExampleSizes:
    sizes = dataset.sizes(cfg.share_prefix)
    return ExampleSizes(sizes.num_tokens, forward_flops(model, sizes), dataset.num_terms(mean_over))


def _examples_per_step(cfg: DictConfig, world_size: int) -> int:
    if cfg.global_batch_size is not None:
        if cfg.gradient_accumulation_steps > 1:
            log.info("global_batch_size is set, so gradient_accumulation_steps is not used")
        return cfg.global_batch_size
    return cfg.batch_size * cfg.gradient_accumulation_steps * world_size


def _pack_len(cfg: DictConfig, dataset: PrefixPreferenceDataset, key: str) -> int:
    """Most tokens in a row; an example that is longer is an error now, not at the step that would take it."""
    num_tokens = dataset.sizes(cfg.share_prefix).num_tokens
    longest = int(num_tokens.argmax())
    if cfg.pack_len == "auto":
        pack_len = bucket_length(int(num_tokens[longest]))
        log.info("%s: pack_len: auto is %s, the longest example rounded up", dataset.name, f"{pack_len:,}")
        return pack_len
    if num_tokens[longest] > cfg.pack_len:
        raise UserError(
            f"{key}: {dataset.describe(longest)} makes {num_tokens[longest]:,} "
            f"tokens and does not fit into a row of pack_len {cfg.pack_len:,}; raise pack_len (auto fits the longest), "
            f"lower {key}.max_seq_len, or leave out group_by_prompt."
        )
    return cfg.pack_len
