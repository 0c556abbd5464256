"""Log-probs under the reference: read from the cache, or computed in one pass before the first update.

The pass is made by the model that is about to train, so there is never a second one, unless a frozen one is asked for.
Values are indexed by the example, never by a position in some rank's stream.
"""

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import training
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

import prefix_sharing
from prefix_sharing.config import source_of
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.errors import UserError
from prefix_sharing.model import ResponseLogProbs, TreeTransformerDecoder
from prefix_sharing.reference.cache import ReferenceCache, fingerprint_reference
from prefix_sharing.rows import Plan, Row
from prefix_sharing.training.adapters import has_adapter
from prefix_sharing.training.checkpoint import load_checkpoint, load_weights
from prefix_sharing.training.distributed import broadcast_from_rank_zero, is_rank_zero, reshard, sum_over_ranks

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FILES = 20
"""How much of a pass an interruption loses at most, about."""


@dataclass(frozen=True)
class KnownReference:
    """Reference log-probs of a whole data set.

    Args:
        log_probs (torch.Tensor): by example, on the model's device, shape ``[N, K]``.
    """

    log_probs: torch.Tensor

    def __call__(self, row: Row) -> torch.Tensor:
        """Those of a row's examples, shape ``[E, K]``."""
        return self.log_probs[row.examples]


@dataclass(frozen=True)
class FrozenReference:
    """A second model that is never trained, for data that is used once.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): its forward pass.
    """

    forward: Callable[[Row], ResponseLogProbs]

    @torch.no_grad()
    def __call__(self, row: Row) -> torch.Tensor:
        """The log-probs of a row's examples, shape ``[E, K]``."""
        return self.forward(row).log_probs


def set_up_reference(
    cfg: DictConfig,
    checkpoint: dict[str, Any],
    passes: Sequence[tuple[PrefixPreferenceDataset | None, Plan | None]],
    *,
    model: TreeTransformerDecoder,
    new_model: Callable[[], TreeTransformerDecoder],
    forward: Callable[[TreeTransformerDecoder, Row], ResponseLogProbs],
    load: StepLoader,
) -> list[KnownReference | FrozenReference | None]:
    """Makes the reference log-probs of a run's data sets available, as the config says.

    Args:
        cfg (DictConfig): the run's config.
        checkpoint (dict[str, Any]): what the run starts from, as ``load_checkpoint`` returned it.
        passes (Sequence[tuple[PrefixPreferenceDataset | None, Plan | None]]): data sets, each with the plan of a pass
            over the examples that the run will read.
        model (TreeTransformerDecoder): the model about to train, with the checkpoint's weights, which it has again at
            the end.
        new_model (Callable[[], TreeTransformerDecoder]): builds another one, for ``precompute: False``.
        forward (Callable[[TreeTransformerDecoder, Row], ResponseLogProbs]): a model's forward pass.
        load (StepLoader): builds the rows.

    Returns:
        list[KnownReference | FrozenReference | None]: for each data set a function of a row.
    """
    other = _load_reference_checkpoint(cfg)
    if not cfg.reference.precompute:
        if has_adapter(model) and cfg.ref_checkpointer is None and cfg.adapter_checkpoint is None:
            return [FrozenReference(functools.partial(_without_adapter, forward, model))] * len(passes)
        frozen = new_model().requires_grad_(False).eval()
        load_weights(frozen, other or checkpoint, cfg.seed)
        return [FrozenReference(functools.partial(forward, frozen))] * len(passes)
    cache = open_reference_cache(cfg, other or checkpoint, load.ld_alpha)
    if other is not None:
        load_weights(model, other, cfg.seed)
    model.eval()
    compute = functools.partial(reference_log_probs, functools.partial(forward, model), load=load, cache=cache)
    references = [None if plan is None else compute(dataset, plan) for dataset, plan in passes]
    reshard(model)
    model.train()
    if other is not None:
        load_weights(model, checkpoint, cfg.seed)
    return references


def _without_adapter(
    forward: Callable[[TreeTransformerDecoder, Row], ResponseLogProbs], model: TreeTransformerDecoder, row: Row
) -> ResponseLogProbs:
    """The base model's log-probs, by the model that is trained."""
    with disable_adapter(model):
        return forward(model, row)


