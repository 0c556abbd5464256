"""A few examples of any data set, as of a sweep that tries something out on them."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from prefix_sharing.config import instantiate
from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.errors import ConfigError
from prefix_sharing.tokenizers import ChatTokenizer

log = logging.getLogger(__name__)


def random_subset(
    tokenizer: ChatTokenizer, *, dataset: Mapping[str, Any], examples: int, seed: int = 0
) -> PrefixPreferenceDataset:
    """Builds a data set and takes some of its examples at random, for a config.

    What is drawn is decided by ``seed`` alone, so runs with another seed of their own train on the same examples.

    Args:
        tokenizer (ChatTokenizer): one of torchtune's, or ``prefix_sharing.tokenizers.hf_chat_tokenizer``.
        dataset (Mapping[str, Any]): the data set's ``_component_`` and its arguments.
        examples (int): how many to take; of a data set with fewer all are taken, and the log says so.
        seed (int): decides which. Default: 0.

    Returns:
        PrefixPreferenceDataset: the examples.

    Raises:
        ConfigError: if the data set cannot be built, or ``examples`` is below 1.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.datasets.random_subset
              examples: 10000
              dataset:
                _component_: prefix_sharing.datasets.prefix_preference_dataset
                data_files: my_pairs.jsonl
    """
    examples = int(examples)  # 1e4 is a float to YAML
    if examples < 1:
        raise ConfigError("examples", f"must be at least 1, but is {examples}")
    whole = instantiate("dataset", OmegaConf.create(dict(dataset)), tokenizer)
    if not isinstance(whole, PrefixPreferenceDataset):
        raise ConfigError("dataset", f"builds a {type(whole).__name__}, which has no examples to choose from")
    if len(whole) <= examples:
        log.info("%s: all of its %s examples are taken (%s asked for)", whole.name, f"{len(whole):,}", f"{examples:,}")
        return whole
    subset = whole.subset(np.sort(np.random.default_rng(seed).permutation(len(whole))[:examples]))
    log.info("%r", subset)
    return subset
