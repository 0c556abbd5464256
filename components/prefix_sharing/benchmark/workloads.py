"""Pairs with the lengths of well-known preference data sets, made of random tokens."""

from typing import NamedTuple

import numpy as np

from prefix_sharing.errors import UserError
from prefix_sharing.rows import Response


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

SIGMA = 0.5
"""Spread of the logarithm of the lengths around the median; the source gives none."""


class PairLengths(NamedTuple):
    """Lengths of pairs, each of shape ``[N]``."""

    prefix: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def draw_lengths(workload: str, num_pairs: int, seed: int = 0, longest: int = 8192) -> PairLengths:
    """Draws lengths like those of a data set, or repeats fixed ones.

    Args:
        workload (str): a name in ``DATASETS``, or ``PREFIX,CHOSEN,REJECTED``.
        num_pairs (int): how many.
        seed (int): the same seed gives the same lengths. Default: 0.
        longest (int): most tokens in a sequence. Default: 8192.

    Returns:
        PairLengths: the prompts' lengths are lognormal, as are the responses', each with the data set's median.

    Raises:
        UserError: if there is no such workload.
    """
    if workload not in DATASETS:
        try:
            prefix, chosen, rejected = (int(length) for length in workload.split(","))
        except ValueError as error:
            known = ", ".join(DATASETS)
            raise UserError(
                f"Config: workloads: '{workload}' is neither one of {known} nor of the form PREFIX,CHOSEN,REJECTED."
            ) from error
        return PairLengths(*(np.full(num_pairs, length) for length in (prefix, chosen, rejected)))
    median, ratio = DATASETS[workload]
    response = median / (1 + ratio)
    rng = np.random.default_rng([seed, sorted(DATASETS).index(workload)])

    def draw(around: float, most: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(around), SIGMA, num_pairs).round(), 2, most).astype(np.int64)

    prefix = draw(median - response, longest * 3 // 4)
    return PairLengths(prefix, draw(response, longest // 4), draw(response, longest // 4))


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
