"""What samples answers to prompts, whatever it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from prefix_sharing.sampling.choose import SamplingOptions
from prefix_sharing.tokenizers import Turn


class Answer(NamedTuple):
    """A sampled answer.

    Attributes:
        tokens (np.ndarray): token ids, shape ``[n]``; the one that ends it is the last.
        log_prob (float): the sum of its tokens' log-probs, by the model's distribution as it is, whatever temperature
            and truncation it was sampled with; NaN if the sampler does not tell.
        is_complete (bool): whether it ended by itself and was not cut by ``max_new_tokens``.
    """

    tokens: np.ndarray
    log_prob: float
    is_complete: bool


@dataclass(frozen=True)
class Prompt:
    """What is to be answered.

    Attributes:
        key (str): fingerprint of its tokens, in hexadecimal digits.
        turns (tuple[Turn, ...]): the conversation up to the answer.
        tokens (np.ndarray): token ids of it by the chat template, what opens an answer included, shape ``[L]``.
    """

    key: str
    turns: tuple[Turn, ...]
    tokens: np.ndarray


class Sampler(Protocol):
    """Samples answers."""

    def __call__(self, prompts: Sequence[Prompt], options: SamplingOptions) -> Iterator[tuple[int, list[Answer]]]:
        """Samples n answers to each prompt.

        Args:
            prompts (Sequence[Prompt]): the prompts.
            options (SamplingOptions): how.

        Yields:
            tuple[int, list[Answer]]: index of a prompt, and its answers; prompts come in any order.
        """
        ...
