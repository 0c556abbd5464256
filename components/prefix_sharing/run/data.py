"""The data of a run from its config: data sets, the loader of Rows, and the plan of steps, Rows and ranks."""

import logging
from typing import Any

import torch
from omegaconf import DictConfig

from prefix_sharing.attention import rounding_of
from prefix_sharing.config import explained, instantiate
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.datasets.labels import with_labels
from prefix_sharing.distributed import Ranks, is_rank_zero, rank_zero_first
from prefix_sharing.errors import ConfigError
from prefix_sharing.hosts import TreeModel, missing_window
from prefix_sharing.hosts.tokenizer_files import check_tokenizer
from prefix_sharing.losses import Loss
from prefix_sharing.planning import ByLength, ExampleSizes, Fixed, Packing, Plan, WholeDataset, report_plan
from prefix_sharing.trees import RowOptions, bucket_length
from prefix_sharing.wording import counted

log = logging.getLogger(__name__)

_STEPS_TO_REPORT = 64
"""Steps whose Rows the log describes: rank 0 plans them while the others wait."""


def build_datasets(
    cfg: DictConfig, tokenizer: Any, model: TreeModel, loss: Loss
) -> tuple[PrefixPreferenceDataset, PrefixPreferenceDataset | None]:
    """Builds the data sets of a run as ``build_dataset`` does.

    Args:
        cfg (DictConfig): the run's config.
        tokenizer (Any): what makes tokens of the data.
        model (TreeModel): the policy, whose vocabulary and length the data has to fit.
        loss (Loss): the loss, which says whether it is for pairs, rankings or single responses.

    Returns:
        tuple[PrefixPreferenceDataset, PrefixPreferenceDataset | None]: those of ``dataset`` and ``dataset_val``; None
            if the config has no ``dataset_val``.

    Raises:
        ConfigError: if one cannot be built or does not fit.
    """
    check_tokenizer(cfg, tokenizer)
    dataset = build_dataset("dataset", cfg, tokenizer, model, loss)
    return dataset, build_dataset("dataset_val", cfg, tokenizer, model, loss) if cfg.dataset_val is not None else None


def build_dataset(key: str, cfg: DictConfig, tokenizer: Any, model: TreeModel, loss: Loss) -> PrefixPreferenceDataset:
    """Builds a data set, tokenized on one process of each machine, and checks that model and loss can take it.

    Args:
        key (str): ``dataset`` or ``dataset_val``.
        cfg (DictConfig): the run's config.
        tokenizer (Any): what makes tokens of the data.
        model (TreeModel): the policy, whose vocabulary and length the data has to fit.
        loss (Loss): the loss, which says whether it is for pairs, rankings or single responses.

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        ConfigError: if it cannot be built or does not fit.
    """
    with rank_zero_first():
        dataset = instantiate(key, cfg[key], tokenizer)
    if not isinstance(dataset, PrefixPreferenceDataset):
        problem = f"{cfg[key]._component_} returns a {type(dataset).__name__}; use "
        raise ConfigError(key, f"{problem}prefix_sharing.datasets.prefix_preference_dataset")
    if dataset.largest_id >= model.vocab_size:
        problem = (
            f"the tokenizer has token ids up to {dataset.largest_id}, but the model's vocabulary has "
            f"{model.vocab_size}; use the tokenizer that comes with the model"
        )
        raise ConfigError(key, problem)
    if dataset.longest > model.max_seq_len:
        problem = (
            f"the longest response sequence has {dataset.longest} tokens, but the model takes at most "
            f"{model.max_seq_len}; set it to that or less"
        )
        raise ConfigError(f"{key}.max_seq_len", problem)
    window = missing_window(model, cfg.get("checkpointer"))
    if window is not None and dataset.longest > window[0]:
        problem = (
            f"the longest response sequence has {dataset.longest} tokens, but sliding_window in {window[1]} is "
            f"{window[0]}, and the model sees further than that; set it to {window[0]} or less"
        )
        raise ConfigError(f"{key}.max_seq_len", problem)
    name = type(loss).__name__
    if loss.needs.pairs_only and dataset.num_responses > 2:
        problem = (
            f"{name} as configured is for pairs, but there are examples of {dataset.num_responses} responses; set "
            f"{key}.pairs: best_vs_worst"
        )
        raise ConfigError(key, problem)
    if loss.mean_over == "tokens" and dataset.num_pairs.max() > 0:
        problem = f"{name} is for examples of one response; {key}.pairs: best_only trains on the chosen ones"
        raise ConfigError(key, problem)
    if loss.mean_over == "tokens" and dataset.num_labels.max() > 0:
        problem = f"{name} would learn undesirable answers as well; leave them out with filter_fn, and the labels with"
        raise ConfigError(key, f"{problem} column_map: {{label: null}}")
    if loss.needs.labels:
        with explained(key), rank_zero_first():
            return with_labels(dataset, mismatched=loss.needs.kl)
    alone = int((dataset.num_pairs == 0).sum())
    if loss.mean_over != "tokens" and alone > 0:
        which = f"{alone:,} of {len(dataset):,} examples have" if alone < len(dataset) else "every example has"
        problem = f"{name} compares pairs, but {which} one response only; "
        if dataset.num_labels.max() > 0:
            problem += "use KTOLoss for single answers with a label"
        elif alone < len(dataset):
            problem += "leave them out with filter_fn"
        else:
            problem += "use NLLLoss, or group_by_prompt if a prompt has several"
        raise ConfigError(key, problem)
    return dataset


