"""Several preference data sets as one, each with its share of the examples."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets as hf_datasets
import numpy as np
from omegaconf import OmegaConf

from prefix_sharing.config import explained, instantiate
from prefix_sharing.datasets.choosing import Candidates, Choice, read_columns
from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.datasets.table import BEYOND_ITS_SHARE
from prefix_sharing.errors import ConfigError
from prefix_sharing.tokenizers import ChatTokenizer

log = logging.getLogger(__name__)

_BUILDER = "prefix_sharing.datasets.prefix_preference_dataset"


class PreferenceMixture(PrefixPreferenceDataset):
    """Data sets one behind the other; recipes shuffle them together.

    Args:
        parts (Sequence[PrefixPreferenceDataset]): the data sets.
        left_out (Sequence[np.ndarray]): why an example of each is left out, "" where it is not, shape ``[N]`` each.
    """

    def __init__(self, parts: Sequence[PrefixPreferenceDataset], left_out: Sequence[np.ndarray]) -> None:
        self._names = [part.name for part in parts]
        self._starts = np.cumsum([0, *(part.num_records for part in parts)])
        reasons = [part.leaving_out(of_examples) for part, of_examples in zip(parts, left_out, strict=True)]
        tokenized = hf_datasets.concatenate_datasets([part.tokenized for part in parts])
        super().__init__(tokenized, f"mixture of {', '.join(self._names)}", left_out=np.concatenate(reasons))

    def describe(self, index: int) -> str:
        """Where an example comes from, for messages."""
        record = self.record_index[index]
        part = int(np.searchsorted(self._starts, record, side="right")) - 1
        return f"record {record - self._starts[part]} of the split of {self._names[part]}"


@dataclass(frozen=True)
class Share:
    """How much of a data set is taken: the keys of one in a mixture that are not its builder's.

    Attributes:
        weight (float | None): by which examples are shared out among all data sets. Default: None.
        fraction (float | None): share of its examples that is there to be taken. Default: None, all.
        max_examples (int | None): how many are there to be taken at most. Default: None, all.

    Raises:
        ConfigError: if a number is out of its range.
    """

    weight: float | None = None
    fraction: float | None = None
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not (_is_number(self.fraction) and 0 < self.fraction <= 1):
            raise ConfigError("fraction", f"must be above 0 and at most 1, but is {self.fraction}")
        most = self.max_examples
        if most is not None and not (_is_number(most) and most >= 1 and most == int(most)):
            raise ConfigError("max_examples", f"must be a whole number of at least 1, but is {self.max_examples}")

    def limit(self, size: int) -> int:
        """How many of so many examples there are to be taken; at least one."""
        size = max(1, round(size * self.fraction)) if self.fraction is not None else size
        return min(size, int(self.max_examples)) if self.max_examples is not None else size


def preference_mixture(
    tokenizer: ChatTokenizer,
    *,
    datasets: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any] | None = None,
    deduplicate: Mapping[str, Any] | str | None = None,
    select: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    rescale: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> PreferenceMixture:
    """Builds a mixture of preference data sets, for a config.

    No example is used twice. First, duplicates are dropped, within and across data sets; then each data set is cut to
    its ``fraction`` and its ``max_examples``; then the largest mixture is made in which every data set has its share by
    ``weight``; and of what is left, ``select`` takes its budget. What is left out is counted by reason and logged.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        datasets (Sequence[Mapping[str, Any]]): the arguments of each data set's builder, that is,
            ``prefix_preference_dataset`` unless ``_component_`` names another, and the fields of ``Share``: ``weight``,
            ``fraction`` and ``max_examples``; without any, all examples are taken. ``scores`` of a data set that does
            not select by itself are for the mixture's ``select``.
        defaults (Mapping[str, Any] | None): arguments of every data set that does not set them itself. Default: None.
        deduplicate (Mapping[str, Any] | str | None): as in ``prefix_preference_dataset``; of two duplicates, the one
            in the earlier data set is kept. Default: None.
        select (Mapping[str, Any] | None): as in ``prefix_preference_dataset``. Default: None, all.
        scores (Mapping[str, Any] | None): a judge, as in ``prefix_preference_dataset``; columns are named at each data
            set. Default: None.
        rescale (Mapping[str, Any] | None): as in ``prefix_preference_dataset``, one line for all data sets. Default:
            None.
        seed (int): decides which examples are left out for the sake of shares. Default: 0.

    Returns:
        PreferenceMixture: the mixture.

    Raises:
        ConfigError: if a data set cannot be built, weights are missing or not positive, or all of a data set repeats
            earlier ones.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.datasets.preference_mixture
              datasets:
                - {data_files: helpful.jsonl, weight: 0.7}
                - {data_files: harmless.jsonl, weight: 0.3}
              defaults: {truncation: drop}
    """
    choice = Choice.from_keys(deduplicate=deduplicate, select=select, scores=scores, rescale=rescale)
    if choice.score_columns:
        raise ConfigError("scores", "must be a judge; columns are named by scores at each of the datasets")
    nodes = [{**(defaults or {}), **node} for node in datasets]
    shares_of, parts = [], []
    for i, node in enumerate(nodes):
        if "packed" in node:
            raise ConfigError(f"datasets[{i}].packed", "not used: a mixture is packed as a whole, with packing: step")
        with explained(f"datasets[{i}]"):
            shares_of.append(Share(**{name: node.pop(name, None) for name in Share.__dataclass_fields__}))
            own = Choice.from_keys(select=node.get("select"))
        columns = node.pop("scores", None) if choice.needs_scores and not own.needs_scores else None
        component = OmegaConf.create({"_component_": _BUILDER, **node})
        part = instantiate(f"datasets[{i}]", component, tokenizer)
        if columns is not None and part.reader is not None:
            part.reader = replace(part.reader, scores=read_columns(f"datasets[{i}].scores", columns))
        parts.append(part)
    left_out = [np.full(len(part), "", dtype=object) for part in parts]
    if choice.duplicates is not None:
        _leave_out(left_out, parts, replace(choice, selection=None))
    _share_out(left_out, parts, shares_of, seed)
    if choice.selection is not None:
        _leave_out(left_out, parts, replace(choice, duplicates=None))
    mixture = PreferenceMixture(parts, left_out)
    for part, reasons in zip(parts, left_out, strict=True):
        count = int((reasons == "").sum())
        share = count / len(mixture)
        log.info(
            "%s: %s of %s examples, %.1f %% of the mixture", part.name, f"{count:,}", f"{len(part):,}", 100 * share
        )
    log.info("%r", mixture)
    return mixture


def _share_out(
    left_out: Sequence[np.ndarray], parts: Sequence[PrefixPreferenceDataset], of: Sequence[Share], seed: int
) -> None:
    """Leaves out what is beyond each data set's share."""
    left = [np.flatnonzero(reasons == "") for reasons in left_out]
    for i, (part, examples) in enumerate(zip(parts, left, strict=True)):
        if len(examples) == 0:
            raise ConfigError(f"datasets[{i}]", f"all of {part.name} repeats earlier data sets; leave it out")
    limits = [share.limit(len(examples)) for share, examples in zip(of, left, strict=True)]
    counts = shares(limits, [share.weight for share in of])
    rng = np.random.default_rng(seed)
    for reasons, examples, count in zip(left_out, left, counts, strict=True):
        reasons[examples[rng.permutation(len(examples))[count:]]] = BEYOND_ITS_SHARE


