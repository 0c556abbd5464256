"""Log-probs under the reference: read from the cache, or computed in one pass before the first update.

The pass is made by the model that is about to train, so there is never a second one, unless a frozen one is asked for.
Values are indexed by the example, never by a position in some rank's stream.
"""

import functools
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.datasets import PrefixPreferenceDataset, StepLoader
from prefix_sharing.distributed import broadcast_from_rank_zero, broadcast_object, is_rank_zero, reshard, sum_over_ranks
from prefix_sharing.errors import ConfigError
from prefix_sharing.fingerprint import code_fingerprint, fingerprint, source_of
from prefix_sharing.hosts import TreeModel, load_checkpoint
from prefix_sharing.planning import Plan
from prefix_sharing.reference.cache import ReferenceCache
from prefix_sharing.scoring import ResponseLogProbs
from prefix_sharing.trees import Row
from prefix_sharing.wording import counted

log = logging.getLogger(__name__)

SECONDS_BETWEEN_FILES = 20
"""About how much of a pass an interruption loses at most."""


@dataclass(frozen=True, eq=False)
class KnownReference:
    """Reference log-probs of a whole data set.

    Args:
        log_probs (torch.Tensor): by example, on the model's device, shape ``[N, K]``.
    """

    log_probs: torch.Tensor

    def __call__(self, row: Row) -> torch.Tensor:
        """Those of a Row's examples, shape ``[E, K]``."""
        return self.log_probs[row.example_index]


@dataclass(frozen=True)
class FrozenReference:
    """A model that is asked for each Row, for data that is used once: a second one, or the trained one's base.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): its forward pass.
    """

    forward: Callable[[Row], ResponseLogProbs]

    @torch.no_grad()
    def __call__(self, row: Row) -> torch.Tensor:
        """The log-probs of a Row's examples, shape ``[E, K]``."""
        return self.forward(row).log_probs


Reference = KnownReference | FrozenReference
"""Reference log-probs as a function of a Row."""


def load_reference(cfg: DictConfig) -> Checkpoint | None:
    """What a config names as reference, ``ref_checkpointer``; None where that is what the run starts from."""
    return None if cfg.ref_checkpointer is None else load_checkpoint("ref_checkpointer", cfg.ref_checkpointer)[1]


def set_up_reference(
    cfg: DictConfig,
    checkpoint: Checkpoint,
    other: Checkpoint | None,
    passes: Sequence[tuple[PrefixPreferenceDataset | None, Plan | None]],
    *,
    seed: int,
    model: TreeModel,
    new_model: Callable[[], TreeModel],
    forward: Callable[[TreeModel, Row], ResponseLogProbs],
    step_loader: StepLoader,
) -> list[Reference | None]:
    """Makes the reference log-probs of a run's data sets available, as the config says.

    Args:
        cfg (DictConfig): the run's config.
        checkpoint (Checkpoint): what the run starts from.
        other (Checkpoint | None): the reference, if it is not what the run starts from.
        passes (Sequence[tuple[PrefixPreferenceDataset | None, Plan | None]]): data sets, each with the plan of a pass
            over the examples that the run will read.
        seed (int): the run's seed, which decides a fresh adapter.
        model (TreeModel): the model about to train, with the checkpoint's weights, which it has again at the end.
        new_model (Callable[[], TreeModel]): builds another one, for ``precompute: False``.
        forward (Callable[[TreeModel, Row], ResponseLogProbs]): a model's forward pass.
        step_loader (StepLoader): builds the Rows.

    Returns:
        list[Reference | None]: for each data set a function of a Row.
    """
    if not cfg.reference.precompute:
        begins_with_adapter = broadcast_object(bool(checkpoint.adapter))  # which rank 0 may have alone
        if model.has_adapter and other is None and not begins_with_adapter:
            return [FrozenReference(functools.partial(_without_adapter, forward, model))] * len(passes)
        frozen = new_model()
        frozen.requires_grad_(False).eval()
        frozen.load_weights(other or checkpoint, seed)
        return [FrozenReference(functools.partial(forward, frozen))] * len(passes)
    cache = open_reference_cache(cfg, other or checkpoint, step_loader.options.tail_weight)
    if other is not None:
        model.load_weights(other, seed)
    model.eval()
    compute = functools.partial(
        reference_log_probs, functools.partial(forward, model), step_loader=step_loader, cache=cache
    )
    references: list[Reference | None] = [
        None if dataset is None or plan is None else compute(dataset=dataset, plan=plan) for dataset, plan in passes
    ]
    reshard(model)
    model.train()
    if other is not None:
        model.load_weights(checkpoint, seed)
    return references


def _without_adapter(
    forward: Callable[[TreeModel, Row], ResponseLogProbs], model: TreeModel, row: Row
) -> ResponseLogProbs:
    """The base model's log-probs, by the model that is trained, without its dropout."""
    was_training = model.training
    model.eval()
    try:
        with model.without_adapter():
            return forward(model, row)
    finally:
        model.train(was_training)


