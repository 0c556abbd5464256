"""The table of tokenized examples: one for each record of the source, dropped ones included."""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from prefix_sharing.fingerprint import fingerprint
from prefix_sharing.trees import PrefixTree, Response, TreeSize

MERGED = "merged"
"""In ``dropped`` where the responses of a record were merged into an earlier one's: the record is used."""

MALFORMED = "malformed"
"""In ``dropped`` where a record could not be read, and ``problem`` says why."""

BEYOND_ITS_SHARE = "beyond its share of the mixture"
"""In ``dropped`` where a record of a data set in a mixture is not used that would be used by itself."""

NOT_DRAWN = "not drawn for the subset"
"""In ``dropped`` where an example is not one of those that a subset takes."""

FEATURES = datasets.Features(
    {
        "tokens": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
        "scored": datasets.Sequence(datasets.Sequence(datasets.Value("bool"))),
        "pairs": datasets.Sequence(datasets.Value("int32")),  # chosen, rejected, chosen, rejected, ...
        "labels": datasets.Sequence(datasets.Value("int8")),  # of each response: 1, -1, 0 if mismatched; or none at all
        "dropped": datasets.Value("string"),  # why, or ""
        "id": datasets.Value("string"),  # fingerprint of tokens and scored
        "prompt": datasets.Value("string"),  # fingerprint of the prompt, or "" if the responses have several
        "num_responses": datasets.Value("int32"),
        "num_pairs": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),
        "num_scored": datasets.Value("int32"),
        "scores": datasets.Sequence(datasets.Value("float64")),  # of single responses that are yet to be compared
        "num_cut": datasets.Value("int32"),  # responses that lost their end to max_seq_len
        "num_without_end": datasets.Value("int32"),  # responses without a scored token that ends them
        "prompt_cut": datasets.Value("bool"),  # whether the prompt lost its beginning to max_prompt_length
        "lost_text": datasets.Value("bool"),  # whether the chat template left out text of scored turns
        "unused": datasets.Sequence(datasets.Value("string")),  # columns and keys of messages with no use
        "problem": datasets.Value("string"),  # of a malformed record
        "longest": datasets.Value("int32"),
        "largest_id": datasets.Value("int32"),
        **{f"{layout}_{name}": datasets.Value("int64") for layout in ("tree", "paired") for name in TreeSize._fields},
    }
)


NO_REMARKS = {"num_cut": 0, "num_without_end": 0, "prompt_cut": False, "lost_text": False, "unused": []}
"""What there is to say of an example of which there is nothing to say."""


def tokenized_example(
    tokens: list[list[int]],
    scored: list[list[bool]],
    pairs: Sequence[tuple[int, int]],
    prompt: str,
    scores: Sequence[float] = (),
    remarks: Mapping[str, Any] = NO_REMARKS,
    labels: Sequence[int] = (),
) -> dict[str, Any]:
    """One line of the table.

    Args:
        tokens (list[list[int]]): token ids of each response sequence.
        scored (list[list[bool]]): which of them are scored.
        pairs (Sequence[tuple[int, int]]): indices of chosen and rejected response of each pair.
        prompt (str): fingerprint of the prompt that all responses answer, or "".
        scores (Sequence[float]): of the response, if it is yet to be compared with others. Default: ().
        remarks (Mapping[str, Any]): the columns of ``NO_REMARKS``. Default: ``NO_REMARKS``.
        labels (Sequence[int]): of each response, see ``Row.labels``. Default: (), none has one.

    Returns:
        dict[str, Any]: a value for each of ``FEATURES``.
    """
    responses = [Response(np.array(t), np.array(s)) for t, s in zip(tokens, scored, strict=True)]
    sizes = {
        layout: PrefixTree.from_responses(responses, share_prefix=layout == "tree").size
        for layout in ("tree", "paired")
    }
    return {
        "tokens": tokens,
        "scored": scored,
        "pairs": [k for pair in pairs for k in pair],
        "labels": list(labels),
        "dropped": "",
        "id": fingerprint([tokens, scored]),
        "prompt": prompt,
        "num_responses": len(tokens),
        "num_pairs": len(pairs),
        "num_labels": sum(label != 0 for label in labels),
        "num_scored": sum(sum(flags[1:]) for flags in scored),  # nothing predicts the first token
        "scores": list(scores),
        **remarks,
        "problem": "",
        "longest": max(map(len, tokens)),
        "largest_id": max(map(max, tokens)),
        **{f"{layout}_{name}": value for layout, size in sizes.items() for name, value in size._asdict().items()},
    }


def dropped_example(reason: str, remarks: Mapping[str, Any] = NO_REMARKS, problem: str = "") -> dict[str, Any]:
    """The line of the table for a record that is not used, or is merged into another one.

    Args:
        reason (str): why.
        remarks (Mapping[str, Any]): the columns of ``NO_REMARKS``. Default: ``NO_REMARKS``.
        problem (str): what is wrong with a malformed record. Default: "".

    Returns:
        dict[str, Any]: a value for each of ``FEATURES``.
    """
    empty: dict[str, list] = {name: [] for name in ("tokens", "scored", "pairs", "labels", "scores")}
    return {**dict.fromkeys(FEATURES), **empty, **remarks, "dropped": reason, "problem": problem}
