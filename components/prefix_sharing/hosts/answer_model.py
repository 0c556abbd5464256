"""What a host's model for answers is to the sampler, whatever library it is of."""

from typing import Protocol

import torch

from prefix_sharing.checkpoint import Checkpoint


class AnswerModel(Protocol):
    """A model as its library builds it, on one device, which goes on with sequences a token at a time.

    Attributes:
        device (torch.device): where it runs.
        max_seq_len (int): maximum number of tokens in prompt and answer.
    """

    device: torch.device
    max_seq_len: int

    def load_weights(self, checkpoint: Checkpoint, seed: int) -> None:
        """See ``TreeModel.load_weights``."""
        ...

    def prefill(self, tokens: torch.Tensor, is_token: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        """Begins with prompts.

        Args:
            tokens (torch.Tensor): their token ids, padded at the left, shape ``[P, L]``.
            is_token (torch.Tensor): which are no padding, shape ``[P, L]``.
            max_new_tokens (int): how many will follow at most.

        Returns:
            torch.Tensor: logits of the next token of each, shape ``[P, vocab]``.
        """
        ...

    def repeat(self, times: int) -> None:
        """Has each sequence go on in so many ways; what was computed of it is kept, not computed again."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Adds a token to each sequence.

        Args:
            tokens (torch.Tensor): token ids, shape ``[B]``.

        Returns:
            torch.Tensor: logits of the next ones, shape ``[B, vocab]``.
        """
        ...