def open_reference_cache(
    cfg: DictConfig, checkpoint: Mapping[str, Any], ld_alpha: float = 1.0
) -> ReferenceCache | None:
    """The part of the cache that belongs to a reference.

    Args:
        cfg (DictConfig): the run's config.
        checkpoint (Mapping[str, Any]): the reference's checkpoint, as ``load_checkpoint`` returned it.
        ld_alpha (float): see ``Row.from_examples``. Default: 1.0.

    Returns:
        ReferenceCache | None: on rank 0; None on other ranks, and if the config turns the cache off.

    Raises:
        UserError: if its directory cannot be written.
    """
    if cfg.reference.cache_dir is None or not is_rank_zero():
        return None
    computation = {
        "model": OmegaConf.to_container(cfg.model, resolve=True),
        "source": source_of(resolve_name(cfg.model._component_)),
        "dtype": cfg.dtype,
        "ld_alpha": ld_alpha,
        "versions": [prefix_sharing.__version__, version("torchtune")],
    }
    weights = checkpoint[training.MODEL_KEY] | checkpoint.get(training.ADAPTER_KEY, {})
    reference = fingerprint_reference(weights, computation)
    about = {"model": cfg.model._component_, "dtype": cfg.dtype, "made": time.strftime("%Y-%m-%d %H:%M")}
    try:
        cache = ReferenceCache(cfg.reference.cache_dir, reference, about)
    except OSError as error:
        raise UserError(
            f"Config: reference.cache_dir: {cfg.reference.cache_dir} cannot be written: {error.strerror}; "
            "null turns the cache off."
        ) from error
    log.info("Reference log-probs are kept in %s", cache.directory)
    return cache


@torch.no_grad()
def reference_log_probs(
    forward: Callable[[Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    load: StepLoader,
    cache: ReferenceCache | None = None,
) -> KnownReference:
    """Reads or computes the log-probs of the examples' responses, with the model as it is now, over all ranks.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): the model's forward pass.
        dataset (PrefixPreferenceDataset): the data set.
        plan (Plan): of a pass over the examples that the run will read.
        load (StepLoader): builds the rows.
        cache (ReferenceCache | None): where to read and write, on rank 0. Default: None.

    Returns:
        KnownReference: NaN for examples that were neither asked for nor in the cache.
    """
    log_probs = torch.full((len(dataset), dataset.num_responses), torch.nan)
    if cache is not None:
        log_probs = torch.from_numpy(cache.read(dataset.ids, dataset.num_responses))
    log_probs = broadcast_from_rank_zero(log_probs.to(load.device))
    examples = plan.all_examples
    unknown = log_probs.isnan().any(dim=1).cpu().numpy()
    missing = examples[unknown[examples]]
    log.info(
        "%s: reference log-probs of %s examples found, of %s to be computed",
        dataset.name,
        f"{len(examples) - len(missing):,}",
        f"{len(missing):,}",
    )
    if len(missing) == 0:
        return KnownReference(log_probs)

    steps = plan.of_pass(missing).epoch()
    written, last_write = 0, time.monotonic()
    progress = tqdm(
        load(dataset, steps),
        total=len(steps),
        desc=f"Reference log-probs, {dataset.name}",
        unit="step",
        disable=not is_rank_zero(),
    )
    for i, step in enumerate(progress):
        of_ranks = torch.from_numpy(np.sort(step.examples)).to(load.device)
        computed = log_probs.new_zeros(len(of_ranks), dataset.num_responses)
        for row in step.rows:
            row = row.to(load.device)
            computed[torch.searchsorted(of_ranks, row.examples)] = forward(row).log_probs.to(computed.dtype)
        log_probs[of_ranks] = sum_over_ranks(computed)
        is_last = i + 1 == len(steps)
        if cache is not None and (is_last or time.monotonic() - last_write > SECONDS_BETWEEN_FILES):
            done = np.concatenate([steps.examples(j) for j in range(written, i + 1)])
            try:
                cache.add(dataset.ids.take(done), log_probs[done].cpu().numpy(), dataset.num_responses_of[done])
            except OSError as error:  # a full disk must not cost the pass
                log.warning("%s cannot be written (%s); the run goes on.", cache.directory, error.strerror)
            written, last_write = i + 1, time.monotonic()
    return KnownReference(log_probs)


def _load_reference_checkpoint(cfg: DictConfig) -> dict[str, Any] | None:
    """The reference's checkpoint, where it is not what the run itself starts from.

    A run that resumes has the policy it first began with as its reference, not the one it goes on from.
    """
    if cfg.ref_checkpointer is not None:
        return load_checkpoint("ref_checkpointer", cfg.ref_checkpointer)[1]
    if cfg.resume_from_checkpoint:
        return load_checkpoint("checkpointer", cfg.checkpointer, adapter=cfg.adapter_checkpoint)[1]
    return None
