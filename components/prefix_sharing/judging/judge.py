"""What scores answers, whatever it is."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from prefix_sharing.tokenizers import Turn


class Judge(Protocol):
    """Scores answers; higher is better. Built by a config's ``judge``, with nothing but its own arguments.

    Models are loaded at the first call, so that a config can be checked without them.
    """

    def __call__(self, prompts: Sequence[Sequence[Turn]], answers: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores the answers to each prompt.

        Args:
            prompts (Sequence[Sequence[Turn]]): the conversation up to the answer.
            answers (Sequence[Sequence[str]]): the n answers to each, as text without special tokens.

        Returns:
            list[np.ndarray]: scores of the answers to each prompt, shape ``[n]``; NaN where there is no verdict.
        """
        ...
