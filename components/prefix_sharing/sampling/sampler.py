"""What samples answers to prompts, whatever it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from omegaconf import DictConfig

from prefix_sharing.checkpoint import Checkpoint
from prefix_sharing.sampling.choose import SamplingOptions
from prefix_sharing.tokenizers import ChatTokenizer, Turn


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


@dataclass(frozen=True)
class Policy:
    """Whose answers are sampled.

    Attributes:
        model (DictConfig): the config's ``model``.
        checkpoint (Checkpoint): its weights.
        directory (Path | None): where they are, as its library writes them; None if they are in no file.
        tokenizer (ChatTokenizer): its tokenizer.
        device (torch.device): where a model may run.
        dtype (torch.dtype): what it is to compute in.
        seed (int): decides weights that the checkpoint lacks, those of a fresh adapter.
    """

    model: DictConfig
    checkpoint: Checkpoint
    directory: Path | None
    tokenizer: ChatTokenizer
    device: torch.device
    dtype: torch.dtype
    seed: int


def answer_seed(seed: int, prompt: str, answer: int) -> int:
    """The seed that an engine of its own is given for an answer.

    Args:
        seed (int): the pass's.
        prompt (str): the prompt's key.
        answer (int): which of its answers.

    Returns:
        int: below 2^31.
    """
    return int(np.random.default_rng([seed, answer, int(prompt, 16)]).integers(2**31))


class Sampler(Protocol):
    """Samples answers. Built by a config's ``sampler``, which gets the ``Policy`` as its first argument."""

    def __call__(self, prompts: Sequence[Prompt], options: SamplingOptions) -> Iterator[tuple[int, list[Answer]]]:
        """Samples n answers to each prompt.

        Args:
            prompts (Sequence[Prompt]): the prompts.
            options (SamplingOptions): how.

        Yields:
            tuple[int, list[Answer]]: index of a prompt, and its answers; prompts come in any order.
        """
        ...
