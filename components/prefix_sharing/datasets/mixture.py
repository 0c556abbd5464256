"""Several preference data sets as one, each with its share of the examples."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import datasets as hf_datasets
import numpy as np
from omegaconf import OmegaConf

from prefix_sharing.config import instantiate
from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.errors import ConfigError
from prefix_sharing.tokenizers import ChatTokenizer

log = logging.getLogger(__name__)

_BUILDER = "prefix_sharing.datasets.prefix_preference_dataset"


class PreferenceMixture(PrefixPreferenceDataset):
    """Data sets one behind the other; recipes shuffle them together.

    Args:
        parts (Sequence[PrefixPreferenceDataset]): the data sets.
        take (Sequence[np.ndarray]): the examples to take of each.
    """

    def __init__(self, parts: Sequence[PrefixPreferenceDataset], take: Sequence[np.ndarray]) -> None:
        self._names = [part.name for part in parts]
        self._starts = np.cumsum([0, *(part.num_records for part in parts)])
        taken = np.zeros(self._starts[-1], dtype=bool)
        for part, start, examples in zip(parts, self._starts, take, strict=False):
            taken[start + part.record_index[examples]] = True
        tokenized = hf_datasets.concatenate_datasets([part.tokenized for part in parts])
        super().__init__(tokenized, f"mixture of {', '.join(self._names)}", take=taken)

    def describe(self, index: int) -> str:
        """Where an example comes from, for messages."""
        record = self.record_index[index]
        part = int(np.searchsorted(self._starts, record, side="right")) - 1
        return f"record {record - self._starts[part]} of the split of {self._names[part]}"


def preference_mixture(
    tokenizer: ChatTokenizer, *, datasets: Sequence[Mapping[str, Any]], seed: int = 0
) -> PreferenceMixture:
    """Builds a mixture of preference data sets, for a config.

    No example is used twice: the largest mixture is made in which every data set has its share. What is left out is
    drawn at random, counted and logged.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        datasets (Sequence[Mapping[str, Any]]): the arguments of each data set's builder, that is,
            ``prefix_preference_dataset`` unless ``_component_`` names another, and its ``weight``, by which examples
            are shared out; without any weight, all examples are taken.
        seed (int): decides which examples are left out. Default: 0.

    Returns:
        PreferenceMixture: the mixture.

    Raises:
        ConfigError: if a data set cannot be built, or weights are missing or not positive.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.datasets.preference_mixture
              datasets:
                - {source: json, data_files: helpful.jsonl, weight: 0.7}
                - {source: json, data_files: harmless.jsonl, weight: 0.3}
    """
    nodes = [dict(node) for node in datasets]
    weights = [node.pop("weight", None) for node in nodes]
    parts = []
    for i, node in enumerate(nodes):
        if "packed" in node:
            raise ConfigError(f"datasets[{i}].packed", "not used: a mixture is packed as a whole, with packing: step")
        component = OmegaConf.create({"_component_": _BUILDER, **node})
        parts.append(instantiate(f"datasets[{i}]", component, tokenizer))
    counts = shares([len(part) for part in parts], weights)
    rng = np.random.default_rng(seed)
    take = [np.sort(rng.permutation(len(part))[:count]) for part, count in zip(parts, counts, strict=True)]
    mixture = PreferenceMixture(parts, take)
    for part, count in zip(parts, counts, strict=True):
        share = count / len(mixture)
        log.info(
            "%s: %s of %s examples, %.1f %% of the mixture", part.name, f"{count:,}", f"{len(part):,}", 100 * share
        )
    log.info("%r", mixture)
    return mixture


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
    if not all(isinstance(weight, (int, float)) and weight > 0 for weight in weights):
        raise ConfigError("datasets", f"every data set or none has a positive weight, but the weights are {weights}")
    positive = [weight for weight in weights if weight is not None]
    per_weight = min(size / weight for size, weight in zip(sizes, positive, strict=True))
    return [max(1, min(size, round(weight * per_weight))) for size, weight in zip(sizes, positive, strict=True)]
