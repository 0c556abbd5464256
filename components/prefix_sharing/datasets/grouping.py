"""Merging the pairs of one prompt into one tree, so that prompt and repeated responses are computed once."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
from datasets.fingerprint import Hasher

from prefix_sharing.datasets.ranking import PairStrategy, pairs_with_a_preference
from prefix_sharing.datasets.table import FEATURES, MERGED, NO_REMARKS, dropped_example, tokenized_example


def group_by_prompt(
    tokenized: datasets.Dataset, name: str, strategy: PairStrategy, left_out: np.ndarray
) -> datasets.Dataset:
    """Merges examples that have the same prompt into the first of them.

    Every pair stays a pair and counts as it did; a response that several pairs contain is there once. Examples of one
    response with a score of its own become pairs.

    Args:
        tokenized (datasets.Dataset): a table with the columns of ``FEATURES``.
        name (str): where the records come from, for the progress bar.
        strategy (PairStrategy): which pairs responses with scores of their own are compared by.
        left_out (np.ndarray): why a line is left out that could be used, "" where it is not, shape ``[lines]``; those
            are merged with no other.

    Returns:
        datasets.Dataset: as many lines; those merged into an earlier one say so in ``dropped``.
    """
    first_of: dict[str, int] = {}
    members: dict[int, list[int]] = {}
    for index, prompt in enumerate(tokenized["prompt"]):
        if prompt and not left_out[index]:
            members.setdefault(first_of.setdefault(prompt, index), []).append(index)
    return tokenized.map(
        _Merge(tokenized, members, strategy, left_out),
        with_indices=True,
        features=FEATURES,
        # Hashing the function would read the whole table.
        new_fingerprint=Hasher.hash([tokenized._fingerprint, "group_by_prompt", strategy, left_out.tolist()]),
        desc=f"Grouping {name} by prompt",
    )


class _Merge:
    def __init__(
        self, tokenized: datasets.Dataset, groups: dict[int, list[int]], strategy: PairStrategy, left_out: np.ndarray
    ) -> None:
        self._tokenized = tokenized
        self._left_out = left_out
        self._strategy = strategy
        self._group_of = {index: group for group in groups.values() for index in group}

    def __call__(self, example: dict[str, Any], index: int) -> dict[str, Any]:
        group = self._group_of.get(index, [index])
        is_scored = bool(example["scores"])
        if self._left_out[index] or (len(group) == 1 and not is_scored):
            return example
        remarks = {name: example[name] for name in NO_REMARKS}
        if not is_scored and index != group[0]:
            return dropped_example(MERGED, remarks) | {"prompt": example["prompt"]}
        members = [self._tokenized[member] for member in group]
        merged = compare(members, self._strategy) if is_scored else merge(members)
        if merged["dropped"] or index == group[0]:
            return merged | {"lost_text": example["lost_text"], "unused": example["unused"]}
        return dropped_example(MERGED, remarks) | {"prompt": example["prompt"]}


def merge(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One example with the responses and the pairs of several.

    Args:
        examples (Sequence[dict[str, Any]]): lines of the table, with the same prompt.

    Returns:
        dict[str, Any]: a line of the table.
    """
    responses: dict[tuple[tuple[int, ...], tuple[bool, ...], Any], int] = {}
    pairs = []
    for number, example in enumerate(examples):
        # Every answer with a label is a term of the loss, the same one twice as well.
        labels = [(label, number) for label in example["labels"]] or [(0, 0)] * len(example["tokens"])
        keys = [
            (tuple(t), tuple(s), label)
            for t, s, label in zip(example["tokens"], example["scored"], labels, strict=True)
        ]
        mine = [responses.setdefault(key, len(responses)) for key in keys]
        flat = example["pairs"]
        pairs += [(mine[chosen], mine[rejected]) for chosen, rejected in zip(flat[::2], flat[1::2], strict=True)]
    return tokenized_example(
        [list(tokens) for tokens, _, _ in responses],
        [list(scored) for _, scored, _ in responses],
        pairs,
        examples[0]["prompt"],
        remarks=_sum_of_remarks(examples, len(responses)),
        labels=[label for _, _, (label, _) in responses] if examples[0]["labels"] else (),
    )


def compare(examples: Sequence[dict[str, Any]], strategy: PairStrategy) -> dict[str, Any]:
    """One example of several with one response each, compared by their scores.

    Args:
        examples (Sequence[dict[str, Any]]): lines of the table, with the same prompt.
        strategy (PairStrategy): which pairs they are compared by.

    Returns:
        dict[str, Any]: a line of the table.
    """
    examples = sorted(examples, key=lambda example: -example["scores"][0])
    if strategy == "best_only":
        return examples[0] | {"scores": []}
    tokens = [example["tokens"][0] for example in examples]
    pairs = pairs_with_a_preference(tokens, [example["scores"][0] for example in examples], strategy)
    if not pairs:
        return dropped_example("one response to its prompt" if len(examples) == 1 else "tied scores")
    used = sorted({k for pair in pairs for k in pair})
    return tokenized_example(
        [tokens[k] for k in used],
        [examples[k]["scored"][0] for k in used],
        [(used.index(chosen), used.index(rejected)) for chosen, rejected in pairs],
        examples[0]["prompt"],
        remarks=_sum_of_remarks([examples[k] for k in used], len(used)),
    )


def _sum_of_remarks(examples: Sequence[dict[str, Any]], num_responses: int) -> dict[str, Any]:
    """The counts of several examples; at most all, since a response may be in more than one."""
    names = ("num_cut", "num_without_end")
    sums = {name: min(sum(e[name] for e in examples), num_responses) for name in names}
    return {**NO_REMARKS, **sums, "prompt_cut": any(e["prompt_cut"] for e in examples)}
