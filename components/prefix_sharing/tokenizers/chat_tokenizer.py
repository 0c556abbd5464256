"""What this package asks of a tokenizer: torchtune's own interface, conversations in, tokens and masks out."""

import inspect
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torchtune.data import Message

Turn = dict[str, str]
"""A ``role`` (system, user, assistant or ipython) and a ``content``."""


class ChatTokenizer(Protocol):
    """torchtune's model tokenizers, and ``HFChatTokenizer``."""

    max_seq_len: int | None

    def tokenize_messages(self, messages: list[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether it is masked, that is, not scored."""

    @property
    def decode(self) -> Callable[..., str]:
        """Text of token ids; tokenizers differ in their options."""


def tokenize_turns(
    tokenizer: ChatTokenizer, turns: Sequence[Turn], scored: Sequence[bool]
) -> tuple[list[int], list[bool]]:
    """Tokenizes a conversation.

    Args:
        tokenizer (ChatTokenizer): the tokenizer.
        turns (Sequence[Turn]): the conversation.
        scored (Sequence[bool]): which turns count towards the log-prob.

    Returns:
        tuple[list[int], list[bool]]: token ids, and for each whether it is scored.
    """
    messages = [
        Message(role=turn["role"], content=turn["content"], masked=not is_scored)
        for turn, is_scored in zip(turns, scored, strict=True)
    ]
    tokens, masked = tokenizer.tokenize_messages(messages)
    return tokens, [not is_masked for is_masked in masked]


def decode_all(tokenizer: ChatTokenizer, tokens: np.ndarray) -> str:
    """Text of tokens, special ones included.

    Args:
        tokenizer (ChatTokenizer): torchtune's or ours.
        tokens (np.ndarray): token ids, shape ``[n]``.

    Returns:
        str: the text.
    """
    parameters = inspect.signature(tokenizer.decode).parameters
    options = {"skip_special_tokens": False, "truncate_at_eos": False}
    return tokenizer.decode(tokens.tolist(), **{name: value for name, value in options.items() if name in parameters})