def _leave_out(left_out: Sequence[np.ndarray], parts: Sequence[PrefixPreferenceDataset], choice: Choice) -> None:
    """Leaves out what a choice among the examples of all data sets leaves out."""
    readers = []
    for i, part in enumerate(parts):
        if part.reader is None:
            problem = "its records cannot be read again to choose among them; build it with prefix_preference_dataset"
            raise ConfigError(f"datasets[{i}]", problem)
        if part.num_merged and not choice.is_by_prompt:
            problem = "merges records before the mixture chooses by their answers; choose in this data set instead"
            raise ConfigError(f"datasets[{i}].group_by_prompt", problem)
        readers.append(part.reader)
    starts = np.cumsum([0, *(part.num_records for part in parts)])

    def describe(record: int) -> str:
        i = int(np.searchsorted(starts, record, side="right")) - 1
        return readers[i].records.describe(record - int(starts[i]))

    left = [np.flatnonzero(reasons == "") for reasons in left_out]
    usable = [start + part.record_index[examples] for start, part, examples in zip(starts, parts, left, strict=False)]
    names = [part.name for part in parts]
    reasons = choice.left_out(Candidates(readers, np.concatenate(usable), names, describe), "the mixture")
    ends = np.cumsum([len(examples) for examples in left])[:-1]
    for mine, examples, given in zip(left_out, left, np.split(reasons, ends), strict=True):
        mine[examples] = given


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shares(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many examples to take of each data set, at most all.

    Args:
        sizes (Sequence[int]): examples there are.
        weights (Sequence[float | None]): by which to share them out; all None takes everything.

    Returns:
        list[int]: at least one of each.

    Raises:
        ConfigError: if some weights are missing, or one is not positive.
    """
    if all(weight is None for weight in weights):
        return list(sizes)
    if not all(_is_number(weight) and weight > 0 for weight in weights if weight is not None) or None in weights:
        raise ConfigError("datasets", f"every data set or none has a positive weight, but the weights are {weights}")
    positive = [weight for weight in weights if weight is not None]
    per_weight = min(size / weight for size, weight in zip(sizes, positive, strict=True))
    return [max(1, min(size, round(weight * per_weight))) for size, weight in zip(sizes, positive, strict=True)]