def open_reference_cache(cfg: DictConfig, checkpoint: Checkpoint, tail_weight: float = 1.0) -> ReferenceCache | None:
    """The part of the cache that belongs to a reference.

    Args:
        cfg (DictConfig): the run's config.
        checkpoint (Checkpoint): the reference's checkpoint.
        tail_weight (float): see ``RowOptions``. Default: 1.0.

    Returns:
        ReferenceCache | None: on rank 0; None on other ranks, and if the config turns the cache off.

    Raises:
        ConfigError: if its directory cannot be written.
    """
    if cfg.reference.cache_dir is None or not is_rank_zero():
        return None
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    decides = {
        "weights": checkpoint.fingerprint,
        "model": {name: value for name, value in model.items() if name != "path"},  # what is there counts
        "source": source_of(resolve_name(cfg.model._component_)),
        "dtype": cfg.dtype,
        "compile": cfg.compile,  # which rounds in another order, as do backends
        "attention_backend": cfg.attention_backend,
        "tail_weight": tail_weight,
        "code": code_fingerprint("trees", "attention", "scoring.py", "hosts"),
        "libraries": {name: version(name) for name in ("torchtune", "transformers", "peft") if find_spec(name)},
    }
    name = json.dumps(decides, sort_keys=True, default=str)
    about = {"model": cfg.model._component_, "dtype": cfg.dtype, "made": time.strftime("%Y-%m-%d %H:%M")}
    try:
        cache = ReferenceCache(cfg.reference.cache_dir, fingerprint(name), about)
    except OSError as error:
        problem = f"{cfg.reference.cache_dir} cannot be written: {error.strerror}; null turns the cache off"
        raise ConfigError("reference.cache_dir", problem) from error
    log.info("Reference log-probs are kept in %s", cache.directory)
    return cache


@torch.no_grad()
def reference_log_probs(
    forward: Callable[[Row], ResponseLogProbs],
    dataset: PrefixPreferenceDataset,
    plan: Plan,
    step_loader: StepLoader,
    cache: ReferenceCache | None = None,
) -> KnownReference:
    """Reads or computes the log-probs of the examples' responses, with the model as it is now, over all ranks.

    Args:
        forward (Callable[[Row], ResponseLogProbs]): the model's forward pass.
        dataset (PrefixPreferenceDataset): the data set.
        plan (Plan): of a pass over the examples that the run will read.
        step_loader (StepLoader): builds the Rows.
        cache (ReferenceCache | None): where to read and write, on rank 0. Default: None.

    Returns:
        KnownReference: NaN for examples that were neither asked for nor in the cache.
    """
    log_probs = torch.full((len(dataset), dataset.num_responses), torch.nan)
    if cache is not None:
        log_probs = torch.from_numpy(cache.read(dataset.ids, dataset.num_responses))
    log_probs = broadcast_from_rank_zero(log_probs.to(step_loader.device))
    examples = plan.all_examples
    unknown = log_probs.isnan().any(dim=1).cpu().numpy()
    missing = examples[unknown[examples]]
    if len(examples) > 0:  # a run that is finished visits none
        log.info(
            "%s: reference log-probs of %s in the cache, %s to compute",
            dataset.name,
            counted(len(examples) - len(missing), "example"),
            f"{len(missing):,}",
        )
    if len(missing) == 0:
        return KnownReference(log_probs)

    steps = plan.of_pass(missing).epoch()
    written, last_write = 0, time.monotonic()
    progress = tqdm(
        step_loader(dataset, steps),
        total=len(steps),
        desc=f"Reference log-probs, {dataset.name}",
        unit="step",
        disable=not is_rank_zero(),
    )
    for i, step in enumerate(progress):
        of_ranks = torch.from_numpy(np.sort(step.example_index)).to(step_loader.device)
        computed = log_probs.new_zeros(len(of_ranks), dataset.num_responses)
        for row in step.rows:
            row = row.to(step_loader.device)
            computed[torch.searchsorted(of_ranks, row.example_index)] = forward(row).log_probs.to(computed.dtype)
        log_probs[of_ranks] = sum_over_ranks(computed)
        is_last = i + 1 == len(steps)
        if cache is not None and (is_last or time.monotonic() - last_write > SECONDS_BETWEEN_FILES):
            done = np.concatenate([steps.example_index(j) for j in range(written, i + 1)])
            try:
                cache.add(dataset.ids.take(done), log_probs[done].cpu().numpy(), dataset.num_responses_of[done])
            except OSError as error:  # a full disk must not cost the pass
                log.warning("%s cannot be written (%s); continuing without it.", cache.directory, error.strerror)
            written, last_write = i + 1, time.monotonic()
    return KnownReference(log_probs)