def build_loader(cfg: DictConfig, model: TreeModel, loss: Loss, device: torch.device) -> StepLoader:
    """What builds the Rows of the run: in few lengths where attention is compiled for each, with what the loss needs.

    Args:
        cfg (DictConfig): the run's config.
        model (TreeModel): the policy, whose vocabulary and length the data has to fit.
        loss (Loss): the loss, which says whether it is for pairs, rankings or single responses.
        device (torch.device): where it runs.

    Returns:
        StepLoader: for any data set and plan.
    """
    options = RowOptions(
        share_prefix=cfg.share_prefix,
        round_length=rounding_of(model.attention_backend),
        tail_weight=loss.needs.tail_weight,
        whole_sequence=loss.needs.whole_sequence,
        confidence=loss.needs.confidence,
    )
    return StepLoader(device, options, num_workers=cfg.num_workers)


def build_plan(
    cfg: DictConfig, dataset: PrefixPreferenceDataset, model: TreeModel, loss: Loss, *, seed: int, ranks: Ranks
) -> Plan:
    """The plan of the run: which examples each step takes, and which of them share a Row.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset): the training data set.
        model (TreeModel): the model, for what its examples cost.
        loss (Loss): the loss, for what it is the mean over.
        seed (int): the run's seed.
        ranks (Ranks): this rank, and how many there are.

    Returns:
        Plan: for this rank.

    Raises:
        ConfigError: if an example does not fit into a Row, or there is no complete step.
    """
    packing = _packing(cfg, dataset, "dataset")
    plan = Plan(
        sizes=_example_sizes(cfg, dataset, model, loss.mean_over),
        packing=packing,
        examples_per_step=None if isinstance(packing, WholeDataset) else _examples_per_step(cfg, ranks.world_size),
        seed=seed,
        shuffle=cfg.shuffle,
        drop_last=cfg.drop_last,
        max_steps=cfg.max_steps_per_epoch,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    if plan.steps_per_epoch == 0:
        raise ConfigError("drop_last", f"leaves no steps of {len(dataset):,} examples; set it to False")
    log.info("%s per epoch, %s per step", counted(plan.steps_per_epoch, "step"), describe_step(plan))
    return plan


def describe_step(plan: Plan) -> str:
    """What a step takes, such as ``32 examples``."""
    if isinstance(plan.packing, WholeDataset):
        return counted(plan.packing.rows_per_step, "Row")
    return counted(plan.examples_per_step or len(plan.all_examples), "example")


def build_val_plan(
    cfg: DictConfig, dataset: PrefixPreferenceDataset | None, model: TreeModel, *, ranks: Ranks
) -> Plan | None:
    """The plan of an evaluation, whose Rows are packed as those of the training data set are.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset | None): the held-out data set.
        model (TreeModel): the model, for what its examples cost.
        ranks (Ranks): this rank, and how many there are.

    Returns:
        Plan | None: for this rank; None where there is no data set.

    Raises:
        ConfigError: if an example does not fit into a Row.
    """
    if dataset is None:
        return None
    return Plan(
        sizes=_example_sizes(cfg, dataset, model),
        packing=_packing(cfg, dataset, "dataset_val"),
        rank=ranks.rank,
        world_size=ranks.world_size,
    ).of_pass()


def plan_of_pass(cfg: DictConfig, dataset: PrefixPreferenceDataset, model: TreeModel, *, ranks: Ranks) -> Plan:
    """The plan of a pass over a data set that is not trained on, with an example in each Row.

    Args:
        cfg (DictConfig): the run's config.
        dataset (PrefixPreferenceDataset): the data set.
        model (TreeModel): the model, for what its examples cost.
        ranks (Ranks): this rank, and how many there are.

    Returns:
        Plan: for this rank.
    """
    sizes = _example_sizes(cfg, dataset, model)
    return Plan(sizes=sizes, packing=Fixed(1), rank=ranks.rank, world_size=ranks.world_size).of_pass()


def log_plan(plan: Plan, dataset: PrefixPreferenceDataset, step_loader: StepLoader) -> None:
    """Logs how full Rows are, how even ranks, how many shapes attention sees, and what sharing saves.

    Args:
        plan (Plan): the plan of the run.
        dataset (PrefixPreferenceDataset): its data set.
        step_loader (StepLoader): what builds its Rows.
    """
    if is_rank_zero():
        saved = 1 - plan.sizes.num_tokens.sum() / dataset.sizes(share_prefix=False).num_tokens.sum()
        report = report_plan(plan, step_loader.options.round_length, max_steps=_STEPS_TO_REPORT)
        log.info("%s, %.1f %% of tokens saved by sharing", report, 100 * saved)


def _example_sizes(
    cfg: DictConfig, dataset: PrefixPreferenceDataset, model: TreeModel, mean_over: str = "pairs"
) -> ExampleSizes:
    sizes = dataset.sizes(cfg.share_prefix)
    return ExampleSizes(sizes.num_tokens, model.forward_flops(sizes), dataset.num_terms(mean_over))


def _examples_per_step(cfg: DictConfig, world_size: int) -> int:
    if cfg.global_batch_size is not None:
        return cfg.global_batch_size
    return (cfg.batch_size or 1) * (cfg.gradient_accumulation_steps or 1) * world_size


def _packing(cfg: DictConfig, dataset: PrefixPreferenceDataset, key: str) -> Packing:
    if cfg.packing == "none":
        return Fixed(cfg.batch_size or 1)
    pack_len = _pack_len(cfg, dataset, key)
    return ByLength(pack_len) if cfg.packing == "step" else WholeDataset(pack_len, cfg.pack_rows_per_step)


def _pack_len(cfg: DictConfig, dataset: PrefixPreferenceDataset, key: str) -> int:
    """Maximum number of tokens in a Row; a longer example is an error now, not at the step that would take it."""
    num_tokens = dataset.sizes(cfg.share_prefix).num_tokens
    longest = int(num_tokens.argmax())
    if cfg.pack_len in (None, "auto"):
        pack_len = bucket_length(int(num_tokens[longest]))
        log.info("%s: pack_len is %s, the longest example rounded up", dataset.name, f"{pack_len:,}")
        return pack_len
    if num_tokens[longest] > cfg.pack_len:
        shorter = f"{key if cfg[key].get('max_seq_len') else 'tokenizer'}.max_seq_len"
        ungrouped = f", or leave out {key}.group_by_prompt" if cfg[key].get("group_by_prompt") else ""
        problem = (
            f"{dataset.describe(longest)} makes {num_tokens[longest]:,} tokens, more than {cfg.pack_len:,}; raise it "
            f"(auto fits the longest){',' if ungrouped else ' or'} lower {shorter}{ungrouped}"
        )
        raise ConfigError("pack_len", problem)
    return cfg.pack_len
