"""Merging the pairs of one prompt into one tree, so that prompt and repeated responses are computed once."""

from collections.abc import Sequence
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from prefix_sharing.datasets.table import FEATURES, MERGED, dropped_example, tokenized_example


def group_by_prompt(tokenized: datasets.Dataset, name: str) -> datasets.Dataset:
    """Merges examples that have the same prompt into the first of them.

    Every pair stays a pair and counts as it did; a response that several pairs contain is there once.

    Args:
        tokenized (datasets.Dataset): a table with the columns of ``FEATURES``.
        name (str): where the records come from, for the progress bar.

    Returns:
        datasets.Dataset: as many lines; those merged into an earlier one say so in ``dropped``.
    """
    first_of: dict[str, int] = {}
    members: dict[int, list[int]] = {}
    for index, prompt in enumerate(tokenized["prompt"]):
        if prompt:
            members.setdefault(first_of.setdefault(prompt, index), []).append(index)
    return tokenized.map(
        _Merge(tokenized, {first: group for first, group in members.items() if len(group) > 1}),
        with_indices=True,
        features=FEATURES,
        # Hashing the function would read the whole table.
        new_fingerprint=Hasher.hash([tokenized._fingerprint, "group_by_prompt"]),
        desc=f"Grouping {name} by prompt",
    )


class _Merge:
    def __init__(self, tokenized: datasets.Dataset, groups: dict[int, list[int]]) -> None:
        self._tokenized = tokenized
        self._groups = groups
        self._merged = {index for group in groups.values() for index in group[1:]}

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        if index in self._merged:
            return dropped_example(MERGED)
        if index not in self._groups:
            return example
        return merge([self._tokenized[member] for member in self._groups[index]])


def merge(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One example with the responses and the pairs of several.

    Args:
        examples (Sequence[dict[str, Any]]): lines of the table, with the same prompt.

    Returns:
        dict[str, Any]: a line of the table.
    """
    responses: dict[tuple[tuple[int, ...], tuple[bool, ...]], int] = {}
    pairs = []
    for example in examples:
        keys = [(tuple(t), tuple(s)) for t, s in zip(example["tokens"], example["scored"], strict=True)]
        mine = [responses.setdefault(key, len(responses)) for key in keys]
        flat = example["pairs"]
        pairs += [(mine[chosen], mine[rejected]) for chosen, rejected in zip(flat[::2], flat[1::2], strict=True)]
    return tokenized_example(
        [list(tokens) for tokens, _ in responses],
        [list(scored) for _, scored in responses],
        pairs,
        examples[0]["prompt"],
    )
