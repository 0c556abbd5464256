"""Judged answers as a preference data set: the tokens that were sampled, not what their text would be tokenized to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.datasets.ranking import PairStrategy, pairs_with_a_preference
from prefix_sharing.datasets.table import FEATURES, NO_REMARKS, dropped_example, tokenized_example
from prefix_sharing.errors import UserError
from prefix_sharing.fingerprint import code_fingerprint
from prefix_sharing.online.tables import read_rows
from prefix_sharing.tokenizers import ChatTokenizer


def sampled_preference_dataset(
    tokenizer: ChatTokenizer, *, data_files: str, pairs: PairStrategy = "best_vs_worst"
) -> PrefixPreferenceDataset:
    """Builds a preference data set of a round's judged answers, for a config.

    A prompt's answers are ranked by score and compared as ``pairs`` says; answers that are in no pair are left out of
    the tree. What is dropped is counted: prompts whose answers all have one score (``tied scores``) or are all alike
    (``identical responses``). Answers without text or without a verdict are not ranked.

    Args:
        tokenizer (ChatTokenizer): not used: the answers are tokens already.
        data_files (str): ``scores.parquet`` of a round.
        pairs (PairStrategy): ``best_vs_worst``, ``best_vs_rest``, ``adjacent`` or ``all``. Default: "best_vs_worst".

    Returns:
        PrefixPreferenceDataset: the data set.

    Raises:
        UserError: if there is no such file, or no example is left.

    Example:
        .. code-block:: yaml

            dataset:
              _component_: prefix_sharing.online.sampled_preference_dataset
              data_files: output/round_0/scores.parquet
    """
    if not Path(data_files).is_file():
        raise UserError(f"{data_files} not found; prefix_dpo_online and prefix_dpo_judge write it.")
    rows = read_rows(Path(data_files))
    table = datasets.Dataset.from_generator(
        _examples, gen_kwargs={"rows": rows, "pairs": pairs, "code": _code()}, features=FEATURES
    )
    return PrefixPreferenceDataset(table, data_files)


def dataset_of_answers(rows: list[dict[str, Any]], name: str) -> PrefixPreferenceDataset:
    """All of a table's answers, each prompt an example, compared with none.

    Args:
        rows (list[dict[str, Any]]): of a round's table.
        name (str): where they come from, for messages.

    Returns:
        PrefixPreferenceDataset: the data set.
    """
    table = datasets.Dataset.from_generator(_all_answers, gen_kwargs={"rows": rows, "code": _code()}, features=FEATURES)
    return PrefixPreferenceDataset(table, name)


def describe_pairs(
    tokenizer: ChatTokenizer, file: Path, pairs: PairStrategy, *, share_prefix: bool
) -> dict[str, float]:
    """What became of a round's answers.

    Args:
        tokenizer (ChatTokenizer): the policy's.
        file (Path): ``scores.parquet`` of the round.
        pairs (PairStrategy): as for ``sampled_preference_dataset``.
        share_prefix (bool): whether prompts are shared in training.

    Returns:
        dict[str, float]: ``share_tied``, of prompts whose answers all have one score, and ``tokens_saved``, the share
        of tokens that separate sequences would take and the round did not.
    """
    scores = np.array([row["scores"] for row in read_rows(file)])
    trees = sampled_preference_dataset(tokenizer, data_files=str(file), pairs=pairs)
    computed, separate = (trees.sizes(shared).num_tokens.sum() for shared in (share_prefix, False))
    return {
        "share_tied": float(np.mean(np.nanmax(scores, axis=1) == np.nanmin(scores, axis=1))),
        "tokens_saved": float(1 - computed / separate),
    }


def _code() -> str:
    """An argument that only decides where ``datasets`` caches a table: it knows a generator by its name."""
    return code_fingerprint("online", "datasets", "trees")


def _all_answers(rows: list[dict[str, Any]], code: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        prompt = row["prompt_tokens"]
        yield tokenized_example(
            [prompt + answer for answer in row["answers"]],
            [[False] * len(prompt) + [True] * len(answer) for answer in row["answers"]],
            [],
            row["key"],
            remarks=NO_REMARKS,
        )


def _examples(rows: list[dict[str, Any]], pairs: PairStrategy, code: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield _example(row, pairs)


def _example(row: dict[str, Any], pairs: PairStrategy) -> dict[str, Any]:
    scores = np.array(row["scores"], dtype=np.float64)
    usable = [i for i, text in enumerate(row["texts"]) if text.strip() and not np.isnan(scores[i])]
    ranked = sorted(usable, key=lambda i: -scores[i])
    answers = [row["answers"][i] for i in ranked]
    found = pairs_with_a_preference(answers, [scores[i] for i in ranked], pairs)
    if not found:
        if len(usable) < 2:
            return dropped_example("fewer than two answers with text and a score")
        alike = all(answer == answers[0] for answer in answers)
        return dropped_example("identical responses" if alike else "tied scores")
    used = sorted({k for pair in found for k in pair})
    place = {k: i for i, k in enumerate(used)}
    prompt = row["prompt_tokens"]
    ends = [not row["complete"][ranked[k]] for k in used]
    return tokenized_example(
        [prompt + answers[k] for k in used],
        [[False] * len(prompt) + [True] * len(answers[k]) for k in used],
        [(place[better], place[worse]) for better, worse in found],
        row["key"],
        remarks={**NO_REMARKS, "num_cut": sum(ends), "num_without_end": sum(ends)},
    )
