"""Examples whose responses are desirable or not, each on its own, as KTO learns from.

Pairs become two such responses. What KTO measures the policy's distance from the reference by, an answer to another
prompt, is one more response of the example: a branch from the same prompt, which is computed once for all.
"""

import logging
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from prefix_sharing.datasets.dataset import PrefixPreferenceDataset
from prefix_sharing.datasets.table import FEATURES, NO_REMARKS, tokenized_example
from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import code_fingerprint

log = logging.getLogger(__name__)


def with_labels(dataset: PrefixPreferenceDataset, *, mismatched: bool) -> PrefixPreferenceDataset:
    """Labels the responses of every example.

    Args:
        dataset (PrefixPreferenceDataset): examples of pairs, or with labels already.
        mismatched (bool): whether each response with a label gets one with label 0 beside it: the answer of an earlier
            example with another prompt, after this prompt, cut to the length of the data set's longest response. It is
            the same whatever the step, so that its log-prob under the reference is computed once.

    Returns:
        PrefixPreferenceDataset: the same examples with other responses, and without pairs.

    Raises:
        UserError: if a response is better than one and worse than another, all examples have the same prompt, or a
            prompt is scored.
    """
    tokenized, used = dataset.tokenized, dataset.record_index
    partners = _partners(dataset) if mismatched else {}
    label = _Label(tokenized, set(used.tolist()), partners, dataset.longest, dataset.name)
    key = [tokenized._fingerprint, used.tolist(), mismatched, code_fingerprint("datasets", "trees")]
    labelled = dataset.with_table(
        tokenized.map(
            label,
            with_indices=True,
            features=FEATURES,
            # Hashing the function would read the whole table.
            new_fingerprint=Hasher.hash(key),
            desc=f"Labelling {dataset.name}",
        )
    )
    labels = pc.list_flatten(labelled.tokenized.data.column("labels").take(used)).to_numpy()
    counts = (f"{int((labels == label).sum()):,}" for label in (1, -1))
    log.info("%s: %s desirable and %s undesirable responses", dataset.name, *counts)
    return labelled


def _partners(dataset: PrefixPreferenceDataset) -> dict[int, int]:
    """For each record the last one before it, or before the end, that has another prompt."""
    used = dataset.record_index.tolist()
    prompts = np.asarray(dataset.tokenized.data.column("prompt").to_pylist(), dtype=object)[used].tolist()
    # As "" is several prompts, it is another one than any.
    differs = [not prompts[i - 1] or prompts[i - 1] != prompts[i] for i in range(len(used))]
    if not any(differs) or len(used) == 1:
        problem = "KTO compares answers with those to other prompts, but there is one prompt only"
        raise UserError(f"{dataset.name}: {problem}.")
    partners, first = {}, differs.index(True)
    last = first - 1
    for i in [*range(first, len(used)), *range(first)]:
        if differs[i]:
            last = i - 1
        partners[used[i]] = used[last]
    return partners


class _Label:
    def __init__(
        self, tokenized: datasets.Dataset, used: set[int], partners: dict[int, int], longest: int, name: str
    ) -> None:
        self._tokenized = tokenized
        self._used = used
        self._partners = partners
        self._longest = longest
        self._name = name

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        if index not in self._used:
            return example
        labels = example["labels"] or self._labels_of_pairs(example, index)
        tokens, scored = list(example["tokens"]), list(example["scored"])
        if index in self._partners:
            partner = self._tokenized[self._partners[index]]
            for k in range(len(labels)):
                of_prompt, _ = self._answer(example, k, index)
                j = k % len(partner["tokens"])
                start, end = self._answer(partner, j, self._partners[index])
                answer = partner["tokens"][j][start:end][: self._longest - of_prompt]
                tokens.append(example["tokens"][k][:of_prompt] + answer)
                scored.append([False] * of_prompt + [True] * len(answer))
            labels = labels + [0] * len(labels)
        remarks = {name: example[name] for name in NO_REMARKS}
        return tokenized_example(tokens, scored, [], example["prompt"], remarks=remarks, labels=labels)

    def _labels_of_pairs(self, example: dict[str, Any], index: int) -> list[int]:
        chosen, rejected = set(example["pairs"][::2]), set(example["pairs"][1::2])
        if chosen & rejected or not chosen:
            problem = "has a response that is better than one and worse than another; set pairs: best_vs_worst for"
            problem += " rankings, or leave out group_by_prompt"
            if not chosen:
                problem = "has a response without a label, and no other to compare it with"
            raise UserError(f"record {index} of the split of {self._name} {problem}.")
        return [1 if k in chosen else -1 for k in range(len(example["tokens"]))]

    def _answer(self, example: dict[str, Any], k: int, index: int) -> tuple[int, int]:
        """The range of a response's tokens that are its answer, the last run of scored ones."""
        scored = np.flatnonzero(example["scored"][k])
        breaks = np.flatnonzero(np.diff(scored) > 1)
        start, end = int(scored[breaks[-1] + 1] if len(breaks) else scored[0]), int(scored[-1]) + 1
        if start == 0:
            problem = (
                "nothing comes before its answer, so that of another prompt cannot take its place; keep_end may have "
                "cut the prompt away, and masking_strategy: train_on_all may score it"
            )
            raise UserError(f"record {index} of the split of {self._name}: {problem}.")
        return start, end
