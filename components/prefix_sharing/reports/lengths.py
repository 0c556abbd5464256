"""What a data set looks like before training: lengths, what sharing saves, and an example with its parts marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prefix_sharing.datasets import PrefixPreferenceDataset
from prefix_sharing.tokenizers import ChatTokenizer, decode_all
from prefix_sharing.trees import Response, common_prefix_length

PERCENTILES = (5, 25, 50, 75, 95, 99, 100)

_PREFIX = "\033[90m"
_BRANCHES = ("\033[32m", "\033[31m", "\033[33m", "\033[36m", "\033[35m")
_SCORED = "\033[1;4m"
_RESET = "\033[0m"


@dataclass(frozen=True)
class Lengths:
    """Tokens of every example.

    Attributes:
        prefix (np.ndarray): what all its responses begin with, shape ``[N]``.
        branches (list[np.ndarray]): what each response adds to that, the first responses, the second ones, and so on,
            each of shape ``[n]`` for the examples that have so many.
        num_responses (np.ndarray): responses of each example, shape ``[N]``.
        example (np.ndarray): all of it, each token once, shape ``[N]``.
    """

    prefix: np.ndarray
    branches: list[np.ndarray]
    num_responses: np.ndarray
    example: np.ndarray

    @property
    def repeated(self) -> np.ndarray:
        """All of it, the prefix once for each response, shape ``[N]``."""
        return self.example + self.prefix * (self.num_responses - 1)

    def named(self) -> dict[str, np.ndarray]:
        """All of them, by what they are called: chosen and rejected where there are pairs."""
        names = ["chosen", "rejected"]
        if len(self.branches) != 2:
            names = [f"response {k + 1}" for k in range(len(self.branches))]
        return {"prefix": self.prefix, **dict(zip(names, self.branches, strict=True)), "example": self.example}


def measure_lengths(dataset: PrefixPreferenceDataset) -> Lengths:
    """Reads every example, with a progress bar.

    Args:
        dataset (PrefixPreferenceDataset): the data set.

    Returns:
        Lengths: of full response sequences.
    """
    prefixes, examples = [], []
    branches: list[list[int]] = [[] for _ in range(dataset.num_responses)]
    for i in tqdm(range(len(dataset)), desc="Reading examples", unit="example", delay=1):
        responses = dataset[i]
        prefix = shared_prefix(responses)
        prefixes.append(prefix)
        lengths = [len(response.tokens) - prefix for response in responses]
        for of_place, length in zip(branches, lengths, strict=False):
            of_place.append(length)
        examples.append(prefix + sum(lengths))
    of_branches = [np.array(of_place) for of_place in branches]
    return Lengths(np.array(prefixes), of_branches, dataset.num_responses_of, np.array(examples))


def shared_prefix(responses: Sequence[Response]) -> int:
    """How many tokens all responses begin with; of one response, those before the first that is scored."""
    if len(responses) == 1:
        return int(responses[0].scored.argmax())
    return common_prefix_length([response.tokens for response in responses])


def percentiles(values: np.ndarray) -> dict[str, int]:
    """Some percentiles, the last of which is the largest."""
    return {str(p): int(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def mark_example(tokenizer: ChatTokenizer, responses: Sequence[Response], *, colors: bool) -> str:
    """Text of an example with its scored tokens marked.

    Args:
        tokenizer (ChatTokenizer): the tokenizer.
        responses (Sequence[Response]): the example.
        colors (bool): for a terminal, with the prefix grey, each branch in a color and scored tokens underlined; else
            scored tokens are in brackets.

    Returns:
        str: the prefix, then a paragraph for each branch.
    """

    def marked(response: Response, start: int, end: int, color: str) -> str:
        cuts = start + 1 + np.flatnonzero(np.diff(response.scored[start:end].astype(int)))
        text = ""
        before = decode_all(tokenizer, response.tokens[:start])
        for a, b in zip([start, *cuts], [*cuts, end], strict=True):
            # Together with what comes before: alone, a token may lose the space that it begins with.
            until = decode_all(tokenizer, response.tokens[:b])
            is_scored, piece = b > a and response.scored[a], until[len(before) :]
            if colors:
                text += color + (_SCORED if is_scored else "") + piece + _RESET
            else:
                text += f"[{piece}]" if is_scored else piece
            before = until
        return text

    prefix = shared_prefix(responses)
    parts = [f"prefix, {prefix:,} tokens:", marked(responses[0], 0, prefix, _PREFIX)]
    for k, response in enumerate(responses):
        added = len(response.tokens) - prefix
        parts += [f"branch {k + 1}, {added:,} tokens, {int(response.scored[prefix:].sum()):,} of them scored:"]
        parts += [marked(response, prefix, len(response.tokens), _BRANCHES[k % len(_BRANCHES)])]
    return "\n".join(parts)


def plot_lengths(lengths: Lengths, title: str, file: Path) -> None:
    """Histograms of the lengths, and of how much longer the prefix is than the responses.

    Args:
        lengths (Lengths): the lengths.
        title (str): what they are of.
        file (Path): where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    named = lengths.named()
    longest = max(int(values.max()) for values in named.values())
    bins = np.geomspace(1, max(longest, 2), 50)
    for name, values in named.items():
        left.hist(values.clip(min=1), bins=bins, histtype="step", linewidth=1.5, label=name)
    left.set_xscale("log")
    left.set_xlabel("tokens")
    left.set_ylabel("examples")
    left.legend(fontsize=8)
    ratio = prefix_ratio(lengths)
    least = max(ratio.min(), 0.01)
    most = max(ratio.max(), 1.1 * least)  # bins have a width even where all ratios are the same
    right.hist(ratio, bins=np.geomspace(least, most, 50), color="C4")
    right.axvline(float(np.median(ratio)), color="black", linestyle="--", label=f"median {np.median(ratio):.2f}")
    right.set_xscale("log")
    right.set_xlabel("tokens of the prefix over those of a response, the mean")
    right.set_ylabel("examples")
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)


def prefix_ratio(lengths: Lengths) -> np.ndarray:
    """Tokens of the prefix over the mean of the responses, shape ``[N]``."""
    of_branches = lengths.example - lengths.prefix
    return lengths.prefix * lengths.num_responses / of_branches.clip(min=1)
