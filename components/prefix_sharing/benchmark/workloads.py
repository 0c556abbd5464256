"""Pairs with the lengths of well-known preference data sets, made of random tokens, or pairs of a file."""

from typing import NamedTuple

import numpy as np

from prefix_sharing.datasets import prefix_preference_dataset
from prefix_sharing.errors import ConfigError
from prefix_sharing.quickstart import tokenizer
from prefix_sharing.trees import Response


class LengthStatistics(NamedTuple):
    """Statistics of a data set, in tokens.

    Attributes:
        median_length (int): median length of prompt and response together.
        prefix_ratio (float): median of prompt over response.
    """

    median_length: int
    prefix_ratio: float


DATASETS = {
    "capybara": LengthStatistics(1160, 1.59),
    "hh": LengthStatistics(186, 2.15),
    "metamath": LengthStatistics(872, 3.91),
    "tldr": LengthStatistics(416, 11.14),
    "helpsteer": LengthStatistics(775, 6.34),
    "ultrafeedback": LengthStatistics(409, 0.42),
}
"""The data sets of https://arxiv.org/abs/2410.20305, with the medians that its code gives."""

SIGMA = 1.0
"""Standard deviation of the logarithm of the lengths. The source gives none; in the harmless-base test file of HH-RLHF
it is 1.09 for prompts and 0.97 for responses."""


class PairLengths(NamedTuple):
    """Lengths of pairs, each of shape ``[N]``."""

    prefix: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_lengths(workload: str, num_pairs: int, seed: int = 0, longest: int = 8192) -> PairLengths:
    """Draws lengths like those of a data set, or repeats fixed ones.

    Args:
        workload (str): a name in ``DATASETS``, or ``PREFIX,CHOSEN,REJECTED``.
        num_pairs (int): how many. The first of more pairs are those of fewer.
        seed (int): the same seed gives the same lengths. Default: 0.
        longest (int): maximum number of tokens in a sequence. Default: 8192.

    Returns:
        PairLengths: the prompts' lengths are lognormal, as are the responses', each with the data set's median.

    Raises:
        ConfigError: if there is no such workload.
    """
    if workload not in DATASETS:
        try:
            fixed = [int(length) for length in workload.split(",")]
            if len(fixed) != 3:
                raise ValueError(workload)
        except ValueError as error:
            known = ", ".join(DATASETS)
            problem = f"unknown workload '{workload}'; choose from {known}, a file, or PREFIX,CHOSEN,REJECTED"
            raise ConfigError("workloads", problem) from error
        return PairLengths(*(np.full(num_pairs, length) for length in fixed))
    median, ratio = DATASETS[workload]
    response = median / (1 + ratio)
    rng = np.random.default_rng([seed, sorted(DATASETS).index(workload)])
    around = np.log([median - response, response, response])
    lengths = rng.lognormal(around, SIGMA, (num_pairs, 3)).round().astype(np.int64)
    prefix = lengths[:, 0].clip(2, longest * 3 // 4)
    return PairLengths(prefix, *(lengths[:, k].clip(2, longest - prefix) for k in (1, 2)))


def pairs_in(workload: str, num_tokens: int, seed: int = 0, longest: int = 8192) -> int:
    """How many pairs have so many tokens if no prompt is shared, to the nearest pair.

    Args:
        workload (str): as for ``draw_lengths``.
        num_tokens (int): tokens of prompts and responses.
        seed (int): as for ``draw_lengths``. Default: 0.
        longest (int): as for ``draw_lengths``. Default: 8192.

    Returns:
        int: at least 1.
    """
    prefix, chosen, rejected = draw_lengths(workload, num_tokens, seed, longest)
    return int(np.abs((2 * prefix + chosen + rejected).cumsum() - num_tokens).argmin()) + 1


def read_pairs(data_files: str, num_tokens: int, longest: int = 8192) -> list[list[Response]]:
    """Reads pairs of a file, tokenized by this project's own tokenizer, in the file's order.

    Args:
        data_files (str): in any form that ``prefix_sharing.datasets.prefix_preference_dataset`` reads.
        num_tokens (int): tokens of prompts and responses at which to stop.
        longest (int): maximum number of tokens in a sequence. Default: 8192.

    Returns:
        list[list[Response]]: chosen and rejected response sequence of each pair.
    """
    dataset = prefix_preference_dataset(
        tokenizer(),
        source="json",
        data_files=data_files,
        masking_strategy="train_on_last",  # as TRL does
        max_seq_len=longest,
    )
    pairs, total = [], 0
    for i in range(len(dataset)):
        pairs.append(dataset[i][:2])
        total += sum(len(response.tokens) for response in pairs[-1])
        if total >= num_tokens:
            break
    return pairs


def make_pairs(lengths: PairLengths, vocab_size: int, seed: int = 0) -> list[list[Response]]:
    """Makes pairs of random tokens; every response token is scored.

    Args:
        lengths (PairLengths): their lengths.
        vocab_size (int): token ids are below.
        seed (int): the same seed gives the same pairs. Default: 0.

    Returns:
        list[list[Response]]: chosen and rejected response sequence of each pair.
    """
    rng = np.random.default_rng(seed)
    pairs = []
    for prefix, *responses in zip(*lengths, strict=True):
        prompt = rng.integers(0, vocab_size, prefix)
        pairs.append(
            [
                Response(
                    np.concatenate([prompt, rng.integers(0, vocab_size, length)]),
                    np.arange(prefix + length) >= prefix,
                )
                for length in responses
            ]
        )
    return pairs
